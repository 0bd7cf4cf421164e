# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of a config."""

import logging
import math
import os
import weakref
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, List, Mapping, Optional

import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from ..checkpoint import LibraCheckpointer, build_model
from ..data import build_augmentation, build_mapper
from ..data.random_state import get_random_state, keep_random_state, set_random_state
from ..data.resumable_loader import ResumableLoader
from ..errors import InputError
from ..evaluation import PredictionPictures, add_test_time_augmentation, build_evaluator
from ..evaluation.validation_loss import validation_losses
from ..lazy import LazyView
from .accumulation import AccumulationTrainer, AMPAccumulationTrainer
from .hooks import (
    AverageWeights,
    BestModel,
    CheckpointHook,
    EarlyStopping,
    StopOnSignal,
    TrainingEnded,
)
from .lazy_config import (
    build_lazy_evaluator,
    build_lazy_optimizer,
    build_lazy_scheduler,
    build_lazy_test_loader,
    build_lazy_train_loader,
    has_own_evaluator,
)
from .run_state import (
    get_histories,
    get_normalizers,
    get_statistics,
    remove_later_metrics,
    set_histories,
    set_normalizers,
)
from .watched_loader import WatchedLoader

__all__ = ["Trainer", "pictures_dir"]

logger = logging.getLogger(__name__)


def pictures_dir(cfg: CfgNode, dataset_name: str) -> str:
    """Directory of the pictures of ``dataset_name``."""
    return os.path.join(cfg.OUTPUT_DIR, "pictures", dataset_name)


class Trainer(DefaultTrainer):
    """
    Detectron2's trainer of a config, with the evaluators, the checkpointer and the errors of
    libra_d2. What it builds is overridden as in :class:`DefaultTrainer`, by its ``build_*``
    methods. It also runs in several processes on CPUs, and takes views of LazyConfigs.
    """

    def __init__(self, cfg: CfgNode):
        """
        The parent's constructor takes it for granted that every process has a GPU, and makes a
        checkpointer of its own, so that the same parts are put together here.

        Args:
            cfg: a config with the keys of :func:`libra_d2.add_libra_config`, or the
                :func:`libra_d2.lazy.view` of a LazyConfig.

        Raises:
            InputError: if a value of the config cannot be used.
        """
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = WatchedLoader(self.build_train_loader(cfg))
        trainer = cfg.MODEL.LIBRA.TRAINER
        #: the model with averaged weights, if any
        self.average: Optional[AverageWeights] = None
        if trainer.EMA_DECAY > 0:
            self.average = AverageWeights(model, trainer.EMA_DECAY)
        ddp = {"broadcast_buffers": False}
        if isinstance(cfg, LazyView):
            ddp.update(cfg.lazy.train.get("ddp", {}))
        if cfg.MODEL.DEVICE == "cpu":
            ddp["device_ids"] = None
        model = create_ddp_model(model, **ddp)
        amp = cfg.SOLVER.AMP.ENABLED
        if trainer.ACCUMULATION_STEPS > 1:
            step = AMPAccumulationTrainer if amp else AccumulationTrainer
            self._trainer = step(model, data_loader, optimizer)
            self._trainer.num_parts = trainer.ACCUMULATION_STEPS
        else:
            step = AMPTrainer if amp else SimpleTrainer
            self._trainer = step(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = LibraCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._losses: Dict[str, torch.Tensor] = {}
        model.register_forward_hook(self._see_losses)
        self._states: List[Dict[str, Any]] = []  # of all processes, see collect_states()
        self._resumed: Dict[str, Any] = {}
        self._evaluated = -1  # iteration of the last evaluation
        self._end_reason = ""  # of a training that ends early
        self._stop = StopOnSignal()
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[Optional[HookBase]]:
        """
        Build the hooks of :class:`DefaultTrainer`, and those of this package between them. What a
        resumed training must know of comes in front of the checkpoint.
        """
        cfg, is_main = self.cfg, comm.is_main_process()
        trainer, period = cfg.MODEL.LIBRA.TRAINER, cfg.TEST.EVAL_PERIOD
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._build_precise_bn(),
            self.average,
            hooks.EvalHook(period, self._evaluate),
            hooks.EvalHook(0, self._evaluate_with_tta) if cfg.TEST.AUG.ENABLED else None,
            self._build_best_model() if is_main and trainer.BEST_METRIC else None,
            EarlyStopping(period, trainer.BEST_METRIC or "bbox/AP", trainer.PATIENCE)
            if trainer.PATIENCE > 0
            else None,
            hooks.PeriodicWriter(self.build_writers(), period=self._log_period)
            if is_main
            else None,
            CheckpointHook(
                self.checkpointer,
                cfg.SOLVER.CHECKPOINT_PERIOD,
                max_to_keep=trainer.MAX_CHECKPOINTS or None,
            ),
            self._stop,
        ]

    @property
    def _plain_model(self) -> nn.Module:
        """The model, without the ``DistributedDataParallel`` around it."""
        return getattr(self.model, "module", self.model)

    def _build_best_model(self) -> HookBase:
        metric = self.cfg.MODEL.LIBRA.TRAINER.BEST_METRIC
        averaged = metric.split("/")[-2].endswith("_EMA") if "/" in metric else False
        model = self.average.model if averaged and self.average else self.model
        checkpointer = LibraCheckpointer(model, self.cfg.OUTPUT_DIR, tag=False)
        return BestModel(self.cfg.TEST.EVAL_PERIOD, checkpointer, metric)

    @property
    def _log_period(self) -> int:
        """Of the writers, which know the last value of a metric alone: each evaluation counts."""
        lazy = isinstance(self.cfg, LazyView)
        period = self.cfg.lazy.train.get("log_period", 20) if lazy else 20
        return min(period, self.cfg.TEST.EVAL_PERIOD or period)

    def _build_precise_bn(self) -> Optional[HookBase]:
        """See :meth:`DefaultTrainer.build_hooks`."""
        cfg = self.cfg.clone()
        if not (cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)):
            return None
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader = self.build_train_loader(cfg)
        return hooks.PreciseBN(
            cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER
        )

    @property
    def results(self) -> Mapping[str, Any]:
        """Metrics of the last evaluation, see :meth:`test`; empty if there was none."""
        return getattr(self, "_last_eval_results", {})  # the parent's name

    def _evaluate(self) -> Mapping[str, Any]:
        """Evaluate, and if that fails save what was trained before."""
        if self._evaluated == self.iter or (self._stop.received and self.iter >= self.max_iter):
            return self.results
        self.collect_states()
        try:
            with self._stop, keep_random_state():
                self._last_eval_results = self._test()
        except Exception:
            if self.iter < self.max_iter:
                self.save_state()
            raise
        self._evaluated = self.iter
        return self._last_eval_results

    def _test(self) -> Mapping[str, Any]:
        results = self.test(self.cfg, self.model)
        if self.average is not None:
            averaged = self.test(self.cfg, self.average.model)
            results = {**results, **{f"{name}_EMA": x for name, x in averaged.items()}}
        if self.cfg.MODEL.LIBRA.TRAINER.VALIDATION_LOSS:
            losses: Dict[str, float] = {}
            for name in self.cfg.DATASETS.TEST:
                found = validation_losses(
                    self._plain_model,
                    self.build_validation_loader(self.cfg, name),
                )
                several = len(self.cfg.DATASETS.TEST) > 1
                losses.update({f"{name}/{k}" if several else k: v for k, v in found.items()})
            for name, value in losses.items():
                self.storage.put_scalar(f"validation/{name}", value, smoothing_hint=False)
        return results

    def _evaluate_with_tta(self) -> Mapping[str, Any]:
        with keep_random_state():
            results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results = {**self.results, **results}
        return results

    def train(self) -> Mapping[str, Any]:
        """
        See :meth:`DefaultTrainer.train`.

        Returns:
            the last results.
        """
        stopping = [h for h in self._hooks if isinstance(h, EarlyStopping)]
        if any(hook.is_over for hook in stopping):
            logger.info("This training has ended early")
            self.start_iter = self.max_iter
        try:
            super().train()
        except TrainingEnded as e:
            logger.info(f"The training ends early: {e}")
        return self.results

    def end_early(self, reason: str) -> None:
        """Make this iteration the last one. Args: reason: to log."""
        self.max_iter = self.iter + 1
        self._end_reason = reason

    def after_step(self) -> None:
        """
        See :meth:`TrainerBase.after_step`.

        Raises:
            TrainingEnded: if a hook has called :meth:`end_early`.
        """
        super().after_step()
        if self._end_reason:
            raise TrainingEnded(self._end_reason)

    def after_train(self) -> None:
        """See :meth:`TrainerBase.after_train`; ends the data loading workers."""
        self._trainer.data_loader.close()
        self.iter = min(self.iter, self.max_iter)  # there may have been no iteration left to do
        super().after_train()
        if self.average is not None and self.iter + 1 >= self.max_iter:
            checkpointer = LibraCheckpointer(self.average.model, self.cfg.OUTPUT_DIR, tag=False)
            checkpointer.save("model_final_ema")

    def before_train(self) -> None:
        """See :meth:`TrainerBase.before_train`; goes on where a resumed training has stopped."""
        super().before_train()
        if self.average is not None and not self.average.is_resumed:
            # Weights were loaded since it was made.
            self.average.model.load_state_dict(self._plain_model.state_dict())
        if comm.is_main_process() and self.start_iter > 0:
            path = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
            remove_later_metrics(path, self.start_iter)
        resumed, self._resumed = self._resumed, {}
        if not resumed:
            return
        set_histories(self.storage, resumed["histories"])
        set_normalizers(self._plain_model, resumed["normalizers"])
        states = resumed["processes"]
        if len(states) != comm.get_world_size():
            logger.warning(
                f"--resume: {len(states)} processes before, {comm.get_world_size()} now: the order "
                "of the images and the random numbers start anew"
            )
            return
        state = states[comm.get_rank()]
        self.model.load_state_dict(state["buffers"], strict=False)
        loader = self._trainer.data_loader.loader
        if isinstance(loader, ResumableLoader) and state["loader"] is not None:
            loader.load_state_dict(state["loader"])
        else:
            logger.warning(
                f"--resume: a {type(loader).__name__} cannot go on where it was: the order of the "
                "images starts anew"
            )
        set_random_state(state["random"])

    def collect_states(self) -> None:
        """
        Take the states of all processes that they do not share, for :meth:`state_dict`. All of them
        call this behind the same iteration.
        """
        loader = self._trainer.data_loader.loader
        resumable = isinstance(loader, ResumableLoader)
        state = {
            "random": get_random_state(),
            "loader": loader.state_dict() if resumable else None,
            # Each process has its own running statistics, and evaluates its images with them.
            "buffers": get_statistics(self.model) if comm.get_rank() > 0 else {},
        }
        self._states = comm.gather(state)

    def save_state(self) -> None:
        """Write a checkpoint to resume behind this iteration from."""
        if comm.get_world_size() == 1:
            self.collect_states()
        self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)

    def state_dict(self) -> Dict[str, Any]:
        """
        See :meth:`DefaultTrainer.state_dict`, which in Detectron2 0.6 forgets the optimizer. Beyond
        that it has what makes a resumed training the same, see :meth:`collect_states`.
        """
        return {
            **super().state_dict(),
            "_trainer": self._trainer.state_dict(),
            "processes": self._states,
            "normalizers": get_normalizers(self._plain_model),
            "histories": get_histories(self.storage) if hasattr(self, "storage") else {},
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint lacks the optimizer's state: its momentum starts at 0")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        if "processes" in state_dict:
            names = ("processes", "normalizers", "histories")
            self._resumed = {name: state_dict[name] for name in names}
        else:
            logger.warning(
                "The checkpoint does not have the state of its training: the order of the images "
                "and the random numbers start anew"
            )
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    def _see_losses(self, model, inputs, losses) -> None:
        self._losses = losses

    def run_step(self) -> None:
        """
        See :meth:`DefaultTrainer.run_step`.

        Raises:
            InputError: if a loss is not finite.
        """
        try:
            super().run_step()
            # The main process has looked at the mean of all; each one knows its own images.
            finite = comm.is_main_process() or torch.isfinite(sum(self._losses.values()))
        except FloatingPointError:
            finite = False
        if finite:
            return
        losses = {name: loss.item() for name, loss in self._losses.items()}
        bad = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
        terms = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
        elsewhere = not bad and comm.get_world_size() > 1
        where = "in another process, not for these images; " if elsewhere else ""
        raise InputError(
            f"a loss is not finite at iteration {self.iter} ({where}{terms}) for the images "
            f"{', '.join(self._trainer.data_loader.last_files)}. {self.checkpointer.advice()}; "
            "a lower SOLVER.BASE_LR, longer SOLVER.WARMUP_ITERS or "
            "SOLVER.CLIP_GRADIENTS.ENABLED True keep a training from diverging"
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """See :func:`libra_d2.checkpoint.build_model`, which says what is wrong with a config."""
        model = build_model(cfg)
        logger.info(f"Model:\n{model}")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :meth:`DefaultTrainer.build_optimizer`."""
        if isinstance(cfg, LazyView):
            return build_lazy_optimizer(cfg, model)
        return super().build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        """See :meth:`DefaultTrainer.build_lr_scheduler`."""
        if isinstance(cfg, LazyView):
            return build_lazy_scheduler(cfg, optimizer)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """See :meth:`DefaultTrainer.build_train_loader`."""
        seed = comm.shared_random_seed()
        if isinstance(cfg, LazyView):
            return build_lazy_train_loader(cfg, seed)
        mapper = build_mapper(cfg, is_train=True)
        # What the function with the same arguments would be given.
        make_arguments = partial(build_detection_train_loader.from_config, cfg, mapper=mapper)
        return ResumableLoader(make_arguments, seed=seed)

    @classmethod
    def build_validation_loader(cls, cfg: CfgNode, dataset_name: str):
        """The images of a dataset as in evaluation, with their annotations, for losses."""
        files = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST))
        records = get_detection_dataset_dicts(
            dataset_name, proposal_files=[files[dataset_name]] if files else None
        )
        mapper = build_mapper(cfg, is_train=True, augmentations=build_augmentation(cfg, False))
        return build_detection_test_loader(
            records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """See :meth:`DefaultTrainer.build_test_loader`."""
        if isinstance(cfg, LazyView):
            return build_lazy_test_loader(cfg, dataset_name)
        mapper = build_mapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`libra_d2.evaluation.build_evaluator`; draws pictures if the config says so."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if isinstance(cfg, LazyView) and has_own_evaluator(cfg):
            evaluator = build_lazy_evaluator(cfg, dataset_name)
        else:
            evaluator = build_evaluator(dataset_name, folder, cfg.TEST.DETECTIONS_PER_IMAGE)
        num_images = cfg.MODEL.LIBRA.NUM_PICTURES
        if num_images == 0:
            return evaluator
        folder = pictures_dir(cfg, dataset_name)
        pictures = PredictionPictures(dataset_name, folder, num_images=num_images)
        return DatasetEvaluators([evaluator, pictures])

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> Mapping[str, Any]:
        """
        Evaluate with the test-time augmentation of ``cfg.TEST.AUG``.

        Returns:
            what :meth:`test` does, with "_TTA" behind each name.
        """
        logger.info("Evaluating with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        limit = cfg.TEST.DETECTIONS_PER_IMAGE
        evaluators = [build_evaluator(name, folder, limit) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, add_test_time_augmentation(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", result) for name, result in results.items())
