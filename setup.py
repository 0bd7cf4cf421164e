#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "libra_d2/__init__.py").read_text()).group(1)

setup(
    name="libra_d2",
    version=VERSION,
    description="Libra R-CNN (CVPR 2019) for Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    # The configs live at the top of the repository and are installed as libra_d2/configs.
    packages=[*find_packages(include=("libra_d2", "libra_d2.*")), "libra_d2.configs"],
    package_dir={"libra_d2.configs": "configs"},
    package_data={"libra_d2.configs": ["**/*.yaml"]},
    # Not detectron2, which is not on the package index, and not torch (2.6 or later), which pip
    # must not replace under a Detectron2 that was compiled with it. README.md says how.
    install_requires=["fvcore", "pycocotools", "tqdm", "Pillow"],
    extras_require={
        "pictures": ["opencv-python-headless"],  # for Detectron2's visualizer
        "evaluation": ["faster-coco-eval"],  # where Detectron2's compiled evaluator is missing
    },
)
