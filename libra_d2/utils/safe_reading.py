# SPDX-License-Identifier: Apache-2.0
"""Weights and arrays in pickle files, loaded without executing anything in them."""

import os
import pickle
import zipfile
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Tuple

import numpy as np
import torch

from ..errors import BrokenFileError, InputError, one_line

__all__ = ["check_declared_sizes", "load_arrays", "read_weights", "reading_weights"]


class _Array(np.ndarray):
    """An array for unpickling: it has no size until it gets content, which has to be numbers."""

    def __new__(cls, shape: Any = (), *args: Any):
        raise pickle.UnpicklingError(f"it declares an array of shape {shape} without content")

    def __setstate__(self, state: Tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        super().__setstate__((1, shape, dtype.value, is_fortran, content))

    def __reduce__(self):
        return self.view(np.ndarray).__reduce__()


class _DType:
    """``numpy.dtype`` for unpickling, of numbers and text; others can hold anything."""

    def __init__(self, code: str, *args: Any):
        self.value = np.dtype(code)
        if self.value.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"it holds an array of type {self.value}")

    def __setstate__(self, state: Tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


def _new_array(array_type: Any, shape: Tuple[int, ...], dtype: bytes) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct``; the real shape is set with the content."""
    return np.ndarray.__new__(_Array, shape, dtype) if shape == (0,) else _Array(shape)


def _new_scalar(dtype: _DType, content: bytes) -> np.generic:
    """``numpy.core.multiarray.scalar``."""
    return np.frombuffer(content, dtype.value, 1)[0]


def _no_bytes() -> bytes:
    """The content of an empty array, which old protocols write as a call of ``bytes``."""
    return b""


# What pickled NumPy arrays refer to, with NumPy 1 and 2, and what takes its place.
_NUMPY_GLOBALS = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _new_scalar for core in ("core", "_core")},
    **{(builtins, "bytes"): _no_bytes for builtins in ("__builtin__", "builtins")},
}
_OTHER_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("detectron2.structures.boxes", "BoxMode"),  # in Detectron2's proposals
}


# The C implementation allocates whatever sizes a file declares.
class _ArrayUnpickler(pickle._Unpickler):
    """Loads arrays, numbers and text in the containers of Python, and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY_GLOBALS:
            return _NUMPY_GLOBALS[module, name]
        if (module, name) not in _OTHER_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which may run code")
        return super().find_class(module, name)

    def load(self) -> Any:
        try:
            content = super().load()
        except KeyError as e:  # of a table of instructions, or of what was read before
            raise pickle.UnpicklingError("it is no pickle file") from e
        # Memo keys are consecutive in real pickles; other unpicklers allocate a list of them.
        if max(self.memo, default=0) > len(self.memo) + 1000:
            raise pickle.UnpicklingError("it declares more references than it has")
        return content


def check_declared_sizes(path: str) -> None:
    """
    Raises:
        BrokenFileError: if a file in PyTorch's format declares more content than it has, is
            compressed, which PyTorch's weights never are, or is a TorchScript file.
    """
    if not zipfile.is_zipfile(path):
        return
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as file:
        if any(name.endswith("/constants.pkl") for name in file.namelist()):
            raise BrokenFileError(
                "a TorchScript file, which is a program: name the weights that it was made from"
            )
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


def _stand_in(module: str, name: str, make: Callable = object) -> type:
    """A class to load instead of ``module.name``, which calls ``make``."""
    methods = {"__new__": lambda cls, *args: make(*args)}
    return type(name, (), {"__module__": module, **methods})


class _Nothing:
    """Drops its arguments and its state."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Checkpoints of mmdetection 3.x also hold the history of the losses.
_HISTORY_GLOBALS = [("mmengine.logging.history_buffer", "HistoryBuffer"), ("builtins", "getattr")]
_ALLOWED = [
    *(_Array, _DType, _Nothing),
    *(_stand_in(*place, make) for place, make in _NUMPY_GLOBALS.items()),
    *(_stand_in(*place, _Nothing) for place in _HISTORY_GLOBALS),
]


def _reason(error: Exception) -> str:
    """What is wrong: the first sentence. PyTorch's others are advice to execute what is in it."""
    # It raises a long message instead of its unpickler's.
    cause = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    return one_line(cause).split(". ")[0].rstrip(".")


@contextmanager
def reading_weights(path: str) -> Iterator[None]:
    """
    Prepare for ``torch.load(path, weights_only=True)`` in the body. Whatever broken or malicious
    files raise becomes a BrokenFileError that names ``path``.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            yield
    except InputError as e:
        raise type(e)(f"{path}: {e}") from e
    except pickle.UnpicklingError as e:
        raise BrokenFileError(
            f"{path}: not loaded, because a weights file must not hold anything but arrays, "
            f"numbers and text, or because it is cut short: {_reason(e)}"
        ) from e
    except OSError as e:
        raise BrokenFileError(f"{path}: the weights cannot be read: {e}") from e
    except Exception as e:  # a broken file can fail in any way
        raise BrokenFileError(
            f"{path}: not a checkpoint, or cut short ({type(e).__name__}: {_reason(e)})"
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
