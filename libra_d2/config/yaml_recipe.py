# SPDX-License-Identifier: Apache-2.0
from functools import partial
from operator import attrgetter
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import nn

from detectron2 import modeling, solver
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
)

from ..data import (
    LibraDatasetMapper,
    ResumableLoader,
    build_augmentation,
    load_dataset,
    outline,
)
from ..errors import ArgumentError, InputError, one_line
from ..evaluation import add_test_time_augmentation
from ..utils.leaves import leaves
from .ideas import DISABLED
from .model_checks import warn_of_unread_keys
from .recipe import Recipe, Setting

__all__ = ["YamlRecipe"]

# Arguments of components whose keys have other names, or that no key sets.
_OTHER_NAMES = {"min_iou": "low_quality_iou"}
_DESCRIPTIONS = {
    "negative_iou_thresh": "MODEL.ROI_HEADS.IOU_THRESHOLDS[0]",
    "backbone": "The backbone (MODEL.BACKBONE.NAME, MODEL.LIBRA.BFP.BASE_BACKBONE)",
    "module": "MODEL.LIBRA.TRAIN_NORM_AFFINE is set, and the backbone",
}


class YamlRecipe(Recipe):
    """The recipe of a ``CfgNode`` with the keys of :func:`libra_d2.add_libra_config`."""

    config: CfgNode

    # Settings

    def _names(self, setting: Setting) -> Tuple[str, ...]:
        if len(setting.yaml) < 2:
            return setting.yaml
        return tuple(key for key in setting.yaml if ("RETINANET" in key) == self.is_retinanet)

    def _has(self, setting: Setting) -> bool:
        return bool(setting.yaml)

    def _read(self, setting: Setting) -> Any:
        if not setting.yaml:
            raise setting.missing(self)
        return attrgetter(self._names(setting)[0])(self.config)

    def _write(self, setting: Setting, value: Any) -> None:
        if not setting.yaml:
            raise setting.missing(self)
        for key in setting.yaml:
            section, _, name = f"config.{key}".rpartition(".")
            setattr(attrgetter(section)(self), name, value)

    def freeze(self) -> None:
        self.config.freeze()

    def copy(self) -> "YamlRecipe":
        config = self.config.clone()
        config.defrost()
        return YamlRecipe(config)

    def dump(self) -> str:
        return self.config.dump()

    def check_keys(self) -> None:
        defaults = dict(leaves(get_cfg()))
        for key, value in leaves(self.config):
            if value is None and defaults.get(key) is not None:
                default = defaults[key]
                advice = f"set a value, such as {default!r}, or leave it out"
                raise InputError(f"{key} is null: {advice}")

    def options(self, settings: Dict[str, Any]) -> List[str]:
        return [str(x) for name, value in settings.items() for x in (self.name_of(name), value)]

    # What the model is

    @property
    def model_class(self) -> Any:
        is_known = self.architecture in META_ARCH_REGISTRY
        return META_ARCH_REGISTRY.get(self.architecture) if is_known else None

    @property
    def class_counts(self) -> Dict[str, int]:
        kind = self.model_class if isinstance(self.model_class, type) else object
        reads_it = issubclass(kind, RetinaNet if self.is_retinanet else GeneralizedRCNN)
        return {self.name_of("num_classes"): self.num_classes} if reads_it else {}

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
        # It keeps the names and weights of the model, without what comes after the proposals.
        recipe.config.MODEL.META_ARCHITECTURE = "ProposalNetwork"
        return recipe

    # What a training is made of

    def _build_model(self) -> nn.Module:
        """See :meth:`Recipe.build_model`; logs keys that no part of the model reads."""
        self.check_parts(True)
        try:
            model = modeling.build_model(self.config)
        except ArgumentError as e:
            raise InputError(f"{self._key_of(e)} is {e.value!r}: {e.rule}") from e
        except KeyError as e:
            raise self._missing_level(e) or e from None
        except (AssertionError, ValueError) as e:
            raise InputError(f"MODEL: it cannot be built: {one_line(e)}") from e
        warn_of_unread_keys(self.config, model)
        return model

    def check_parts(self, train: bool) -> None:
        """See :meth:`Recipe.check_parts`: the parts of a model have to be registered."""
        model = self.config.MODEL
        registries = {"META_ARCHITECTURE": META_ARCH_REGISTRY, "BACKBONE.NAME": BACKBONE_REGISTRY}
        if model.BACKBONE.NAME == "build_libra_backbone":
            registries["LIBRA.BFP.BASE_BACKBONE"] = BACKBONE_REGISTRY
        if "RCNN" in self.architecture or self.is_proposal_network:
            if not self.needs_proposals:
                registries["PROPOSAL_GENERATOR.NAME"] = PROPOSAL_GENERATOR_REGISTRY
            registries["ROI_HEADS.NAME"] = ROI_HEADS_REGISTRY
        for key, registry in registries.items():
            name = attrgetter(key)(model)
            if name not in registry:
                known = ", ".join(sorted(name for name, _ in registry))
                raise InputError(
                    f"MODEL.{key} is {name!r}: no component has this name; there are {known}"
                )

    def _key_of(self, error: ArgumentError) -> str:
        """The key with the name and value of a component's argument."""
        name = _OTHER_NAMES.get(error.argument, error.argument)
        for key, value in leaves(self.config.MODEL, "MODEL."):
            if key.split(".")[-1].lower() == name and value == error.value:
                return key
        return _DESCRIPTIONS.get(error.argument, error.argument)

    def _missing_level(self, error: KeyError) -> Optional[InputError]:
        """The error of a model that reads a feature level which its backbone does not return."""
        model, level = self.config.MODEL, error.args[0] if error.args else None
        sections = ("RETINANET", "FPN") if self.is_retinanet else ("RPN", "ROI_HEADS", "FPN")
        hint = "; the backbone of a RetinaNet is build_libra_retinanet_resnet_fpn_backbone"
        for section in sections:
            if level in model[section].IN_FEATURES:
                problem = f"MODEL.{section}.IN_FEATURES names {level!r}, which"
                if section == "FPN":
                    return InputError(f"{problem} the network below the pyramid does not return")
                known = ", ".join(modeling.build_backbone(self.config).output_shape())
                return InputError(
                    f"{problem} MODEL.BACKBONE.NAME {model.BACKBONE.NAME!r} does not return, but "
                    f"{known}{hint if level in ('p6', 'p7') else ''}"
                )
        return None

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return solver.build_optimizer(self.config, model)

    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return solver.build_lr_scheduler(self.config, optimizer)

    def build_augmentations(self, is_train: bool) -> List:
        return build_augmentation(self.config, is_train)

    def build_mapper(
        self, is_train: bool, augmentations: Optional[List] = None
    ) -> Callable[[Dict[str, Any]], Dict[str, Any]]:
        replaced = {} if augmentations is None else {"augmentations": augmentations}
        return LibraDatasetMapper(self.config, is_train=is_train, **replaced)

    def build_train_loader(self, seed: int) -> Iterable:
        return ResumableLoader(partial(self._loader_arguments, self.build_mapper(True)), seed=seed)

    def _loader_arguments(self, mapper: Callable) -> Dict[str, Any]:
        """The arguments that ``build_detection_train_loader`` would get."""
        cfg = self.config
        dataset = load_dataset(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        arguments = build_detection_train_loader.from_config(
            cfg, mapper=mapper, dataset=outline(dataset)
        )
        return {**arguments, "dataset": dataset}

    def build_test_loader(self, dataset_name: str) -> Iterable:
        files = self.proposals_of(dataset_name)
        dataset = load_dataset(dataset_name, filter_empty=False, proposal_files=files)
        return build_detection_test_loader(
            dataset, mapper=self.build_mapper(False), num_workers=self.num_workers
        )

    def add_test_time_augmentation(self, model: nn.Module) -> nn.Module:
        return add_test_time_augmentation(self.config, model)

    def scaled_to(self, world_size: int) -> "YamlRecipe":
        return YamlRecipe(DefaultTrainer.auto_scale_workers(self.config, world_size))

    def verify(self, results: Dict[str, Any]) -> None:
        # Of several datasets, the names of tasks start with the dataset; some may be missing.
        flat, found = flatten_results_dict(results), {}
        for task, metric, *_ in self.config.TEST.EXPECTED_RESULTS:
            found.setdefault(task, {})[metric] = flat.get(f"{task}/{metric}")
        verify_results(self.config, found)
