# SPDX-License-Identifier: Apache-2.0
import errno
import os

import pytest

from detectron2.utils import comm

from libra_d2.utils.atomic_write import UNFINISHED, atomic_write


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_appears_when_complete(mode, tmp_path, monkeypatch):
    """Written to a temporary file of this process, in UTF-8, and flushed before it is renamed."""
    path, calls = tmp_path / "a", []
    unfinished = tmp_path / f"a.3-7{UNFINISHED}"
    replace = os.replace
    monkeypatch.setattr(comm, "get_rank", lambda: 3)
    monkeypatch.setattr(os, "getpid", lambda: 7)
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


@pytest.mark.parametrize("name", ["n" * 255, "n" * 241, "猫" * 84 + "n"])
def test_long_names(name, tmp_path, monkeypatch):
    """As long as file systems allow, or a byte too long with ".0-7.unfinished"; two at a time."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    paths = [tmp_path / f"{name[:-1]}{end}" for end in "ab"]
    with atomic_write(str(paths[0]), "w") as a, atomic_write(str(paths[1]), "w") as b:
        a.write("a")
        b.write("b")
    assert [path.read_text() for path in paths] == ["a", "b"]
    assert sorted(tmp_path.iterdir()) == paths


FULL, LOST = OSError(errno.ENOSPC, "No space left"), OSError(errno.ENOENT, "No such", "/other")


@pytest.mark.parametrize("error", [ValueError("why"), KeyboardInterrupt("why"), FULL, LOST])
def test_failure(error, tmp_path):
    """The file is unchanged, nothing else is left, and the error propagates."""
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(type(error)) as raised:  # noqa: PT012, SIM117
        with atomic_write(str(path)) as f:
            f.write(b"half")
            raise error
    named = raised.value.filename if isinstance(error, OSError) else None
    assert named == {FULL: str(path), LOST: "/other"}.get(error)
    assert str(error).partition(":")[0] in str(raised.value)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("path", "reason"), [("folder", errno.EISDIR), ("none/a", errno.ENOENT)])
def test_names_its_target(path, reason, tmp_path, monkeypatch):
    """Not the temporary file, whether that cannot be opened or cannot take the target's place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="^") as raised, atomic_write(path) as f:
        f.write(b"content")
    assert str(raised.value) == str(OSError(reason, os.strerror(reason), path))
    assert [x.name for x in tmp_path.rglob("*")] == ["folder"]
