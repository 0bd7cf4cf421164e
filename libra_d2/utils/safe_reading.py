# SPDX-License-Identifier: Apache-2.0
"""Weights and arrays in pickle files, loaded without executing anything in them."""

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

# What pickled NumPy arrays refer to, with NumPy 1 and 2.
_NUMPY_GLOBALS = [
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
]
_ARRAY_GLOBALS = {
    *_NUMPY_GLOBALS,
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("detectron2.structures.boxes", "BoxMode"),  # in Detectron2's proposals
}


def _new_array(array_type: type, shape: Tuple[int, ...], dtype: bytes) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct``; the real shape is set with the content."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"it declares an array of shape {shape} without content")
    return np.ndarray(shape, dtype)


# The C implementation allocates whatever sizes a file declares.
class _ArrayUnpickler(pickle._Unpickler):
    """Loads arrays, numbers and text in the containers of Python, and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("__builtin__", "bytes"):
            return lambda: b""  # an empty array in protocol 2
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which may run code")
        return _new_array if name == "_reconstruct" else super().find_class(module, name)

    def load(self) -> Any:
        content = super().load()
        # Memo keys are consecutive in real pickles; other unpicklers allocate a list of them.
        if max(self.memo, default=0) > len(self.memo) + 1000:
            raise pickle.UnpicklingError("it declares more references than it has")
        return content


def check_declared_sizes(path: str) -> None:
    """
    Raises:
        BrokenFileError: if a file in PyTorch's format declares more content than it has, or is
            compressed, which PyTorch never does.
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
    Load a pickle file of arrays, numbers and text in the containers of Python.

    Raises:
        pickle.UnpicklingError: if it refers to anything else, which is not executed.
        EOFError, ValueError, ...: if it is cut short or no pickle file, as :func:`pickle.load`.
    """
    with open(path, "rb") as f:
        return _ArrayUnpickler(f, encoding="latin1").load()


def _stand_in(module: str, name: str) -> type:
    """A class to load instead of ``module.name``, which drops its arguments and its state."""
    methods = {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None}
    return type(name, (), {"__module__": module, **methods})


# Checkpoints of mmdetection 3.x also hold the history of the losses, as NumPy arrays.
_HISTORY_GLOBALS = [("mmengine.logging.history_buffer", "HistoryBuffer"), ("builtins", "getattr")]
_IGNORED = [_stand_in(module, name) for module, name in (*_HISTORY_GLOBALS, *_NUMPY_GLOBALS)]


@contextmanager
def reading_weights(path: str) -> Iterator[None]:
    """
    Prepare for ``torch.load(path, weights_only=True)`` in the body. Whatever broken or malicious
    files raise becomes a BrokenFileError that names ``path``.
    """
    try:
        with torch.serialization.safe_globals(_IGNORED):
            yield
    except InputError as e:
        raise type(e)(f"{path}: {e}") from e
    except pickle.UnpicklingError as e:
        # PyTorch puts advice before and after the reason.
        reason = re.sub(r".*WeightsUnpickler error: | was not an allowed global.*", "", one_line(e))
        raise BrokenFileError(
            f"{path}: not loaded, because a weights file must not hold anything but arrays, "
            f"numbers and text, or because it is cut short: {reason.split(' Check the doc')[0]}"
        ) from e
    except OSError as e:
        raise BrokenFileError(f"{path}: the weights cannot be read: {e}") from e
    except Exception as e:  # a broken file can fail in any way
        raise BrokenFileError(
            f"{path}: not a checkpoint, or cut short ({type(e).__name__}: {one_line(e)})"
        ) from e


def read_weights(path: str) -> Any:
    """
    Load a local file of weights, PyTorch's or a ``.pkl`` of arrays, on the CPU, without executing
    anything in it.

    Raises:
        BrokenFileError: if it is missing, cut short, or holds anything else.
    """
    with reading_weights(path):
        check_declared_sizes(path)
        if path.endswith(".pkl"):
            return load_arrays(path)
        return torch.load(path, map_location="cpu", weights_only=True)
