# SPDX-License-Identifier: Apache-2.0
"""Checks of the image files of a dataset, each of which is opened once."""

import multiprocessing
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Callable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils import data as torchdata
from tqdm import tqdm

from ..errors import InputError
from .image_reading import UNREADABLE, displayed_size, is_whole, read_image, why_unreadable
from .resize import OpenCVResizeShortestEdge

__all__ = ["ImageChecks", "ResizeLimits", "check_resized"]

#: for each pair of config keys, the lengths of the shorter side and the limit of the longer one
ResizeLimits = Mapping[str, Tuple[Sequence[int], int]]

UNKNOWN = -1  # in place of the state of a file
_MAX_PIXELS = 2**26  # of a resized image: 50 times those of 1333 x 800
# Network file systems answer many requests at a time.
_THREADS = 16
# Threads that open images wait for the interpreter lock; processes do not, and have few threads.
# Starting them for fewer images would not pay, nor where each has to import everything anew.
_THREADS_OF_PROCESS = 2
_MIN_PER_PROCESS = 4000
_MAX_PROCESSES = 16
_BATCH = 256  # images that a process takes at a time
_PARTS = 8  # in which a thread takes its share: not all images take the same time
_MAX_ERRORS = 10  # that one message names


def check_resized(
    names: Sequence[str], sizes: np.ndarray, image_root: str, limits: ResizeLimits
) -> None:
    """
    Args:
        names, sizes: see :class:`ImageChecks`.
        limits: what the images are resized to.

    Raises:
        InputError: if an image is resized to less than a pixel or to too many.
    """
    _, first = np.unique(sizes, axis=0, return_index=True)  # of each size
    for image in sorted(first.tolist()):
        width, height = sizes[image].tolist()
        for keys, (lengths, limit) in limits.items():
            for length in filter(None, lengths):  # 0 keeps the size
                shape = OpenCVResizeShortestEdge.get_output_shape(height, width, length, limit)
                if min(shape) < 1 or shape[0] * shape[1] > _MAX_PIXELS:
                    raise InputError(
                        f"{os.path.join(image_root, names[image])}: {width} x {height} pixels "
                        f"become {shape[1]} x {shape[0]} with {keys} ({length}, {limit}), which no "
                        "network can use; change them, or leave the image out"
                    )


def _check_inside(name: str, image_root: str, json_file: str) -> None:
    """Raise InputError unless an image is in ``image_root``."""
    if os.pardir not in name and not os.path.isabs(name):
        return
    path = os.path.join(image_root, name)
    inside = os.path.relpath(os.path.normpath(path), os.path.normpath(image_root))
    if inside.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{path}: {json_file} names an image outside of the image directory {image_root}. If "
            "you trust it, name a directory that all of its images are in, such as /"
        )


def _file_state(path: str) -> Tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; :data:`UNKNOWN` without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return UNKNOWN, UNKNOWN
    is_file = stat.S_ISREG(status.st_mode)
    return (status.st_size, status.st_mtime_ns) if is_file else (UNKNOWN, UNKNOWN)


def _check_image(path: str, expected: Tuple[int, int], json_file: str) -> None:
    """Raise InputError unless a file is a readable image of a width and height."""
    try:
        with Image.open(path) as file:
            size = file.size
            # Detectron2 applies the Exif orientation. It may be at the end of a PNG file, which
            # is not worth reading if the size is right.
            if file.format != "PNG" or size != expected:
                size = displayed_size(file)
            whole = is_whole(path, file.format)
    except UNREADABLE as e:
        raise InputError(f"{path}: not a readable image ({why_unreadable(e)})") from None
    if size != expected:
        raise InputError(
            f"{path}: the image is {size[0]} x {size[1]} pixels, but {json_file} says "
            f"{expected[0]} x {expected[1]}"
        )
    if not whole:
        read_image(path)


def _in_threads(function: Callable, indices: Sequence[int], num_threads: int) -> List:
    """The values of ``function`` in order; the first error ends it."""
    size = len(indices) // (_PARTS * num_threads) + 1
    parts = (indices[i : i + size] for i in range(0, len(indices), size))
    with ThreadPoolExecutor(num_threads) as threads:
        found = threads.map(lambda part: [function(i) for i in part], parts)
        return list(chain.from_iterable(found))


class _Checks(torchdata.Dataset):
    """Checks image files, in batches, each of them by several threads."""

    def __init__(self, paths: Sequence[str], sizes: np.ndarray, json_file: str, num_threads: int):
        self.paths, self.sizes, self.json_file = paths, sizes, json_file
        self.num_threads = num_threads

    def __getitem__(self, i: int) -> str:
        """What is wrong with an image, "" if nothing is; raised, it would keep processes."""
        try:
            _check_image(self.paths[i], tuple(self.sizes[i].tolist()), self.json_file)
        except InputError as e:
            return str(e)
        return ""

    def __getitems__(self, indices: np.ndarray) -> List[str]:
        """What is wrong with those of some images that are not as they should be."""
        return list(filter(None, _in_threads(self.__getitem__, indices.tolist(), self.num_threads)))


def _num_processes(num_images: int, is_idle: bool) -> int:
    """How many processes to start, 0 for none, beside this one, which may be idle meanwhile."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    cores = cores if is_idle else max(cores - 1, 1)
    num = min(cores, _MAX_PROCESSES, num_images // _MIN_PER_PROCESS)
    if num < 1 or multiprocessing.current_process().daemon:
        return 0
    # Asking fixes the method for this process, as starting processes does.
    return num if multiprocessing.get_start_method() == "fork" else 0


class ImageChecks:
    """
    Checks that images are in a directory, are images, and have the size in the annotations. JPEG
    and PNG files are only decoded if their end is missing. Only files that have changed since they
    were checked are opened. If there are many, other processes begin at once to open them.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: np.ndarray,
        image_root: str,
        json_file: str,
        amount: int = -1,
        states: Optional[np.ndarray] = None,
        is_idle: bool = True,
    ):
        """
        Args:
            names: of files, relative to ``image_root``.
            sizes: (N, 2) widths and heights in pixels.
            image_root: the directory.
            json_file: where they are from, for messages.
            amount: how many images to check, in equal distances; -1 for all.
            states: (N, 2) int64, sizes of the files in bytes and times of their last change in
                nanoseconds when they were checked; -1 if they never were. Updated in place.
            is_idle: whether this process has nothing to do until :meth:`finish` is called.

        Raises:
            InputError: if the directory or a file is missing, or a file is elsewhere.
        """
        if not os.path.isdir(image_root):
            raise InputError(f"{image_root}: no such image directory")
        for name in names:
            _check_inside(name, image_root, json_file)
        paths = [os.path.join(image_root, name) for name in names]
        self._states = np.full((len(names), 2), UNKNOWN) if states is None else states
        chosen = _spread(amount, len(names))
        found = _in_threads(lambda i: _file_state(paths[i]), chosen.tolist(), _THREADS)
        found = np.array(found, np.int64).reshape(-1, 2)
        missing = chosen[found[:, 0] == UNKNOWN]
        if len(missing):
            others = [names[i] for i in missing[1:_MAX_ERRORS]]
            others += ["..."] if len(missing) > _MAX_ERRORS else []
            more = f" (missing in all: {len(missing)}; {', '.join(others)})" if others else ""
            raise InputError(f"{paths[missing[0]]}: no such image; {json_file} names it{more}")
        is_changed = (found != self._states[chosen]).any(axis=1)
        self._changed, self._found = chosen[is_changed], found[is_changed]
        num_changed = len(self._changed)
        self._batches = [slice(i, i + _BATCH) for i in range(0, num_changed, _BATCH)]
        num_processes = _num_processes(num_changed, is_idle)
        loader = torchdata.DataLoader(
            _Checks(paths, sizes, json_file, _THREADS_OF_PROCESS if num_processes else _THREADS),
            batch_sampler=[self._changed[batch] for batch in self._batches],
            num_workers=num_processes,
            prefetch_factor=len(self._batches) if num_processes else None,  # all
            collate_fn=list,
            generator=torch.Generator(),  # the global one is left alone
        )
        self._errors = iter(loader)

    def finish(self) -> None:
        """
        Wait for the checks, with a progress bar if it takes more than a second.

        Raises:
            InputError: if images are not as they should be. It names the first ten of the batch in
                which they are found.
        """
        total = len(self._changed)
        with tqdm(total=total, desc="checking images", unit="image", delay=1) as progress:
            for batch, errors in zip(self._batches, self._errors):
                if errors:
                    more = ["and others"] if len(errors) > _MAX_ERRORS else []
                    raise InputError("; ".join([*errors[:_MAX_ERRORS], *more]))
                self._states[self._changed[batch]] = self._found[batch]
                progress.update(len(self._changed[batch]))

    def close(self) -> None:
        """End the other processes."""
        self._errors = iter(())


def _spread(amount: int, length: int) -> np.ndarray:
    """Indices of a number of entries in equal distances; of all if it is -1."""
    amount = length if amount < 0 else min(amount, length)
    return (np.arange(amount) * length) // max(amount, 1)
