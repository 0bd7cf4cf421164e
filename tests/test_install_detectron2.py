# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from detectron2.layers import nms_rotated

spec = importlib.util.spec_from_file_location(
    "install_detectron2", ROOT / "tools/install_detectron2.py"
)
installer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(installer)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source archive from the package index."""
    return installer.fetch_source(tmp_path_factory.mktemp("source"))


def test_every_fix(source, tmp_path):
    """It applies, once: applying it again is an error."""
    root = shutil.copytree(source, tmp_path / "source")
    for fix in installer.FIXES:
        installer.apply_fixes(root, (fix,))
        text = (root / fix.path).read_text()
        assert fix.new in text
        if fix.old not in fix.new:
            assert fix.old not in text
            with pytest.raises(installer.InstallError, match=f"{fix.path} does not apply"):
                installer.apply_fixes(root, (fix,))


def test_nothing_is_written_unless_all_fixes_apply(source, tmp_path):
    root = shutil.copytree(source, tmp_path / "source")
    first = installer.FIXES[0]
    for fix, message in (
        (installer.Fix("detectron2/none.py", "a", "b"), "there is no such file"),
        (first._replace(path=installer.FIXES[1].path, count=2), "occurs 1 times, expected 2"),
    ):
        with pytest.raises(installer.InstallError, match=message):
            installer.apply_fixes(root, (first, fix))
    assert (root / first.path).read_text() == (source / first.path).read_text()


def test_wheel(source, tmp_path):
    """It has all Python files and configs of the source archive."""
    root = shutil.copytree(source, tmp_path / "source")
    installer.apply_fixes(root)
    with zipfile.ZipFile(installer.build_wheel(root, tmp_path)) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read("detectron2-0.6.dist-info/METADATA").decode()
    files = [*(source / "detectron2").rglob("*.py"), *(source / "detectron2").rglob("*.yaml")]
    assert {str(p.relative_to(source)) for p in files} <= names
    assert "detectron2/projects/point_rend/__init__.py" in names
    assert "Name: detectron2\nVersion: 0.6" in metadata


def test_existing_detectron2_is_left_alone(capsys, monkeypatch):
    monkeypatch.setattr(installer, "run_pip", lambda *args: pytest.fail("pip was called"))
    assert installer.main([]) == 0
    assert "is already installed; nothing to do.\n" in capsys.readouterr().out


def test_installation(tmp_path, monkeypatch, capsys):
    """Each step gets the result of the one before; the wheel is kept in --wheel-dir."""
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
        ({"setuptools": "81.0.0"}, "setuptools 81.0.0 is too new"),
        ({"setuptools": "60.10.0"}, "setuptools 60.10.0 is too old"),
        ({"setuptools": "61.0", "pip": "26.1"}, "pip 26.1 refuses the archive"),
        ({"setuptools": "80.9.0", "pip": "26.0.1"}, None),
        ({"setuptools": "61.0", "pip": "25.10"}, None),
    ],
)
def test_environment(versions, message, monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, "25.0"))
    if message is None:
        installer.check_environment()
        return
    monkeypatch.setattr(installer, "installed_version", lambda: None)
    assert installer.main([]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("module", ["torch", "torchvision", "setuptools", "wheel"])
def test_missing_module(module, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == module else x)
    with pytest.raises(installer.InstallError, match=f"^{module} is not installed in .*pip inst"):
        installer.check_environment()


def test_pip_failure_is_one_error(monkeypatch):
    """It has the command, and the last 15 lines of the output."""
    lines = "\n".join(map(str, range(40)))

    def run(command, stdout, stderr, **kwargs):
        assert (stdout, stderr) == (subprocess.PIPE, subprocess.STDOUT)
        return SimpleNamespace(returncode=1, stdout=lines)

    monkeypatch.setattr(subprocess, "run", run)
    last = "\n".join(map(str, range(25, 40)))
    with pytest.raises(installer.InstallError, match=f"^`.*pip download --none` failed:\n{last}$"):
        installer.run_pip("download", "--none")


def has_compiled_ops():
    return importlib.util.find_spec("detectron2._C") is not None


@pytest.mark.skipif(has_compiled_ops(), reason="this Detectron2 has compiled operators")
def test_missing_operators():
    with pytest.raises(ImportError, match="nms_rotated is not available: .* without compiled op"):
        nms_rotated(torch.ones(2, 5), torch.ones(2), 0.5)
