#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "libra_d2/__init__.py").read_text(encoding="utf-8")
).group(1)

TOP_LEVEL = {f"libra_d2.{name}": name for name in ("configs", "demo", "tools")}
PROGRAMS = {
    "libra-d2-train": "libra_d2.engine.main",
    "libra-d2-demo": "libra_d2.demo.demo",
    "libra-d2-analyze-balance": "libra_d2.tools.analyze_balance",
    "libra-d2-analyze-errors": "libra_d2.tools.analyze_errors",
    "libra-d2-compare-ideas": "libra_d2.tools.compare_ideas",
    "libra-d2-convert-mmdet": "libra_d2.tools.convert_mmdet",
    "libra-d2-dump-proposals": "libra_d2.tools.dump_proposals",
    "libra-d2-export-model": "libra_d2.tools.export_model",
    "libra-d2-make-synthetic-dataset": "libra_d2.tools.make_synthetic_dataset",
    "libra-d2-show-training-images": "libra_d2.tools.show_training_images",
    "libra-d2-split-dataset": "libra_d2.tools.split_dataset",
    "libra-d2-voc-to-coco": "libra_d2.tools.voc_to_coco",
    "libra-d2-yolo-to-coco": "libra_d2.tools.yolo_to_coco",
}

setup(
    name="libra_d2",
    version=VERSION,
    description="Libra R-CNN (CVPR 2019) for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    # Configs and programs live at the top of the repository and are installed inside the package.
    packages=[*find_packages(include=("libra_d2", "libra_d2.*")), *TOP_LEVEL],
    package_dir=TOP_LEVEL,
    package_data={
        "libra_d2.configs": ["**/*.yaml", "**/*.py"],
        "libra_d2.evaluation": ["page/*"],
        "libra_d2.utils": ["web_page.*"],
    },
    entry_points={"console_scripts": [f"{name} = {main}:main" for name, main in PROGRAMS.items()]},
    # Not detectron2, which is not on the package index, and not torch (2.6 or later), which pip
    # must not replace under a Detectron2 that was compiled with it. README.md says how.
    install_requires=[
        "fvcore",
        "iopath",
        "matplotlib",
        "numpy",
        "Pillow",
        "pycocotools",
        "scipy",
        "tabulate",
        "tqdm",
    ],
    extras_require={
        # As mmdetection resizes images, for published weights; and for Detectron2's visualizer.
        "opencv": ["opencv-python-headless"],
        "report": ["plotly"],  # index.html of analyze_errors.py
        "timm": ["timm"],  # TimmBackbone; ViTDet and Swin of Detectron2's main branch
        "evaluation": ["faster-coco-eval"],  # where Detectron2's compiled evaluator is missing
    },
)
