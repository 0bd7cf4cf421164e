# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: claimed by one program, and empty of the files of earlier runs."""

import errno
import fcntl
import glob
import logging
import os
import socket
import tempfile
from contextlib import suppress
from typing import IO, Dict, List, Tuple

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import Recipe
from ..errors import InputError, one_line
from ..utils.atomic_write import UNFINISHED
from .launch import in_main_process

__all__ = ["prepare_output_dir", "set_earlier_run_aside"]

logger = logging.getLogger(__name__)

EARLIER_RUNS = "earlier_runs"
# What trainings and evaluations write; logs go on.
_FILES_OF_A_RUN = (
    *("config.yaml", "curves.png", "events.out.tfevents.*", "inference", "inference_TTA"),
    *("last_checkpoint", "metrics.json", "model_*.pth", "pictures", "results.md"),
)

# Open lock files, by device and inode. Closing one would release its lock.
_claims: Dict[Tuple[int, int], IO] = {}


def prepare_output_dir(recipe: Recipe) -> None:
    """
    Create the output directory, keep other programs from writing into it until this process ends,
    and log into it. All processes must call this.

    Raises:
        InputError: if it is not writable, or another program writes into it.
    """
    in_main_process(_claim, recipe)
    setup_logger(name="libra_d2", output=recipe.output_dir, distributed_rank=comm.get_rank())


def _claim(recipe: Recipe) -> None:
    """Lock a directory, and remove what processes that were killed have not finished writing."""
    folder, name = recipe.output_dir, f"{recipe.name_of('output_dir')}: {recipe.output_dir}"
    try:
        PathManager.mkdirs(folder)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(bytes(1 << 16))  # the disk is not full
    except OSError as e:
        raise InputError(f"{name}: {one_line(e)}") from e
    path = os.path.join(folder, ".lock")
    with suppress(FileNotFoundError):
        if _inode(os.stat(path)) in _claims:
            return
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        # Unlike flock(), not inherited by data loading workers, which may outlive this process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        if e.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning(f"{folder}: this file system has no locks ({one_line(e)})")
            return
        raise InputError(
            f"{name}: another program writes into it ({owner}): use another directory, or wait for "
            "its end"
        ) from e
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _claims[_inode(os.fstat(file.fileno()))] = file
    for unfinished in glob.glob(os.path.join(glob.escape(folder), f"*{UNFINISHED}")):
        os.remove(unfinished)


def _inode(status: os.stat_result) -> Tuple[int, int]:
    return status.st_dev, status.st_ino


def set_earlier_run_aside(recipe: Recipe) -> None:
    """
    Move the files of an earlier run, if there is one in the output directory, to a directory in it,
    so that a new run does not mix with it. All processes must call this.

    Raises:
        InputError: if the new run starts from its weights.
    """
    in_main_process(_set_aside, recipe)


def _set_aside(recipe: Recipe) -> None:
    folder = recipe.output_dir
    patterns = (os.path.join(glob.escape(folder), pattern) for pattern in _FILES_OF_A_RUN)
    found: List[str] = [path for pattern in patterns for path in glob.glob(pattern)]
    if {os.path.basename(path) for path in found} <= {"config.yaml"}:
        return
    weights = recipe.weights.split("?")[0]
    if any(_is_same(weights, path) for path in found):
        raise InputError(
            f"{recipe.name_of('weights')}: {weights} belongs to the run in "
            f"{recipe.name_of('output_dir')}, {folder}: choose another directory for the new one"
        )
    aside = os.path.join(folder, EARLIER_RUNS)
    os.makedirs(aside, exist_ok=True)
    numbers = [int(name) for name in os.listdir(aside) if name.isdigit()]
    aside = os.path.join(aside, str(max(numbers, default=0) + 1))
    os.mkdir(aside)
    for path in found:
        os.rename(path, os.path.join(aside, os.path.basename(path)))
    logger.warning(f"{folder} held an earlier run, which is in {aside} now")


def _is_same(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.samefile(path, other)
