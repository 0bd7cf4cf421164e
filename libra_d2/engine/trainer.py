# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of a config."""

import logging
import math
import os
import weakref
from collections import OrderedDict
from typing import Any, Dict, List, Mapping, Optional

import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
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
from ..data import build_mapper
from ..errors import InputError
from ..evaluation import PredictionPictures, add_test_time_augmentation, build_evaluator
from ..lazy import LazyView
from .hooks import CheckpointHook, StopOnSignal
from .lazy_config import (
    build_lazy_evaluator,
    build_lazy_loader,
    build_lazy_optimizer,
    build_lazy_scheduler,
    has_own_evaluator,
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
        ddp = {"broadcast_buffers": False}
        if isinstance(cfg, LazyView):
            ddp.update(cfg.lazy.train.get("ddp", {}))
        if cfg.MODEL.DEVICE == "cpu":
            ddp["device_ids"] = None
        model = create_ddp_model(model, **ddp)
        step = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = LibraCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._losses: Dict[str, torch.Tensor] = {}
        model.register_forward_hook(self._see_losses)
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[Optional[HookBase]]:
        """Build the hooks of :class:`DefaultTrainer`, and those of this package between them."""
        cfg, is_main = self.cfg, comm.is_main_process()
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._build_precise_bn(),
            CheckpointHook(
                self.checkpointer,
                cfg.SOLVER.CHECKPOINT_PERIOD,
                max_to_keep=cfg.MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS or None,
            )
            if is_main
            else None,
            # Behind what a checkpoint must know of, before what may take long.
            StopOnSignal(),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
            hooks.EvalHook(0, self._evaluate_with_tta) if cfg.TEST.AUG.ENABLED else None,
            hooks.PeriodicWriter(self.build_writers(), period=self._log_period)
            if is_main
            else None,
        ]

    @property
    def _log_period(self) -> int:
        lazy = isinstance(self.cfg, LazyView)
        return self.cfg.lazy.train.get("log_period", 20) if lazy else 20

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
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def _evaluate_with_tta(self) -> Mapping[str, Any]:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results = {**self.results, **results}
        return results

    def state_dict(self) -> Dict[str, Any]:
        """See :meth:`DefaultTrainer.state_dict`, which in Detectron2 0.6 forgets the optimizer."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint lacks the optimizer's state: its momentum starts at 0")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
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
        if isinstance(cfg, LazyView):
            return build_lazy_loader(cfg)
        return build_detection_train_loader(cfg, mapper=build_mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """See :meth:`DefaultTrainer.build_test_loader`."""
        if isinstance(cfg, LazyView):
            return build_lazy_loader(cfg, dataset_name=dataset_name)
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
