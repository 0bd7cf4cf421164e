# SPDX-License-Identifier: Apache-2.0
"""From command line arguments to a checked recipe and registered data."""

import argparse
import logging
import os
from typing import Any, Callable, Dict, List, Optional, Sequence

from detectron2.engine import default_setup
from detectron2.utils import comm

from ..checkpoint import find_checkpoint
from ..config import Recipe, check_run, read_recipe
from ..data import (
    cache_coco_json,
    cache_registered,
    prepare_proposals,
    register_cached,
    use_cached,
)
from ..errors import InputError, one_line
from ..model_zoo import find_config
from ..utils.main_process import in_main_process
from .output_dir import config_kept, prepare_output_dir, save_config, set_earlier_run_aside

__all__ = [
    "map_registered_data",
    "prepare_proposal_files",
    "read_config",
    "register_own_data",
    "setup",
]

logger = logging.getLogger(__name__)

_DATA = ("json", "images", "proposals")  # --train-json, and so on


def read_config(config_file: Optional[str], options: Sequence[str]) -> Recipe:
    """
    :func:`libra_d2.config.read_recipe` of a file or name of a config, see ``find_config``; "" for
    Detectron2's defaults.

    Raises:
        InputError: if it is None, or cannot be used.
    """
    if config_file is None:
        raise InputError("--config-file: name a file, or a config of the model zoo")
    return read_recipe(find_config(config_file), options, config_file)


def _once_per_machine(function: Callable, *args: Any) -> Any:
    """
    Call ``function(*args)``, which writes files, in the main process, and then in the first process
    of each other machine, which may find these files. All processes must call this; all of them
    return the value of the main process, or raise InputError.
    """
    value = in_main_process(function, *args)
    error = ""
    if comm.get_local_rank() == 0 and not comm.is_main_process():
        try:
            function(*args)
        except Exception as e:
            error = one_line(e)
    errors = list(filter(None, comm.all_gather(error)))
    if errors:
        raise InputError(errors[0])
    return value


def _datasets_dir(recipe: Recipe) -> str:
    return os.path.join(recipe.output_dir, "datasets")


def register_own_data(recipe: Recipe, args: argparse.Namespace) -> List[str]:
    """
    Register the datasets given on the command line, and use them in the recipe.

    Returns:
        the names of the datasets.

    Raises:
        InputError: if the arguments or the data are inconsistent.
    """
    names, known_classes = [], None
    for option, split in (("train", "train"), ("val", "test")):
        json_file, images, proposals = (getattr(args, f"{option}_{x}") for x in _DATA)
        if (json_file is None) != (images is None):
            raise InputError(f"--{option}-json and --{option}-images go together")
        if json_file is None:
            if proposals is not None:
                raise InputError(f"--{option}-proposals goes with --{option}-json")
            continue
        name = f"own_{option}"
        names.append(name)
        limits = {recipe.sizes_name(split == "train"): recipe.sizes(split == "train")}
        if split == "test" and recipe.tta:
            keys = " and ".join(map(recipe.name_of, ("tta_min_sizes", "tta_max_size")))
            limits[keys] = (recipe.tta_min_sizes, recipe.tta_max_size)
        cached = _once_per_machine(
            cache_coco_json,
            *(name, json_file, images, _datasets_dir(recipe)),
            *(recipe.mask_format if recipe.has_masks else None, limits, recipe.check_images),
        )
        classes = register_cached(name, cached)
        if known_classes not in (None, classes):
            raise InputError(
                f"{json_file}: its categories {classes} are not those of {args.train_json}, "
                f"{known_classes}"
            )
        known_classes = classes
        setattr(recipe, f"{split}_datasets", (name,))
        if proposals or getattr(recipe, f"{split}_proposals"):
            setattr(recipe, f"{split}_proposals", (proposals,) if proposals else ())
    if known_classes is not None:
        for name, number in recipe.class_counts.items():
            if number != len(known_classes):
                logger.info(f"{name} is {len(known_classes)}, as in the data, instead of {number}")
        recipe.num_classes = len(known_classes)
        if args.train_json and not args.val_json:
            recipe.test_datasets = ()
    return names


def map_registered_data(recipe: Recipe, splits: Sequence[str] = ("train", "test")) -> None:
    """
    Let all processes share the datasets of a recipe that Detectron2 has registered, see
    :func:`libra_d2.data.cache_registered`.
    """
    names = [name for split in splits for name in recipe.get(f"{split}_datasets", ())]
    for name in dict.fromkeys(names):
        cached = _once_per_machine(cache_registered, name, _datasets_dir(recipe))
        if cached is not None:
            use_cached(name, cached)


def prepare_proposal_files(recipe: Recipe, splits: Sequence[str] = ("train", "test")) -> None:
    """
    Check the proposals of the datasets, if the model needs any, and replace them in the recipe by
    files that Detectron2 can read.

    Raises:
        InputError: if a dataset has none; see also :func:`prepare_proposals`.
    """
    for split in splits if recipe.needs_proposals else ():
        names, files = getattr(recipe, f"{split}_datasets"), getattr(recipe, f"{split}_proposals")
        if len(names) != len(files):
            raise InputError(
                f"{recipe.name_of(f'{split}_proposals')} (--train-proposals, --val-proposals) must "
                f"name a file for each of {names}, because the model has no RPN; "
                "tools/dump_proposals.py writes them"
            )
        cache_dir = os.path.join(recipe.output_dir, "proposals")
        prepared = (prepare_proposals(f, name, cache_dir) for f, name in zip(files, names))
        setattr(recipe, f"{split}_proposals", tuple(prepared))


def run_inputs(recipe: Recipe, args: argparse.Namespace) -> Dict[str, str]:
    """What a run reads, by option or key."""
    options = ("config_file", *(f"{x}_{what}" for x in ("train", "val") for what in _DATA))
    found = {f"--{name.replace('_', '-')}": getattr(args, name) for name in options}
    found[recipe.name_of("weights")] = recipe.weights
    for setting in ("train_proposals", "test_proposals"):
        for i, path in enumerate(recipe.get(setting)):
            found[f"{recipe.name_of(setting)}[{i}]"] = path
    return {name: path for name, path in found.items() if path}


def setup(args: argparse.Namespace) -> Recipe:
    """
    Read the config, register your own data, check both, and set up logging and seeds.

    Returns:
        the frozen recipe.

    Raises:
        InputError: if something is wrong with the config or the data.
    """
    recipe = read_config(args.config_file, args.opts)
    prepare_output_dir(recipe)
    register_own_data(recipe, args)
    splits = ("test",) if args.eval_only else ("train", "test")
    map_registered_data(recipe, splits)
    inputs = run_inputs(recipe, args)
    resume = args.resume and in_main_process(find_checkpoint, recipe.output_dir) != ""
    check_run(recipe, train=not args.eval_only, resume=resume)
    prepare_proposal_files(recipe, splits)
    if not (resume or args.eval_only):
        set_earlier_run_aside(recipe, inputs, args.resume)
    # default_setup prints the file, too, and needs its path.
    path = find_config(args.config_file)
    with config_kept(recipe):
        default_setup(recipe.config, argparse.Namespace(**{**vars(args), "config_file": path}))
    if not (resume or args.eval_only):
        save_config(recipe, args.config_file)
    recipe.freeze()
    if recipe.device == "cpu":
        logger.warning("Running on the CPU, which is slow for anything but small images.")
    return recipe
