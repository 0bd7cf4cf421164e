# SPDX-License-Identifier: Apache-2.0
"""Exact resuming: the state of a training besides weights, optimizer and schedule."""

import json
import logging
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch
from torch import nn

from detectron2.engine import HookBase
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from ..data import ResumableLoader
from ..errors import counted
from ..utils.random_state import get_random_state, set_random_state

__all__ = ["ExactResume"]

logger = logging.getLogger(__name__)

_WINDOW = 20  # of the medians in Detectron2's writers


class ExactResume(HookBase):
    """
    Makes a resumed training bit-identical to an uninterrupted one. With another number of
    processes, it sees the same images in the same order, with the same augmentation; sums round
    differently, and samples are drawn from other random numbers.

    Its state holds the position in the data order, the RNG states and the moving averages of
    normalizers of each process, and the histories of smoothed metrics. It is restored, and
    ``metrics.json`` cut to its length at the checkpoint, before the first iteration. (Evaluations
    use the running statistics of the main process, see :func:`share_statistics`.)

    It must be the last hook, because its :meth:`before_train` restores the RNG states.
    """

    def __init__(self, loader: Any, output_dir: str):
        """
        Args:
            loader: of the training data; it starts over unless it is a :class:`ResumableLoader`.
            output_dir: directory of ``metrics.json``.
        """
        self.loader = loader
        self.metrics_file = os.path.join(output_dir, "metrics.json")
        #: the last iteration that is in ``metrics.json``
        self.written = -1
        self._loaded: Optional[Dict[str, Any]] = None
        self._held: Optional[List[Dict[str, Any]]] = None

    def state_dict(self) -> Dict[str, Any]:
        """See :meth:`HookBase.state_dict`. Several processes must be inside :meth:`held`."""
        held = self._held
        if held is None:
            held = self._gather() if comm.get_world_size() == 1 else []
        storage, path = getattr(self.trainer, "storage", None), self.metrics_file
        return {
            "processes": held,
            "histories": _get_histories(storage) if storage else {},
            "latest": _get_latest(storage) if storage else {},
            "length": os.path.getsize(path) if os.path.isfile(path) else 0,
        }

    def _gather(self) -> List[Dict[str, Any]]:
        is_resumable = isinstance(self.loader, ResumableLoader)
        state = {
            "random": get_random_state(),
            "loader": self.loader.state_dict() if is_resumable else None,
            "normalizers": _get_normalizers(self.trainer.checkpointer.model),
        }
        return comm.gather(state)

    @contextmanager
    def held(self) -> Iterator[None]:
        """
        Gather the states of all processes, which must enter together. Checkpoints that are written
        inside have these states.
        """
        if self._held is not None:
            yield
            return
        self._held = self._gather()
        try:
            yield
        finally:
            self._held = None

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """See :meth:`HookBase.load_state_dict`; the state is restored by :meth:`before_train`."""
        self._loaded = state

    def before_train(self) -> None:
        start, state, self._loaded = self.trainer.start_iter, self._loaded, None
        model = self.trainer.checkpointer.model
        if comm.is_main_process() and start > 0:
            length = (state or {}).get("length", -1)
            self.written = _cut_metrics(self.metrics_file, start, length)
        if not (state and state["processes"]):
            if start > 0:
                logger.warning(
                    "The checkpoint does not have the state of its training: the data order and "
                    "the random numbers restart"
                )
            return
        _set_histories(self.trainer.storage, state, self.written)
        processes, rank, number = state["processes"], comm.get_rank(), comm.get_world_size()
        # With more processes than before, those that were not there start from the state of one
        # that was.
        own = processes[rank % len(processes)]
        # Normalizers count the objects of a process' share of the batch.
        share = len(processes) / number
        _set_normalizers(model, {name: x * share for name, x in own["normalizers"].items()})
        states = [process["loader"] for process in processes]
        if isinstance(self.loader, ResumableLoader) and None not in states:
            self.loader.load_state_dicts(states)
        else:
            logger.warning(
                f"A {type(self.loader).__name__} cannot continue where it was: the data order "
                "restarts"
            )
        set_random_state(own["random"])
        if rank >= len(processes):  # with random numbers of its own
            seed_all_rng(int(torch.randint(1 << 30, ())) + rank)
        if number != len(processes):
            logger.info(
                f"The training had {counted(len(processes), 'process')} and has {number} now: it "
                "continues in the same order of images"
            )


def _get_normalizers(model: nn.Module) -> Dict[str, float]:
    """The moving averages of loss normalizers, by the name of the module that keeps them."""
    return {
        name: float(module.loss_normalizer)
        for name, module in model.named_modules()
        if isinstance(module, DenseDetector) and hasattr(module, "loss_normalizer")
    }


def _set_normalizers(model: nn.Module, normalizers: Dict[str, float]) -> None:
    for name, module in model.named_modules():
        if name in normalizers:
            module.loss_normalizer = normalizers[name]


def _is_reproducible(name: str) -> bool:
    return "time" not in name and name != "eta_seconds"


def _get_histories(storage: EventStorage) -> Dict[str, List[List[float]]]:
    """The latest values, with their iterations, of smoothed metrics other than times."""
    smoothed = storage.smoothing_hints()
    return {
        name: [[float(value), int(iteration)] for value, iteration in history.values()[-_WINDOW:]]
        for name, history in storage.histories().items()
        if smoothed.get(name, True) and _is_reproducible(name)
    }


def _get_latest(storage: EventStorage) -> Dict[str, List[float]]:
    """The latest value, with its iteration, of the other metrics, again without times."""
    smoothed = storage.smoothing_hints()
    return {
        name: [float(value), int(iteration)]
        for name, (value, iteration) in storage.latest().items()
        if not smoothed[name] and _is_reproducible(name)
    }


def _set_histories(storage: EventStorage, state: Dict[str, Any], written: int) -> None:
    """Restore metrics; the writers get those of iterations after ``written``."""
    now = storage.iter
    for name, values in state["histories"].items():
        for value, storage.iter in values:
            if storage.iter > written:
                storage.put_scalar(name, value)
            else:
                storage.histories()[name].update(value, storage.iter)
    for name, (value, storage.iter) in state["latest"].items():
        if storage.iter > written:
            storage.put_scalar(name, value, smoothing_hint=False)
    storage.iter = now


def _cut_metrics(path: str, iteration: int, length: int) -> int:
    """
    Cut a ``metrics.json``, if there is one, to ``length`` bytes (-1: unknown), without truncated
    lines and those from ``iteration`` on. It is changed in place, because it may be open already.

    Returns:
        the last iteration that is left, -1 if there is none.
    """
    if not os.path.isfile(path):
        return -1
    with open(path, "rb+") as f:
        lines = f.read(length).splitlines(keepends=True)
        kept = [line for line in lines if _iteration(line) < iteration]
        f.seek(0)
        f.writelines(kept)
        f.truncate()
    return int(max(map(_iteration, kept), default=-1))


def _iteration(line: bytes) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut short or broken
