# SPDX-License-Identifier: Apache-2.0
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

from detectron2 import modeling, solver
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import verify_results
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)

from ..data import LibraDatasetMapper, ResumableLoader, build_augmentation
from ..errors import ArgumentError, InputError
from ..evaluation import add_test_time_augmentation
from .ideas import DISABLED
from .model_checks import check_box_losses, warn_of_unread_keys
from .recipe import Recipe, Setting

__all__ = ["YamlRecipe"]

# Arguments of components whose keys have other names, or which no key says.
_OTHER_NAMES = {"min_iou": "low_quality_iou"}
_DESCRIPTIONS = {
    "negative_iou_thresh": "MODEL.ROI_HEADS.IOU_THRESHOLDS[0]",
    "backbone": "The backbone (MODEL.BACKBONE.NAME, MODEL.LIBRA.BFP.BASE_BACKBONE)",
    "module": "MODEL.LIBRA.TRAIN_NORM_AFFINE is set, and the backbone",
}


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class YamlRecipe(Recipe):
    """The recipe that a ``CfgNode`` with the keys of :func:`libra_d2.add_libra_config` says."""

    config: CfgNode

    # Settings

    def _keys(self, setting: Setting) -> Tuple[str, ...]:
        """Those that count for this kind of model."""
        if len(setting.yaml) < 2:
            return setting.yaml
        return tuple(key for key in setting.yaml if ("RETINANET" in key) == self.is_retinanet)

    def _node(self, key: str) -> Tuple[CfgNode, str]:
        *sections, name = key.split(".")
        node = self.config
        for section in sections:
            node = node[section]
        return node, name

    def _read(self, setting: Setting) -> Any:
        if not setting.yaml:
            raise setting.missing(self)
        node, name = self._node(self._keys(setting)[0])
        return node[name]

    def _write(self, setting: Setting, value: Any) -> None:
        if not setting.yaml:
            raise setting.missing(self)
        for key in setting.yaml:
            node, name = self._node(key)
            setattr(node, name, value)  # which refuses to change a frozen config

    def name_of(self, setting: str) -> str:
        described = getattr(Recipe, setting, None)
        if not isinstance(described, Setting):
            return setting
        return self._keys(described)[0] if described.yaml else setting

    def has(self, setting: str) -> bool:
        described = getattr(Recipe, setting, None)
        return bool(described.yaml) if isinstance(described, Setting) else "." in setting

    def get(self, setting: str, default: Any = None) -> Any:
        if "." not in setting:
            return super().get(setting, default)
        node, name = self._node(setting)
        return node[name]

    def freeze(self) -> None:
        self.config.freeze()

    def copy(self) -> "YamlRecipe":
        config = self.config.clone()
        config.defrost()
        return YamlRecipe(config)

    def dump(self) -> str:
        return self.config.dump()

    def check_nulls(self) -> None:
        _check_null(self.config, get_cfg())

    def options(self, settings: Dict[str, Any]) -> List[str]:
        return [str(x) for name, value in settings.items() for x in (self.name_of(name), value)]

    # What the model is

    @property
    def architecture(self) -> str:
        return self.config.MODEL.META_ARCHITECTURE

    @property
    def needs_proposals(self) -> bool:
        return self.config.MODEL.LOAD_PROPOSALS

    @property
    def has_masks(self) -> bool:
        return self.config.MODEL.MASK_ON

    @property
    def has_keypoints(self) -> bool:
        return self.config.MODEL.KEYPOINT_ON

    def sizes(self, is_train: bool) -> Tuple[Tuple[int, ...], int]:
        values = self.config.INPUT
        if is_train:
            return tuple(values.MIN_SIZE_TRAIN), values.MAX_SIZE_TRAIN
        return (values.MIN_SIZE_TEST,), values.MAX_SIZE_TEST

    def sizes_name(self, is_train: bool) -> str:
        split = "TRAIN" if is_train else "TEST"
        return f"INPUT.MIN_SIZE_{split} and INPUT.MAX_SIZE_{split}"

    # The three ideas

    @property
    def has_ideas(self) -> bool:
        model = self.config.MODEL
        names = (model.META_ARCHITECTURE, model.BACKBONE.NAME, model.ROI_HEADS.NAME)
        return any("libra" in name.lower() for name in names)

    def variant_options(self, disabled: Sequence[str], reference_bins: bool = False) -> List[str]:
        bins = ["MODEL.LIBRA.SAMPLER.MODE", "reference"] if reference_bins else []
        return [str(x) for idea in disabled for x in DISABLED[idea]] + bins

    def rpn_only(self) -> "YamlRecipe":
        recipe = self.copy()
        # The same names and weights as the model's, without what comes after the proposals.
        recipe.config.MODEL.META_ARCHITECTURE = "ProposalNetwork"
        return recipe

    # What a training is made of

    def build_model(self) -> nn.Module:
        """See :meth:`Recipe.build_model`. Keys that nothing reads are warned of."""
        self._check_registered_names()
        try:
            model = modeling.build_model(self.config)
        except ArgumentError as e:
            raise InputError(f"{self._key_of(e)} is {e.value!r}: {e.rule}") from e
        except KeyError as e:
            raise self._missing_level(e) or e from None
        check_box_losses(model)
        warn_of_unread_keys(self.config, model)
        return model

    def _check_registered_names(self) -> None:
        model = self.config.MODEL
        names = [("META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY)]
        names.append(("BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY))
        if model.BACKBONE.NAME == "build_libra_backbone":
            base = model.LIBRA.BFP.BASE_BACKBONE
            names.append(("LIBRA.BFP.BASE_BACKBONE", base, BACKBONE_REGISTRY))
        if "RCNN" in self.architecture or self.is_proposal_network:
            if not self.needs_proposals:
                name = model.PROPOSAL_GENERATOR.NAME
                names.append(("PROPOSAL_GENERATOR.NAME", name, PROPOSAL_GENERATOR_REGISTRY))
            names.append(("ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS_REGISTRY))
        for key, name, registry in names:
            if name not in registry:
                known = ", ".join(sorted(name for name, _ in registry))
                raise InputError(
                    f"MODEL.{key} is {name!r}: nothing has that name; there are {known}"
                )

    def _key_of(self, error: ArgumentError) -> str:
        """The key that a component was given an argument from: one of its name and value."""
        name = _OTHER_NAMES.get(error.argument, error.argument)
        for key, value in _leaves(self.config.MODEL, "MODEL."):
            if key.split(".")[-1].lower() == name and value == error.value:
                return key
        return _DESCRIPTIONS.get(error.argument, error.argument)

    def _missing_level(self, error: KeyError) -> Optional[InputError]:
        """What to say if a part of the model wants features that its backbone does not have."""
        model, level = self.config.MODEL, error.args[0] if error.args else None
        sections = ("RETINANET", "FPN") if self.is_retinanet else ("RPN", "ROI_HEADS", "FPN")
        for section in sections:
            if level in model[section].IN_FEATURES:
                hint = (
                    "; the backbone of a RetinaNet is build_libra_retinanet_resnet_fpn_backbone"
                    if level in ("p6", "p7")
                    else ""
                )
                return InputError(
                    f"MODEL.{section}.IN_FEATURES names {level!r}, which MODEL.BACKBONE.NAME "
                    f"{model.BACKBONE.NAME!r} does not return{hint}"
                )
        return None

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`detectron2.solver.build_optimizer`."""
        return solver.build_optimizer(self.config, model)

    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """See :func:`detectron2.solver.build_lr_scheduler`."""
        return solver.build_lr_scheduler(self.config, optimizer)

    def build_augmentations(self, is_train: bool) -> List:
        """See :func:`libra_d2.data.build_augmentation`."""
        return build_augmentation(self.config, is_train)

    def build_mapper(
        self, is_train: bool, augmentations: Optional[List] = None
    ) -> Callable[[Dict[str, Any]], Dict[str, Any]]:
        replaced = {} if augmentations is None else {"augmentations": augmentations}
        return LibraDatasetMapper(self.config, is_train=is_train, **replaced)

    def build_train_loader(self, seed: int) -> Iterable:
        # What the function with the same arguments would be given.
        make_arguments = partial(
            build_detection_train_loader.from_config, self.config, mapper=self.build_mapper(True)
        )
        return ResumableLoader(make_arguments, seed=seed)

    def build_test_loader(self, dataset_name: str) -> Iterable:
        return build_detection_test_loader(
            self.config, dataset_name, mapper=self.build_mapper(False)
        )

    def add_test_time_augmentation(self, model: nn.Module) -> nn.Module:
        return add_test_time_augmentation(self.config, model)

    def scaled_to(self, world_size: int) -> "YamlRecipe":
        return YamlRecipe(DefaultTrainer.auto_scale_workers(self.config, world_size))

    def verify(self, results: Dict[str, Any]) -> None:
        """See :func:`detectron2.evaluation.verify_results`."""
        verify_results(self.config, results)


def _check_null(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> None:
    for name, value in cfg.items():
        default = defaults.get(name)
        if isinstance(value, CfgNode):
            known = default if isinstance(default, CfgNode) else value
            _check_null(value, known, f"{prefix}{name}.")
        elif value is None and default is not None:
            raise InputError(f"{prefix}{name} is null: leave it out for its default, {default!r}")
