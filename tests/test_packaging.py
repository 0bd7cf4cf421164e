# SPDX-License-Identifier: Apache-2.0
import ast
import graphlib
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
    """Every module, program and config."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "libra_d2").rglob("*.py")}
    inside = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "tools").glob("*.py")]
    inside += (ROOT / "demo").glob("*.py")
    assert len(modules) > 30
    assert len(inside) > 20
    assert modules | {f"libra_d2/{p.relative_to(ROOT)}" for p in inside} <= names
    assert not {n for n in names if n.startswith(("tests", "tools", "configs", "demo"))}


# With Detectron2 and what libra_d2 declares, and nothing else: none of the test suite's packages.
RESTRICTED = """
import importlib.metadata as metadata, re, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})

def closure(names):
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match(r"[\\w.-]+", r).group() for r in requirements if "extra ==" not in r]
    return found

declared = [r for r in metadata.distribution("libra_d2").requires if "extra ==" not in r]
declared = [re.match(r"[\\w.-]+", r).group() for r in declared]
allowed = closure(["torch", "torchvision", "detectron2", "setuptools", *declared])
packages = metadata.packages_distributions()
names = lambda module: {{re.sub(r"[-_.]+", "-", d).lower() for d in packages[module]}}
blocked = {{m for m in packages if not names(m) & allowed}} - {{"libra_d2", "_distutils_hack"}}

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert {{"cv2", "pytest", "mmdet", "faster_coco_eval", "onnx"}} <= blocked, blocked
"""


@pytest.fixture(scope="module")
def restricted(wheel, tmp_path_factory):
    """Runs code with the wheel's package, where only what it declares can be imported."""
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


PROGRAM = "import runpy; sys.argv[0] = {0!r}; runpy.run_module({0!r}, run_name='__main__')"


def programs():
    """Modules of the console scripts."""
    text = (ROOT / "setup.py").read_text()
    return sorted(set(re.findall(r'": "(libra_d2\.[\w.]+)"', text)))


@pytest.mark.parametrize("module", programs())
def test_programs_run_where_installed(restricted, module):
    """With `python -m`, from anywhere, with nothing but Detectron2 and what setup.py declares."""
    result = restricted(PROGRAM.format(module), "--help")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_console_scripts():
    assert len(programs()) == 9
    for entry in importlib.metadata.distribution("libra_d2").entry_points:
        assert entry.group == "console_scripts"
        assert entry.module in programs()
        assert callable(entry.load())


def test_every_module_imports(restricted):
    """None is missing, and none changes Detectron2's config or datasets."""
    code = """
import importlib, pkgutil, libra_d2
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
before = get_cfg().dump(), DatasetCatalog.list()
assert libra_d2.__file__.startswith(sys.path[0]), libra_d2.__file__
modules = [m.name for m in pkgutil.walk_packages(libra_d2.__path__, "libra_d2.")]
assert len(modules) > 40
modules.remove("libra_d2.tools.mutants")  # which wants requirements/mutants.txt
for name in modules:
    importlib.import_module(name)
assert (get_cfg().dump(), DatasetCatalog.list()) == before
"""
    result = restricted(code)
    assert result.returncode == 0, result.stderr


def test_training_where_installed(restricted, synthetic, tmp_path):
    """One step, an evaluation with pycocotools, and no pictures: without OpenCV."""
    data = own_data(synthetic, "train", "val")
    args = ["--config-file", "Demo/libra_faster_rcnn_R_18_FPN.yaml", *data, "OUTPUT_DIR", tmp_path]
    args += [*TINY, "MODEL.LIBRA.NUM_PICTURES", 0, "SOLVER.MAX_ITER", 1]
    result = restricted(PROGRAM.format("libra_d2.engine.main"), *args)
    assert result.returncode == 0, result.stderr
    assert "bbox: AP" in result.stdout


def imports(path):
    """The modules of the package that a module of it imports when it is imported."""
    parts = ("libra_d2", *path.relative_to(ROOT / "libra_d2").with_suffix("").parts)
    package = parts[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield ".".join((*base, *(node.module or "").split("."))).strip(".")
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("libra_d2"):
            yield node.module


def test_imports_go_one_way():
    """Between folders of the package there is no circle."""
    graph = {}
    for path in (ROOT / "libra_d2").rglob("*.py"):
        parts = path.relative_to(ROOT / "libra_d2").with_suffix("").parts
        folder = parts[0]
        for module in imports(path):
            other = module.split(".")[1] if "." in module else None
            if other not in (None, folder) and folder != "__init__":
                graph.setdefault(folder, set()).add(other)
    assert "modeling" in graph["analysis"]
    assert graph["modeling"] == {"errors"}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_nothing_is_patched():
    """What users run replaces no names of other modules, and mocks nothing."""
    files = [
        *(ROOT / "libra_d2").rglob("*.py"),
        *(ROOT / "demo").glob("*.py"),
        ROOT / "train_net.py",
    ]
    files += (ROOT / "tools").glob("*.py")
    for path in files:
        text = path.read_text()
        assert "mock" not in text, path
        assert not re.search(
            r"\bsetattr\((?!parent, name, Affine|node, name, value|recipe, )", text
        ), path
