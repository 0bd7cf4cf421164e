# SPDX-License-Identifier: Apache-2.0
"""Values of the config that Detectron2 takes, and that fail later or are ignored."""

import logging
import math
import os
from typing import Any, Callable, List, Set, Tuple

import torch
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import get_norm
from detectron2.solver import build_lr_scheduler
from detectron2.solver.build import GradientClipType

from ..errors import InputError, one_line
from ..lazy import LazyView

__all__ = ["check_config", "check_keypoints", "check_yaml", "warn_of_few_images"]

logger = logging.getLogger(__name__)

_SAMPLERS = (
    "TrainingSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "WeightedTrainingSampler",
)
_CROPS = ("relative_range", "relative", "absolute", "absolute_range")
_DEPTHS = (18, 34, 50, 101, 152)
_SIDE = "use 8 pixels or more"


def _is_norm(name: Any) -> bool:
    try:
        get_norm(name, 64)
    except (KeyError, AttributeError):
        return False
    return True


def _one_of(values: Tuple) -> Tuple[Callable[[Any], bool], str]:
    return lambda v: v in values, f"use one of {values}"


_POSITIVE: Tuple[Callable[[Any], bool], str] = (lambda v: v > 0, "use 1 or more")
_NOT_NEGATIVE: Tuple[Callable[[Any], bool], str] = (lambda v: v >= 0, "use 0 or more")
_NORM = (_is_norm, "use one of '', 'BN', 'FrozenBN', 'GN', 'SyncBN'")

# Key, what is legal, and what to do otherwise.
_RULES: List[Tuple[str, Callable[[Any], bool], str]] = [
    ("SOLVER.IMS_PER_BATCH", *_POSITIVE),
    ("SOLVER.MAX_ITER", *_POSITIVE),
    ("SOLVER.CHECKPOINT_PERIOD", *_POSITIVE),
    ("SOLVER.WARMUP_ITERS", *_NOT_NEGATIVE),
    (
        "SOLVER.BASE_LR",
        lambda v: v > 0 and math.isfinite(v),
        "use a positive number, such as 0.02 for batches of 16 images",
    ),
    ("SOLVER.MOMENTUM", lambda v: 0 <= v < 1, "use a value in [0, 1)"),
    ("SOLVER.WEIGHT_DECAY", lambda v: 0 <= v < math.inf, "use 0 or more"),
    (
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        *_one_of(tuple(kind.value for kind in GradientClipType)),
    ),
    ("DATALOADER.NUM_WORKERS", *_NOT_NEGATIVE),
    ("DATALOADER.SAMPLER_TRAIN", *_one_of(_SAMPLERS)),
    ("INPUT.MIN_SIZE_TRAIN", lambda v: len(v) > 0 and min(v) >= 8, _SIDE),
    ("INPUT.MAX_SIZE_TRAIN", lambda v: v >= 8, _SIDE),
    ("INPUT.MIN_SIZE_TEST", lambda v: v == 0 or v >= 8, f"{_SIDE}, or 0 not to resize"),
    ("INPUT.MAX_SIZE_TEST", lambda v: v >= 8, _SIDE),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", *_one_of(("choice", "range"))),
    ("INPUT.RANDOM_FLIP", *_one_of(("horizontal", "vertical", "none"))),
    ("INPUT.CROP.TYPE", *_one_of(_CROPS)),
    ("INPUT.MASK_FORMAT", *_one_of(("polygon", "bitmask"))),
    ("INPUT.FORMAT", *_one_of(("BGR", "RGB", "L", "YUV-BT.601"))),
    ("TEST.EVAL_PERIOD", *_NOT_NEGATIVE),
    ("TEST.DETECTIONS_PER_IMAGE", *_POSITIVE),
    # Each process adds its number.
    ("SEED", lambda v: -1 <= v < 2**32 - 2**16, "use a number below 2**32 - 2**16, or -1 for any"),
    ("MODEL.RESNETS.DEPTH", *_one_of(_DEPTHS)),
    ("MODEL.RESNETS.NORM", *_NORM),
    ("MODEL.FPN.NORM", *_NORM),
    ("MODEL.ROI_BOX_HEAD.NORM", *_NORM),
    ("MODEL.ROI_MASK_HEAD.NORM", *_NORM),
    ("MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS", *_NOT_NEGATIVE),
    ("MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS", *_POSITIVE),
    ("MODEL.LIBRA.TRAINER.PATIENCE", *_NOT_NEGATIVE),
    (
        "MODEL.LIBRA.TRAINER.EMA_DECAY",
        lambda v: 0 <= v < 1,
        "use a value in (0, 1), such as 0.9998, or 0 for none",
    ),
    ("MODEL.LIBRA.NUM_PICTURES", *_NOT_NEGATIVE),
]


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _check_null(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> None:
    for name, value in cfg.items():
        default = defaults.get(name)
        if isinstance(value, CfgNode):
            known = default if isinstance(default, CfgNode) else value
            _check_null(value, known, f"{prefix}{name}.")
        elif value is None and default is not None:
            raise InputError(f"{prefix}{name} is null: leave it out for its default, {default!r}")


def check_config(cfg: CfgNode, opts: List[str]) -> None:
    """
    Args:
        cfg: a config with the keys of :func:`libra_d2.add_libra_config`.
        opts: what the command line sets.

    Raises:
        InputError: if a value cannot work. The message names the key and what to use.
    """
    _check_null(cfg, get_cfg())
    for key, legal, rule in _RULES:
        value = _get(cfg, key)
        try:
            is_legal = legal(value)
        except TypeError:
            is_legal = False
        if not is_legal:
            raise InputError(f"{key} is {value!r}: {rule}")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(cfg.INPUT.MIN_SIZE_TRAIN) != 2:
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {cfg.INPUT.MIN_SIZE_TRAIN}: use two sizes, the ends of the "
            "range that INPUT.MIN_SIZE_TRAIN_SAMPLING draws from"
        )
    named = any(opt.split("=")[0] in ("MODEL.DEVICE", "train.device") for opt in map(str, opts))
    _check_device(cfg.MODEL.DEVICE, named)
    if not isinstance(cfg, LazyView):
        _check_schedule(cfg)
    trainer = cfg.MODEL.LIBRA.TRAINER
    for key, wanted in (
        ("BEST_METRIC", bool(trainer.BEST_METRIC)),
        ("PATIENCE", trainer.PATIENCE > 0),
    ):
        if wanted and not cfg.TEST.EVAL_PERIOD > 0:
            raise InputError(
                f"MODEL.LIBRA.TRAINER.{key} needs evaluations: set TEST.EVAL_PERIOD to the number "
                "of iterations between them"
            )
    if trainer.ACCUMULATION_STEPS > 1 and cfg.MODEL.META_ARCHITECTURE.endswith("RetinaNet"):
        _check_normalizer(cfg)
    if cfg.TEST.EVAL_PERIOD > cfg.SOLVER.MAX_ITER:
        logger.warning(
            f"TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD} is longer than the training of "
            f"{cfg.SOLVER.MAX_ITER} iterations: it is evaluated at the end only"
        )


def _check_normalizer(cfg: CfgNode) -> None:
    """Raise InputError for one that is a moving average over steps, of which parts make one."""
    if isinstance(cfg, LazyView):
        normalizer = cfg.lazy.model.get("normalizer", "moving_average")
        key = "model.normalizer"
    else:
        is_libra = cfg.MODEL.META_ARCHITECTURE == "LibraRetinaNet"
        normalizer = cfg.MODEL.LIBRA.RETINANET.NORMALIZER if is_libra else "moving_average"
        key = "MODEL.LIBRA.RETINANET.NORMALIZER"
    if normalizer != "batch":
        raise InputError(
            f"{key} is {normalizer!r}: MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS needs the 'batch' of "
            "a LibraRetinaNet"
        )


def _check_schedule(cfg: CfgNode) -> None:
    try:
        parameter = torch.nn.Parameter(torch.zeros(1))
        build_lr_scheduler(cfg, torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR))
    except Exception as e:  # it is the check of a schedule that Detectron2 has
        raise InputError(
            f"SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME!r} with SOLVER.STEPS "
            f"{cfg.SOLVER.STEPS} cannot be used: {one_line(e)}"
        ) from e


def _check_device(device: str, named: bool) -> None:
    """Raise InputError unless the device is there, or is Detectron2's default, which may not be."""
    try:
        kind = torch.device(device)
    except RuntimeError as e:
        raise InputError(f"MODEL.DEVICE is {device!r}: {one_line(e)}") from e
    if kind.type != "cuda" or (device == "cuda" and not named):
        return
    if (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"MODEL.DEVICE is {device!r}: this machine has {torch.cuda.device_count()} GPUs that "
            "PyTorch can use; 'cpu' is slow, but works"
        )


def warn_of_few_images(cfg: CfgNode) -> None:
    """Log what is odd about a training on few images, as far as their number is known."""
    counts = [MetadataCatalog.get(name).get("num_images") for name in cfg.DATASETS.TRAIN]
    if not counts or None in counts:
        return
    for key, value in (
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH),
        ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS),
    ):
        if value > sum(counts):
            logger.warning(f"{key} is {value}, but there are only {sum(counts)} images to train on")


def check_keypoints(cfg: CfgNode, dataset_names: List[str]) -> None:
    """
    Raises:
        InputError: if a model of keypoints is to be trained on a dataset that does not name them.
    """
    for name in dataset_names if cfg.MODEL.KEYPOINT_ON else ():
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise InputError(
                f"MODEL.KEYPOINT_ON: dataset {name!r} does not name its keypoints; register it "
                "with keypoint_names and keypoint_flip_map in its metadata"
            )


def check_yaml(path: str, seen: Set[str] = frozenset()) -> None:
    """
    Check a YAML file and those in its ``_BASE_`` for what is no error to YAML.

    Raises:
        InputError: if a key is there twice, or if the bases lead in a circle.
    """
    if path in seen:
        raise InputError(f"{path}: its _BASE_ leads back to itself")
    with open(path, encoding="utf-8") as f:
        tree = yaml.compose(f, Loader=yaml.SafeLoader)

    def check(node: yaml.Node, prefix: str) -> None:
        keys: Set[str] = set()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = f"{prefix}{key.value}"
            if name in keys:
                line = key.start_mark.line + 1
                raise InputError(f"{path}: {name} is there twice, once more in line {line}")
            keys.add(name)
            check(value, f"{name}.")

    check(tree, "")
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if key.value == "_BASE_":
            bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for base in bases:
                base_path = os.path.join(os.path.dirname(path), os.path.expanduser(base.value))
                if "://" not in base.value and os.path.isfile(base_path):
                    check_yaml(os.path.normpath(base_path), {*seen, path})
