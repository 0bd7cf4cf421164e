# SPDX-License-Identifier: Apache-2.0
import glob
import os
import re
from collections import Counter
from contextlib import suppress
from typing import Any, Dict

import torch
from tabulate import tabulate

from detectron2.checkpoint import DetectionCheckpointer

from ..errors import BrokenFileError, InputError, counted, one_line
from ..utils.atomic_write import atomic_write
from ..utils.safe_reading import check_declared_sizes, load_arrays, reading_weights
from .download import fetch
from .mmdetection import to_detectron2_checkpoint

__all__ = ["LibraCheckpointer", "PyramidMissing", "WeightsMismatch", "find_checkpoint"]

# Files without optimizer and schedule, from which a training cannot be resumed.
_WEIGHTS_ONLY = ("model_best.pth", "model_final_ema.pth")
_PYRAMID = "backbone.bfp."
# Suffix of a path, as in Detectron2's main branch.
_HEURISTICS = "?matching_heuristics=True"


class WeightsMismatch(InputError):
    """Some of the weights that a model needs are missing, or of another shape."""


class PyramidMissing(WeightsMismatch):
    """Weights for evaluation lack only those of the balanced feature pyramid."""


def _tagged(folder: str) -> str:
    """The name in ``last_checkpoint``; "" if there is no such file or it is broken."""
    with suppress(OSError, UnicodeDecodeError):
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as f:
            name = f.read().strip()
        if re.fullmatch(r"[^/\0\n]+\.pth", name):
            return name
    return ""


def find_checkpoint(folder: str) -> str:
    """
    The checkpoint in a directory to resume from: that of ``last_checkpoint`` or, if there is no
    such file or it is broken, the newer one of ``model_final.pth`` and that of the last iteration;
    "" if there is none.
    """
    if not folder:
        return ""
    name = _tagged(folder)
    if name:
        return os.path.join(folder, name)
    files = glob.glob(os.path.join(glob.escape(folder), "model_*.pth"))
    numbered = [file for file in files if re.search(r"model_\d{7}\.pth$", file)]
    finals = [file for file in files if os.path.basename(file) == "model_final.pth"]
    return max([*finals, *sorted(numbered)[-1:]], key=os.path.getmtime, default="")


class _AtomicPathManager:
    """A path manager that writes local files atomically."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" in mode and "://" not in path:
            return atomic_write(path, mode)
        return self._path_manager.open(path, mode, **kwargs)


class LibraCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that also loads checkpoints of mmdetection 2.x and 3.x, ImageNet
    weights of torchvision and open-mmlab, and ``libra://`` names of :mod:`libra_d2.model_zoo`. With
    the suffix ``?matching_heuristics=True``, names in the file may be the ends of the model's.

    Files that are missing, truncated, of another model, or that would execute code are refused.
    Downloads are checked against the hash in their name. Weights that are missing, of another shape
    or unused are logged in one table.

    Checkpoints are written atomically, and only if all weights are finite. Resuming skips corrupt
    ones with a warning, and finds the last one without ``last_checkpoint``, too.
    """

    def __init__(
        self, model, save_dir: str = "", *, complete: bool = False, tag: bool = True, **kwargs
    ):
        """
        Args:
            model, save_dir, kwargs: as for :class:`DetectionCheckpointer`.
            complete: whether a checkpoint must hold all weights: True for evaluation, False for
                fine-tuning.
            tag: whether :meth:`save` marks its checkpoint as the one to resume from.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = _AtomicPathManager(self.path_manager)
        self.complete = complete
        self.tag = tag
        self._resuming = False
        self._path = ""
        self._heuristics = False

    def save(self, name: str, **kwargs) -> None:
        """
        See :meth:`DetectionCheckpointer.save`.

        Raises:
            InputError: if a weight is not finite, or the file cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        for key, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise InputError(
                    f"{path}: not written, because {key} is not finite: the training has "
                    f"diverged. {self.advice()}"
                )
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as e:  # PyTorch's writer raises the latter
            raise InputError(
                f"{path}: cannot be written: {one_line(e)}. Is the disk full? {self.advice()}"
            ) from e

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self.tag:
            super().tag_last_checkpoint(last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """See :func:`find_checkpoint`."""
        return find_checkpoint(self.save_dir)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.get_checkpoint_file() != ""

    def advice(self) -> str:
        """Says from which checkpoint a training that has failed can be resumed."""
        if not self.has_checkpoint():
            return "There is no earlier checkpoint"
        return f"Training can be resumed from {self.get_checkpoint_file()}"

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """
        See :meth:`DetectionCheckpointer.resume_or_load`.

        Raises:
            InputError: if all checkpoints are broken; see also the class.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=resume)
        newest = self.get_checkpoint_file()
        if not _tagged(self.save_dir):
            self.logger.warning(
                f"last_checkpoint is missing or broken: {newest} is taken for the last one"
            )
        excluded = {newest, *(os.path.join(self.save_dir, name) for name in _WEIGHTS_ONLY)}
        others = set(self.get_all_checkpoint_files()) - excluded
        files = [newest, *sorted(others, key=os.path.getmtime, reverse=True)]
        errors = []
        self._resuming = True
        try:
            for file in files:
                try:
                    return self.load(file)
                except BrokenFileError as e:
                    errors.append(e)
                    self.logger.warning(f"This checkpoint is broken, trying the one before: {e}")
        finally:
            self._resuming = False
        raise InputError(
            f"none of the {len(files)} checkpoints in {self.save_dir} can be read, the last one "
            f"because: {errors[0]}. Without resuming the training starts over"
        )

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """See :meth:`DetectionCheckpointer.load`. Raises: InputError, see the class."""
        self._path = path
        self._heuristics = path.endswith(_HEURISTICS)
        try:
            if path:
                path = self._find(path[: -len(_HEURISTICS)] if self._heuristics else path)
            return super().load(path, *args, **kwargs)
        except OSError as e:  # an unreadable file, or a URL without a connection
            raise BrokenFileError(f"{self._path}: the weights cannot be read: {e}") from e
        finally:
            # Detectron2's main branch does not reset this when loading fails.
            self._parsed_url_during_load = None

    def _find(self, path: str) -> str:
        """The local path of an address; names of Detectron2's model zoo are left as they are."""
        if path.startswith(("http://", "https://")):
            return fetch(path)
        local = path[len("file://") :] if path.startswith("file://") else path
        if "://" in local:
            # An address without a handler is returned unchanged.
            local = self.path_manager.get_local_path(local)
        if not os.path.isfile(local):
            raise BrokenFileError(f"{path}: no such weights file")
        return path if path.startswith("detectron2://") else local

    def _load_file(self, filename: str) -> Dict[str, Any]:
        with reading_weights(self._path):
            check_declared_sizes(filename)
            if filename.endswith(".pkl"):
                load_arrays(filename)
            loaded = to_detectron2_checkpoint(super()._load_file(filename))
        if self._resuming and "trainer" in self.checkpointables and "trainer" not in loaded:
            raise BrokenFileError(f"{self._path}: it has weights only; no training resumes from it")
        return {**loaded, "matching_heuristics": True} if self._heuristics else loaded

    def _load_model(self, checkpoint: Dict[str, Any]):
        wanted = self.model.state_dict()
        for key, value in checkpoint["model"].items():
            is_real = key in wanted and wanted[key].is_floating_point()
            if is_real and "float" not in str(value.dtype):
                raise InputError(
                    f"{self._path}: {key!r} in it is of type {value.dtype}, not of floating point "
                    "numbers"
                )
        incompatible = super()._load_model(checkpoint)
        reshaped = {key: shapes for key, *shapes in incompatible.incorrect_shapes}
        absent = {*incompatible.missing_keys, *reshaped}
        names = [name for name, _ in self.model.named_parameters()]
        if absent.issuperset(names):
            example = next(iter(incompatible.unexpected_keys), "none")
            raise InputError(
                f"{self._path}: these are weights of another model: none of its names or shapes is "
                f"one of this model's (the model has, e.g., {names[0]!r}; the file has {example!r})"
            )
        if self._resuming:
            absent.update(incompatible.unexpected_keys)
        of_pyramid = {key for key in absent if key.startswith(_PYRAMID)}
        if of_pyramid == absent and absent and self.complete:
            raise PyramidMissing(
                f"{self._path}: these are weights of a model without the balanced feature pyramid, "
                "which changes the features even before it is trained"
            )
        if of_pyramid and not (self.complete or self._resuming):
            self.logger.warning(
                f"{self._path} has no weights of the balanced feature pyramid, which is trained "
                "from its initial ones"
            )
        if (self.complete or self._resuming) and absent:
            self._log_incompatible_keys(incompatible)
            first, detail = min(absent), "missing"
            if first in reshaped:
                detail = "shape {}, not {}".format(*reshaped[first])
            elif first in incompatible.unexpected_keys:
                detail = "not in the model"
            config = os.path.join(os.path.dirname(self._path), "config.yaml")
            advice = f" Their own config is {config}." if os.path.isfile(config) else ""
            raise WeightsMismatch(
                f"{self._path}: these are weights of another model than the config's. Missing, "
                f"unexpected or of another shape: {counted(len(absent), 'weight')}, the first "
                f"{first!r} ({detail}). Do the config and the number of classes belong to these "
                f"weights?{advice}"
            )
        return incompatible

    def _log_incompatible_keys(self, incompatible) -> None:
        """Log one table instead of a message for each kind."""
        rows = [
            ("other shape", key, f"{found} in the file, {wanted} in the model")
            for key, found, wanted in incompatible.incorrect_shapes
        ]
        missing, unused = incompatible.missing_keys, incompatible.unexpected_keys
        for status, keys in (("missing", missing), ("not used", unused)):
            # By the first three parts of the name, such as backbone.bottom_up.res3.
            groups = Counter(".".join(key.split(".")[:-1][:3]) for key in keys)
            rows += [(status, f"{group}.*", counted(n, "weight")) for group, n in groups.items()]
        if rows:
            table = tabulate(rows, headers=("", "weights", ""), tablefmt="pipe")
            self.logger.warning(f"Weights that were not loaded from {self._path}:\n{table}")
