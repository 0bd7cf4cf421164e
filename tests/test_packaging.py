# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from test_train_net import TINY, own_data


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return next(folder.glob("libra_d2-*.whl"))


def test_wheel_is_complete(wheel):
    """It has all modules, programs and configs, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "libra_d2").rglob("*.py")}
    data = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "configs").rglob("*.py")]
    pages = [*(ROOT / "libra_d2").rglob("*.html"), *(ROOT / "libra_d2").rglob("*.css")]
    modules |= {str(p.relative_to(ROOT)) for p in (*pages, *(ROOT / "libra_d2").rglob("*.js"))}
    data += [*(ROOT / "tools").glob("*.py"), *(ROOT / "demo").glob("*.py")]
    assert modules | {f"libra_d2/{p.relative_to(ROOT)}" for p in data} <= names
    assert not {n for n in names if n.startswith(("tests", "tools", "configs", "demo"))}


# Hides packages that neither Detectron2 nor libra_d2 requires, such as those of the test suite.
RESTRICTED = """
import contextlib, importlib.metadata as metadata, re, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
allowed = set()

def allow(package):
    name = re.sub(r"[-_.]+", "-", package).lower()
    if name not in allowed:
        allowed.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            for requirement in metadata.requires(name) or []:
                if "extra ==" not in requirement:
                    allow(re.match(r"[\\w.-]+", requirement).group())

for package in ("torch", "torchvision", "detectron2", "setuptools", "libra_d2"):
    allow(package)
packages = metadata.packages_distributions()
names = lambda module: {{re.sub(r"[-_.]+", "-", d).lower() for d in packages[module]}}
blocked = {{m for m in packages if not names(m) & allowed}} - {{"_distutils_hack"}}

sys.modules.update(dict.fromkeys(blocked))
assert {{"cv2", "pytest", "mmdet", "faster_coco_eval", "onnx"}} <= blocked, blocked
"""


@pytest.fixture(scope="module")
def restricted(wheel, tmp_path_factory):
    """Runs code where only the wheel and its declared requirements can be imported."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)

    def run(code, *args):
        return subprocess.run(
            [sys.executable, "-c", RESTRICTED.format(folder=str(folder)) + code, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONNOUSERSITE": "1"},
        )

    return run


def programs():
    """Modules of the console scripts."""
    text = (ROOT / "setup.py").read_text()
    return sorted(set(re.findall(r'": "(libra_d2\.[\w.]+)"', text)))


def test_console_scripts(capsys):
    """Each program has an entry point, which prints its help."""
    entry_points = importlib.metadata.distribution("libra_d2").entry_points
    assert {entry.module for entry in entry_points} == set(programs())
    for entry in entry_points:
        with pytest.raises(SystemExit, match="0"):
            entry.load()(["--help"])
        assert "usage:" in capsys.readouterr().out


def test_installed(restricted, synthetic, tmp_path):
    """
    Without OpenCV and faster_coco_eval, all modules can be imported, none of which changes
    Detectron2's config or datasets, and a detector is trained and evaluated.
    """
    code = """
import importlib, pkgutil, libra_d2
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
before = get_cfg().dump(), DatasetCatalog.list()
assert libra_d2.__file__.startswith(sys.path[0]), libra_d2.__file__
modules = [m.name for m in pkgutil.walk_packages(libra_d2.__path__, "libra_d2.")]
modules.remove("libra_d2.tools.mutants")  # needs requirements/mutants.txt
modules.remove("libra_d2.evaluation.panel")  # needs OpenCV
for name in modules:
    importlib.import_module(name)
assert (get_cfg().dump(), DatasetCatalog.list()) == before
libra_d2.engine.main.main()
"""
    data = own_data(synthetic, "train", "val")
    args = ["--config-file", "Demo/libra_faster_rcnn_R_18_FPN.yaml", *data, "OUTPUT_DIR", tmp_path]
    args += [*TINY, "MODEL.LIBRA.NUM_PICTURES", 0, "SOLVER.MAX_ITER", 1]
    result = restricted(code, *args)
    assert result.returncode == 0, result.stderr
    assert "bbox: AP" in result.stdout


def test_mutation_testing_knows_all_tests():
    """tools/mutants.py finds tests for each module, and all that pyproject.toml lists exist."""
    tomllib = pytest.importorskip("tomllib")
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["libra_mutants"]
    tests = {path.stem[len("test_") :] for path in (ROOT / "tests").glob("test_*.py")}
    assert set().union(*table.values()) <= tests
    package = ROOT / "libra_d2"
    known = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*")}
    assert table.keys() - {"programs"} <= known
    modules = [x.relative_to(package).with_suffix("") for x in package.rglob("*.py")]
    untested = [
        module.as_posix()
        for module in modules
        if module.name != "__init__" and module.parts[0] not in ("tools", "configs")
        if module.name not in tests and not {module.as_posix(), module.parts[0]} & table.keys()
    ]
    assert not untested
