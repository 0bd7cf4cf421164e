# SPDX-License-Identifier: Apache-2.0
import os
import re
import signal
import sys

from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm

__all__ = ["CheckpointHook", "StopOnSignal"]


class CheckpointHook(PeriodicCheckpointer):
    """
    Detectron2's hook, which with ``max_to_keep`` also removes the checkpoints that were written
    before the training was resumed.
    """

    def before_train(self) -> None:
        """See :meth:`HookBase.before_train`."""
        super().before_train()
        if self.max_to_keep is None or self.trainer.start_iter == 0:
            return
        files = self.checkpointer.get_all_checkpoint_files()
        files = [f for f in files if re.fullmatch(r"model_\d{7}\.pth", os.path.basename(f))]
        self.recent_checkpoints = sorted(files)[-self.max_to_keep :]


class StopOnSignal(HookBase):
    """
    Make SIGTERM, by which schedulers announce that a job's time is over, stop the training after
    the iteration it is in, with a checkpoint to resume from. The exit status is 143, as if the
    signal had ended the process.
    """

    def __init__(self):
        self.received = False
        self._previous = None

    def before_train(self) -> None:
        """Start to listen. See :meth:`HookBase.before_train`."""
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def after_train(self) -> None:
        """Stop to listen. See :meth:`HookBase.after_train`."""
        signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, number, frame) -> None:
        self.received = True

    def after_step(self) -> None:
        """
        Stop if the signal has come.

        Raises:
            SystemExit: then.
        """
        if not self.received:
            return
        iteration = self.trainer.iter
        self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        if comm.is_main_process():
            message = f"SIGTERM: stopped after iteration {iteration}; --resume continues"
            print(message, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)
