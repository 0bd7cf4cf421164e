# SPDX-License-Identifier: Apache-2.0
"""
What a training is made of, whichever config language says it.

A :class:`Recipe` wraps a config, which it reads and writes straight through: the settings of the
table in :class:`Recipe` have a name in YAML configs and one in LazyConfigs. Nothing outside of
``libra_d2.config`` needs to know which of the two a user has written.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.evaluation import DatasetEvaluator

from ..checkpoint import LibraCheckpointer
from ..errors import InputError
from ..evaluation import build_evaluator

__all__ = ["Recipe", "Setting", "SettingMissing"]

_REQUIRED = object()


class SettingMissing(InputError):
    """A config does not say something that has no default, or cannot say it in its language."""


class Setting:
    """
    A setting of a :class:`Recipe`, which is read and assigned as an attribute:
    ``recipe.max_iter = 100`` changes the config.
    """

    def __init__(
        self,
        yaml: Union[str, Tuple[str, ...], None],
        lazy: Union[str, Tuple[str, ...], None],
        default: Any = _REQUIRED,
    ):
        """
        Args:
            yaml: key in YAML configs; None if they cannot say it. Where a key of ``RETINANET`` and
                one of another section are given, a RetinaNet has the former, other models the
                latter; both are assigned.
            lazy: place in LazyConfigs, or several, of which a config may have some: the first one
                found is read, all that are found are assigned. ``*`` is any index. None if
                LazyConfigs cannot say it.
            default: of a LazyConfig that leaves it out, since only YAML configs are always
                complete. A tuple makes values tuples.
        """
        self.yaml = (yaml,) if isinstance(yaml, str) else yaml or ()
        self.lazy = (lazy,) if isinstance(lazy, str) else lazy or ()
        self.default = default

    @property
    def has_default(self) -> bool:
        """Whether a LazyConfig may leave it out."""
        return self.default is not _REQUIRED

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name

    def __get__(self, recipe: Optional["Recipe"], owner: type) -> Any:
        return self if recipe is None else recipe._read(self)

    def __set__(self, recipe: "Recipe", value: Any) -> None:
        recipe._write(self, value)

    def missing(self, recipe: "Recipe") -> SettingMissing:
        """What to raise where ``recipe`` has no value for it."""
        name = recipe.name_of(self.attribute)
        return SettingMissing(f"{name}: the config lacks it; it has no default")


_PREDICTORS = ("model.roi_heads.box_predictor", "model.roi_heads.box_predictors.*")


def _in_predictors(name: str) -> Tuple[str, ...]:
    return tuple(f"{predictor}.{name}" for predictor in _PREDICTORS)


def _balanced_l1(name: str, default: Any) -> Setting:
    places = (*_in_predictors(f"balanced_l1.{name}"), f"model.balanced_l1.{name}")
    return Setting(f"MODEL.LIBRA.BALANCED_L1.{name.upper()}", places, default)


def _trainer(name: str, default: Any) -> Setting:
    return Setting(f"MODEL.LIBRA.TRAINER.{name.upper()}", f"train.{name}", default)


class Recipe(ABC):
    """
    The settings, the parts and the evaluation of a training.

    See :func:`libra_d2.config.make_recipe`. Values are those of the config, in the units and ranges
    of the YAML key.
    """

    output_dir = Setting("OUTPUT_DIR", "train.output_dir", "./output")
    seed = Setting("SEED", "train.seed", -1)
    device = Setting("MODEL.DEVICE", "train.device", "cuda")
    weights = Setting("MODEL.WEIGHTS", "train.init_checkpoint", "")

    # Training
    max_iter = Setting("SOLVER.MAX_ITER", "train.max_iter")
    learning_rate = Setting("SOLVER.BASE_LR", "optimizer.lr")
    batch_size = Setting("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    #: number of processes that batch size and learning rate are meant for; 0 for any
    reference_world_size = Setting("SOLVER.REFERENCE_WORLD_SIZE", None)
    amp = Setting("SOLVER.AMP.ENABLED", "train.amp.enabled", False)
    checkpoint_period = Setting("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period", 5000)
    max_checkpoints = Setting(
        "MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS", "train.checkpointer.max_to_keep", 0
    )
    #: iterations between the lines of metrics.json
    log_period = Setting(None, "train.log_period", 20)
    accumulation_steps = _trainer("accumulation_steps", 1)
    ema_decay = _trainer("ema_decay", 0.0)
    best_metric = _trainer("best_metric", "")
    patience = _trainer("patience", 0)
    validation_loss = _trainer("validation_loss", False)

    # Data
    train_datasets = Setting("DATASETS.TRAIN", "dataloader.train.dataset.names", ())
    test_datasets = Setting("DATASETS.TEST", "dataloader.test.dataset.names", ())
    train_proposals = Setting(
        "DATASETS.PROPOSAL_FILES_TRAIN", "dataloader.train.dataset.proposal_files", ()
    )
    test_proposals = Setting(
        "DATASETS.PROPOSAL_FILES_TEST", "dataloader.test.dataset.proposal_files", ()
    )
    num_workers = Setting("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers", 0)
    image_format = Setting(
        "INPUT.FORMAT", ("dataloader.test.mapper.image_format", "model.input_format")
    )
    interpolation = Setting(
        "MODEL.LIBRA.INPUT.INTERPOLATION", "dataloader.test.mapper.augmentations", "pillow"
    )
    mask_format = Setting(
        "INPUT.MASK_FORMAT", "dataloader.train.mapper.instance_mask_format", "polygon"
    )

    # Model
    num_classes = Setting(
        ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"),
        ("model.roi_heads.num_classes", "model.num_classes"),
    )
    score_threshold = Setting(
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.RETINANET.SCORE_THRESH_TEST"),
        (*_in_predictors("test_score_thresh"), "model.test_score_thresh"),
        0.05,
    )
    nms_threshold = Setting(
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", "MODEL.RETINANET.NMS_THRESH_TEST"),
        (*_in_predictors("test_nms_thresh"), "model.test_nms_thresh"),
        0.5,
    )
    max_detections = Setting(
        "TEST.DETECTIONS_PER_IMAGE",
        (*_in_predictors("test_topk_per_image"), "model.max_detections_per_image"),
        100,
    )
    #: IoU from which on a proposal is a positive of the (first) second stage
    iou_thresholds = Setting(
        "MODEL.ROI_HEADS.IOU_THRESHOLDS",
        (
            "model.roi_heads.proposal_matcher.thresholds",
            "model.roi_heads.proposal_matchers.0.thresholds",
        ),
        (0.5,),
    )
    #: of the box loss without balanced L1
    smooth_l1_beta = Setting(
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA"),
        (*_in_predictors("smooth_l1_beta"), "model.smooth_l1_beta"),
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

    # Evaluation
    eval_period = Setting("TEST.EVAL_PERIOD", "train.eval_period", 0)
    num_pictures = Setting("MODEL.LIBRA.NUM_PICTURES", "train.num_pictures", 0)
    #: whether the running statistics of batch norm are computed anew before each evaluation
    precise_bn = Setting("TEST.PRECISE_BN.ENABLED", None)
    precise_bn_iterations = Setting("TEST.PRECISE_BN.NUM_ITER", None)
    tta = Setting("TEST.AUG.ENABLED", "train.test_time_augmentation.enabled", False)
    tta_min_sizes = Setting(
        "TEST.AUG.MIN_SIZES",
        "train.test_time_augmentation.min_sizes",
        (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
    )
    tta_max_size = Setting("TEST.AUG.MAX_SIZE", "train.test_time_augmentation.max_size", 4000)
    tta_flip = Setting("TEST.AUG.FLIP", "train.test_time_augmentation.flip", True)

    def __init__(self, config: Any):
        """Args: config: that of the user, which is not copied."""
        #: the config, as the user knows it
        self.config = config

    # Settings

    @abstractmethod
    def _read(self, setting: Setting) -> Any:
        """The value of a setting."""

    @abstractmethod
    def _write(self, setting: Setting, value: Any) -> None:
        """Change a setting."""

    @abstractmethod
    def name_of(self, setting: str) -> str:
        """
        Args:
            setting: an attribute of this class, or a key of a YAML config.

        Returns:
            the user's own name for it, for messages.
        """

    @abstractmethod
    def has(self, setting: str) -> bool:
        """Whether the config has a value for a setting; see :meth:`name_of`."""

    def get(self, setting: str, default: Any = None) -> Any:
        """The value of a setting, see :meth:`name_of`, or a default if the config lacks it."""
        return getattr(self, setting) if self.has(setting) else default

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
    def check_nulls(self) -> None:
        """
        Raises:
            InputError: if the config says null where there must be a value.
        """

    @abstractmethod
    def options(self, settings: Dict[str, Any]) -> List[str]:
        """What to add to a command line for some values of settings."""

    # What the model is

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Name of the meta-architecture's class."""

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
    def needs_proposals(self) -> bool:
        """Whether the model has no RPN and reads proposals from files."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether the model predicts masks."""

    @property
    @abstractmethod
    def has_keypoints(self) -> bool:
        """Whether the model predicts keypoints."""

    @abstractmethod
    def sizes(self, is_train: bool) -> Tuple[Tuple[int, ...], int]:
        """
        What images are resized to in training or evaluation: the lengths of the shorter side, and
        the longest longer side; (), 0 if that is not known.
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
        What to add to the command line for a variant of the model.

        Args:
            disabled: ideas that it does without: "sampling", "feature_pyramid", "balanced_l1".
            reference_bins: whether its sampler has mmdetection's bins.
        """

    @abstractmethod
    def rpn_only(self) -> "Recipe":
        """A copy whose model ends with the proposals."""

    # What a training is made of

    @abstractmethod
    def build_model(self) -> nn.Module:
        """
        Build the model, in training mode, on its device.

        Raises:
            InputError: if a name is not registered, a value is out of its range, or parts of the
                model do not fit together.
        """

    def build_trained_model(self, checkpoint_dir: str = "") -> nn.Module:
        """
        Build the model and load its weights, all of which must be there.

        Args:
            checkpoint_dir: if it holds a checkpoint, the last one is loaded in place of
                :attr:`weights`.

        Returns:
            the model, in evaluation mode.

        Raises:
            InputError: if no weights are named, they are those of another model or cannot be read;
                see also :meth:`build_model`.
        """
        model = self.build_model()
        checkpointer = LibraCheckpointer(model, checkpoint_dir, complete=True)
        resume = bool(checkpoint_dir) and checkpointer.has_checkpoint()
        if not self.weights and not resume:
            raise InputError(f"{self.name_of('weights')}: name the weights of a trained model")
        checkpointer.resume_or_load(self.weights, resume=resume)
        return model.eval()

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of a model's parameters."""

    @abstractmethod
    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build the schedule of an optimizer's learning rates."""

    @abstractmethod
    def build_augmentations(self, is_train: bool) -> List:
        """Build what resizes and augments images."""

    @abstractmethod
    def build_mapper(
        self, is_train: bool, augmentations: Optional[List] = None
    ) -> Callable[[Dict[str, Any]], Dict[str, Any]]:
        """
        Build what makes the input of a model of an image in Detectron2's dataset format.

        Args:
            is_train: whether with annotations, for training.
            augmentations: in place of those of :meth:`build_augmentations`.
        """

    @abstractmethod
    def build_train_loader(self, seed: int) -> Iterable:
        """
        Build the data loader for training, which can be resumed if it is Detectron2's.

        Args:
            seed: of the order and the augmentation of the images, the same in all processes.
        """

    @abstractmethod
    def build_test_loader(self, dataset_name: str) -> Iterable:
        """Build the data loader for the evaluation on a dataset."""

    def build_validation_loader(self, dataset_name: str) -> Iterable:
        """Build a loader of images as in evaluation with their annotations, for losses."""
        files = dict(zip(self.test_datasets, self.test_proposals))
        records = get_detection_dataset_dicts(
            dataset_name, proposal_files=[files[dataset_name]] if files else None
        )
        mapper = self.build_mapper(True, augmentations=self.build_augmentations(False))
        return build_detection_test_loader(records, mapper=mapper, num_workers=self.num_workers)

    @property
    def has_own_evaluator(self) -> bool:
        """Whether the config names an evaluator, in place of the one that fits the dataset."""
        return False

    def build_evaluator(self, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """
        Build the evaluator of a dataset, see :func:`libra_d2.evaluation.build_evaluator`.

        Args:
            dataset_name: a registered dataset.
            output_dir: for its predictions.
        """
        return build_evaluator(dataset_name, output_dir, self.max_detections)

    @abstractmethod
    def add_test_time_augmentation(self, model: nn.Module) -> nn.Module:
        """See :func:`libra_d2.evaluation.add_test_time_augmentation`."""

    @abstractmethod
    def verify(self, results: Dict[str, Any]) -> None:
        """Compare results with those that the config expects, if it can say so."""

    @property
    def ddp_options(self) -> Dict[str, Any]:
        """Arguments of ``DistributedDataParallel``."""
        return {"broadcast_buffers": False}

    def scaled_to(self, world_size: int) -> "Recipe":
        """
        The recipe for a number of processes: with batch size, learning rate and schedule in
        proportion where the config says for how many it was made, else this one.
        """
        return self
