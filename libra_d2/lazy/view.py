# SPDX-License-Identifier: Apache-2.0
"""
A LazyConfig as the programs see it: what both kinds of config say, under its name in YAML.

The programs read and change keys such as ``OUTPUT_DIR`` and ``DATASETS.TEST``. Models, data
loaders, optimizers and schedules are made from the LazyConfig, into which the changes go back.
"""

import copy
import os
import re
import tempfile
from typing import Any, Dict, Iterator, List, Optional, Tuple

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from detectron2.config import CfgNode, LazyConfig, get_cfg

from ..config import add_libra_config
from .target import target_of

__all__ = ["LazyView", "is_lazy_config", "lazy_names", "view"]

_PREDICTORS = ("model.roi_heads.box_predictor", "model.roi_heads.box_predictors.*")

#: each key, and the places in a LazyConfig that it stands for; the first one there is read
_PLACES: Dict[str, Tuple[str, ...]] = {
    "OUTPUT_DIR": ("train.output_dir",),
    "SEED": ("train.seed",),
    "MODEL.DEVICE": ("train.device",),
    "MODEL.WEIGHTS": ("train.init_checkpoint",),
    "SOLVER.MAX_ITER": ("train.max_iter",),
    "SOLVER.AMP.ENABLED": ("train.amp.enabled",),
    "SOLVER.CHECKPOINT_PERIOD": ("train.checkpointer.period",),
    "SOLVER.IMS_PER_BATCH": ("dataloader.train.total_batch_size",),
    "TEST.EVAL_PERIOD": ("train.eval_period",),
    "TEST.AUG.ENABLED": ("train.test_time_augmentation.enabled",),
    "TEST.AUG.MIN_SIZES": ("train.test_time_augmentation.min_sizes",),
    "TEST.AUG.MAX_SIZE": ("train.test_time_augmentation.max_size",),
    "TEST.AUG.FLIP": ("train.test_time_augmentation.flip",),
    "TEST.DETECTIONS_PER_IMAGE": (
        *(f"{predictor}.test_topk_per_image" for predictor in _PREDICTORS),
        "model.max_detections_per_image",
    ),
    "DATALOADER.NUM_WORKERS": ("dataloader.train.num_workers",),
    "DATASETS.TRAIN": ("dataloader.train.dataset.names",),
    "DATASETS.TEST": ("dataloader.test.dataset.names",),
    "DATASETS.PROPOSAL_FILES_TRAIN": ("dataloader.train.dataset.proposal_files",),
    "DATASETS.PROPOSAL_FILES_TEST": ("dataloader.test.dataset.proposal_files",),
    "INPUT.FORMAT": ("dataloader.test.mapper.image_format", "model.input_format"),
    "INPUT.MASK_FORMAT": ("dataloader.train.mapper.instance_mask_format",),
    "MODEL.ROI_HEADS.NUM_CLASSES": ("model.roi_heads.num_classes",),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": tuple(f"{x}.test_score_thresh" for x in _PREDICTORS),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": tuple(f"{x}.test_nms_thresh" for x in _PREDICTORS),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": tuple(f"{x}.smooth_l1_beta" for x in _PREDICTORS),
    "MODEL.RETINANET.NUM_CLASSES": ("model.num_classes",),
    "MODEL.RETINANET.SCORE_THRESH_TEST": ("model.test_score_thresh",),
    "MODEL.RETINANET.NMS_THRESH_TEST": ("model.test_nms_thresh",),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": ("model.smooth_l1_beta",),
    "MODEL.LIBRA.NUM_PICTURES": ("train.num_pictures",),
    "MODEL.LIBRA.SAMPLER.NUM_BINS": ("model.roi_heads.proposal_sampler.num_bins",),
    **{
        f"MODEL.LIBRA.BALANCED_L1.{name}": (
            *(f"{predictor}.balanced_l1.{name.lower()}" for predictor in _PREDICTORS),
            f"model.balanced_l1.{name.lower()}",
        )
        for name in ("ALPHA", "BETA", "GAMMA", "FORM")
    },
    "MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS": ("train.checkpointer.max_to_keep",),
    **{
        f"MODEL.LIBRA.TRAINER.{name}": (f"train.{name.lower()}",)
        for name in (
            *("ACCUMULATION_STEPS", "EMA_DECAY", "BEST_METRIC", "PATIENCE"),
            "VALIDATION_LOSS",
        )
    },
}
# Kept in every head of a detector, and written into each place; others into those that are there.
_NUM_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")


def is_lazy_config(path: str) -> bool:
    """Whether a file is a LazyConfig: Python, or YAML that ``LazyConfig.save`` has written."""
    if path.endswith(".py"):
        return True
    if "://" in path or not path.endswith((".yaml", ".yml")) or not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as f:
        try:
            tree = yaml.compose(f, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError):
            return False
    keys = [key.value for key, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
    return "model" in keys and "MODEL" not in keys


def lazy_names(message: str) -> str:
    """``message`` with the places in a LazyConfig in place of the keys in YAML."""
    for key in sorted(_PLACES, key=len, reverse=True):
        message = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.])", _PLACES[key][0], message)
    return message


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    parent, _, name = key.rpartition(".")
    (_get(cfg, parent) if parent else cfg)[name] = value


def _expand(lazy: DictConfig, place: str) -> Iterator[str]:
    """The places that ``*`` in one stands for."""
    head, star, tail = place.partition(".*")
    if not star:
        yield place
        return
    for i in range(len(OmegaConf.select(lazy, head) or ())):
        yield f"{head}.{i}{tail}"


def _find(lazy: DictConfig, key: str) -> List[str]:
    places = (p for place in _PLACES[key] for p in _expand(lazy, place))
    return [p for p in places if OmegaConf.select(lazy, p, default=None) is not None]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (ListConfig, tuple, list)) else value


def _is_target(node: Any, name: str) -> bool:
    """Whether a part of a LazyConfig is made with a class of this name or one derived from it."""
    return name in [x.__name__ for x in getattr(target_of(node), "__mro__", ())]


def _set_num_classes(node: Any, value: int) -> None:
    """In a head and all that it consists of, except where one refers to another."""
    if isinstance(node, DictConfig):
        if "num_classes" in node and not OmegaConf.is_interpolation(node, "num_classes"):
            node.num_classes = value
        for name in node:
            if not OmegaConf.is_interpolation(node, name):
                _set_num_classes(node._get_node(name), value)
    elif isinstance(node, ListConfig):
        for child in node._iter_ex(resolve=False):
            _set_num_classes(child, value)


class LazyView(CfgNode):
    """See the module. ``cfg.lazy`` is the LazyConfig; :meth:`current` has all changes."""

    def __init__(self, cfg: CfgNode, lazy: DictConfig):
        """
        Args:
            cfg: keys and values.
            lazy: the LazyConfig that they are those of.
        """
        super().__init__()
        self.update(cfg)
        # As items they would be settings.
        self.__dict__["lazy"] = lazy
        self.__dict__["before"] = {key: copy.deepcopy(_get(cfg, key)) for key in _PLACES}

    def current(self) -> DictConfig:
        """
        Return:
            a copy of the LazyConfig, with what has been changed in this view.
        """
        lazy = copy.deepcopy(self.lazy)
        for key in _PLACES:
            value = _get(self, key)
            if value == self.before[key]:
                continue
            if key in _NUM_CLASSES:
                if _find(lazy, key):
                    heads = lazy.model.roi_heads if "ROI_HEADS" in key else lazy.model
                    _set_num_classes(heads, value)
                continue
            value = list(value) if isinstance(value, tuple) else value
            for place in _find(lazy, key) or self._new_places(lazy, key):
                OmegaConf.update(lazy, place, value, merge=False)
        return lazy

    def _new_places(self, lazy: DictConfig, key: str) -> List[str]:
        """Where a key goes that the LazyConfig leaves to a default: to what exists."""
        is_retinanet = self.MODEL.META_ARCHITECTURE == "RetinaNet"
        places = [p for place in _PLACES[key] for p in _expand(lazy, place)]
        of_retinanet = [p for p in places if re.fullmatch(r"model\.\w+", p)]
        places = of_retinanet if is_retinanet else [p for p in places if p not in of_retinanet]
        parents = (p.rpartition(".")[0] for p in places)
        return [
            place
            for place, parent in zip(places, parents)
            if not parent.startswith(("model", "dataloader"))
            or OmegaConf.select(lazy, parent) is not None
        ]

    def dump(self, **kwargs) -> str:
        """The LazyConfig as YAML."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.yaml")
            LazyConfig.save(self.current(), path)
            with open(path, encoding="utf-8") as f:
                return f.read()


def _resize(lazy: DictConfig, split: str) -> Optional[DictConfig]:
    """What resizes the images of "train" or "test"."""
    for node in OmegaConf.select(lazy, f"dataloader.{split}.mapper.augmentations") or ():
        if _is_target(node, "ResizeShortestEdge"):
            return node
    return None


def view(lazy: DictConfig) -> LazyView:
    """
    Args:
        lazy: a LazyConfig with ``model``, and as far as they are needed ``dataloader``,
            ``optimizer``, ``lr_multiplier`` and ``train``.

    Returns:
        what it says, under the names of YAML configs.
    """
    cfg = get_cfg()
    add_libra_config(cfg)
    cfg.MODEL.WEIGHTS, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = "", (), ()
    cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = 0.0  # the default of the class
    for key in _PLACES:
        for place in _find(lazy, key)[:1]:
            value = _plain(OmegaConf.select(lazy, place))
            if isinstance(_get(cfg, key), tuple):
                value = tuple(value) if isinstance(value, list) else (value,)
            _set(cfg, key, value)
    model = lazy.model
    heads = model.get("roi_heads")
    is_retinanet = _is_target(model, "RetinaNet")
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet" if is_retinanet else "GeneralizedRCNN"
    for name in ("ProposalNetwork", "PanopticFPN"):
        if _is_target(model, name):
            cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.LOAD_PROPOSALS = not is_retinanet and model.get("proposal_generator") is None
    cfg.MODEL.MASK_ON = heads is not None and heads.get("mask_head") is not None
    cfg.MODEL.KEYPOINT_ON = heads is not None and heads.get("keypoint_head") is not None
    if heads is not None:
        for matcher in ("proposal_matcher", "proposal_matchers[0]"):
            thresholds = OmegaConf.select(heads, f"{matcher}.thresholds")
            if thresholds is not None:
                cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = list(thresholds)
    for split in ("train", "test"):
        resize = _resize(lazy, split)
        if resize is None:
            continue
        lengths = _plain(resize.short_edge_length)
        lengths = tuple(lengths) if isinstance(lengths, list) else (lengths,)
        sizes = {"train": lengths, "test": lengths[0]}
        cfg.INPUT[f"MIN_SIZE_{split.upper()}"] = sizes[split]
        cfg.INPUT[f"MAX_SIZE_{split.upper()}"] = resize.get("max_size", cfg.INPUT.MAX_SIZE_TEST)
        opencv = _is_target(resize, "OpenCVResizeShortestEdge")
        cfg.MODEL.LIBRA.INPUT.INTERPOLATION = "opencv" if opencv else "pillow"
    return LazyView(cfg, lazy)
