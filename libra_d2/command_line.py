# SPDX-License-Identifier: Apache-2.0
"""What the command line programs share: arguments, config, checks before work starts, errors."""

import argparse
import importlib.util
import os
import sys
from contextlib import contextmanager
from typing import Callable, Iterator, List, Sequence

import torch

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .config import add_libra_config
from .data import prepare_proposals, register_coco_json
from .errors import InputError, one_line
from .model_zoo import get_config_file

__all__ = [
    "add_data_arguments",
    "blamed_on",
    "check_datasets",
    "config_argument_parser",
    "prepare_proposal_files",
    "read_config",
    "register_own_data",
    "report_errors",
]

# Command line prefix and config suffix of the two kinds of datasets.
_SPLITS = (("train", "TRAIN"), ("val", "TEST"))


@contextmanager
def blamed_on(source: str) -> Iterator[None]:
    """Turn what is raised while ``source`` is being read into an InputError that names it."""
    try:
        yield
    except Exception as e:
        raise InputError(f"{source}: {one_line(e)}") from e


def report_errors(main: Callable, args) -> None:
    """Call ``main(args)``; an InputError becomes one line on stderr and exit status 2."""
    try:
        main(args)
    except InputError as e:
        # Only one process may have met the broken image, so that each speaks for itself.
        process = f"[process {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
        print(f"{process}error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`register_own_data` reads."""
    data = parser.add_argument_group(
        "your own data", "in COCO format; sets the number of classes. Instead of DATASETS.*"
    )
    for split, _ in _SPLITS:
        data.add_argument(f"--{split}-json", metavar="FILE", help=f"annotations to {split} on")
        data.add_argument(f"--{split}-images", metavar="DIR", help="where their images are")
        data.add_argument(
            f"--{split}-proposals",
            metavar="FILE",
            help="their proposals, for models without RPN (MODEL.LOAD_PROPOSALS)",
        )


def config_argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--config-file`` and, behind all options, the ``opts`` of read_config."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE or NAME")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser


def read_config(config_file: str, opts: Sequence[str], *, output: bool = True) -> CfgNode:
    """
    Make the config of a file and of ``KEY VALUE`` pairs, on the CPU if there is no GPU.

    Args:
        config_file: a path, or a name for :func:`libra_d2.model_zoo.get_config_file`.
        opts: the pairs.
        output: whether to make sure that there is a directory OUTPUT_DIR.

    Raises:
        InputError: if there is no such file, or a key or value is unknown or of another type.
    """
    cfg = get_cfg()
    add_libra_config(cfg)
    if config_file:
        with blamed_on(config_file):
            if not os.path.exists(config_file) and "://" not in config_file:
                config_file = get_config_file(config_file)
            cfg.merge_from_file(config_file, allow_unsafe=False)
    with blamed_on("command line"):
        cfg.merge_from_list(list(opts))
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise InputError("SOLVER.AMP.ENABLED: Detectron2 trains with mixed precision on GPUs only")
    if cfg.MODEL.LIBRA.NUM_PICTURES and importlib.util.find_spec("cv2") is None:
        raise InputError(
            "MODEL.LIBRA.NUM_PICTURES: drawing needs OpenCV; `pip install opencv-python-headless`"
        )
    if output:
        with blamed_on(f"OUTPUT_DIR: {cfg.OUTPUT_DIR}"):
            PathManager.mkdirs(cfg.OUTPUT_DIR)
    return cfg


def register_own_data(cfg: CfgNode, args: argparse.Namespace) -> List[str]:
    """
    Register the datasets named on the command line and make ``cfg`` use them.

    Returns:
        their names.

    Raises:
        InputError: if the arguments or the data are not consistent.
    """
    names, known_classes = [], None
    for split, key in _SPLITS:
        json_file, images, proposals = (
            getattr(args, f"{split}_{what}") for what in ("json", "images", "proposals")
        )
        if (json_file is None) != (images is None):
            raise InputError(f"--{split}-json and --{split}-images go together")
        if json_file is None:
            if proposals is not None:
                raise InputError(f"--{split}-proposals goes with --{split}-json")
            continue
        name = f"own_{split}"
        names.append(name)
        classes = register_coco_json(
            name,
            json_file,
            images,
            cache_dir=os.path.join(cfg.OUTPUT_DIR, "datasets"),
            mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        )
        if known_classes not in (None, classes):
            raise InputError(
                f"{json_file}: its categories {classes} are not those of {args.train_json}, "
                f"{known_classes}"
            )
        known_classes = classes
        cfg.DATASETS[key] = (name,)
        cfg.DATASETS[f"PROPOSAL_FILES_{key}"] = (proposals,) if proposals else ()
    if known_classes is not None:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(known_classes)
        cfg.MODEL.RETINANET.NUM_CLASSES = len(known_classes)
        if args.train_json and not args.val_json:
            cfg.DATASETS.TEST = ()
    return names


def check_datasets(names: Sequence[str]) -> None:
    """Raise InputError if one of the datasets is not registered or not there."""
    for name in names:
        if name not in DatasetCatalog:
            raise InputError(
                f"DATASETS: {name!r} is not a registered dataset; for your own data use "
                "--train-json, --train-images, --val-json and --val-images"
            )
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("dirname")):
            if path is not None and "://" not in path and not os.path.exists(path):
                raise InputError(
                    f"{path}: dataset {name!r} is not there. The environment variable "
                    "DETECTRON2_DATASETS names the directory of Detectron2's builtin datasets"
                )


def prepare_proposal_files(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """
    Check the proposals of the datasets that ``cfg`` names, if the model wants any, and make
    ``cfg`` name files that Detectron2 can read.

    Raises:
        InputError: if there are none for a dataset; see also :func:`prepare_proposals`.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for key in splits:
        names, files = cfg.DATASETS[key], cfg.DATASETS[f"PROPOSAL_FILES_{key}"]
        if len(names) != len(files):
            raise InputError(
                f"DATASETS.PROPOSAL_FILES_{key} (--train-proposals, --val-proposals) must name a "
                f"file for each of {tuple(names)}, because the model has no RPN "
                "(MODEL.LOAD_PROPOSALS); tools/dump_proposals.py writes them"
            )
        cache_dir = os.path.join(cfg.OUTPUT_DIR, "proposals")
        cfg.DATASETS[f"PROPOSAL_FILES_{key}"] = tuple(
            prepare_proposals(file, name, cache_dir) for file, name in zip(files, names)
        )
