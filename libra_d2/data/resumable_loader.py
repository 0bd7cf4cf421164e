# SPDX-License-Identifier: Apache-2.0
"""A data loader that goes on where another one has stopped."""

import itertools
import signal
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence

from torch.utils import data as torchdata

from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from ..utils.random_state import keep_random_state, seeded

__all__ = ["ResumableLoader"]

_POSITION = "position_in_data_order"
_GRACE = 20.0  # seconds that a worker outlives SIGTERM, for the training step to be finished
_OPTIONS = ("prefetch_factor", "persistent_workers", "pin_memory")  # those of PyTorch's loader


class _PositionedIndex(int):
    """An index into a dataset that knows how many were drawn in front of it."""

    position: int

    def __new__(cls, index: int, position: int):
        self = super().__new__(cls, index)
        self.position = position
        return self

    def __reduce__(self):
        return _PositionedIndex, (int(self), self.position)


class _PositionedSampler(torchdata.Sampler):
    """The indices of a sampler at some positions, and all from another position on."""

    def __init__(self, sampler: torchdata.Sampler, pending: Sequence[int], start: int):
        self.sampler = sampler
        self.pending = frozenset(pending)
        self.start = start

    def __iter__(self) -> Iterator[_PositionedIndex]:
        for position, index in enumerate(self.sampler):
            if position >= self.start or position in self.pending:
                yield _PositionedIndex(index, position)

    def __len__(self) -> int:
        return len(self.sampler)


class _PositionedDataset(torchdata.Dataset):
    """
    Images whose augmentation depends on a seed and on their position in the data order of all
    processes alone, and not on which process or worker has drawn what before.
    """

    def __init__(self, dataset: torchdata.Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: _PositionedIndex) -> Dict[str, Any]:
        with seeded(self.seed, index.position * self.world_size + self.rank):
            return {**self.dataset[int(index)], _POSITION: index.position}


def _as_it_is(image: Dict[str, Any]) -> Dict[str, Any]:
    return image


def _die_later(number: int, frame) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _GRACE)


def _defer_signals(worker: int) -> None:
    """Those that are sent to all processes are for the main one, which ends the workers in time."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_later)


def _in_batches(images: Iterable[Dict[str, Any]], size: int) -> Iterator[List[Dict[str, Any]]]:
    iterator = iter(images)
    while len(batch := list(itertools.islice(iterator, size))) == size:
        yield batch


class ResumableLoader:
    """
    Detectron2's data loader for training, in which order and augmentation of the images follow from
    one seed, and whose position in that order can be saved and restored to the image. The numbers
    of workers before and after may differ.
    """

    def __init__(self, make_arguments: Callable[[], Dict[str, Any]], *, seed: int):
        """
        Args:
            make_arguments: returns the arguments of ``build_detection_train_loader``, with a
                dataset to be mapped: a list or one with indices. It is called with NumPy's
                generator, which seeds Detectron2's samplers, at ``seed``.
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

    def state_dict(self) -> Dict[str, Any]:
        """The seed and the position of this process, behind the last batch that was given."""
        return {"seed": self.seed, "start": self._start, "pending": list(self._pending)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a position. Args: state: see :meth:`state_dict`."""
        if state["seed"] != self.seed:
            self._set_seed(state["seed"])
        self._start, self._pending = state["start"], list(state["pending"])

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        with keep_random_state():  # workers are seeded, to no effect
            batches = iter(self._batches())
            batch = next(batches, None)
        while batch is not None:
            self._advance([image.pop(_POSITION) for image in batch])
            yield batch
            batch = next(batches, None)

    def _batches(self) -> Iterable[List[Dict[str, Any]]]:
        """
        As ``build_detection_train_loader`` has them, except that indices are drawn here rather than
        by the workers, so that images come in one order, however many workers there are.
        """
        arguments = self._arguments
        images = torchdata.DataLoader(
            _PositionedDataset(self._dataset, self.seed),
            sampler=_PositionedSampler(self._sampler, self._pending, self._start),
            batch_size=None,
            collate_fn=_as_it_is,
            worker_init_fn=_defer_signals,
            num_workers=arguments.get("num_workers", 0),
            **{name: arguments[name] for name in _OPTIONS if name in arguments},
        )
        size = arguments["total_batch_size"] // comm.get_world_size()
        if arguments.get("aspect_ratio_grouping", True):
            return AspectRatioGroupedDataset(images, size)
        return _in_batches(images, size)

    def _advance(self, positions: List[int]) -> None:
        """
        Images are drawn in order, and given in batches of similar shapes: when a batch is complete,
        all up to its last image were drawn, and those that were not given wait for others.
        """
        start = max(self._start, max(positions) + 1)
        drawn = [*self._pending, *range(self._start, start)]
        self._pending = sorted(set(drawn).difference(positions))
        self._start = start
