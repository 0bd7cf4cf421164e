# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
from contextlib import contextmanager, suppress
from typing import IO, Iterator

from detectron2.utils import comm

__all__ = ["UNFINISHED", "atomic_write"]

#: The end of the name of a file that is being written, or that a killed process has left.
UNFINISHED = ".unfinished"
_MAX_NAME = 255  # bytes that file systems allow


@contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
    """
    Open a file that appears at ``path`` when the body is done and its content is on the disk. If
    the body fails or the process is killed, ``path`` stays as it was. Several processes may write
    the same content. Modes are "wb", and "w" for text in UTF-8.

    Raises:
        OSError: if the file cannot be written; it names ``path``.
    """
    # Processes on several machines may have the same number, and several programs the same rank.
    end = f".{comm.get_rank()}-{os.getpid()}{UNFINISHED}"
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) <= _MAX_NAME < len(os.fsencode(name + end)):
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    unfinished = os.path.join(folder, name + end)
    try:
        with open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except BaseException as e:
        with suppress(OSError):
            os.remove(unfinished)
        if isinstance(e, OSError) and e.errno and e.filename in (None, unfinished):
            raise OSError(e.errno, e.strerror, path) from None
        raise
