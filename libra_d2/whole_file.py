# SPDX-License-Identifier: Apache-2.0
import os
from contextlib import contextmanager
from typing import IO, Iterator

from detectron2.utils import comm

__all__ = ["write_whole"]


@contextmanager
def write_whole(path: str, mode: str = "wb") -> Iterator[IO]:
    """
    Open a file that appears at ``path`` once the body has written all of it. Several processes may
    write the same content.

    Args:
        path: the file; one that exists is replaced.
        mode: "wb", or "w" for text in UTF-8.
    """
    unfinished = f"{path}.{comm.get_rank()}"
    with open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as f:
        yield f
    os.replace(unfinished, path)
