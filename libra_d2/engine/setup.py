# SPDX-License-Identifier: Apache-2.0
"""From command line arguments to a config and data that work can start with."""

import argparse
import importlib.util
import logging
import os
import tempfile
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
import yaml

import detectron2
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import add_libra_config
from ..data import check_interpolation, prepare_proposals, register_coco_json
from ..errors import InputError, one_line
from ..evaluation import check_evaluator_type, check_tta
from ..lazy import LazyView, is_lazy_config
from ..model_zoo import get_config_file
from .arguments import SPLITS
from .config_checks import check_config, check_keypoints, check_yaml, warn_of_few_images
from .lazy_config import has_own_evaluator, read_lazy_config

__all__ = [
    "check_datasets",
    "prepare_proposal_files",
    "read_config",
    "register_own_data",
    "setup",
]

logger = logging.getLogger(__name__)

# Where detectron2.model_zoo finds them, which cannot be imported without setuptools.
_DETECTRON2_CONFIGS = os.path.join(
    os.path.realpath(detectron2.__path__[0]), "model_zoo", "configs", ""
)


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turn what Detectron2's config reader raises into an InputError that names ``source``."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # there is no end to what it raises for what is no config
        raise InputError(f"{source}: {one_line(e)}") from e


def find_config(config_file: str) -> str:
    """
    Args:
        config_file: a path, a URL, or the name of a config of this model zoo or of Detectron2's,
            see :func:`libra_d2.model_zoo.get_config_file`.

    Returns:
        the path or URL.

    Raises:
        InputError: if there is no such file.
    """
    if not config_file or os.path.exists(config_file) or "://" in config_file:
        return config_file
    try:
        return get_config_file(config_file)
    except RuntimeError as e:
        path = os.path.join(_DETECTRON2_CONFIGS, config_file)
        if os.path.isfile(path):
            return path
        raise InputError(f"{e}, nor one of Detectron2's") from e


def read_config(config_file: str, opts: Sequence[str], *, output: bool = True) -> CfgNode:
    """
    Make the config of a file and of what the command line sets, on the CPU if there is no GPU.

    Args:
        config_file: see :func:`find_config`. A LazyConfig gives a :class:`LazyView`.
        opts: ``KEY VALUE`` pairs; ``key=value`` for a LazyConfig.
        output: whether to make sure that there is a directory OUTPUT_DIR.

    Raises:
        InputError: if there is no such file, or a key or value is unknown or of another type.
    """
    path = find_config(config_file)
    if is_lazy_config(path):
        with _reading(config_file):
            cfg = read_lazy_config(path, opts)
    else:
        cfg = _read_yaml_config(config_file, path, opts)
    check_config(cfg, opts)
    check_interpolation(cfg.MODEL.LIBRA.INPUT.INTERPOLATION)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise InputError("SOLVER.AMP.ENABLED: Detectron2 trains with mixed precision on GPUs only")
    if cfg.MODEL.LIBRA.NUM_PICTURES and importlib.util.find_spec("cv2") is None:
        raise InputError(
            "MODEL.LIBRA.NUM_PICTURES: drawing needs OpenCV; `pip install opencv-python-headless`"
        )
    if output:
        try:
            PathManager.mkdirs(cfg.OUTPUT_DIR)
            with tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR):
                pass  # it can be written to
        except OSError as e:
            raise InputError(f"OUTPUT_DIR: {cfg.OUTPUT_DIR}: {one_line(e)}") from e
    return cfg


def _read_yaml_config(config_file: str, path: str, opts: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    add_libra_config(cfg)
    if path:
        with _reading(config_file):
            if "://" not in path:
                check_yaml(path)
            # Detectron2's own RetinaNets have an expression in their YAML.
            is_detectron2s = os.path.realpath(path).startswith(_DETECTRON2_CONFIGS)
            cfg.merge_from_file(path, allow_unsafe=is_detectron2s)
    with _reading("command line"):
        cfg.merge_from_list(list(opts))
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
    for split, key in SPLITS:
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
            limits=_resize_limits(cfg, key),
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


def _resize_limits(cfg: CfgNode, split: str) -> Dict[str, Tuple[Sequence[int], int]]:
    """What images of "TRAIN" or "TEST" are resized to, by the keys that say so."""
    sizes = cfg.INPUT[f"MIN_SIZE_{split}"]
    keys = f"INPUT.MIN_SIZE_{split} and INPUT.MAX_SIZE_{split}"
    lengths = sizes if split == "TRAIN" else (sizes,)
    limits = {keys: (lengths, cfg.INPUT[f"MAX_SIZE_{split}"])}
    if split == "TEST" and cfg.TEST.AUG.ENABLED:
        aug = cfg.TEST.AUG
        limits["TEST.AUG.MIN_SIZES and TEST.AUG.MAX_SIZE"] = (aug.MIN_SIZES, aug.MAX_SIZE)
    return limits


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


def check_batch_size(cfg: CfgNode) -> None:
    """
    Say what the batch size of all processes together is.

    Raises:
        InputError: if it cannot be divided among them.
    """
    world_size, reference = comm.get_world_size(), cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference != 0:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which is not a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {reference}"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size).SOLVER
    if scaled.IMS_PER_BATCH % world_size != 0:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {scaled.IMS_PER_BATCH}, which {world_size} processes cannot "
            "share: use a multiple, and change SOLVER.BASE_LR in proportion. With "
            "SOLVER.REFERENCE_WORLD_SIZE, the number of processes that the config was made for, "
            "both are scaled"
        )
    parts = cfg.MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS
    if scaled.IMS_PER_BATCH // world_size % parts != 0:
        raise InputError(
            f"MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS is {parts}, which does not divide the "
            f"{scaled.IMS_PER_BATCH // world_size} images of each process"
        )
    logger.info(
        f"Training with {scaled.IMS_PER_BATCH} images in each iteration, "
        f"{scaled.IMS_PER_BATCH // world_size} in each of {world_size} processes, and a learning "
        f"rate of {scaled.BASE_LR:g}"
    )


def _leaves(node: Any, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


class _LenientLoader(yaml.SafeLoader):
    """Takes what a saved LazyConfig has of Python for lists and names, and executes nothing."""


def _without_objects(loader: yaml.Loader, name: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return name


_LenientLoader.add_multi_constructor("tag:yaml.org,2002:python/", _without_objects)


def _report_changes(cfg: CfgNode) -> None:
    """Log each value in which ``cfg`` differs from the config that is resumed."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not os.path.isfile(path):
        return
    with _reading(path), open(path, encoding="utf-8") as f:
        before = dict(_leaves(yaml.load(f, Loader=_LenientLoader)))
    # Where outputs and weights are does not change a training.
    ignored = (
        "OUTPUT_DIR",
        "MODEL.WEIGHTS",
        "VERSION",
        "train.output_dir",
        "train.init_checkpoint",
    )
    for key, value in _leaves(yaml.load(cfg.dump(), Loader=_LenientLoader)):
        if key not in ignored and before.get(key, value) != value:
            logger.warning(f"--resume: {key} is {value!r}, but was {before[key]!r} before")


def setup(args) -> CfgNode:
    """Make the config, check what can be checked before work starts, and set up logging."""
    cfg = read_config(args.config_file, args.opts)
    resuming = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    weights = cfg.MODEL.WEIGHTS.split("?")[0]
    if not resuming:
        if args.eval_only and not weights:
            raise InputError("MODEL.WEIGHTS: name the weights to evaluate")
        if weights and "://" not in weights and not os.path.isfile(weights):
            raise InputError(f"MODEL.WEIGHTS: {weights}: no such file")
    setup_logger(name="libra_d2", output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    register_own_data(cfg, args)
    needed = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    if not cfg.DATASETS[needed[0]]:
        raise InputError(
            f"no dataset to {'evaluate' if args.eval_only else 'train'} on: set DATASETS.* or use "
            "--train-json, --train-images, --val-json and --val-images"
        )
    check_tta(cfg)
    check_datasets([name for split in needed for name in cfg.DATASETS[split]])
    if not args.eval_only:
        check_keypoints(cfg, cfg.DATASETS.TRAIN)
        warn_of_few_images(cfg)
    if resuming:
        _report_changes(cfg)
    if not (isinstance(cfg, LazyView) and has_own_evaluator(cfg)):
        for name in cfg.DATASETS.TEST:
            check_evaluator_type(name)
    prepare_proposal_files(cfg, needed)
    if not args.eval_only:
        check_batch_size(cfg)
    cfg.freeze()
    # It prints the file, too, and knows paths only.
    path = find_config(args.config_file)
    config = cfg.current() if isinstance(cfg, LazyView) else cfg
    default_setup(config, argparse.Namespace(**{**vars(args), "config_file": path}))
    if cfg.MODEL.DEVICE == "cpu":
        logger.warning("Running on the CPU, which is slow for anything but small images.")
    return cfg
