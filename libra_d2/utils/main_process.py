# SPDX-License-Identifier: Apache-2.0
"""Work that one process does for all."""

from typing import Any, Callable

from detectron2.utils import comm

from ..errors import InputError, one_line

__all__ = ["in_main_process"]


def in_main_process(function: Callable, *args: Any) -> Any:
    """
    Call ``function(*args)`` in the main process only. All processes must call this; all of them
    return its value, or raise its error, others than the main process as InputError.
    """
    value, error, message = None, None, ""
    if comm.is_main_process():
        try:
            value = function(*args)
        except Exception as e:
            error, message = e, one_line(e)
    value, message = comm.all_gather((value, message))[0]
    if message:
        raise error or InputError(message)
    return value
