# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


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
    """Every module and every config."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "libra_d2").rglob("*.py")}
    configs = {f"libra_d2/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert modules
    assert configs
    assert modules | configs <= names
    assert not {n for n in names if n.startswith(("tests", "tools", "configs"))}


def test_installed_package_works_from_anywhere(wheel, tmp_path):
    """Import from the unpacked wheel, and merge one of its configs with its bases."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import libra_d2
from pathlib import Path
from detectron2.config import get_cfg
folder = Path(libra_d2.__file__).parent
assert str(folder) == {str(tmp_path / "libra_d2")!r}, folder
cfg = get_cfg()
libra_d2.add_libra_config(cfg)
cfg.merge_from_file(
    str(folder / "configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml"), allow_unsafe=False
)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_import_changes_nothing():
    """No config, dataset or path handler of Detectron2 is touched by the import."""
    code = """
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
before = get_cfg().dump(), DatasetCatalog.list()
import libra_d2, libra_d2.data, libra_d2.evaluation, libra_d2.checkpoint
assert (get_cfg().dump(), DatasetCatalog.list()) == before
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
