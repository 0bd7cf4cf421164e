# SPDX-License-Identifier: Apache-2.0
"""Training hooks: checkpoints, signals, best model, early stopping, averaged weights, speed."""

import copy
import logging
import math
import os
import re
import signal
import sys
from contextlib import suppress
from typing import Any, Dict, Optional, Type

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, PeriodicCheckpointer, PreciseBN
from detectron2.utils import comm

from ..checkpoint import LibraCheckpointer
from ..data import ResumableLoader
from ..errors import InputError
from .launch import Aborted
from .resuming import ExactResume

__all__ = [
    "AverageWeights",
    "BestModel",
    "CheckpointHook",
    "EarlyStopping",
    "PreciseStatistics",
    "StopOnSignal",
    "Throughput",
    "TrainingEnded",
]


logger = logging.getLogger(__name__)


class TrainingEnded(BaseException):
    """Ends a training early, as if the current iteration had been the last one."""


class CheckpointHook(PeriodicCheckpointer):
    """
    :class:`PeriodicCheckpointer` whose ``max_to_keep`` includes checkpoints written before the
    training was resumed. All processes need it, to gather their states; the main process writes.
    """

    def __init__(self, checkpointer: Checkpointer, resume: ExactResume, period: int, **kwargs):
        """
        Args:
            checkpointer, period, kwargs: see :class:`PeriodicCheckpointer`.
            resume: gathers the states of all processes.
        """
        super().__init__(checkpointer, period, **kwargs)
        self.resume = resume

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is None or self.trainer.start_iter == 0:
            return
        files = self.checkpointer.get_all_checkpoint_files()
        files = [f for f in files if re.fullmatch(r"model_\d{7}\.pth", os.path.basename(f))]
        self.recent_checkpoints = sorted(files)

    def after_step(self) -> None:
        self.max_iter = self.trainer.max_iter  # the training may end early
        next_iter = self.trainer.iter + 1
        if next_iter % self.period == 0 or next_iter >= self.max_iter:
            # An evaluation that was made up for had its checkpoint before.
            again = os.path.join(self.checkpointer.save_dir, f"model_{self.trainer.iter:07d}.pth")
            self.recent_checkpoints = [f for f in self.recent_checkpoints if f != again]
            with self.resume.held():
                if comm.is_main_process():
                    super().after_step()
                    # Each step removes one, but an interruption writes one more, and a run that is
                    # resumed may have kept more.
                    while len(self.recent_checkpoints) > (self.max_to_keep or math.inf):
                        outdated = self.recent_checkpoints.pop(0)
                        logger.info(f"Removing {outdated}, an older checkpoint than are kept")
                        with suppress(FileNotFoundError):
                            os.remove(outdated)


class PreciseStatistics(PreciseBN):
    """
    :class:`PreciseBN` that computes the statistics from the same images each time, so that they are
    the same after a training was resumed.
    """

    def update_stats(self) -> None:
        """See :meth:`PreciseBN.update_stats`."""
        if not self._disabled and isinstance(self._data_loader, ResumableLoader):
            self._data_iter = iter(copy.copy(self._data_loader))  # which starts at its position
        super().update_stats()


class StopOnSignal(HookBase):
    """
    Stops the training on SIGTERM or SIGUSR1, which schedulers send before a job's time is over, and
    on SIGINT (Ctrl-C): after the current iteration, with a checkpoint to resume from; a second
    Ctrl-C stops at once. The exit status is 128 plus the signal's number, as in shells.

    Several processes agree on the iteration, asynchronously during the next one. An evaluation is
    aborted; it is made up for when the training is resumed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received: Optional[signal.Signals] = None
        self._previous: Dict[signal.Signals, Any] = {}
        self._interruptible = False
        self._group = None
        self._pending = None

    def before_train(self) -> None:
        """Install the signal handlers."""
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        if comm.get_world_size() > 1:
            # On CPUs, so that no process has to wait for its GPU.
            self._group = distributed.new_group(backend="gloo")

    def after_train(self) -> None:
        """Restore the signal handlers, and wait for pending communication."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            # A thread still running when the interpreter exits would abort the process.
            with suppress(RuntimeError):  # another process may be gone
                self._pending[0].wait()
            self._pending = None

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._interruptible:
            self._interruptible = False
            self.stop(Aborted)

    def after_step(self) -> None:
        """Stop, by raising SystemExit, if a process has received a signal."""
        if self._group is None:
            if self.received is not None:
                self.stop()
            return
        if self._pending is not None:
            work, number = self._pending
            work.wait()
            if number.item():
                self.received = signal.Signals(number.item())
                self.stop()
        number = torch.tensor(self.received or 0)
        work = distributed.all_reduce(
            number, distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = work, number

    def stop(self, exit: Type[SystemExit] = SystemExit) -> None:
        """Write a checkpoint and raise ``exit``."""
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        self.trainer.save_state()
        if comm.is_main_process():
            message = f"{self.received.name}: stopped after iteration {iteration}; "
            print(f"{message}--resume continues", file=sys.stderr, flush=True)
        raise exit(128 + self.received)

    def __enter__(self) -> None:
        """Until :meth:`__exit__`, a signal aborts the evaluation, which changes no state."""
        if self.received is not None:
            self.stop(Aborted)
        self._interruptible = True

    def __exit__(self, kind, error, traceback) -> None:
        self._interruptible = False
        if isinstance(error, Exception) and self.received is not None:
            self.stop(Aborted)  # it failed because another process has aborted it


class Throughput(HookBase):
    """Logs the images per second of all processes, by the median time of an iteration."""

    def __init__(self, batch_size: int):
        """Args: batch_size: images in an iteration."""
        self.batch_size = batch_size

    def after_train(self) -> None:
        times = self.trainer.storage.histories().get("time")  # of IterationTimer
        if times is not None:
            logger.info(f"{self.batch_size / times.median(1000):.3g} images per second (median)")


class BestModel(BestCheckpointer):
    """:class:`BestCheckpointer` that can be resumed. It writes ``model_best.pth``, weights only."""

    def __init__(
        self, eval_period: int, checkpointer: Checkpointer, metric: str, data: Dict[str, Any]
    ):
        """
        Args:
            eval_period, checkpointer, metric: see :class:`BestCheckpointer`.
            data: what it is measured on; see :func:`libra_d2.config.describe`.
        """
        super().__init__(eval_period, checkpointer, metric)
        self.measure = {"metric": metric, **data}

    def describe(self) -> str:
        """One line about the best model; "" if there is none."""
        if self.best_metric is None:
            return ""
        # Detectron2 counts the last evaluation as one iteration after the last.
        iterations = min(self.best_iter + 1, self.trainer.max_iter)
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        value = f"{self._val_metric} {self.best_metric:.1f}"
        return f"best: {value} after {iterations} iterations, {path}"

    def state_dict(self) -> Dict[str, Any]:
        return {
            "measure": self.measure,
            "best_metric": self.best_metric,
            "best_iter": self.best_iter,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """See :meth:`HookBase.load_state_dict`; the best by another measure does not count."""
        before = state["measure"]
        if before == self.measure:
            self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]
        elif state["best_metric"] is not None:
            logger.warning(
                f"The best model so far had {before['metric']} {state['best_metric']:.1f}. The "
                "metric or the validation data differs now: the best model is chosen anew"
            )


class EarlyStopping(HookBase):
    """
    Ends the training when a metric has not risen for some evaluations, which are counted from the
    first in which it is a number.
    """

    def __init__(self, eval_period: int, metric: str, patience: int, data: Dict[str, Any]):
        """
        Args:
            eval_period: in iterations, greater than 0.
            metric: such as "bbox/AP".
            patience: number of evaluations without a new maximum after which it ends.
            data: what it is measured on; see :func:`libra_d2.config.describe`.
        """
        self.measure = {"metric": metric, **data}
        self.period = eval_period
        self.metric = metric
        self.patience = patience
        self.best = -math.inf
        self.num_bad = 0

    def state_dict(self) -> Dict[str, Any]:
        return {"measure": self.measure, "best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """See :meth:`HookBase.load_state_dict`; the best by another measure does not count."""
        if state["measure"] == self.measure:
            self.best, self.num_bad = state["best"], state["num_bad"]

    @property
    def is_over(self) -> bool:
        """Whether there is no patience left."""
        return self.num_bad >= self.patience

    def after_step(self) -> None:
        """
        All processes decide by the metric of the main process.

        Raises:
            InputError: if there is no such metric.
        """
        next_iter = self.trainer.iter + 1
        if next_iter % self.period != 0 or next_iter >= self.trainer.max_iter:
            return
        values = self.trainer.storage.latest()
        names = sorted(name for name in values if name.split("/")[-1].startswith("AP"))
        latest, names = comm.all_gather((values.get(self.metric, (None,))[0], names))[0]
        if latest is None:
            raise InputError(f"evaluations do not report {self.metric}, but {', '.join(names)}")
        if math.isnan(latest) and self.best == -math.inf:
            return  # nothing has been detected yet
        self.num_bad = 0 if latest > self.best else self.num_bad + 1
        self.best = max(self.best, latest) if latest == latest else self.best
        if self.is_over:
            self.trainer.end_early(
                f"{self.metric} has not risen above {self.best:.2f} in {self.patience} evaluations"
            )


class AverageWeights(HookBase):
    """
    Keeps an exponential moving average of the weights. Buffers, such as batch norm statistics, are
    copied.
    """

    def __init__(self, model: nn.Module, decay: float, output_dir: str, **checkpointables: Any):
        """
        Args:
            model: to average, without ``DistributedDataParallel``.
            decay: in (0, 1), share of the average that is kept in a step.
            output_dir: directory of ``model_final_ema.pth``.
            checkpointables: what this file keeps besides the weights, see :class:`Checkpointer`.
        """
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.output_dir = output_dir
        self.checkpointables = checkpointables
        self._is_resumed = False

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        return self.average.module

    def before_train(self) -> None:
        """Start from the loaded weights, unless an average was loaded as well."""
        if not self._is_resumed:
            self.model.load_state_dict(self.trainer.checkpointer.model.state_dict())

    def after_step(self) -> None:
        self.average.update_parameters(self.trainer.checkpointer.model)

    def after_train(self) -> None:
        """Write the averaged weights if the training is complete."""
        if self.trainer.iter >= self.trainer.max_iter:
            checkpointer = LibraCheckpointer(
                *(self.model, self.output_dir), tag=False, **self.checkpointables
            )
            checkpointer.save("model_final_ema")

    def state_dict(self) -> Dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.average.load_state_dict(state)
        self._is_resumed = True
