# SPDX-License-Identifier: Apache-2.0
"""A data loader whose position can be saved and restored."""

import atexit
import ctypes
import multiprocessing
import os
import signal
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

from torch.utils import data as torchdata

from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from ..utils.random_state import keep_random_state, seeded

__all__ = ["ResumableLoader"]

_POSITION = "position_in_data_order"
_GRACE = 20.0  # seconds that a worker outlives SIGTERM, so that the training step can be finished
_OPTIONS = ("prefetch_factor", "persistent_workers", "pin_memory")  # of torch's DataLoader


class _PositionedDataset(torchdata.Dataset):
    """
    Images whose augmentation depends only on a seed and on their position in the data order of all
    processes, not on what a process or worker has drawn before.
    """

    def __init__(self, dataset: torchdata.Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __getitem__(self, position_and_index: Tuple[int, int]) -> Dict[str, Any]:
        position, index = position_and_index
        with seeded(self.seed, position * self.world_size + self.rank):
            return {**self.dataset[index], _POSITION: position}


def _defer_signals(is_over: Any, worker: int) -> None:
    """
    Leave signals to the main process, which shuts its workers down.

    Args:
        is_over: shared with the main process; its ``value`` says that no more images are needed.
        worker: its number, which PyTorch passes.
    """

    def exit_later(number: int, frame: Any) -> None:
        if is_over.value:
            os._exit(0)
        # A worker that a signal has ended is an error of the main process, which may be evaluating.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, _GRACE)

    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, exit_later)


class ResumableLoader:
    """
    Detectron2's data loader for training, whose data order and augmentation follow from one seed,
    and whose position in that order can be saved and restored exactly, also with another number of
    workers or processes.

    All processes share one endless sequence of images, from which process ``r`` of ``n`` draws the
    images ``r``, ``r + n``, ``r + 2n``, and so on. Detectron2's samplers do so. A sampler of your
    own must do it as well, with a sequence that does not depend on the number of processes.
    """

    def __init__(self, make_arguments: Callable[[], Dict[str, Any]], *, seed: int):
        """
        Args:
            make_arguments: returns the arguments of ``build_detection_train_loader``, whose dataset
                is a list or map-style. Called with NumPy's generator, from which Detectron2's
                samplers draw their seed, seeded with ``seed``.
            seed: at least 0, the same in all processes.
        """
        self._make_arguments = make_arguments
        self._set_seed(seed)
        self._start = 0
        self._pending: List[int] = []

    def _set_seed(self, seed: int) -> None:
        with seeded(seed):
            self._arguments = self._make_arguments()
            dataset, sampler = self._arguments["dataset"], self._arguments.get("sampler")
            if isinstance(dataset, list):
                dataset = DatasetFromList(dataset, copy=False)
            self._dataset = MapDataset(dataset, self._arguments["mapper"])
            self._sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
        self.seed = seed

    @property
    def num_images(self) -> int:
        """The number of images that are drawn from."""
        return len(self._dataset)

    def state_dict(self) -> Dict[str, Any]:
        """The seed, and the position of this process after the last batch that it returned."""
        return {"seed": self.seed, "start": self._start, "pending": list(self._pending)}

    def load_state_dicts(self, states: Sequence[Dict[str, Any]]) -> None:
        """
        Continue where the processes of a training were. Together, the processes that there are now
        return each image that those have not returned.

        Args:
            states: of all processes that there were, in the order of their ranks; see
                :meth:`state_dict`. Their number may be another than now.
        """
        if states[0]["seed"] != self.seed:
            self._set_seed(states[0]["seed"])
        rank, number = comm.get_rank(), comm.get_world_size()
        # In the sequence of all processes: what is left before the first image that none has drawn.
        end = max(state["start"] for state in states) * len(states)
        left = [
            position * len(states) + r
            for r, state in enumerate(states)
            for position in (*state["pending"], *range(state["start"], end // len(states)))
        ]
        # The images before `end` that this process draws, as its own positions.
        self._start = len(range(rank, end, number))
        self._pending = sorted(position // number for position in left if position % number == rank)
        while self._pending[-1:] == [self._start - 1]:  # which this process has not drawn, either
            self._start = self._pending.pop()

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        is_over = multiprocessing.RawValue(ctypes.c_bool, False)
        end = partial(setattr, is_over, "value", True)
        atexit.register(end)  # Python ends workers by SIGTERM if something still refers to them
        try:
            with keep_random_state():  # PyTorch draws a seed for the workers, which is not used
                batches = iter(self._batches(partial(_defer_signals, is_over)))
                batch = next(batches, None)
            while batch is not None:
                self._advance([image.pop(_POSITION) for image in batch])
                yield batch
                batch = next(batches, None)
        finally:
            end()
            atexit.unregister(end)

    def _draw(self) -> Iterator[Tuple[int, int]]:
        """Position and index of each pending image, and of all from the start position on."""
        start, pending = self._start, frozenset(self._pending)
        for position, index in enumerate(self._sampler):
            if position >= start or position in pending:
                yield position, int(index)

    def _batches(self, worker_init_fn: Callable[[int], None]) -> Iterable[List[Dict[str, Any]]]:
        """
        The batches of ``build_detection_train_loader``. Indices are drawn in the main process, so
        that the data order does not depend on the number of workers.
        """
        arguments = self._arguments
        images = torchdata.DataLoader(
            _PositionedDataset(self._dataset, self.seed),
            sampler=self._draw(),
            batch_size=None,
            collate_fn=trivial_batch_collator,
            worker_init_fn=worker_init_fn,
            num_workers=arguments.get("num_workers", 0),
            **{name: arguments[name] for name in _OPTIONS if name in arguments},
        )
        size = arguments["total_batch_size"] // comm.get_world_size()
        if arguments.get("aspect_ratio_grouping", True):
            return AspectRatioGroupedDataset(images, size)
        return torchdata.BatchSampler(images, size, drop_last=True)

    def _advance(self, positions: List[int]) -> None:
        """
        Images are drawn in order and grouped by aspect ratio: when a batch is complete, all images
        up to its last one have been drawn, and those not returned yet wait for their group to fill.
        """
        start = max(self._start, max(positions) + 1)
        drawn = [*self._pending, *range(self._start, start)]
        self._pending = sorted(set(drawn).difference(positions))
        self._start = start
