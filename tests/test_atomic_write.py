# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from detectron2.utils import comm

from libra_d2.utils.atomic_write import atomic_write


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_appears_when_complete(mode, tmp_path, monkeypatch):
    """Written to a temporary file of this process, in UTF-8, and flushed before it is renamed."""
    path, unfinished, calls = tmp_path / "a", tmp_path / "a.3", []
    replace = os.replace
    monkeypatch.setattr(comm, "get_rank", lambda: 3)
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(unfinished.read_bytes()))
    monkeypatch.setattr(os, "replace", lambda *x: (calls.append("replace"), replace(*x)))
    path.write_text("before")
    with atomic_write(str(path), *([mode] if mode == "w" else [])) as f:
        f.write("é" if mode == "w" else b"\xc3\xa9")
        assert mode == "wb" or f.encoding == "utf-8"  # the locale's would be "UTF-8"
        assert path.read_text() == "before"
    assert calls == [b"\xc3\xa9", "replace"]
    assert path.read_bytes() == b"\xc3\xa9"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure(error, tmp_path):
    """The file is unchanged, nothing else is left, and the error propagates."""
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(error, match="^reason$"):  # noqa: PT012, SIM117
        with atomic_write(str(path)) as f:
            f.write(b"half")
            raise error("reason")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
