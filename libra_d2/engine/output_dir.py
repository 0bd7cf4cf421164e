# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: claimed by one program, and empty of the files of earlier runs."""

import errno
import fcntl
import glob
import logging
import os
import re
import socket
from contextlib import contextmanager
from typing import IO, Any, Dict, Iterator, List, Mapping

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import find_checkpoint
from ..config import Recipe
from ..errors import InputError, one_line
from ..utils.atomic_write import UNFINISHED, atomic_write
from ..utils.main_process import in_main_process
from ..utils.output_path import file_identity, output_path

__all__ = [
    "config_kept",
    "evaluation_recipe",
    "prepare_output_dir",
    "recipe_in",
    "save_config",
    "set_earlier_run_aside",
    "title_of",
]

logger = logging.getLogger(__name__)

EARLIER_RUNS = "earlier_runs"
# What trainings and evaluations write; logs go on.
_FILES_OF_A_RUN = (
    *("EMA", "config.yaml", "curves.png", "evaluation", "events.out.tfevents.*", "inference"),
    *("inference_TTA", "last_checkpoint", "metrics.json", "model_*.pth", "pictures", "results.md"),
)

# A directory without them has no run that could be continued, or mixed with another: only what a
# new run would replace is moved.
_MARKS_OF_A_RUN = ("last_checkpoint", "metrics.json")
_REPLACED = ("curves.png", "model_best.pth", "model_final*.pth", "results.md")

# Open lock files, by :func:`file_identity`. Closing one would release its lock.
_claims: Dict[Any, IO] = {}


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
    option = recipe.name_of("output_dir")
    folder = output_path(option, recipe.output_dir, {}, is_folder=True)
    path = os.path.join(folder, ".lock")
    if file_identity(path) in _claims:
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
            f"{option}: {folder}: another program writes into it ({owner}): use another directory, "
            "or wait for its end"
        ) from e
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _claims[file_identity(path)] = file
    for unfinished in glob.glob(os.path.join(glob.escape(folder), f"model_*.pth.*{UNFINISHED}")):
        os.remove(unfinished)


def set_earlier_run_aside(recipe: Recipe, inputs: Mapping[str, str], resume: bool) -> None:
    """
    Move the files of an earlier run, if there is one in the output directory, to a directory in it,
    so that a new run does not mix with it. All processes must call this.

    Args:
        recipe: of the new run.
        inputs: the files and directories that it reads, by their option or key.
        resume: whether it was meant to resume the earlier one, which has no checkpoint.

    Raises:
        InputError: if the new run reads files of the earlier one.
    """
    in_main_process(_set_aside, recipe, inputs, resume)


def _set_aside(recipe: Recipe, inputs: Mapping[str, str], resume: bool) -> None:
    folder = recipe.output_dir
    aside = os.path.join(folder, EARLIER_RUNS)
    numbers = [int(x) for x in os.listdir(aside) if x.isdecimal()] if os.path.isdir(aside) else []
    earlier = [os.path.join(aside, str(number)) for number in sorted(numbers)]
    if resume:
        message = f"There is no checkpoint to resume from in {folder}"
        with_checkpoint = [path for path in earlier if find_checkpoint(path)]
        if with_checkpoint:
            message += (
                f". The last run that has one is in {with_checkpoint[-1]}, and is resumed with "
                f"that as {recipe.name_of('output_dir')}"
            )
        logger.warning(message)
    is_run = any(_has_content(os.path.join(folder, name)) for name in _MARKS_OF_A_RUN)
    names = _FILES_OF_A_RUN if is_run else _REPLACED
    patterns = (os.path.join(glob.escape(folder), pattern) for pattern in names)
    found: List[str] = [path for pattern in patterns for path in glob.glob(pattern)]
    # Of a config that is used once more, nothing is lost.
    found = [path for path in found if not _is_inside(inputs.get("--config-file", ""), path)]
    for name, given in inputs.items():
        if any(_is_inside(given, path) for path in found):
            raise InputError(
                f"{name}: {given} belongs to the run in {recipe.name_of('output_dir')}, {folder}: "
                "choose another directory for the new one"
            )
    if not found:
        return
    trial = recipe.copy()  # what cannot be built is refused before anything is moved
    trial.build_optimizer(trial.build_model())
    aside = os.path.join(aside, str(max(numbers, default=0) + 1))
    os.makedirs(aside)
    for path in found:
        os.rename(path, os.path.join(aside, os.path.basename(path)))
    logger.warning(f"{folder} held an earlier run, which is in {aside} now")


def _has_content(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def _is_inside(given: str, path: str) -> bool:
    """Whether a given file, which may have an address and options, is ``path`` or in it."""
    given = os.path.realpath(re.sub(r"^file://|\?.*$", "", given))
    path = os.path.realpath(path)
    return given == path or given.startswith(os.path.join(path, ""))


@contextmanager
def config_kept(recipe: Recipe) -> Iterator[None]:
    """Undo a change of the ``config.yaml`` in the output directory, if there was one before."""
    path = os.path.join(recipe.output_dir, "config.yaml")
    is_kept = comm.is_main_process() and os.path.isfile(path)
    if is_kept:
        with open(path, "rb") as f:
            content = f.read()
    try:
        yield
    finally:
        if is_kept:
            with atomic_write(path) as f:
                f.write(content)


def save_config(recipe: Recipe, config_file: str) -> None:
    """
    Write the ``config.yaml`` of a training, which may have been resumed with another config, unless
    the config was read from it, as ``config_file``: then its overrides are not saved.
    """
    path = os.path.join(recipe.output_dir, "config.yaml")
    if comm.is_main_process() and not _is_inside(config_file, path):
        with atomic_write(path, "w") as f:
            f.write(recipe.dump())


def title_of(config_file: str) -> str:
    """What to call a config: its file, or the directory if it is the ``config.yaml`` of a run."""
    folder, name = os.path.split(os.path.abspath(config_file))
    marks = (os.path.join(folder, mark) for mark in _MARKS_OF_A_RUN)
    is_of_run = name == "config.yaml" and any(map(os.path.exists, marks))
    return os.path.basename(folder) if is_of_run else os.path.splitext(name)[0]


def recipe_in(recipe: Recipe, name: str) -> Recipe:
    """A copy of a recipe that writes to the directory ``name`` in its output directory."""
    own = recipe.copy()
    own.output_dir = os.path.join(recipe.output_dir, name)
    os.makedirs(own.output_dir, exist_ok=True)
    return own


def evaluation_recipe(recipe: Recipe) -> Recipe:
    """
    The recipe of an evaluation without training. If the output directory is that of a training,
    detections and pictures go to a directory in it, which is made.
    """
    folder = recipe.output_dir
    if not any(_has_content(os.path.join(folder, name)) for name in _MARKS_OF_A_RUN):
        return recipe
    own = recipe_in(recipe, "evaluation")
    own.freeze()
    return own
