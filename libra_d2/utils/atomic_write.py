# SPDX-License-Identifier: Apache-2.0
import os
from contextlib import contextmanager, suppress
from typing import IO, Iterator

from detectron2.utils import comm

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
    """
    Open a file that appears at ``path`` when the body is done and its content is on the disk. If
    the body fails or the process is killed, ``path`` stays as it was. Several processes may write
    the same content. Modes are "wb", and "w" for text in UTF-8.
    """
    unfinished = f"{path}.{comm.get_rank()}"
    try:
        with open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        with suppress(OSError):
            os.remove(unfinished)
        raise
    os.replace(unfinished, path)
