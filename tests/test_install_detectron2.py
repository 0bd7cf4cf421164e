# SPDX-License-Identifier: Apache-2.0
import collections
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location(
    "install_detectron2", ROOT / "tools/install_detectron2.py"
)
installer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(installer)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source archive, unpacked, as it is on the package index."""
    return installer.fetch_source(tmp_path_factory.mktemp("source"))


def copy_of(source, tmp_path):
    for path in {fix.path for fix in installer.FIXES}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((source / path).read_text())
    return tmp_path


def test_every_fix_is_checked(source, tmp_path):
    """A fix that does not apply, because it was applied already, is an error."""
    root = copy_of(source, tmp_path)
    for fix in installer.FIXES:
        installer.apply_fixes(root, (fix,))
        text = (root / fix.path).read_text()
        assert fix.new in text
        if fix.old not in fix.new:
            assert fix.old not in text
            with pytest.raises(installer.InstallError, match=f"{fix.path} does not apply"):
                installer.apply_fixes(root, (fix,))


def test_nothing_is_written_unless_all_fixes_apply(source, tmp_path):
    root = copy_of(source, tmp_path)
    first = installer.FIXES[0]
    for fix, message in (
        (installer.Fix("detectron2/none.py", "a", "b"), "there is no such file"),
        (first._replace(path=installer.FIXES[1].path, count=2), "occurs 1 times, expected 2"),
    ):
        with pytest.raises(installer.InstallError, match=message):
            installer.apply_fixes(root, (first, fix))
    assert (root / first.path).read_text() == (source / first.path).read_text()


def test_wheel(source, tmp_path):
    root = installer.fetch_source(tmp_path)
    installer.apply_fixes(root)
    with zipfile.ZipFile(installer.build_wheel(root, tmp_path)) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read("detectron2-0.6.dist-info/METADATA").decode()
    python = {str(p.relative_to(source)) for p in (source / "detectron2").rglob("*.py")}
    assert python <= names
    yaml = {str(p.relative_to(source)) for p in source.glob("detectron2/model_zoo/**/*.yaml")}
    assert len(yaml) > 80
    assert yaml <= names
    assert "detectron2/projects/point_rend/__init__.py" in names
    assert "Name: detectron2\nVersion: 0.6" in metadata


def test_fixes_are_upstreams(source, tmp_path):
    """What the lines that they add consist of, as often as it is there."""
    root = copy_of(source, tmp_path)
    installer.apply_fixes(root)
    added = collections.Counter()
    for path in {fix.path for fix in installer.FIXES}:
        before = collections.Counter((source / path).read_text().splitlines())
        added += collections.Counter((root / path).read_text().splitlines()) - before
    patterns = r"dtype=\w+|astype\(\w+|Image\.BI\w+|_*LRSch\w+|sample\(sor\w+|indexing=.ij"
    patterns += r"|no_compiled_ops import _C|return _C.\w+|except \w+|COCOeval_opt = \w+|from \.\w+"
    assert collections.Counter(re.findall(patterns, "\n".join(added.elements()))) == {
        **{"dtype=int": 4, "dtype=float": 2, "dtype=bool": 2, "dtype=str": 1},
        **{"astype(bool": 7, "astype(float": 3, "Image.BILINEAR": 1, "LRScheduler": 2},
        **{"sample(sorted": 1, 'indexing="ij': 1, "no_compiled_ops import _C": 4},
        **{"return _C.nms_rotated": 1, "except ImportError": 2, "COCOeval_opt = COCOeval": 1},
        "from .api": 1,
    }


def test_existing_detectron2_is_left_alone(capsys, monkeypatch):
    monkeypatch.setattr(installer, "run_pip", lambda *args: pytest.fail("pip was called"))
    assert installer.main([]) == 0
    version = importlib.metadata.version("detectron2")
    assert capsys.readouterr().out == (
        f"Detectron2 {version} is already installed; nothing to do.\n"
    )


def test_installation(tmp_path, monkeypatch, capsys):
    """Each step works on what the one before has made; the wheel is kept where it should be."""
    calls, folder = [], tmp_path / "a/b"
    for name in ("check_environment", "fetch_source", "apply_fixes", "build_wheel", "run_pip"):
        monkeypatch.setattr(
            installer, name, lambda *args, name=name: calls.append((name, *args)) or Path(name)
        )
    monkeypatch.setattr(installer, "installed_version", lambda: None)
    assert installer.main(["--wheel-dir", str(folder)]) == 0
    assert calls.pop(1)[0] == "fetch_source"
    source = Path("fetch_source")
    assert calls == [
        *(("check_environment",), ("apply_fixes", source), ("build_wheel", source, folder)),
        ("run_pip", "install", "build_wheel"),
    ]
    assert folder.is_dir()
    assert capsys.readouterr().out.endswith(f"{installer.LIMITS}\n")


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"setuptools": "81.0.0"}, "setuptools 81 is too new"),
        ({"setuptools": "100.1"}, "setuptools 100 is too new"),
        ({"pip": "26.1"}, "pip 26.1 refuses the archive"),
        ({"pip": "27.0.1"}, "pip 27.0.1 refuses the archive"),
        ({"setuptools": "80.9.0", "pip": "26.0.1"}, None),
        ({"setuptools": "9.0", "pip": "25.10"}, None),
    ],
)
def test_environment(versions, message, monkeypatch, capsys):
    monkeypatch.setattr(
        installer.importlib.metadata, "version", lambda name: versions.get(name, "25.0")
    )
    if message is None:
        installer.check_environment()
        return
    monkeypatch.setattr(installer, "installed_version", lambda: None)
    assert installer.main([]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("module", ["torch", "torchvision", "setuptools", "wheel"])
def test_missing_module(module, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        installer.importlib.util, "find_spec", lambda x: None if x == module else find(x)
    )
    with pytest.raises(
        installer.InstallError, match=f"^{module} is not installed in .*pip install"
    ):
        installer.check_environment()


def test_pip_failure_is_one_error():
    """The command, and the last 15 lines of what it says."""
    with pytest.raises(installer.InstallError, match="^`.*pip download --none` failed:\n") as error:
        installer.run_pip("download", "--none")
    assert "no such option: --none" in str(error.value)
    assert len(str(error.value).splitlines()) <= 16


def run_in_subprocess(code):
    """Import this Detectron2 anew, without what other tests did to it."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )


def has_compiled_ops():
    return importlib.util.find_spec("detectron2._C") is not None


@pytest.mark.skipif(has_compiled_ops(), reason="this Detectron2 has compiled operators")
@pytest.mark.parametrize(
    "code",
    [
        "from detectron2.layers import nms_rotated; import torch;"
        "nms_rotated(torch.ones(2, 5), torch.ones(2), 0.5)",
        "from detectron2.layers import ROIAlignRotated; import torch;"
        "ROIAlignRotated(2, 1.0, 0)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 6))",
    ],
)
def test_missing_operators_say_so(code):
    result = run_in_subprocess(code)
    assert result.returncode == 1
    assert "was installed without compiled operators" in result.stderr


def test_imports():
    """All that a training imports, and what Detectron2 0.6 alone would fail to import."""
    code = """
import detectron2.engine, detectron2.evaluation, detectron2.export, detectron2.model_zoo
import detectron2.utils.analysis, detectron2.utils.collect_env as env
import detectron2.data.transforms
assert "detectron2" in env.collect_env_info()
detectron2.model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
"""
    result = run_in_subprocess(code)
    assert result.returncode == 0, result.stderr


def test_numpy_fixes_work():
    from detectron2.data.build import print_instances_class_histogram
    from detectron2.structures import BitMasks, PolygonMasks

    print_instances_class_histogram([{"annotations": [{"category_id": 0}]}], ["a"])
    square = [np.array([0.0, 0, 4, 0, 4, 4, 0, 4])]
    masks = PolygonMasks([square, square])
    assert masks.nonempty().tolist() == [True, True]
    assert BitMasks.from_polygon_masks(masks, 8, 8).tensor.sum() > 0
