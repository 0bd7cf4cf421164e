#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Run a part of the test suite with other versions of Python, PyTorch, NumPy and Detectron2:

    python tests/reference/run_versions.py [--only 3.9] [--detectron2 CLONE_OF_MAIN]

For each row of CELLS it creates a virtual environment in the working directory's build/versions,
installs what pip finds in the package index and Detectron2 0.6 by tools/install_detectron2.py, runs
the tests, and removes the environment, which has some gigabytes. With a clone of Detectron2's main
branch, the tests are also run with that, which needs no compiler. It prints a table. The exit
status is 1 if a test fails; rows whose Python is not on this machine are reported as untested.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).parents[2]


class Cell(NamedTuple):
    """Requirements of an environment, as for pip; "" for the newest version."""

    python: str
    torch: str = ""
    torchvision: str = ""
    numpy: str = ""


CELLS = (
    Cell("3.9", "==2.6.0", "==0.21.0", "==1.26.4"),  # the oldest of all
    Cell("3.10", "==2.8.0", "==0.23.0", "==2.2.6"),
    Cell("3.11", "==2.6.0", "==0.21.0", "==2.4.6"),
    Cell("3.12"),
    Cell("3.13"),
)

# Some minutes: reading configs, the ideas and what makes models fast, checkpoints, trainings that
# are resumed, export, and a model next to mmdetection's.
TESTS = (
    *("tests/test_versions.py", "tests/test_config.py", "tests/test_checkpoint.py"),
    *("tests/test_balanced_l1_loss.py", "tests/test_balanced_sampling.py"),
    *("tests/test_balanced_feature_pyramid.py", "tests/test_fast_rcnn.py", "tests/test_rpn.py"),
    *("tests/test_retinanet.py", "tests/test_focal_loss.py", "tests/test_folded_conv.py"),
    "tests/test_fused_bottleneck.py",
    *("tests/test_roi_align.py", "tests/test_acceleration.py", "tests/test_resize.py"),
    *("tests/test_backbone.py", "tests/test_compile.py", "tests/test_lean_fpn.py"),
    "tests/test_winograd_conv.py",
    "tests/test_winograd_gradient.py",
    *("tests/test_train_net.py::test_training", "tests/test_train_net.py::test_resume"),
    "tests/test_lazy_programs.py::test_training",
    "tests/test_parity.py::test_losses_and_gradients[libra_faster_rcnn_R_50-list]",
    "tests/test_parity.py::test_losses_and_gradients[libra_retinanet_R_50-list]",
)
# Of the test suite's requirements, those of these tests; and mmdetection, without dependencies.
REQUIREMENTS = (
    "addict",
    "hypothesis",
    "pytest",
    "rich",
    "shapely",
    "six",
    "terminaltables",
    "yapf",
)
REFERENCE = ("mmcv-lite==2.1.0", "mmdet==3.3.0", "mmengine==0.10.7")


def find_python(version: str) -> Optional[str]:
    """An interpreter of ``version``, such as "3.9": on the path, of pyenv or of uv."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    folders = (Path.home() / ".pyenv/versions", Path.home() / ".local/share/uv/python")
    pythons = (p for f in folders for p in f.glob(f"*{version}.*/bin/python{version}"))
    return next(map(str, pythons), None)


def install(cell: Cell, python: str, folder: Path) -> str:
    """Create the environment of ``cell`` in ``folder``; returns its interpreter."""
    # The package index decides, not this project's constraints.
    env = {
        name: x for name, x in os.environ.items() if name not in ("PIP_CONSTRAINT", "PYTHONPATH")
    }

    def run(*command: str) -> None:
        subprocess.run(command, env=env, cwd=ROOT, check=True)

    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", str(folder))
    python = str(folder / "bin/python")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-q")
    run(*pip, "pip<26.1", "setuptools>=61,<81", "wheel")
    versions = (f"{name}{getattr(cell, name)}" for name in cell._fields[1:])
    run(*pip, *versions)
    run(python, "tools/install_detectron2.py")
    # pip must not replace what Detectron2 was installed for.
    pinned = [f"{name}=={find_version(python, name)}" for name in cell._fields[1:]]
    run(*pip, "--no-build-isolation", "-e", ".[opencv,evaluation]", *REQUIREMENTS, *pinned)
    run(*pip, "--no-deps", *REFERENCE)
    return python


def find_version(python: str, package: str) -> str:
    """The version of an installed package, without the name of its build."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([python, "-c", code], text=True).strip().partition("+")[0]


def run_tests(python: str, detectron2: str) -> str:
    """
    Run the tests, with Detectron2 from the clone ``detectron2`` if that is not "".

    Returns:
        pytest's last line, such as "3 failed, 200 passed in 99.00s", or what became of pytest.
    """
    clone = {"PYTHONPATH": detectron2} if detectron2 else {}
    command = [python, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    print(" ".join(command), flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **clone}
    process = subprocess.Popen(
        [*command, "--durations=0", "--durations-min=10"],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = ""
    for line in process.stdout:
        print(line, end="", flush=True)
    ended_well = process.wait() in (0, 1)  # all tests passed, or some failed
    return line.strip() if ended_well else f"error: pytest ended with {process.returncode}"


def main() -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PYTHON", help="the rows of this version of Python")
    parser.add_argument("--detectron2", metavar="CLONE", default="", help="of its main branch")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    args = parser.parse_args()
    rows = [("Python", "PyTorch", "torchvision", "NumPy", "Detectron2", "tests"), ("---",) * 6]
    for i, cell in enumerate(CELLS):
        if args.only not in (None, cell.python):
            continue
        python = find_python(cell.python)
        if python is None:
            rows.append((*cell, "", "untested: this Python is not installed"))
            continue
        folder = ROOT / f"build/versions/{i}"
        python = install(cell, python, folder)
        versions = [find_version(python, name) for name in cell._fields[1:]]
        code = "import platform; print(platform.python_version())"
        versions.insert(0, subprocess.check_output([python, "-c", code], text=True).strip())
        for name, clone in (("0.6", ""), ("main", args.detectron2)):
            if clone or name == "0.6":
                rows.append((*versions, name, run_tests(python, clone)))
        if not args.keep:
            shutil.rmtree(folder)
    print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")
    return int(any("failed" in row[-1] or "error" in row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
