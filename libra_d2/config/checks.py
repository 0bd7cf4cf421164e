# SPDX-License-Identifier: Apache-2.0
"""
Checks of a recipe before work starts: of single values, of combinations, of datasets and of the
number of processes. :func:`check_values` and :func:`check_run` go through tables of rules; checks
that need a built model are in ``model_checks``.
"""

import importlib.util
import itertools
import logging
import math
import os
from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import get_norm
from detectron2.solver.build import GradientClipType
from detectron2.utils import comm

from ..data import class_names
from ..data.resize import INTERPOLATIONS
from ..errors import InputError, counted, one_line
from ..evaluation import check_evaluator_type, reported_metrics
from ..modeling.acceleration import CHANNELS_LAST
from .recipe import Recipe, SettingMissing

__all__ = ["check_datasets", "check_run", "check_values"]

logger = logging.getLogger(__name__)

_SAMPLERS = (
    "TrainingSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "WeightedTrainingSampler",
)
_CROPS = ("relative_range", "relative", "absolute", "absolute_range")
_SIDE = "use 8 pixels or more"
_SIDES = "use a list of sizes, each of 8 pixels or more"


class Rule(NamedTuple):
    """What the value of a setting must be."""

    #: a setting of :class:`Recipe`, or a key that YAML configs alone have
    setting: str
    is_legal: Callable[[Any], bool]
    #: what to do otherwise
    advice: str


def _is_norm(name: Any) -> bool:
    try:
        get_norm(name, 64)
    except (KeyError, AttributeError):
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_expectation(task: str, metric: str, value: float, tolerance: float) -> bool:
    return isinstance(task, str) and isinstance(metric, str) and math.isfinite(value + tolerance)


def _whole(setting: str, minimum: int) -> Rule:
    advice = f"use a whole number, {minimum} or more"
    return Rule(setting, lambda v: _is_whole(v) and v >= minimum, advice)


def _choice(setting: str, values: Sequence) -> Rule:
    return Rule(setting, lambda v: v in values, f"use one of {tuple(values)}")


def _switch(setting: str) -> Rule:
    return Rule(setting, lambda v: v in (True, False), "use True or False")


def _are_sides(values: Sequence) -> bool:
    return len(values) > 0 and min(values) >= 8


_RULES: Tuple[Rule, ...] = (
    *(Rule(name, lambda v: isinstance(v, str), "use a path") for name in ("output_dir", "weights")),
    *(
        Rule(name, lambda v: v[:1] != "~", "use a path without '~'")
        for name in ("output_dir", "weights")
    ),
    Rule("best_metric", lambda v: isinstance(v, str), "use the name of a metric, such as bbox/AP"),
    *(_whole(name, 1) for name in ("batch_size", "max_iter", "checkpoint_period")),
    *(_whole(name, 1) for name in ("max_detections", "accumulation_steps", "num_classes")),
    *(_whole(name, 1) for name in ("log_period", "tta_max_size")),
    *(_whole(name, 0) for name in ("num_workers", "eval_period", "num_pictures")),
    *(_whole(name, 0) for name in ("SOLVER.WARMUP_ITERS", "max_checkpoints", "patience")),
    Rule(
        "learning_rate",
        lambda v: v > 0 and math.isfinite(v),
        "use a positive number, such as 0.02 for batches of 16 images",
    ),
    _whole("reference_world_size", 0),
    Rule("SOLVER.WARMUP_FACTOR", lambda v: 0 <= v <= 1, "use a value in [0, 1]"),
    Rule("SOLVER.GAMMA", lambda v: 0 < v < math.inf, "use a positive number, such as 0.1"),
    *(
        Rule(f"SOLVER.CLIP_GRADIENTS.{name}", lambda v: v > 0, "use a positive number")
        for name in ("CLIP_VALUE", "NORM_TYPE")
    ),
    Rule("SOLVER.MOMENTUM", lambda v: 0 <= v < 1, "use a value in [0, 1)"),
    Rule("SOLVER.WEIGHT_DECAY", lambda v: 0 <= v < math.inf, "use 0 or more"),
    _choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", [kind.value for kind in GradientClipType]),
    _choice("DATALOADER.SAMPLER_TRAIN", _SAMPLERS),
    *(Rule(name, _are_sides, _SIDES) for name in ("INPUT.MIN_SIZE_TRAIN", "tta_min_sizes")),
    Rule("INPUT.MAX_SIZE_TRAIN", lambda v: v >= 8, _SIDE),
    Rule("INPUT.MIN_SIZE_TEST", lambda v: v == 0 or v >= 8, f"{_SIDE}, or 0 not to resize"),
    Rule("INPUT.MAX_SIZE_TEST", lambda v: v >= 8, _SIDE),
    _choice("INPUT.MIN_SIZE_TRAIN_SAMPLING", ("choice", "range")),
    _choice("INPUT.RANDOM_FLIP", ("horizontal", "vertical", "none")),
    _choice("INPUT.CROP.TYPE", _CROPS),
    _choice("mask_format", ("polygon", "bitmask")),
    _choice("image_format", ("BGR", "RGB", "L", "YUV-BT.601")),
    _choice("MODEL.LIBRA.INPUT.INTERPOLATION", INTERPOLATIONS),
    Rule(
        "check_images",
        lambda v: _is_whole(v) and v >= -1,
        "use a number of images, 0 for none or -1 for all",
    ),
    _choice("channels_last", ("auto", *CHANNELS_LAST)),
    _choice("amp_dtype", ("auto", "float16", "bfloat16")),
    *(_switch(name) for name in ("fold_norm", "parallel_roi_align", "winograd", "lean_fpn")),
    *(_switch(name) for name in ("keep_freed_memory", "compile_backbone", "amp")),
    *(_switch(name) for name in ("validation_loss", "tta", "tta_flip")),
    *(
        Rule(name, lambda v: v <= 1, "use a value in [0, 1]")
        for name in ("score_threshold", "nms_threshold")
    ),
    Rule(
        "seed",
        # Each process adds its rank.
        lambda v: _is_whole(v) and -1 <= v < 2**32 - 2**16,
        "use a number below 2**32 - 2**16, or -1 for any",
    ),
    _choice("MODEL.RESNETS.DEPTH", (18, 34, 50, 101, 152)),
    *(
        Rule(f"MODEL.{part}.NORM", _is_norm, "use one of '', 'BN', 'FrozenBN', 'GN', 'SyncBN'")
        for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    ),
    Rule(
        "TEST.EXPECTED_RESULTS",
        lambda v: all(_is_expectation(*x) for x in v),
        "use [[task, metric, value, tolerance], ...], such as [['bbox', 'AP', 38.5, 0.2]]",
    ),
    Rule(
        "epochs",
        lambda v: 0 <= v <= 10000 and not isinstance(v, bool),
        "use a number of passes over the images, such as 12, or 0 for a number of iterations",
    ),
    Rule("ema_decay", lambda v: 0 <= v < 1, "use a value in (0, 1), such as 0.9998, or 0 for none"),
)


def _check_size_range(recipe: Recipe) -> None:
    lengths = recipe.get("INPUT.MIN_SIZE_TRAIN", ())
    if recipe.get("INPUT.MIN_SIZE_TRAIN_SAMPLING") == "range" and len(lengths) != 2:
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {lengths}: use two sizes, the ends of the range that "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING draws from"
        )


def _check_device(recipe: Recipe) -> None:
    name, device = recipe.name_of("device"), recipe.device
    try:
        kind = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise InputError(f"{name} is {device!r}: {one_line(e)}") from e
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"{name} is {device!r}: this machine has {torch.cuda.device_count()} GPUs that "
            "PyTorch can use; 'cpu' is slow, but works"
        )
    if kind.type == "cuda":
        return
    try:
        torch.zeros(1, device=kind).cpu()
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"{name} is {device!r}, which PyTorch cannot use here") from e


def _check_schedule(recipe: Recipe) -> None:
    rate = recipe.get("learning_rate")
    if rate is None:
        return
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        schedule = recipe.build_lr_scheduler(optimizer)
        schedule.last_epoch = recipe.max_iter  # where not all of fvcore's schedules are defined
        schedule.get_lr()
    except SettingMissing:
        return  # only a training needs a schedule
    except InputError:
        raise
    except Exception as e:  # Detectron2 raises many kinds
        keys = ("SOLVER.LR_SCHEDULER_NAME", "SOLVER.STEPS")
        described = " with ".join(f"{k} {recipe.get(k)!r}" for k in keys if recipe.has(k))
        raise InputError(f"{described or 'lr_multiplier'} cannot be used: {one_line(e)}") from e


def _check_evaluations(recipe: Recipe) -> None:
    period = recipe.eval_period
    for setting in ("best_metric", "patience"):
        if recipe.get(setting) and not (period > 0 or recipe.epochs > 0):
            raise InputError(
                f"{recipe.name_of(setting)} needs evaluations: set "
                f"{recipe.name_of('eval_period')} to the number of iterations between them"
            )


def _check_accumulation(recipe: Recipe) -> None:
    """Moving averages would be updated once for each micro-batch."""
    if recipe.accumulation_steps == 1 or not recipe.is_retinanet:
        return
    if recipe.architecture != "LibraRetinaNet" or recipe.normalizer != "batch":
        raise InputError(
            f"{recipe.name_of('accumulation_steps')} needs a LibraRetinaNet with "
            f"{recipe.name_of('normalizer')} 'batch'"
        )


def _check_opencv(recipe: Recipe) -> None:
    if importlib.util.find_spec("cv2") is not None:
        return
    for setting, needed in (
        ("interpolation", recipe.interpolation == "opencv"),
        ("num_pictures", recipe.num_pictures > 0),
    ):
        if needed:
            raise InputError(
                f"{recipe.name_of(setting)} is {getattr(recipe, setting)!r}, which needs OpenCV: "
                "`pip install opencv-python-headless`"
            )


def _check_tta(recipe: Recipe) -> None:
    unsupported = {
        "a model without RPN": recipe.needs_proposals,
        "a model of keypoints": recipe.has_keypoints,
        "a ProposalNetwork": recipe.is_proposal_network,
    }
    for what in filter(unsupported.get, unsupported if recipe.tta else ()):
        raise InputError(f"{recipe.name_of('tta')}: there is no test-time augmentation of {what}")


def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_precision(recipe: Recipe) -> None:
    """Mixed precision needs instructions for its type."""
    name = recipe.name_of("amp_dtype")
    if recipe.precision is torch.float16 and recipe.device_type == "cpu":
        raise InputError(f"{name} is 'float16': on CPUs use 'bfloat16'")
    if recipe.precision is not torch.bfloat16:
        return
    if recipe.device_type == "cuda":
        with torch.cuda.device(recipe.device):
            is_supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not is_supported:
            raise InputError(f"{name} is 'bfloat16', which this GPU cannot compute: use 'float16'")
    elif not (torch.backends.mkldnn.is_available() and _has_bfloat16()):
        logger.warning(
            f"{recipe.name_of('amp')}: this CPU has no instructions for bfloat16; mixed precision "
            "is slower on it than float32"
        )


_RULES_OF_SEVERAL: Tuple[Callable[[Recipe], None], ...] = (
    *(_check_size_range, _check_device, _check_schedule, _check_evaluations),
    *(_check_accumulation, _check_opencv, _check_tta, _check_precision),
)


def check_values(recipe: Recipe) -> None:
    """
    Check those values of a recipe that the config has.

    Raises:
        InputError: if one cannot work, with the user's name for it and what to use instead.
    """
    recipe.check_keys()
    for setting, is_legal, advice in _RULES:
        value = recipe.get(setting)
        try:
            legal = not recipe.has(setting) or is_legal(value)
        except (TypeError, ValueError):
            legal = False
        if not legal:
            raise InputError(f"{recipe.name_of(setting)} is {value!r}: {advice}")
    for check in _RULES_OF_SEVERAL:
        check(recipe)


def check_datasets(names: Sequence[str]) -> None:
    """
    Raises:
        InputError: if one of the datasets is not registered, or its files are not there.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise InputError(
                f"{name!r} is not a registered dataset; for your own data use --train-json, "
                "--train-images, --val-json and --val-images"
            )
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("dirname")):
            if path is not None and "://" not in path and not os.path.exists(path):
                raise InputError(
                    f"{path}: dataset {name!r} is not there. The environment variable "
                    "DETECTRON2_DATASETS names the directory of Detectron2's builtin datasets; for "
                    "your own COCO JSON use --train-json, --train-images, --val-json, --val-images"
                )


def _check_weights(recipe: Recipe, train: bool) -> None:
    name, weights = recipe.name_of("weights"), recipe.weights.split("?")[0]
    if not weights and not train:
        trained = os.path.join(recipe.output_dir, "model_final.pth")
        example = f", such as {trained}" if os.path.isfile(trained) else ""
        raise InputError(f"{name}: name the weights to evaluate{example}")
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise InputError(f"{name}: {weights}: no such file")


def _check_named_datasets(recipe: Recipe, train: bool) -> None:
    setting, action = ("train_datasets", "train") if train else ("test_datasets", "evaluate")
    if not recipe.get(setting):
        raise InputError(
            f"no dataset to {action} on: set {recipe.name_of(setting)} or use --train-json, "
            "--train-images, --val-json and --val-images"
        )
    check_datasets([*(recipe.train_datasets if train else ()), *recipe.test_datasets])


def _check_unused_proposals(recipe: Recipe, train: bool) -> None:
    """Warn of proposals that are given to a model that makes its own, or needs none."""
    for setting in ("train_proposals", "test_proposals"):
        if recipe.get(setting) and not recipe.needs_proposals:
            logger.warning(
                f"{recipe.name_of(setting)} is set, but this model reads no proposals from files"
            )


def _check_keypoints(recipe: Recipe, train: bool) -> None:
    for name in recipe.train_datasets if train and recipe.has_keypoints else ():
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise InputError(
                f"a model of keypoints: dataset {name!r} does not name its keypoints; register it "
                "with keypoint_names and keypoint_flip_map in its metadata"
            )


def _check_number_of_images(recipe: Recipe, train: bool) -> None:
    """Warn of batches or workers that outnumber the training images, if their number is known."""
    counts = [MetadataCatalog.get(name).get("num_images") for name in recipe.train_datasets]
    if not train or not counts or None in counts:
        return
    for setting in ("batch_size", "num_workers"):
        value = recipe.get(setting)
        if value > sum(counts):
            logger.warning(
                f"{recipe.name_of(setting)} is {value}, but there are only {sum(counts)} images "
                "to train on"
            )


def _check_evaluators(recipe: Recipe, train: bool) -> None:
    for name in () if recipe.has_own_evaluator else recipe.test_datasets:
        if not reported_metrics(name, recipe.tasks):
            raise InputError(
                f"dataset {name!r} is of type {check_evaluator_type(name)!r}, whose evaluator "
                f"cannot evaluate a {recipe.architecture}"
            )


def _metrics(recipe: Recipe, suffixes: Sequence[str]) -> List[str]:
    """Names of the metrics that evaluations report; a suffix stands for one of several models."""
    datasets, names = recipe.test_datasets, []
    for suffix, dataset in itertools.product(suffixes, datasets):
        for metric in reported_metrics(dataset, recipe.tasks):
            task, _, rest = metric.partition("/")
            several = len(datasets) > 1
            names.append(f"{dataset}{suffix}/{metric}" if several else f"{task}{suffix}/{rest}")
    return names


def _check_metrics(recipe: Recipe, train: bool) -> None:
    """A metric that something looks at must be one that evaluations report."""
    if recipe.has_own_evaluator:
        return
    best, patience = recipe.name_of("best_metric"), recipe.name_of("patience")
    averaged = ["_EMA"] if train and recipe.ema_decay > 0 else []
    looked_at = []  # who, at which metric, and those that there are
    if train and (recipe.best_metric or recipe.patience):
        who = f"{best} is" if recipe.best_metric else f"{best} is not set, and {patience} looks at"
        looked_at.append((who, recipe.best_metric or "bbox/AP", ["", *averaged]))
    at_end = ["", *averaged, *(["_TTA"] if recipe.tta else [])]
    for task, metric, *_ in recipe.get("TEST.EXPECTED_RESULTS", ()):
        looked_at.append(("TEST.EXPECTED_RESULTS names", f"{task}/{metric}", at_end))
    for who, metric, suffixes in looked_at:
        names = _metrics(recipe, suffixes)
        if not names:
            raise InputError(
                f"{who} {metric!r}, which needs validation data: set "
                f"{recipe.name_of('test_datasets')}, or use --val-json and --val-images"
            )
        if metric not in names:
            known = [name for name in names if "/AP-" not in name]
            known += ["AP-<class>"] if known != names else []
            raise InputError(
                f"{who} {metric!r}, which no evaluation reports: use one of {', '.join(known)}"
            )


def _check_classes(recipe: Recipe, train: bool) -> None:
    """All heads have the classes of all datasets."""
    if recipe.is_proposal_network:
        return
    (place, count), *others = [*recipe.class_counts.items()] or [("", 0)]
    for other, other_count in others:
        if other_count != count:
            raise InputError(
                f"{place} is {count}, but {other} is {other_count}: use the number of classes of "
                "the data for both"
            )
    first, classes = "", ()
    for dataset in (*(recipe.train_datasets if train else ()), *recipe.test_datasets):
        names = class_names(dataset)
        if names and count not in (0, len(names)):
            raise InputError(
                f"{place} is {count}, but dataset {dataset!r} has {len(names)} classes: use "
                f"{len(names)}"
            )
        for i, (a, b) in enumerate(itertools.zip_longest(classes, names)):
            if classes and names and a != b:
                raise InputError(
                    f"class {i} of dataset {first!r} is {a!r}, and of {dataset!r} it is {b!r}: use "
                    "data with the same classes in the same order"
                )
        first, classes = (first, classes) if classes else (dataset, names)


def _check_batch_size(recipe: Recipe, train: bool) -> None:
    """Processes and micro-batches must be able to share the images of a batch equally."""
    if not train:
        return
    batch_size, name = recipe.batch_size, recipe.name_of("batch_size")
    world_size, reference = comm.get_world_size(), recipe.get("reference_world_size")
    if reference and batch_size % reference != 0:
        raise InputError(
            f"{name} is {batch_size}, which is not a multiple of "
            f"{recipe.name_of('reference_world_size')}, {reference}"
        )
    scaled = recipe.scaled_to(world_size)
    if scaled.batch_size % world_size != 0:
        scales = recipe.has("reference_world_size")
        hint = (
            f". With {recipe.name_of('reference_world_size')}, the number of processes that the "
            "config was made for, both are scaled"
        )
        raise InputError(
            f"{name} is {scaled.batch_size}, which {world_size} processes cannot share: use a "
            f"multiple, and change {recipe.name_of('learning_rate')} in proportion"
            f"{hint if scales else ''}"
        )
    steps, local = recipe.accumulation_steps, scaled.batch_size // world_size
    if local % steps != 0:
        raise InputError(
            f"{recipe.name_of('accumulation_steps')} is {steps}, which does not divide the {local} "
            "images of each process"
        )
    rate = scaled.get("learning_rate")
    logger.info(
        f"Training with {scaled.batch_size} images in each iteration, {local} in each of "
        f"{counted(world_size, 'process')}" + (f", and a learning rate of {rate:g}" if rate else "")
    )


_RULES_OF_RUNS: Tuple[Callable[[Recipe, bool], None], ...] = (
    *(_check_named_datasets, lambda recipe, train: recipe.check_parts(train)),
    *(_check_evaluators, _check_classes),
    *(_check_metrics, _check_keypoints, _check_unused_proposals),
    *(_check_number_of_images, _check_batch_size),
)


def check_run(recipe: Recipe, *, train: bool, resume: bool) -> None:
    """
    Check that a training or an evaluation can start.

    Args:
        recipe: with datasets that are registered.
        train: whether it is a training.
        resume: whether a checkpoint takes the place of the weights.

    Raises:
        InputError: if not. What may be a mistake is logged.
    """
    if not resume:
        _check_weights(recipe, train)
    for check in _RULES_OF_RUNS:
        check(recipe, train)
