# SPDX-License-Identifier: Apache-2.0
import importlib
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT
from run_versions import CELLS

from libra_d2.versions import OLDEST, check_versions


@pytest.mark.parametrize(
    ("module", "version", "message"),
    [
        ("torch", "2.5.1+cu121", "needs PyTorch 2.6 or later, but 2.5.1.cu121 is installed"),
        ("torch", "2.6.0", ""),
        ("torch", "2.14.1+cpu", ""),
        ("detectron2", "0.5", "needs Detectron2 0.6 or later, but 0.5 is installed"),
        ("detectron2", "0.6", ""),
        ("detectron2", None, "needs Detectron2 0.6 or later, but it is not installed"),
    ],
)
def test_check_versions(module, version, message, monkeypatch):
    if version is None:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.setattr(importlib.import_module(module), "__version__", version)
    if not message:
        check_versions()
        return
    with pytest.raises(ImportError, match=message) as e:
        check_versions()
    assert e.value.name == module
    error = ModuleNotFoundError("No module named 'other'", name="other")
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=error))
    with pytest.raises(ModuleNotFoundError, match="other"):  # of what the module imports
        check_versions()


def test_one_claim():
    """What is said to be the oldest is the same everywhere, and the first that is tested."""
    oldest = CELLS[0]
    assert oldest.torch == f"=={OLDEST['torch'][1]}.0"
    required = (ROOT / "setup.py").read_text(), (ROOT / "tools/install_detectron2.py").read_text()
    assert f'python_requires=">={oldest.python}"' in required[0]
    assert f'requires-python = ">={oldest.python}"' in required[1]
    claim = f"Python {oldest.python} or later, PyTorch {OLDEST['torch'][1]} or later"
    for page in ("README.md", "docs/installation.md"):
        assert claim in (ROOT / page).read_text(), page
