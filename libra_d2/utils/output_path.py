# SPDX-License-Identifier: Apache-2.0
"""Where a program writes: never over what it reads."""

import os
from typing import Mapping, Sequence, Union

from ..errors import InputError
from .atomic_write import atomic_write

__all__ = ["output_path"]


def output_path(
    option: str,
    path: str,
    others: Mapping[str, Union[str, Sequence[str], None]],
    *,
    is_folder: bool = False,
) -> str:
    """
    Check a path that a program is going to write to, and make the folder that it is in.

    Args:
        option: the user's name for it, such as "--output", for messages.
        path: of a file that is written with :func:`libra_d2.utils.atomic_write.atomic_write`.
        others: what else the user has named: options, and the files and folders that the program
            reads, or writes, there. Those that are not on this machine, such as URLs, are fine.
        is_folder: whether ``path`` is a folder to write files into.

    Returns:
        ``path``.

    Raises:
        InputError: if ``path`` leads to one of the others, is a folder where a file is wanted or
            the other way round, or nothing can be written there.
    """
    wanted = "folder" if is_folder else "file"
    for name, values in others.items():
        for other in [values] if isinstance(values, str) else values or ():
            if other and _is_same(path, other):
                raise InputError(
                    f"{option}: {path} and {name}, {other}, are the same {wanted}, which would be "
                    "written over: choose another"
                )
    # In a path that ends with a slash nothing has a name yet.
    folder, name = os.path.split(os.path.join(path, "") if is_folder else path)
    is_wanted = os.path.isdir if is_folder else os.path.isfile
    has_name = path if is_folder else name
    if not has_name or (os.path.exists(path) and not is_wanted(path)):
        raise InputError(f"{option}: {path or repr(path)} is no {wanted}: choose another")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        _try_to_write(os.path.join(folder, name))
    except OSError as e:
        where = "" if e.filename in (path, os.path.join(folder, name)) else f": {e.filename}"
        raise InputError(f"{option}: {path} cannot be written: {e.strerror}{where}") from e
    return path


def _is_same(path: str, other: str) -> bool:
    """Whether two paths lead to the same file, be it through links."""
    if not os.path.exists(other):
        other = other.partition("?")[0]  # weights may have options
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


class _Tried(Exception):
    """Ends the writing of a file that must not appear."""


def _try_to_write(path: str) -> None:
    """Raise the OSError that writing ``path`` would raise; nothing is left of it."""
    try:
        with atomic_write(path) as f:
            f.write(bytes(1 << 16))  # the disk is not full
            f.flush()
            raise _Tried
    except _Tried:
        pass
