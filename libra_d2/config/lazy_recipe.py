# SPDX-License-Identifier: Apache-2.0
import inspect
import logging
import os
import re
import tempfile
import traceback
from contextlib import contextmanager, suppress
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import ProposalNetwork
from detectron2.solver import LRMultiplier
from detectron2.utils.logger import log_first_n

from ..data import LibraDatasetMapper, ResumableLoader, load_dataset
from ..errors import ArgumentError, InputError, one_line
from ..evaluation import add_test_time_augmentation
from ..lazy import disable, target_of
from ..utils.leaves import did_you_mean, leaves
from .defaults import add_libra_config
from .ideas import DISABLED
from .recipe import Recipe, Setting, SettingMissing

__all__ = ["PLACES", "LazyRecipe"]

_SETTINGS = [x for x in vars(Recipe).values() if isinstance(x, Setting)]
#: where LazyConfigs have settings; ``*`` is any index
PLACES = sorted({place for x in _SETTINGS for place in x.lazy})

# What a training is made of, in the order of building, and what an evaluation is.
_PARTS = (
    *("model", "optimizer", "optimizer.params", "lr_multiplier"),
    *("dataloader.train", "dataloader.train.mapper"),
)
_PARTS_OF_EVALUATION = ("dataloader.test", "dataloader.test.mapper")
_LOADERS = (build_detection_train_loader, build_detection_test_loader)
_FILLED_IN = ("optimizer.params.model",)  # by build_optimizer
_PACKAGES = ("libra_d2", "detectron2", "fvcore", "omegaconf", "torch", "torchvision")
_NO_LIMIT = 2**31 - 1  # of ResizeShortestEdge, in pixels
_ARCHITECTURES = ("LibraRetinaNet", "RetinaNet", "ProposalNetwork", "PanopticFPN")


def _quoted(value: Any) -> Any:
    """A value as the command line of a LazyConfig takes it."""
    if not isinstance(value, str):
        return value
    # A quote is escaped by a backslash; those before a quote are doubled.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _mapper(is_train: bool) -> str:
    return f"dataloader.{'train' if is_train else 'test'}.mapper"


def _is_target(node: Any, name: str) -> bool:
    """Whether a node of a LazyConfig instantiates a class of this name or a subclass of it."""
    return name in [x.__name__ for x in getattr(target_of(node), "__mro__", ())]


@contextmanager
def _resolving(place: str) -> Iterator[None]:
    """Turn what OmegaConf raises for interpolations without value into an InputError."""
    try:
        yield
    except OmegaConfBaseException as e:
        raise InputError(f"{place}: {str(e).splitlines()[0]}") from e


def _contents(place: str, node: Any, above: Tuple = ()) -> Iterator[Tuple[str, Any]]:
    """
    The place and the value of all that a node of a LazyConfig consists of.

    Raises:
        InputError: if an interpolation has no value or leads back to itself, or nothing has the
            name of a target.
    """
    yield place, node
    if not OmegaConf.is_config(node):
        return
    if any(node is x for x in above):
        raise InputError(f"{place}: it is a part of itself")
    target_of(node)
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        if (child_place := f"{place}.{key}") not in _FILLED_IN:
            with _resolving(child_place):
                child = node[key]
            yield from _contents(child_place, child, (*above, node))


# What a class raises for a bad argument.
_BUILDING = (
    *(AssertionError, AttributeError, ImportError, KeyError, OSError, RuntimeError),
    *(TypeError, ValueError),
)


def _own_code(error: Exception) -> str:
    """Where in a user's code an error was raised, for messages; "" if it was elsewhere."""
    frames = [(frame.f_globals, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(x, line) for x, line in frames if x["__name__"].split(".")[0] not in _PACKAGES]
    return f" ({own[-1][0].get('__file__')}, line {own[-1][1]})" if own else ""


def _unknown_argument(error: Exception, place: str, part: Any) -> str:
    """What to say of an argument that a target in ``part`` does not have; "" of other errors."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    contents = list(_contents(place, part)) if match else []
    given = [(x, node) for x, node in contents if isinstance(node, DictConfig) and match[1] in node]
    targets = [(f"{x}.{match[1]}", target_of(node)) for x, node in given if "_target_" in node]
    if len(targets) != 1:
        return ""
    (key, target), known = targets[0], set()
    for parent in getattr(target, "__mro__", [target]):
        with suppress(TypeError, ValueError):  # some in C have no signature
            known.update(inspect.signature(parent).parameters)
    hint = did_you_mean(match[1], sorted(known))
    return f"{key}: {getattr(target, '__name__', target)} has no such argument{hint}"


def _unknown_name(error: KeyError, place: str, part: Any) -> str:
    """What to say of a name that nothing has, such as that of a feature map."""
    used = [x for x, v in _contents(place, part) if isinstance(v, str) and error.args == (v,)]
    return f"there is no {error}" + (f", which {used[0]} names" if used else "")


class LazyRecipe(Recipe):
    """
    The recipe of a LazyConfig with ``model`` and, where they are needed, ``dataloader``,
    ``optimizer``, ``lr_multiplier`` and ``train``.
    """

    config: DictConfig

    # Settings

    def _select(self, place: str) -> Any:
        with _resolving(place):
            return OmegaConf.select(self.config, place, default=None)

    def _places(self, setting: Setting) -> Iterator[str]:
        """All places of a setting, with ``*`` replaced by each index."""
        for place in setting.lazy:
            head, star, tail = place.partition(".*")
            parts = self._select(head) if star else ()
            indices = range(len(parts)) if isinstance(parts, ListConfig) else ()
            yield from (f"{head}.{i}{tail}" for i in indices) if star else (place,)

    def _found(self, setting: Setting) -> List[str]:
        """The places of a setting that the config has."""
        return [place for place in self._places(setting) if self._select(place) is not None]

    def _free_places(self, setting: Setting) -> List[str]:
        """Where to write a setting that the config lacks: in existing parts of the model."""
        places = list(self._places(setting))
        of_retinanet = [place for place in places if re.fullmatch(r"model\.\w+", place)]
        if self.is_retinanet:
            places = of_retinanet or places
        else:
            places = [place for place in places if place not in of_retinanet]
        return [
            place
            for place in places
            if not place.startswith(("model.", "dataloader."))
            or self._select(place.rpartition(".")[0]) is not None
        ]

    def _read(self, setting: Setting) -> Any:
        for place in self._found(setting):
            value = self._select(place)
            if isinstance(value, (ListConfig, tuple, list)):
                value = tuple(value)
            elif isinstance(setting.default, tuple):
                value = (value,)
            return value
        if not self._has(setting):
            raise setting.missing(self)
        return setting.default

    def _write(self, setting: Setting, value: Any) -> None:
        value = list(value) if isinstance(value, tuple) else value
        if setting is Recipe.num_classes:  # each head of a detector has its own
            for place in self.class_counts:
                node = self._select(place.rpartition(".")[0])
                if not OmegaConf.is_interpolation(node, "num_classes"):
                    node.num_classes = value
            return
        for place in self._found(setting) or self._free_places(setting):
            OmegaConf.update(self.config, place, value, merge=False, force_add=True)

    def _names(self, setting: Setting) -> Sequence[str]:
        return self._found(setting) or self._free_places(setting) or setting.lazy

    def _has(self, setting: Setting) -> bool:
        return bool(setting.lazy) and (setting.has_default or bool(self._found(setting)))

    def freeze(self) -> None:
        OmegaConf.set_readonly(self.config, True)

    def copy(self) -> "LazyRecipe":
        recipe = super().copy()
        OmegaConf.set_readonly(recipe.config, False)
        return recipe

    def dump(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.yaml")
            LazyConfig.save(self.copy().config, path)
            with open(path, encoding="utf-8") as f:
                return f.read()

    def check_keys(self) -> None:
        """See :meth:`Recipe.check_keys`; nor may there be a value in the place of a section."""
        for setting in _SETTINGS:
            for place in self._places(setting):
                parent, _, name = place.rpartition(".")
                node, value = self._select(parent), self._select(place)
                if isinstance(node, (bool, int, float, str)):
                    raise InputError(f"{parent} is {node!r}: it must be a section with {place}")
                # Detectron2 accepts null for these, too.
                is_optional = setting in (Recipe.max_checkpoints, Recipe.weights)
                is_null = isinstance(node, DictConfig) and name in node and value is None
                if is_null and not is_optional:
                    raise InputError(f"{place} is null: leave it out, or give it a value")

    def options(self, settings: Dict[str, Any]) -> List[str]:
        return [f"{self.name_of(name)}={_quoted(value)}" for name, value in settings.items()]

    def check_parts(self, train: bool) -> None:
        """
        See :meth:`Recipe.check_parts`: all names and interpolations in them have to resolve. Keys
        of ``train`` that are almost settings are logged: they may be the user's own.
        """
        section = OmegaConf.to_container(self._select("train") or OmegaConf.create())
        for key in sorted(dict(leaves(section, "train.")).keys() - {*PLACES}):
            if hint := did_you_mean(key, PLACES, cutoff=0.9):
                message = f"{key} is not a setting of libra_d2{hint}"
                log_first_n(logging.WARNING, message, name=__name__, key="message")
        places = _PARTS if train else _PARTS[:1]
        for place in (*places, *(_PARTS_OF_EVALUATION if self.test_datasets else ())):
            if target_of(self._resolved(place)) is None:
                raise InputError(f"{place}: its _target_, a class or function, is missing")
        for is_train in (True, False):
            self._augmentations(is_train)
        if train and not self.has("max_iter"):
            raise Recipe.max_iter.missing(self)

    @contextmanager
    def _building(self, place: str) -> Iterator[None]:
        """Turn what classes raise for bad arguments into an InputError."""
        try:
            with _resolving(place):
                yield
        except ArgumentError as e:
            raise InputError(str(e)) from e
        except _BUILDING as e:
            part = self._select(place)
            reason = _unknown_name(e, place, part) if isinstance(e, KeyError) else one_line(e)
            unknown = _unknown_argument(e, place, part)
            message = unknown or f"{place}: it cannot be built: {reason}"
            raise InputError(f"{message}{_own_code(e)}") from e

    # What the model is

    @property
    def model_class(self) -> Any:
        return target_of(self.config.model)

    @property
    def class_counts(self) -> Dict[str, int]:
        root = "model.roi_heads" if self._select("model.roi_heads") is not None else "model"
        parts = dict(_contents(root, self._select(root)))
        # That of the model or of all heads comes first, which those of the parts refer to.
        named = sorted((k for k in parts if k.endswith(".num_classes")), key=lambda k: k.count("."))
        counts = {place: parts[place] for place in named if isinstance(parts[place], int)}
        # A mask head of one class, where the others have more, predicts masks of any class.
        most = max(counts.values(), default=1)
        return {k: n for k, n in counts.items() if not (n == 1 < most and ".mask_head" in k)}

    @property
    def architecture(self) -> str:
        found = (name for name in _ARCHITECTURES if _is_target(self.config.model, name))
        return next(found, "GeneralizedRCNN")

    @property
    def needs_proposals(self) -> bool:
        is_rcnn = _is_target(self.config.model, "GeneralizedRCNN")
        return is_rcnn and self._select("model.proposal_generator") is None

    @property
    def has_masks(self) -> bool:
        return self._select("model.roi_heads.mask_head") is not None

    @property
    def has_keypoints(self) -> bool:
        return self._select("model.roi_heads.keypoint_head") is not None

    def _augmentations(self, is_train: bool) -> Sequence:
        place = f"{_mapper(is_train)}.augmentations"
        found = self._select(place)
        if found is not None and not isinstance(found, ListConfig):
            raise InputError(f"{place} is {found!r}: use a list of augmentations")
        return found or ()

    def _resize(self, is_train: bool) -> Optional[DictConfig]:
        augmentations = self._augmentations(is_train)
        return next((x for x in augmentations if _is_target(x, "ResizeShortestEdge")), None)

    @property
    def interpolation(self) -> str:
        resize = self._resize(False) or self._resize(True)
        return "opencv" if _is_target(resize, "OpenCVResizeShortestEdge") else "pillow"

    def sizes(self, is_train: bool) -> Tuple[Tuple[int, ...], int]:
        resize = self._resize(is_train)
        if resize is None or "short_edge_length" not in resize:
            return (), 0
        lengths = resize.short_edge_length
        lengths = (lengths,) if isinstance(lengths, (int, float)) else tuple(lengths)
        return lengths if is_train else lengths[:1], resize.get("max_size", _NO_LIMIT)

    def sizes_name(self, is_train: bool) -> str:
        return f"short_edge_length and max_size in {_mapper(is_train)}.augmentations"

    # The three ideas

    @property
    def has_ideas(self) -> bool:
        return bool(disable(self.config.model, *DISABLED))

    def variant_options(self, disabled: Sequence[str], reference_bins: bool = False) -> List[str]:
        options, sampler = disable(self.config.model, *disabled), "model.roi_heads.proposal_sampler"
        if reference_bins and self._select(sampler) is not None:
            options = [*options, f"{sampler}.mode=reference"]
        return options

    def rpn_only(self) -> "LazyRecipe":
        recipe = self.copy()
        model = recipe.config.model
        if "roi_heads" in model:
            names = ("backbone", "proposal_generator", "pixel_mean", "pixel_std")
            recipe.config.model = L(ProposalNetwork)(**{name: model[name] for name in names})
        return recipe

    # What a training is made of

    def _part(self, place: str) -> Any:
        part = self._select(place)
        if part is None:
            raise SettingMissing(f"{place}: missing in the LazyConfig")
        return part

    def _resolved(self, place: str) -> Any:
        """
        A part of the config, in which all names and interpolations resolve, and no text is in the
        place of a list of features.
        """
        part = self._part(place)
        for name, value in _contents(place, part):
            if re.search(r"\.(\w+_)?(in|out)_features$", name) and isinstance(value, str):
                raise InputError(
                    f"{name} is {value!r}: use a list, such as [{value!r}] (in quotes in a shell)"
                )
        return part

    def _build(self, place: str) -> Any:
        """Instantiate a part of the config."""
        part = self._resolved(place)
        with self._building(place):
            return instantiate(part)

    def _build_model(self) -> nn.Module:
        return self._build("model").to(torch.device(self.device))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Instantiate the config's ``optimizer`` with the parameters of ``model``."""
        self._part("optimizer.params")
        recipe = self.copy()
        recipe.config.optimizer.params.model = model
        return recipe._build("optimizer")

    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        """Instantiate the config's ``lr_multiplier``, of the learning rates of ``optimizer``."""
        multiplier = self._build("lr_multiplier")
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=self.max_iter)

    def build_augmentations(self, is_train: bool) -> List:
        """Instantiate the augmentations of the config's mapper."""
        return list(self._build(f"{_mapper(is_train)}.augmentations"))

    def build_mapper(
        self, is_train: bool, augmentations: Optional[List] = None
    ) -> Callable[[Dict[str, Any]], Dict[str, Any]]:
        """See :meth:`Recipe.build_mapper`; Detectron2's mapper becomes a LibraDatasetMapper."""
        place = _mapper(is_train)
        arguments = self._arguments(place)
        if augmentations is not None:
            arguments["augmentations"] = augmentations
        target = target_of(self._part(place))
        with self._building(place):
            return (LibraDatasetMapper if target is DatasetMapper else target)(**arguments)

    def _arguments(self, place: str) -> Dict[str, Any]:
        """All arguments of a part of the config but its mapper."""
        part = self._part(place)
        names = [name for name in part if name not in ("mapper", "_target_")]
        with self._building(place):
            # Detectron2's loaders take what others may not: datasets that are no lists.
            is_mapped = target_of(part) in _LOADERS
            return {name: self._argument(f"{place}.{name}", is_mapped) for name in names}

    def _argument(self, place: str, is_mapped: bool) -> Any:
        part = self._select(place)
        if is_mapped and target_of(part) is get_detection_dataset_dicts:
            return load_dataset(**self._arguments(place))
        return instantiate(part)

    def build_train_loader(self, seed: int) -> Iterable:
        """Instantiate the config's ``dataloader.train``; Detectron2's can be resumed."""
        place, mapper = "dataloader.train", self.build_mapper(True)
        target = target_of(self._part(place))
        if target is not build_detection_train_loader:
            with self._building(place):
                return target(**self._arguments(place), mapper=mapper)
        return ResumableLoader(lambda: {**self._arguments(place), "mapper": mapper}, seed=seed)

    def build_test_loader(self, dataset_name: str) -> Iterable:
        """Instantiate the config's ``dataloader.test``, for one of its datasets."""
        recipe, place = self.copy(), "dataloader.test"
        files = recipe.proposals_of(dataset_name)
        recipe.test_datasets = (dataset_name,)
        if files:
            recipe.test_proposals = tuple(files)
        arguments = recipe._arguments(place)
        with self._building(place):
            return target_of(self._part(place))(**arguments, mapper=self.build_mapper(False))

    def _evaluators(self) -> List[DictConfig]:
        place = "dataloader.evaluator"
        found = self._select(place)
        if found is None:
            return []
        evaluators = list(found) if isinstance(found, ListConfig) else [found]
        if not all(isinstance(x, DictConfig) for x in evaluators):
            raise InputError(f"{place} is {found!r}: it must be a section with {place}._target_")
        return evaluators

    @property
    def has_own_evaluator(self) -> bool:
        """Whether the config names an evaluator other than Detectron2's COCOEvaluator."""
        return [target_of(x) for x in self._evaluators()] not in ([], [COCOEvaluator])

    def build_evaluator(self, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """See :meth:`Recipe.build_evaluator`; the config's own evaluator takes precedence."""
        if not self.has_own_evaluator:
            return super().build_evaluator(dataset_name, output_dir)
        evaluators = self.copy()._evaluators()
        for evaluator in evaluators:
            if "dataset_name" in evaluator:
                evaluator.dataset_name = dataset_name
        with self._building("dataloader.evaluator"):
            return DatasetEvaluators([instantiate(evaluator) for evaluator in evaluators])

    def add_test_time_augmentation(self, model: nn.Module) -> nn.Module:
        # Detectron2's is made for YAML configs: these are the keys that it reads.
        cfg = get_cfg()
        add_libra_config(cfg)
        cfg.TEST.AUG.FLIP = self.tta_flip
        cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = self.tta_min_sizes, self.tta_max_size
        cfg.TEST.DETECTIONS_PER_IMAGE = self.max_detections
        cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = self.has_masks, self.has_keypoints
        cfg.MODEL.LOAD_PROPOSALS = self.needs_proposals
        for section in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
            section.NUM_CLASSES = self.num_classes
            section.NMS_THRESH_TEST = self.nms_threshold
        cfg.MODEL.LIBRA.INPUT.INTERPOLATION = self.interpolation
        return add_test_time_augmentation(cfg, model)

    def verify(self, results: Dict[str, Any]) -> None:
        """See :meth:`Recipe.verify`; LazyConfigs expect nothing."""

    @property
    def ddp_options(self) -> Dict[str, Any]:
        """See :attr:`Recipe.ddp_options`; ``train.ddp`` overrides them."""
        own = self._select("train.ddp") or {}
        if not isinstance(own, (dict, DictConfig)):
            raise InputError(f"train.ddp is {own!r}: it must be a section")
        return {**super().ddp_options, **own}
