# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import zipfile
from typing import Any, Dict

from detectron2.checkpoint import DetectionCheckpointer

from .arrays_pickle import load_arrays
from .errors import InputError, one_line

__all__ = ["LibraCheckpointer"]


class LibraCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that refuses, with an error that says why, files that are
    missing, cut short, of another model, or would execute code when they are read.

    A checkpoint of the plain Detectron2 model loads; only the weights of the balanced feature
    pyramid (``backbone.bfp.*``) are reported missing.
    """

    def __init__(self, model, save_dir: str = "", *, complete: bool = False, **kwargs):
        """
        Args:
            model, save_dir, kwargs: as for :class:`DetectionCheckpointer`.
            complete: whether a checkpoint must hold all weights except those of the balanced
                feature pyramid: True for evaluation, False to start training from a backbone or
                from a model with other classes.
        """
        super().__init__(model, save_dir, **kwargs)
        self.complete = complete
        self._path = ""

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """See :meth:`DetectionCheckpointer.load`. Raises: InputError, see the class."""
        self._path = path
        if path and "://" not in path and not os.path.isfile(path):
            raise InputError(f"{path}: no such weights file (MODEL.WEIGHTS, or --resume)")
        try:
            return super().load(path, *args, **kwargs)
        except OSError as e:  # an unreadable file, or a URL without a connection
            raise InputError(f"{path}: the weights cannot be read: {e}") from e

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                load_arrays(filename)
            return super()._load_file(filename)
        except pickle.UnpicklingError as e:
            reason = str(e).strip().splitlines()[0]
            raise InputError(
                f"{self._path}: not loaded, because a weights file must not hold anything but "
                f"arrays, numbers and text, or because it is cut short: {reason}"
            ) from e
        except (EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as e:
            raise InputError(
                f"{self._path}: not a checkpoint, or cut short ({type(e).__name__}: {one_line(e)})"
            ) from e

    def _load_model(self, checkpoint: Dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        reshaped = {key: shapes for key, *shapes in incompatible.incorrect_shapes}
        absent = {*incompatible.missing_keys, *reshaped}
        names = [name for name, _ in self.model.named_parameters()]
        if absent.issuperset(names):
            example = next(iter(incompatible.unexpected_keys), "none")
            raise InputError(
                f"{self._path}: these are weights of another model: none of its names or shapes "
                f"is one of this model's (the model has, e.g., {names[0]!r}; "
                f"the file has {example!r})"
            )
        absent = sorted(key for key in absent if not key.startswith("backbone.bfp."))
        if self.complete and absent:
            shapes = reshaped.get(absent[0])
            detail = f" (shape {shapes[0]}, not {shapes[1]})" if shapes else " (missing)"
            raise InputError(
                f"{self._path}: not a complete checkpoint of this model: {len(absent)} "
                f"weights are missing or of another shape, the first {absent[0]!r}"
                f"{detail}. Do the config and the number of classes belong to these weights?"
            )
        return incompatible
