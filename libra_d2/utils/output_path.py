# SPDX-License-Identifier: Apache-2.0
"""Where a program writes: never over what it reads."""

import os
from typing import List, Mapping, Sequence, Tuple, Union

from ..errors import InputError
from .atomic_write import atomic_write

__all__ = ["file_identity", "output_path", "output_paths"]

Others = Mapping[str, Union[str, Sequence[str], None]]


def output_path(option: str, path: str, others: Others, *, is_folder: bool = False) -> str:
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
    return output_paths(option, [path], others, is_folder=is_folder)[0]


def output_paths(
    option: str, paths: Sequence[str], others: Others, *, is_folder: bool = False
) -> List[str]:
    """:func:`output_path` of several paths of one option, no two of which may be the same."""
    wanted, is_wanted = ("folder", os.path.isdir) if is_folder else ("file", os.path.isfile)
    taken = {
        file_identity(path.partition("?")[0] if not os.path.exists(path) else path): (name, path)
        for name, values in others.items()
        for path in ([values] if isinstance(values, str) else values or ())
        if path  # weights may have options
    }
    tried = set()
    for path in paths:
        # In a path that ends with a slash nothing has a name yet.
        folder, name = os.path.split(os.path.join(path, "") if is_folder else path)
        has_name = path if is_folder else name
        if not has_name or (os.path.exists(path) and not is_wanted(path)):
            raise InputError(f"{option}: {path or repr(path)} is not a {wanted}: choose another")
        if file_identity(path) in taken:
            name, other = taken[file_identity(path)]
            if (name, other) == (option, path):
                raise InputError(f"{option}: {path} would be written twice: choose another")
            raise InputError(
                f"{option}: {path} and {name}, {other}, are the same {wanted}, which would be "
                "overwritten: choose another"
            )
        taken[file_identity(path)] = (option, path)
        if folder not in tried:
            _try_to_write(option, path, folder, name)
        tried.add(folder)
    return list(paths)


def file_identity(path: str) -> Union[str, Tuple[int, int]]:
    """Equal for all paths of a file, be it through links."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return os.path.realpath(path)


def _try_to_write(option: str, path: str, folder: str, name: str) -> None:
    """Make a folder and write a file that is not left there. Raises InputError."""
    target = os.path.join(folder, name)
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with atomic_write(target) as f:
            f.write(bytes(1 << 16))  # the disk is not full
            f.flush()
            raise _Tried
    except _Tried:
        pass
    except OSError as e:
        where = "" if e.filename in (path, target) else f": {e.filename}"
        raise InputError(f"{option}: {path} cannot be written: {e.strerror}{where}") from e


class _Tried(Exception):
    """Ends the writing of a file that must not appear."""
