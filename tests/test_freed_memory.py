# SPDX-License-Identifier: Apache-2.0
import ctypes
import inspect
import platform
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from libra_d2.utils.freed_memory import keep_freed_memory

NUM_BYTES = 1 << 26


def count_new_pages():
    """Pages that a tensor needs from the system if some of the same size were freed before."""
    for _ in range(20):  # the first ones may leave holes that are a few bytes too small
        torch.ones(NUM_BYTES, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(NUM_BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages():
    """In a process of its own, as it cannot be undone."""
    path = str(ROOT / "libra_d2/utils/freed_memory.py")
    code = f"import resource, runpy, torch\nNUM_BYTES = {NUM_BYTES}\n"
    code += inspect.getsource(count_new_pages)
    code += f"keep = runpy.run_path({path!r})['keep_freed_memory']\n"
    code += "print(count_new_pages(), keep(), count_new_pages())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    before, is_kept, after = result.stdout.split()
    assert is_kept == "True"
    # Pages have 4 KiB, or more on some machines.
    assert int(before) >= NUM_BYTES // resource.getpagesize() // 2
    assert int(after) < int(before) // 10


def test_other_libraries(monkeypatch):
    """They may have no mallopt."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", pytest.fail)
    assert not keep_freed_memory()
