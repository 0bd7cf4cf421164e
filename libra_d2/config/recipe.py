# SPDX-License-Identifier: Apache-2.0
"""
What a training is made of, whichever config language describes it.

A :class:`Recipe` wraps a config, which it reads and writes directly: each setting in the table of
:class:`Recipe` has a name in YAML configs and one in LazyConfigs. Nothing outside of
``libra_d2.config`` needs to know which of the two a user has written.
"""

import copy
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    List,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from torch import nn

from detectron2.data import build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork, RetinaNet

from ..checkpoint import LibraCheckpointer, PyramidMissing, WeightsMismatch
from ..data import load_dataset
from ..errors import InputError
from ..evaluation import TASKS, build_evaluator
from ..modeling.acceleration import accelerate, choose_channels_last
from ..utils.freed_memory import keep_freed_memory
from .identity import check_classes, learned_classes
from .model_checks import check_box_losses, check_features

__all__ = ["Recipe", "Setting", "SettingMissing"]

_REQUIRED = object()


class SettingMissing(InputError):
    """A config lacks a setting without default, or its language cannot express the setting."""


class Setting:
    """
    A setting of a :class:`Recipe`, read and assigned as an attribute: ``recipe.max_iter = 100``
    changes the config.
    """

    def __init__(
        self,
        yaml: Union[str, Tuple[str, ...], None],
        lazy: Union[str, Tuple[str, ...], None] = None,
        default: Any = _REQUIRED,
    ):
        """
        Args:
            yaml: key in YAML configs; None if there is none. Of several keys, those of the section
                ``RETINANET`` are read for a RetinaNet and the others for other models; all are
                assigned.
            lazy: place in LazyConfigs; None if there is none. Of several places, the first that the
                config has is read, and all that it has are assigned. ``*`` is any index.
            default: of a LazyConfig without the setting; YAML configs are always complete. With a
                tuple as default, values are tuples.
        """
        self.yaml = (yaml,) if isinstance(yaml, str) else yaml or ()
        self.lazy = (lazy,) if isinstance(lazy, str) else lazy or ()
        self.default = default
        self.has_default = default is not _REQUIRED

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name

    def __get__(self, recipe: Optional["Recipe"], owner: type) -> Any:
        return self if recipe is None else recipe._read(self)

    def __set__(self, recipe: "Recipe", value: Any) -> None:
        recipe._write(self, value)

    def missing(self, recipe: "Recipe") -> SettingMissing:
        """The error to raise if ``recipe`` has no value for this setting."""
        name = recipe.name_of(self.attribute)
        return SettingMissing(f"{name}: the config lacks it; it has no default")


_TRAIN, _TEST, _MATCHER = "dataloader.train", "dataloader.test", "model.roi_heads.proposal_matcher"
_CHECKPOINTER, _TTA = "train.checkpointer", "train.test_time_augmentation"


def _key_of_both(name: str) -> Tuple[str, str]:
    return f"MODEL.ROI_HEADS.{name}", f"MODEL.RETINANET.{name}"


def _in_predictor(name: str, retinanet_name: str = "") -> Tuple[str, ...]:
    predictors = ("model.roi_heads.box_predictor", "model.roi_heads.box_predictors.*", "model")
    names = (name, name, retinanet_name or name)
    return tuple(f"{place}.{argument}" for place, argument in zip(predictors, names))


def _balanced_l1(name: str, default: Any) -> Setting:
    key = f"MODEL.LIBRA.BALANCED_L1.{name.upper()}"
    return Setting(key, _in_predictor(f"balanced_l1.{name}"), default)


def _speed(name: str, default: Any) -> Setting:
    return Setting(f"MODEL.LIBRA.SPEED.{name.upper()}", f"train.speed.{name}", default)


def _trainer(name: str, default: Any, lazy: str = "") -> Setting:
    return Setting(f"MODEL.LIBRA.TRAINER.{name.upper()}", lazy or f"train.{name}", default)


class Recipe(ABC):
    """
    The settings, the parts and the evaluation of a training; see
    :func:`libra_d2.config.make_recipe`. Settings have the units and ranges of their YAML key.
    """

    output_dir = Setting("OUTPUT_DIR", "train.output_dir", "./output")
    seed = Setting("SEED", "train.seed", -1)
    device = Setting("MODEL.DEVICE", "train.device", "cuda")
    weights = Setting("MODEL.WEIGHTS", "train.init_checkpoint", "")

    # Training
    max_iter = Setting("SOLVER.MAX_ITER", "train.max_iter")
    epochs = _trainer("epochs", 0.0)
    learning_rate = Setting("SOLVER.BASE_LR", "optimizer.lr")
    batch_size = Setting("SOLVER.IMS_PER_BATCH", f"{_TRAIN}.total_batch_size")
    #: number of processes for which batch size and learning rate were chosen; 0 for any
    reference_world_size = Setting("SOLVER.REFERENCE_WORLD_SIZE")
    amp = Setting("SOLVER.AMP.ENABLED", "train.amp.enabled", False)
    checkpoint_period = Setting("SOLVER.CHECKPOINT_PERIOD", f"{_CHECKPOINTER}.period", 5000)
    max_checkpoints = _trainer("max_checkpoints", 0, f"{_CHECKPOINTER}.max_to_keep")
    #: iterations between the lines of metrics.json
    log_period = Setting(None, "train.log_period", 20)
    accumulation_steps = _trainer("accumulation_steps", 1)
    ema_decay = _trainer("ema_decay", 0.0)
    best_metric = _trainer("best_metric", "")
    patience = _trainer("patience", 0)
    validation_loss = _trainer("validation_loss", False)

    # Data
    train_datasets = Setting("DATASETS.TRAIN", f"{_TRAIN}.dataset.names", ())
    test_datasets = Setting("DATASETS.TEST", f"{_TEST}.dataset.names", ())
    train_proposals = Setting(
        "DATASETS.PROPOSAL_FILES_TRAIN", f"{_TRAIN}.dataset.proposal_files", ()
    )
    test_proposals = Setting("DATASETS.PROPOSAL_FILES_TEST", f"{_TEST}.dataset.proposal_files", ())
    num_workers = Setting("DATALOADER.NUM_WORKERS", f"{_TRAIN}.num_workers", 0)
    image_format = Setting("INPUT.FORMAT", (f"{_TEST}.mapper.image_format", "model.input_format"))
    check_images = Setting("MODEL.LIBRA.INPUT.CHECK_IMAGES", "train.check_images", -1)
    #: in LazyConfigs, given by the class of the augmentation
    interpolation = Setting(
        "MODEL.LIBRA.INPUT.INTERPOLATION", f"{_TEST}.mapper.augmentations", "pillow"
    )
    mask_format = Setting("INPUT.MASK_FORMAT", f"{_TRAIN}.mapper.instance_mask_format", "polygon")

    # Model; what LazyConfigs say by their classes, LazyRecipe finds out
    #: name of the meta-architecture's class
    architecture = Setting("MODEL.META_ARCHITECTURE")
    #: whether the model has no RPN and reads proposals from files
    needs_proposals = Setting("MODEL.LOAD_PROPOSALS")
    has_masks = Setting("MODEL.MASK_ON")
    has_keypoints = Setting("MODEL.KEYPOINT_ON")
    num_classes = Setting(
        _key_of_both("NUM_CLASSES"), ("model.roi_heads.num_classes", "model.num_classes")
    )
    score_threshold = Setting(
        _key_of_both("SCORE_THRESH_TEST"), _in_predictor("test_score_thresh"), 0.05
    )
    nms_threshold = Setting(_key_of_both("NMS_THRESH_TEST"), _in_predictor("test_nms_thresh"), 0.5)
    max_detections = Setting(
        "TEST.DETECTIONS_PER_IMAGE",
        _in_predictor("test_topk_per_image", "max_detections_per_image"),
        100,
    )
    #: IoU from which on a proposal is a positive of the (first) second stage
    iou_thresholds = Setting(
        "MODEL.ROI_HEADS.IOU_THRESHOLDS",
        (f"{_MATCHER}.thresholds", f"{_MATCHER}s.0.thresholds"),
        (0.5,),
    )
    #: of smooth L1, the box loss without balanced L1
    smooth_l1_beta = Setting(
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA"),
        _in_predictor("smooth_l1_beta"),
        0.0,
    )
    #: of a LibraRetinaNet
    normalizer = Setting("MODEL.LIBRA.RETINANET.NORMALIZER", "model.normalizer", "batch")
    num_bins = Setting(
        "MODEL.LIBRA.SAMPLER.NUM_BINS", "model.roi_heads.proposal_sampler.num_bins", 3
    )
    alpha = _balanced_l1("alpha", 0.5)
    gamma = _balanced_l1("gamma", 1.5)
    beta = _balanced_l1("beta", 1.0)
    form = _balanced_l1("form", "scaled")

    # Speed
    channels_last = _speed("channels_last", "auto")
    fold_norm = _speed("fold_norm", True)
    parallel_roi_align = _speed("parallel_roi_align", True)
    winograd = _speed("winograd", True)
    lean_fpn = _speed("lean_fpn", True)
    keep_freed_memory = _speed("keep_freed_memory", False)
    amp_dtype = _speed("amp_dtype", "auto")
    compile_backbone = _speed("compile_backbone", False)

    # Evaluation
    eval_period = Setting("TEST.EVAL_PERIOD", "train.eval_period", 0)
    num_pictures = Setting("MODEL.LIBRA.NUM_PICTURES", "train.num_pictures", 0)
    #: whether batch norm's running statistics are recomputed before each evaluation
    precise_bn = Setting("TEST.PRECISE_BN.ENABLED")
    precise_bn_iterations = Setting("TEST.PRECISE_BN.NUM_ITER")
    tta = Setting("TEST.AUG.ENABLED", f"{_TTA}.enabled", False)
    tta_min_sizes = Setting("TEST.AUG.MIN_SIZES", f"{_TTA}.min_sizes", tuple(range(400, 1201, 100)))
    tta_max_size = Setting("TEST.AUG.MAX_SIZE", f"{_TTA}.max_size", 4000)
    tta_flip = Setting("TEST.AUG.FLIP", f"{_TTA}.flip", True)

    def __init__(self, config: Any):
        """Args: config: the user's, not copied; it stays available as ``config``."""
        self.config = config

    # Settings

    @abstractmethod
    def _read(self, setting: Setting) -> Any:
        """The value of a setting."""

    @abstractmethod
    def _write(self, setting: Setting, value: Any) -> None:
        """Change a setting."""

    @abstractmethod
    def _names(self, setting: Setting) -> Sequence[str]:
        """The user's names for a setting, the one that is read first."""

    @abstractmethod
    def _has(self, setting: Setting) -> bool:
        """Whether the config has a value for a setting."""

    @staticmethod
    def _setting(name: str) -> Setting:
        """The setting with that name, or that of a key that YAML configs alone have."""
        setting = getattr(Recipe, name, None)
        return setting if isinstance(setting, Setting) else Setting(name)

    def name_of(self, setting: str) -> str:
        """
        The user's own name for a setting, for messages.

        Args:
            setting: an attribute of this class, or a key of YAML configs.
        """
        return next(iter(self._names(self._setting(setting))), setting)

    def has(self, setting: str) -> bool:
        """Whether the config has a value for a setting; see :meth:`name_of`."""
        return self._has(self._setting(setting))

    def get(self, setting: str, default: Any = None) -> Any:
        """The value of a setting, see :meth:`name_of`, or a default if the config lacks it."""
        if not self.has(setting):
            return default
        return self._read(self._setting(setting)) if "." in setting else getattr(self, setting)

    def set(self, setting: str, value: Any) -> None:
        """Change a setting, see :meth:`name_of`."""
        self._write(self._setting(setting), value)

    def copy(self) -> "Recipe":
        """A recipe whose config can be changed independently, even if this one is frozen."""
        return type(self)(copy.deepcopy(self.config))

    @abstractmethod
    def freeze(self) -> None:
        """Make changes of the config an error."""

    @abstractmethod
    def dump(self) -> str:
        """The config as YAML."""

    @abstractmethod
    def check_keys(self) -> None:
        """
        Raises:
            InputError: if the config has null where there must be a value.
        """

    @abstractmethod
    def check_parts(self, train: bool) -> None:
        """
        Check what a training (``train``) or an evaluation is made of.

        Raises:
            InputError: if the config lacks a part of it, or names something that is not there.
        """

    @abstractmethod
    def options(self, settings: Dict[str, Any]) -> List[str]:
        """The command line options that give settings these values."""

    # What the model is

    @property
    def is_retinanet(self) -> bool:
        """Whether the model is a RetinaNet, without a second stage."""
        return self.architecture.endswith("RetinaNet")

    @property
    def is_proposal_network(self) -> bool:
        """Whether the model returns proposals only."""
        return self.architecture == "ProposalNetwork"

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The class of the model, or the function that makes it; None if nothing has its name."""

    @property
    def tasks(self) -> Tuple[str, ...]:
        """
        What the model can be evaluated in, see :data:`libra_d2.evaluation.TASKS`: any of them if
        its class is none of Detectron2's.
        """
        kind = self.model_class if isinstance(self.model_class, type) else object
        if issubclass(kind, ProposalNetwork):
            return ("box_proposals",)
        if issubclass(kind, RetinaNet):
            return ("bbox",)
        if not issubclass(kind, GeneralizedRCNN):
            return TASKS
        parts = {"bbox": True, "segm": self.has_masks, "keypoints": self.has_keypoints}
        return tuple(filter(parts.get, parts))

    @property
    @abstractmethod
    def class_counts(self) -> Dict[str, int]:
        """
        The number of classes of each part of the model, by the user's name for it. Empty if that
        is not known, or the model tells no classes apart.
        """

    @abstractmethod
    def sizes(self, is_train: bool) -> Tuple[Tuple[int, ...], int]:
        """
        The lengths of the shorter side to which images are resized in training or evaluation, and
        the maximum length of the longer side, in pixels; (), 0 if unknown.
        """

    @abstractmethod
    def sizes_name(self, is_train: bool) -> str:
        """The user's name for :meth:`sizes`."""

    # The three ideas

    @property
    @abstractmethod
    def has_ideas(self) -> bool:
        """Whether the model has any part of Libra R-CNN."""

    @abstractmethod
    def variant_options(self, disabled: Sequence[str], reference_bins: bool = False) -> List[str]:
        """
        The command line options that turn the model into a variant.

        Args:
            disabled: ideas to disable: "sampling", "feature_pyramid", "balanced_l1".
            reference_bins: whether its sampler uses mmdetection's bins.
        """

    @abstractmethod
    def rpn_only(self) -> "Recipe":
        """A copy whose model ends with the proposals."""

    # The parts of a training

    def build_model(self) -> nn.Module:
        """
        Build the model, in training mode, on its device, and :func:`accelerate` it. If the setting
        is on, a process of the CPU also keeps freed memory; see :func:`keep_freed_memory`.

        Raises:
            InputError: if a name is not registered, a value is out of its range, or parts of the
                model do not fit together.
        """
        if self.keep_freed_memory and self.device_type == "cpu":
            keep_freed_memory()
        model = self._build_model()
        check_box_losses(model)
        check_features(model)
        accelerate(
            model,
            channels_last=self._choose_channels_last(model),
            fold_norm=self.fold_norm,
            parallel_roi_align=self.parallel_roi_align,
            winograd=self.winograd,
            lean_fpn=self.lean_fpn,
            compile_backbone=self.compile_backbone,
        )
        return model

    @abstractmethod
    def _build_model(self) -> nn.Module:
        """See :meth:`build_model`."""

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda", or another kind of device."""
        return torch.device(self.device).type

    def _choose_channels_last(self, model: nn.Module) -> str:
        if self.channels_last != "auto":
            return self.channels_last
        winograd = self.winograd and not self.compile_backbone
        return choose_channels_last(model, self.device_type, self.amp, winograd)

    @property
    def precision(self) -> torch.dtype:
        """What the model computes in: that of :attr:`amp`, or float32."""
        if not self.amp:
            return torch.float32
        default = "bfloat16" if self.device_type == "cpu" else "float16"
        return getattr(torch, default if self.amp_dtype == "auto" else self.amp_dtype)

    def autocast(self) -> ContextManager:
        """Context for forward passes in :attr:`precision`."""
        if not self.amp:
            return nullcontext()
        return torch.autocast(self.device_type, self.precision)

    def build_trained_model(
        self, checkpoint_dir: str = "", datasets: Sequence[str] = ()
    ) -> nn.Module:
        """The model of :meth:`load_trained_model`, which has the arguments and the errors."""
        return self.load_trained_model(checkpoint_dir, datasets)[0]

    def load_trained_model(
        self, checkpoint_dir: str = "", datasets: Sequence[str] = ()
    ) -> Tuple[nn.Module, List[str]]:
        """
        Build the model in evaluation mode and load its weights, all of which must be there.

        Args:
            checkpoint_dir: its last checkpoint, if any, takes the place of :attr:`weights`.
            datasets: registered datasets that must have the classes that it was trained on.

        Returns:
            the model, and the names of the classes that it was trained on, if its checkpoint has
            them.

        Raises:
            InputError: if there are no weights, or they are unreadable, of another model or of
                other classes; see also :meth:`build_model`.
        """
        model = self.build_model()
        checkpointer = LibraCheckpointer(model, checkpoint_dir, complete=True)
        resume = bool(checkpoint_dir) and checkpointer.has_checkpoint()
        if not resume:
            self._check_weights_are_named()
        try:
            content = checkpointer.resume_or_load(self.weights, resume=resume)
        except PyramidMissing as e:
            plain = " ".join(self.variant_options(["feature_pyramid"]))
            raise InputError(f"{e}; to evaluate them as they are, add {plain}") from None
        except WeightsMismatch as e:
            counts = ", ".join(f"{name} {n}" for name, n in self.class_counts.items())
            raise InputError(f"{e} This one has {counts}." if counts else str(e)) from None
        run = content.get("run") or {}
        check_classes(run, datasets)
        return model.eval(), (learned_classes(run) or [[]])[0]

    def build_initial_model(self) -> nn.Module:
        """
        Build the model in evaluation mode with the weights that a training starts from. Those that
        do not fit, as those of other classes, are logged and left at random.

        Raises:
            InputError: if no weights are named, or they are unreadable or of another model.
        """
        self._check_weights_are_named("weights that the training starts from")
        model = self.build_model()
        LibraCheckpointer(model).load(self.weights)
        return model.eval()

    def _check_weights_are_named(self, which: str = "weights of a trained model") -> None:
        if not self.weights:
            raise InputError(f"{self.name_of('weights')}: name the {which}")

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of a model's parameters."""

    @abstractmethod
    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build the learning rate schedule of an optimizer."""

    @abstractmethod
    def build_augmentations(self, is_train: bool) -> List:
        """Build the augmentations of images, resizing included."""

    @abstractmethod
    def build_mapper(
        self, is_train: bool, augmentations: Optional[List] = None
    ) -> Callable[[Dict[str, Any]], Dict[str, Any]]:
        """
        Build the mapper from Detectron2's dataset format to the input of a model.

        Args:
            is_train: whether with annotations, for training.
            augmentations: in place of those of :meth:`build_augmentations`.
        """

    def proposals_of(self, dataset_name: str, split: str = "test") -> Optional[List[str]]:
        """
        The proposals of a dataset of a split, "train" or "test", as :func:`load_dataset` takes
        them; None if the model has its own.

        Raises:
            InputError: if there are none for this dataset.
        """
        if not self.needs_proposals:
            return None
        setting = f"{split}_proposals"
        files = dict(zip(getattr(self, f"{split}_datasets"), getattr(self, setting)))
        if dataset_name not in files:
            raise InputError(
                f"{self.name_of(setting)}: there is no file for dataset {dataset_name!r}, which a "
                "model without RPN needs"
            )
        return [files[dataset_name]]

    @abstractmethod
    def build_train_loader(self, seed: int) -> Iterable:
        """
        Build the data loader for training; it is resumable if it is Detectron2's.

        Args:
            seed: of the order and the augmentation of images, the same in all processes.
        """

    @abstractmethod
    def build_test_loader(self, dataset_name: str) -> Iterable:
        """Build the data loader for the evaluation on a dataset."""

    def build_validation_loader(self, dataset_name: str) -> Iterable:
        """Build the loader for validation losses: images as in evaluation, with annotations."""
        records = load_dataset(dataset_name, proposal_files=self.proposals_of(dataset_name))
        mapper = self.build_mapper(True, augmentations=self.build_augmentations(False))
        return build_detection_test_loader(records, mapper=mapper, num_workers=self.num_workers)

    #: whether the config names an evaluator, in place of the one that fits the dataset
    has_own_evaluator: bool = False

    def build_evaluator(self, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """See :func:`libra_d2.evaluation.build_evaluator`."""
        return build_evaluator(dataset_name, output_dir, self.max_detections)

    @abstractmethod
    def add_test_time_augmentation(self, model: nn.Module) -> nn.Module:
        """See :func:`libra_d2.evaluation.add_test_time_augmentation`."""

    @abstractmethod
    def verify(self, results: Dict[str, Any]) -> None:
        """
        Compare results with those that the config expects, if it can say so; exits with status 1 if
        they differ.
        """

    @property
    def ddp_options(self) -> Dict[str, Any]:
        """
        Arguments of ``DistributedDataParallel``. Gradients are views of the buckets that processes
        exchange, which saves as much memory as the trained weights take, and a copy in each step.
        """
        return {"broadcast_buffers": False, "gradient_as_bucket_view": True}

    def scaled_to(self, world_size: int) -> "Recipe":
        """
        The recipe for a number of processes: with batch size, learning rate and schedule scaled in
        proportion if :attr:`reference_world_size` is set, else this one.
        """
        return self
