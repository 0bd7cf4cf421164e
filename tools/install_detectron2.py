#!/usr/bin/env python
r"""
Install Detectron2 0.6 with pip alone, without a source repository or a compiler.

Detectron2 itself is not on PyPI, but its Python code is, as the source distribution
``pb1-detectron2==0.6``. It contains all Python files and model zoo configs of Detectron2's tag
v0.6, without the C++ sources. This script downloads it with pip, verifies its hash, applies fixes
that Detectron2 has made since and that current versions of numpy, Pillow and PyTorch require, and
builds and installs a wheel named ``detectron2``.

Usage, in an environment that has torch, torchvision, ``setuptools>=61,<81`` and wheel::

    python tools/install_detectron2.py

If Detectron2 is already installed, nothing is changed. The exit status is 0 if Detectron2 is
installed in the end, otherwise 1.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

NAME = "pb1-detectron2"
VERSION = "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

LIMITS = """\
Detectron2 0.6 is installed WITHOUT compiled operators. Missing in this build:
  - deformable convolution   (on GPUs; MODEL.RESNETS.DEFORM_ON_PER_STAGE)
  - rotated boxes            (RRPN, RROIHeads, RotatedCOCOEvaluator)
  - fast COCO evaluation     (pycocotools is used; same numbers, slower)
Everything else, Libra R-CNN included, uses torchvision's operators and is complete.
With a compiler and a connection, upstream's own build has all of it:
  pip uninstall detectron2
  pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"""


class InstallError(Exception):
    """Detectron2 cannot be installed; the message says why and what to do."""


class Fix(NamedTuple):
    """Replaces ``old`` by ``new`` in ``path``, where it must occur exactly ``count`` times."""

    path: str
    old: str
    new: str
    count: int = 1


_COMPILED = ("from detectron2 import _C", "from detectron2.layers.no_compiled_ops import _C")

# All are from upstream's main branch, except the error message of missing operators.
FIXES = (
    # Missing operators raise an error when they are used, not when detectron2 is imported.
    Fix("detectron2/layers/deform_conv.py", *_COMPILED),
    Fix("detectron2/layers/roi_align_rotated.py", *_COMPILED),
    Fix("detectron2/layers/rotated_boxes.py", *_COMPILED),
    Fix(
        "detectron2/layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(",
        f"    {_COMPILED[1]}\n\n    return _C.nms_rotated(",
    ),
    Fix(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "\ntry:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval\n\n",
    ),
    # numpy removed the aliases of Python's own types in 1.24.
    Fix("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Fix("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Fix("detectron2/data/build.py", "dtype=np.int)", "dtype=int)"),
    Fix("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Fix("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2),
    Fix("detectron2/evaluation/sem_seg_evaluation.py", ".astype(np.float)", ".astype(float)", 3),
    Fix("detectron2/evaluation/pascal_voc_evaluation.py", ".astype(np.bool)", ".astype(bool)", 2),
    Fix("detectron2/structures/masks.py", ".astype(np.bool)", ".astype(bool)", 2),
    Fix("detectron2/structures/masks.py", "dtype=np.bool)", "dtype=bool)"),
    Fix("detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    Fix("detectron2/utils/visualizer.py", ".astype(np.bool)", ".astype(bool)", 3),
    # Pillow removed Image.LINEAR, an alias, in 10.
    Fix("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # Python 3.11 no longer samples from sets.
    Fix(
        "detectron2/data/common.py",
        "self._rng.sample(self._fallback_candidates, k=1)",
        "self._rng.sample(sorted(self._fallback_candidates), k=1)",
    ),
    # caffe2 is gone from PyTorch; tracing, scripting and FLOP counting do not need it.
    Fix(
        "detectron2/export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:  # caffe2 is not installed\n    pass\n",
    ),
    # torch.optim schedulers derive from LRScheduler since PyTorch 2.0.
    Fix("detectron2/engine/hooks.py", "lr_scheduler._LRScheduler)", "lr_scheduler.LRScheduler)", 2),
    # PyTorch warns if the index order is not given.
    Fix(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
)

NO_COMPILED_OPS = """\
class _MissingOperators:
    def __getattr__(self, name):
        raise ImportError(
            f"detectron2._C.{name} is not available: this Detectron2 was installed without "
            "compiled operators (deformable convolution, rotated boxes). Install upstream's "
            "compiled build to use them."
        )


_C = _MissingOperators()
"""

# Replaces the archive's setup.py, which compiles the missing C++ sources, looks for the model zoo's
# configs outside the package, and pins a `black` that only LazyConfig printing uses.
PYPROJECT = f"""\
[build-system]
requires = ["setuptools", "wheel"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{VERSION}"
description = "Detectron2 {VERSION}, Python code only, with later upstream fixes"
requires-python = ">=3.9"
dependencies = [
    "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8", "tabulate",
    "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6", "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1", "hydra-core>=1.1", "packaging", "setuptools<81",
]

[tool.setuptools]
package-dir = {{ "detectron2.projects.point_rend" = "projects/PointRend/point_rend", \
"detectron2.projects.deeplab" = "projects/DeepLab/deeplab", \
"detectron2.projects.panoptic_deeplab" = "projects/Panoptic-DeepLab/panoptic_deeplab" }}
packages = [%s]

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]
"""


def installed_version() -> "str | None":
    """The version of Detectron2 in this environment, or None."""
    if importlib.util.find_spec("detectron2") is None:
        return None
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"  # a source checkout on PYTHONPATH


def run_pip(*args: str) -> None:
    """Run pip. Raises InstallError with the end of its output if it fails."""
    command = [sys.executable, "-m", "pip", *args]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        tail = "\n".join(result.stdout.strip().splitlines()[-15:])
        raise InstallError(f"`{' '.join(command)}` failed:\n{tail}")


def check_environment() -> None:
    """Raise InstallError if a required package is missing or has the wrong version."""
    for module in ("torch", "torchvision", "setuptools", "wheel"):
        if importlib.util.find_spec(module) is None:
            raise InstallError(
                f"{module} is not installed in {sys.prefix}. "
                "Run `pip install -r requirements/build.txt` first."
            )
    version = importlib.metadata.version("setuptools")
    major = int(version.split(".")[0])
    if not 61 <= major < 81:
        fault = (
            "too new: Detectron2 imports pkg_resources, which setuptools 81 removed"
            if major >= 81
            else "too old: it does not read pyproject.toml, which setuptools 61 does"
        )
        raise InstallError(
            f"setuptools {version} is {fault}. Run `pip install 'setuptools>=61,<81'` first."
        )
    pip_version = importlib.metadata.version("pip")
    if tuple(int(x) for x in pip_version.split(".")[:2]) > (26, 0):
        raise InstallError(
            f"pip {pip_version} refuses the archive because of a direct URL in an extra that is "
            "not used. Run `python -m pip install 'pip<=26.0'` first."
        )


def fetch_source(directory: Path) -> Path:
    """
    Download the source archive to ``directory``, where pip verifies its hash, and unpack it there.

    Returns:
        root of the source tree.
    """
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    run_pip(
        *("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"),
        *("--require-hashes", "--dest", str(directory), "--requirement", str(requirement)),
    )
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # Early patch releases of Python 3.9 to 3.11 lack the filter; pip has verified the hash.
        tar.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (root,) = (path.parent for path in directory.glob("*/PKG-INFO"))
    return root


def apply_fixes(root: Path, fixes: "tuple[Fix, ...]" = FIXES) -> None:
    """
    Apply ``fixes`` to the source tree ``root``.

    Raises:
        InstallError: if a file is missing or a text does not occur as often as expected. Nothing is
            written then.
    """
    texts = {}
    for fix in fixes:
        path = root / fix.path
        if path not in texts:
            if not path.is_file():
                raise InstallError(f"Cannot fix {fix.path}: there is no such file in {root}.")
            texts[path] = path.read_text(encoding="utf-8")
        found = texts[path].count(fix.old)
        if found != fix.count:
            raise InstallError(
                f"The fix of {fix.path} does not apply: {fix.old.strip()!r} occurs {found} times, "
                f"expected {fix.count}."
            )
        texts[path] = texts[path].replace(fix.old, fix.new)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def build_wheel(root: Path, directory: Path) -> Path:
    """Build a wheel of the fixed source tree ``root`` in ``directory``; returns its path."""
    (root / "detectron2/layers/no_compiled_ops.py").write_text(NO_COMPILED_OPS, encoding="utf-8")
    (root / "setup.py").unlink()
    folders = {p.parent.relative_to(root) for p in (root / "detectron2").rglob("__init__.py")}
    packages = {".".join(p.parts) for p in folders if "configs" not in p.parts}
    packages |= {f"detectron2.projects.{x}" for x in ("point_rend", "deeplab", "panoptic_deeplab")}
    (root / "pyproject.toml").write_text(PYPROJECT % ", ".join(f'"{p}"' for p in sorted(packages)))
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(directory))
    run_pip("wheel", *options, str(root))
    (wheel,) = directory.glob("detectron2-*.whl")
    return wheel


def main(argv: "list[str] | None" = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wheel-dir",
        metavar="DIR",
        help="also save the wheel in this folder, to install it elsewhere",
    )
    args = parser.parse_args(argv)
    version = installed_version()
    if version is not None:
        print(f"Detectron2 {version} is already installed; nothing to do.")
        return 0
    try:
        check_environment()
        with tempfile.TemporaryDirectory() as tmp:
            print(f"[1/3] fetching Detectron2 {VERSION} ...", flush=True)
            root = fetch_source(Path(tmp))
            print(f"[2/3] applying {len(FIXES)} fixes and building a wheel ...", flush=True)
            apply_fixes(root)
            wheel_dir = Path(args.wheel_dir or os.path.join(tmp, "wheel"))
            wheel_dir.mkdir(parents=True, exist_ok=True)
            wheel = build_wheel(root, wheel_dir)
            print(f"[3/3] installing {wheel.name} and what it needs ...", flush=True)
            run_pip("install", str(wheel))
    except (InstallError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(LIMITS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
