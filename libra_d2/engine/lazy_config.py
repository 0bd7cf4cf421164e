# SPDX-License-Identifier: Apache-2.0
"""Reading of LazyConfigs, and what a training is made of according to them."""

from typing import Any, Dict, Iterable, List, Sequence

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.solver import LRMultiplier

from ..data import build_mapper
from ..data.resumable_loader import ResumableLoader
from ..errors import InputError, one_line
from ..lazy import LazyView, target_of, view

__all__ = [
    "build_lazy_evaluator",
    "build_lazy_optimizer",
    "build_lazy_scheduler",
    "build_lazy_test_loader",
    "build_lazy_train_loader",
    "has_own_evaluator",
    "read_lazy_config",
]


def read_lazy_config(path: str, overrides: Sequence[str]) -> LazyView:
    """
    Args:
        path: of a Python file, or a YAML file that ``LazyConfig.save`` has written. Reading it
            executes code from it.
        overrides: as "train.max_iter=100"; for all of the syntax see hydra's override grammar.

    Returns:
        a view of the LazyConfig.

    Raises:
        InputError: if the config has no model, or an override is not understood or names nothing.
    """
    lazy = LazyConfig.load(path)
    if not isinstance(lazy.get("model"), DictConfig) or "_target_" not in lazy.model:
        raise InputError(f"{path}: a LazyConfig needs a model")
    for override in overrides:
        _check_override(lazy, override)
    try:
        lazy = LazyConfig.apply_overrides(lazy, list(overrides))
    except Exception as e:  # the parser has many
        raise InputError(f"command line: {one_line(e)}") from e
    return view(lazy)


def _check_override(lazy: DictConfig, override: str) -> None:
    """Raise InputError for a key that nothing would read."""
    key, equals, _ = override.partition("=")
    if not equals:
        raise InputError(
            f"command line: {override!r}: write what is set in a LazyConfig as key=value, such as "
            "train.max_iter=100"
        )
    key = key.lstrip("+~")
    missing = object()
    if OmegaConf.select(lazy, key, default=missing, throw_on_missing=False) is not missing:
        return
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(lazy, parent, default=None) if parent else lazy
    # Classes have arguments that a config need not name, and trainers options.
    if isinstance(node, DictConfig) and ("_target_" in node or key.startswith("train.")):
        return
    known = f"; {parent or 'it'} has {', '.join(map(str, node))}" if _has_keys(node) else ""
    raise InputError(f"command line: {key}: the LazyConfig has no such key{known}")


def _has_keys(node: Any) -> bool:
    return isinstance(node, DictConfig) and len(node) > 0


def _part(cfg: LazyView, name: str) -> DictConfig:
    """A part of the LazyConfig, or an InputError if it is missing."""
    part = OmegaConf.select(cfg.current(), name)
    if part is None:
        raise InputError(f"{name}: the LazyConfig lacks it")
    return part


def build_lazy_optimizer(cfg: LazyView, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The config's ``optimizer`` of the parameters of ``model``."""
    optimizer = _part(cfg, "optimizer")
    optimizer.params.model = model
    return instantiate(optimizer)


def build_lazy_scheduler(cfg: LazyView, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """The config's ``lr_multiplier`` of the learning rates of ``optimizer``."""
    multiplier = instantiate(_part(cfg, "lr_multiplier"))
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=cfg.SOLVER.MAX_ITER)


def _loader_arguments(cfg: LazyView, name: str) -> Dict[str, Any]:
    """The arguments of a data loader, except for its mapper, and what it is made by."""
    loader = _part(cfg, name)
    arguments = {key: instantiate(value) for key, value in loader.items() if key != "mapper"}
    return {**arguments, "_target_": target_of(loader)}


def build_lazy_train_loader(cfg: LazyView, seed: int) -> Iterable:
    """
    The config's ``dataloader.train``. If it is Detectron2's, it can be resumed.

    Args:
        cfg: see :func:`read_lazy_config`.
        seed: of the order and the augmentation of the images.
    """
    mapper = build_mapper(cfg, is_train=True)
    name = "dataloader.train"
    arguments = _loader_arguments(cfg, name)
    target = arguments.pop("_target_")
    if target is not build_detection_train_loader:
        return target(**arguments, mapper=mapper)

    def make_arguments() -> Dict[str, Any]:
        made = _loader_arguments(cfg, name)
        del made["_target_"]
        return {**made, "mapper": mapper}

    return ResumableLoader(make_arguments, seed=seed)


def build_lazy_test_loader(cfg: LazyView, dataset_name: str) -> Iterable:
    """The config's ``dataloader.test`` for a dataset."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (dataset_name,)
    arguments = _loader_arguments(cfg, "dataloader.test")
    return arguments.pop("_target_")(**arguments, mapper=build_mapper(cfg, is_train=False))


def _evaluators(cfg: LazyView) -> List[DictConfig]:
    evaluators = OmegaConf.select(cfg.current(), "dataloader.evaluator")
    if evaluators is None:
        return []
    return list(evaluators) if isinstance(evaluators, ListConfig) else [evaluators]


def has_own_evaluator(cfg: LazyView) -> bool:
    """Whether the config names an evaluator other than Detectron2's of COCO."""
    targets = [target_of(x) for x in _evaluators(cfg)]
    return targets not in ([], [COCOEvaluator])


def build_lazy_evaluator(cfg: LazyView, dataset_name: str) -> DatasetEvaluator:
    """The evaluators that the config names, for a dataset."""
    evaluators = _evaluators(cfg)
    for evaluator in evaluators:
        if "dataset_name" in evaluator:
            evaluator.dataset_name = dataset_name
    return DatasetEvaluators([instantiate(evaluator) for evaluator in evaluators])
