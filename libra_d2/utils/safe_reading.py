# SPDX-License-Identifier: Apache-2.0
"""Weights and arrays in pickle files, read without executing anything in them."""

import os
import pickle
import re
import zipfile
from contextlib import contextmanager
from typing import Any, Iterator, Tuple

import numpy as np
import torch

from ..errors import BrokenFileError, InputError, one_line

__all__ = ["check_declared_sizes", "load_arrays", "read_weights", "reading_weights"]

# All that a pickled dict of numpy arrays refers to, and the enumeration in Detectron2's proposals.
_ARRAY_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("detectron2.structures.boxes", "BoxMode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}


def _new_array(array_type: type, shape: Tuple[int, ...], dtype: bytes) -> np.ndarray:
    """What NumPy writes to be called; its real shape comes with its content."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"it declares an array of shape {shape} without content")
    return np.ndarray(shape, dtype)


# The one written in Python: the other allocates what a file declares, of which nothing need exist.
class _ArrayUnpickler(pickle._Unpickler):
    """Reads arrays, numbers and text in the containers of Python, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("__builtin__", "bytes"):
            return lambda: b""  # how Python 3 writes it for Python 2, in an array without elements
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which may run code")
        return _new_array if name == "_reconstruct" else super().find_class(module, name)

    def load(self) -> Any:
        content = super().load()
        # Pickles number what they refer to again one by one. Other readers make a list of it.
        if max(self.memo, default=0) > len(self.memo) + 1000:
            raise pickle.UnpicklingError("it declares more references than it has")
        return content


def check_declared_sizes(path: str) -> None:
    """
    Raises:
        BrokenFileError: if a file in PyTorch's format says that it holds more than it does, or
            would grow when it is read. PyTorch stores its weights uncompressed.
    """
    if not zipfile.is_zipfile(path):
        return
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise BrokenFileError(
                    f"{entry.filename} in it would take {entry.file_size} bytes of memory: not "
                    "written by PyTorch"
                )


def load_arrays(path: str) -> Any:
    """
    Read a pickle file that holds nothing but arrays, numbers and text in the containers of Python.

    Raises:
        pickle.UnpicklingError: if it refers to anything else, which is not executed.
        EOFError, ValueError, ...: if it is cut short or no pickle file, as :func:`pickle.load`.
    """
    with open(path, "rb") as f:
        return _ArrayUnpickler(f, encoding="latin1").load()


def _stand_in(module: str, name: str) -> type:
    """A class that is read in place of ``module.name`` and does nothing with what it is given."""
    methods = {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None}
    return type(name, (), {"__module__": module, **methods})


# What checkpoints of mmdetection 3.x hold besides weights: the history of the training's losses, as
# NumPy arrays, under the names of NumPy 1 and 2.
_IGNORED = [
    _stand_in(module, name)
    for module, name in (
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("builtins", "getattr"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
    )
]


@contextmanager
def reading_weights(path: str) -> Iterator[None]:
    """
    Let PyTorch read weights in the body, which must not say otherwise than ``weights_only``. What
    broken or dangerous files raise becomes a BrokenFileError that names ``path``.
    """
    try:
        with torch.serialization.safe_globals(_IGNORED):
            yield
    except InputError as e:
        raise type(e)(f"{path}: {e}") from e
    except pickle.UnpicklingError as e:
        # PyTorch puts advice in front of the reason and behind it.
        reason = re.sub(r".*WeightsUnpickler error: | was not an allowed global.*", "", one_line(e))
        raise BrokenFileError(
            f"{path}: not loaded, because a weights file must not hold anything but arrays, "
            f"numbers and text, or because it is cut short: {reason.split(' Check the doc')[0]}"
        ) from e
    except OSError as e:
        raise BrokenFileError(f"{path}: the weights cannot be read: {e}") from e
    except Exception as e:  # there is no end to what readers raise for bytes that are not theirs
        raise BrokenFileError(
            f"{path}: not a checkpoint, or cut short ({type(e).__name__}: {one_line(e)})"
        ) from e


def read_weights(path: str) -> Any:
    """
    Read a file of weights: PyTorch's, or a ``.pkl`` of arrays. Nothing in it is executed.

    Args:
        path: of a local file.

    Returns:
        its content, on the CPU.

    Raises:
        BrokenFileError: if it is cut short, no such file, or holds anything else.
    """
    with reading_weights(path):
        check_declared_sizes(path)
        if path.endswith(".pkl"):
            return load_arrays(path)
        return torch.load(path, map_location="cpu", weights_only=True)
