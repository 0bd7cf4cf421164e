# SPDX-License-Identifier: Apache-2.0
"""Pickle files that hold arrays, read without executing anything in them."""

import pickle
from typing import Any

__all__ = ["load_arrays"]

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


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers and text in the containers of Python, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which may run code")
        return super().find_class(module, name)


def load_arrays(path: str) -> Any:
    """
    Read a pickle file that holds nothing but arrays, numbers and text in the containers of Python.

    Raises:
        pickle.UnpicklingError: if it refers to anything else, which is not executed.
        EOFError, ValueError, ...: if it is cut short or no pickle file, as :func:`pickle.load`.
    """
    with open(path, "rb") as f:
        return _ArrayUnpickler(f, encoding="latin1").load()
