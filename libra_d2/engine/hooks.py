# SPDX-License-Identifier: Apache-2.0
"""What happens besides the steps of a training, between them."""

import os
import re
import signal
import sys
from typing import Any, Dict, Optional

import torch
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, PeriodicCheckpointer
from detectron2.utils import comm

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
    Detectron2's hook, which with ``max_to_keep`` also removes the checkpoints that were written
    before the training was resumed. It is there in all processes, each of which has a state to
    save; the main one writes.
    """

    def before_train(self) -> None:
        """See :meth:`HookBase.before_train`."""
        super().before_train()
        if self.max_to_keep is None or self.trainer.start_iter == 0:
            return
        files = self.checkpointer.get_all_checkpoint_files()
        files = [f for f in files if re.fullmatch(r"model_\d{7}\.pth", os.path.basename(f))]
        self.recent_checkpoints = sorted(files)[-self.max_to_keep :]

    def after_step(self) -> None:
        """See :meth:`HookBase.after_step`."""
        self.max_iter = self.trainer.max_iter  # the training may end early
        next_iter = self.trainer.iter + 1
        if next_iter % self.period == 0 or next_iter >= self.max_iter:
            self.trainer.collect_states()
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
        """Stop to listen. See :meth:`HookBase.after_train`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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
                self.trainer.collect_states()
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

    def state_dict(self) -> Dict[str, Any]:
        """See :meth:`HookBase.state_dict`."""
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """See :meth:`HookBase.load_state_dict`."""
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
        """See :meth:`HookBase.state_dict`."""
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """See :meth:`HookBase.load_state_dict`."""
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

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: whose weights are averaged, not in a ``DistributedDataParallel``.
            decay: in (0, 1), share of the average that a step keeps.
        """
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.is_resumed = False

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        return self.average.module

    def after_step(self) -> None:
        """See :meth:`HookBase.after_step`."""
        model = self.trainer.model
        self.average.update_parameters(getattr(model, "module", model))

    def state_dict(self) -> Dict[str, Any]:
        """See :meth:`HookBase.state_dict`."""
        return self.average.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """See :meth:`HookBase.load_state_dict`."""
        self.average.load_state_dict(state)
        self.is_resumed = True
