# SPDX-License-Identifier: Apache-2.0
"""Training hooks: checkpoints, signals, best model, early stopping, moving average of weights."""

import os
import re
import signal
import sys
from contextlib import suppress
from typing import Any, Dict, Optional

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, PeriodicCheckpointer
from detectron2.utils import comm

from ..checkpoint import LibraCheckpointer
from .resuming import ExactResume

__all__ = [
    "AverageWeights",
    "BestModel",
    "CheckpointHook",
    "EarlyStopping",
    "StopOnSignal",
    "TrainingEnded",
]


class TrainingEnded(BaseException):
    """A training ends before its last iteration, as if that had been its last one."""


class CheckpointHook(PeriodicCheckpointer):
    """
    :class:`PeriodicCheckpointer` whose ``max_to_keep`` includes the checkpoints that were written
    before the training was resumed. All processes have it, since each has a state to save; the main
    one writes.
    """

    def __init__(self, checkpointer: Checkpointer, resume: ExactResume, period: int, **kwargs):
        """
        Args:
            checkpointer, period, kwargs: see :class:`PeriodicCheckpointer`.
            resume: knows the states of all processes.
        """
        super().__init__(checkpointer, period, **kwargs)
        self.resume = resume

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is None or self.trainer.start_iter == 0:
            return
        files = self.checkpointer.get_all_checkpoint_files()
        files = [f for f in files if re.fullmatch(r"model_\d{7}\.pth", os.path.basename(f))]
        self.recent_checkpoints = sorted(files)[-self.max_to_keep :]

    def after_step(self) -> None:
        self.max_iter = self.trainer.max_iter  # the training may end early
        next_iter = self.trainer.iter + 1
        if next_iter % self.period == 0 or next_iter >= self.max_iter:
            with self.resume.held():
                if comm.is_main_process():
                    super().after_step()


class StopOnSignal(HookBase):
    """
    Make SIGTERM, by which schedulers announce that a job's time is over, SIGUSR1, which they can be
    told to send ahead of that, and SIGINT (Ctrl-C) stop the training after the iteration it is in,
    with a checkpoint to resume from; a second Ctrl-C stops at once. The exit status is 128 and the
    signal's number, as if the signal had ended the process.

    Several processes agree on an iteration, of which they tell one another while they compute the
    next one. An evaluation is broken off.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received: Optional[signal.Signals] = None
        self._previous: Dict[signal.Signals, Any] = {}
        self._interruptible = False
        self._group = None
        self._pending = None

    def before_train(self) -> None:
        """Start to listen. See :meth:`HookBase.before_train`."""
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        if comm.get_world_size() > 1:
            # One for CPUs: nobody has to wait for a GPU.
            self._group = distributed.new_group(backend="gloo")

    def after_train(self) -> None:
        """Stop to listen, and leave nothing pending. See :meth:`HookBase.after_train`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            # A thread that is still at it when the interpreter ends would abort the process.
            with suppress(RuntimeError):  # another process may be gone
                self._pending[0].wait()
            self._pending = None

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._interruptible:
            self._interruptible = False
            self.stop()

    def after_step(self) -> None:
        """
        Stop if the signal has come.

        Raises:
            SystemExit: then.
        """
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

    def stop(self) -> None:
        """Write a checkpoint and leave."""
        iteration = self.trainer.iter
        self.trainer.save_state()
        if comm.is_main_process():
            message = f"{self.received.name}: stopped after iteration {iteration}; "
            print(f"{message}--resume continues", file=sys.stderr, flush=True)
        sys.exit(128 + self.received)

    def __enter__(self) -> None:
        """Until :meth:`__exit__` a signal stops what is being done, which changes no state."""
        if self.received is not None and self._group is None:
            self.stop()
        self._interruptible = True

    def __exit__(self, *error) -> None:
        self._interruptible = False


class BestModel(BestCheckpointer):
    """
    :class:`BestCheckpointer` that knows its best after the training was resumed, too.

    It writes ``model_best.pth``, weights alone.
    """

    def describe(self) -> str:
        """The best model, in a line; "" if there is none."""
        if self.best_metric is None:
            return ""
        # Detectron2 files the last evaluation under the iteration after the last one.
        iterations = min(self.best_iter + 1, self.trainer.max_iter)
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        value = f"{self._val_metric} {self.best_metric:.1f}"
        return f"best: {value} after {iterations} iterations, {path}"

    def state_dict(self) -> Dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


class EarlyStopping(HookBase):
    """End the training when a metric has not risen for some evaluations."""

    def __init__(self, eval_period: int, metric: str, patience: int):
        """
        Args:
            eval_period: in iterations, greater than 0.
            metric: such as "bbox/AP".
            patience: number of evaluations without a new maximum after which it ends.
        """
        self.period = eval_period
        self.metric = metric
        self.patience = patience
        self.best = -float("inf")
        self.num_bad = 0

    def state_dict(self) -> Dict[str, Any]:
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.best, self.num_bad = state["best"], state["num_bad"]

    @property
    def is_over(self) -> bool:
        """Whether there is no patience left."""
        return self.num_bad >= self.patience

    def after_step(self) -> None:
        """See :meth:`HookBase.after_step`; the main process knows the metric."""
        next_iter = self.trainer.iter + 1
        if next_iter % self.period != 0 or next_iter >= self.trainer.max_iter:
            return
        latest = self.trainer.storage.latest().get(self.metric, (float("nan"), 0))[0]
        latest = comm.all_gather(float(latest))[0]
        self.num_bad = 0 if latest > self.best else self.num_bad + 1
        self.best = max(self.best, latest) if latest == latest else self.best
        if self.is_over:
            self.trainer.end_early(
                f"{self.metric} has not risen above {self.best:.2f} in {self.patience} evaluations"
            )


class AverageWeights(HookBase):
    """
    Keep an exponential moving average of the weights; buffers, such as statistics of batch norm,
    are copies.
    """

    def __init__(self, model: nn.Module, decay: float, output_dir: str):
        """
        Args:
            model: whose weights are averaged, not in a ``DistributedDataParallel``.
            decay: in (0, 1), share of the average that a step keeps.
            output_dir: directory for ``model_final_ema.pth``.
        """
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.output_dir = output_dir
        self._is_resumed = False

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        return self.average.module

    def before_train(self) -> None:
        """See :meth:`HookBase.before_train`; weights were loaded since this hook was made."""
        if not self._is_resumed:
            model = getattr(self.trainer.model, "module", self.trainer.model)
            self.model.load_state_dict(model.state_dict())

    def after_step(self) -> None:
        model = self.trainer.model
        self.average.update_parameters(getattr(model, "module", model))

    def after_train(self) -> None:
        """See :meth:`HookBase.after_train`; writes the averaged weights of a whole training."""
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            LibraCheckpointer(self.model, self.output_dir, tag=False).save("model_final_ema")

    def state_dict(self) -> Dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.average.load_state_dict(state)
        self._is_resumed = True
