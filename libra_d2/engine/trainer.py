# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of a config."""

import logging
import math
import os
import weakref
from collections import OrderedDict
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from detectron2.utils.logger import setup_logger

from ..checkpoint import LibraCheckpointer
from ..config import Recipe, RunIdentity, identify, make_recipe, set_length
from ..data import ResumableLoader
from ..errors import InputError, one_line
from ..evaluation import PredictionPictures, build_evaluator, finite_predictions
from ..evaluation.validation_loss import validation_losses
from ..modeling.batch_norm import share_statistics
from ..utils.main_process import in_main_process
from ..utils.random_state import keep_random_state, seeded
from .accumulation import AccumulationTrainer, AMPAccumulationTrainer
from .hooks import (
    AverageWeights,
    BestModel,
    CheckpointHook,
    EarlyStopping,
    PreciseStatistics,
    StopOnSignal,
    Throughput,
    TrainingEnded,
)
from .output_dir import recipe_in
from .resuming import ExactResume
from .watched_loader import WatchedLoader

__all__ = ["Trainer", "pictures_dir"]

logger = logging.getLogger(__name__)


def pictures_dir(recipe: Recipe, dataset_name: str) -> str:
    """Directory of the pictures of ``dataset_name``."""
    return os.path.join(recipe.output_dir, "pictures", dataset_name)


def _results_dir(recipe: Recipe, name: str, dataset_name: str) -> str:
    """Directory of the detections, whose files have the same names for all datasets."""
    is_one_of_several = len(recipe.test_datasets) > 1
    return os.path.join(recipe.output_dir, name, *[dataset_name] * is_one_of_several)


def _set_up_logging() -> None:
    """Log as :class:`DefaultTrainer` does, or where Detectron2 logs, unless that is set up."""
    ours, theirs = logging.getLogger("libra_d2"), logging.getLogger("detectron2")
    if not theirs.isEnabledFor(logging.INFO):
        setup_logger(distributed_rank=comm.get_rank())
    if not ours.isEnabledFor(logging.INFO):
        ours.handlers, ours.propagate = [*theirs.handlers], theirs.propagate
        ours.setLevel(theirs.level)


class _Printer(CommonMetricPrinter):
    def _get_eta(self, storage: EventStorage) -> Optional[str]:
        """The parent's, which divides by zero if the same iteration is printed twice."""
        try:
            return super()._get_eta(storage)
        except ZeroDivisionError:
            return None


class _TensorBoard(TensorboardXWriter):
    """
    Writes each value at once, so that a process that is killed loses none that its checkpoint
    counts on. Starts with the first value, when it is known where the training is resumed: the
    reader of TensorBoard then drops what an interrupted training has written beyond.
    """

    def __init__(self, trainer: "Trainer"):
        self._trainer = trainer

    def write(self) -> None:
        if not hasattr(self, "_last_write"):
            start = self._trainer._resume.written + 1
            super().__init__(self._trainer.recipe.output_dir, purge_step=start)
        super().write()
        self._writer.flush()


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` with the evaluators, the checkpointer and the errors of libra_d2, for
    YAML configs and LazyConfigs, on GPUs and CPUs. Subclasses override its ``build_*`` methods as
    there; their ``cfg`` is the config that the trainer was given.
    """

    def __init__(self, cfg: Any):
        """
        This replaces the parent's constructor, which takes a GPU for each process for granted and
        makes its own checkpointer.

        Args:
            cfg: a ``CfgNode`` with the keys of :func:`libra_d2.add_libra_config`, a LazyConfig, or
                the recipe of one.

        Raises:
            InputError: if a value of the config is not usable.
        """
        TrainerBase.__init__(self)
        self.recipe = recipe = make_recipe(cfg).scaled_to(comm.get_world_size())
        _set_up_logging()
        self.cfg = cfg = recipe.config
        self._identity = RunIdentity(in_main_process(identify, recipe))
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self.recipe = recipe = self._with_length(recipe, loader)
        self.cfg = cfg = recipe.config
        data_loader = WatchedLoader(loader)
        #: moving average of the weights, if any
        self.average: Optional[AverageWeights] = None
        if recipe.ema_decay > 0:
            self.average = AverageWeights(
                *(model, recipe.ema_decay, recipe.output_dir), run=self._identity
            )
        on_cpu = {"device_ids": None} if recipe.device == "cpu" else {}
        model = create_ddp_model(model, **recipe.ddp_options, **on_cpu)
        is_scaled = recipe.precision is torch.float16
        step = AMPAccumulationTrainer if is_scaled else AccumulationTrainer
        self._trainer = step(model, data_loader, optimizer)
        self._trainer.accumulation_steps = recipe.accumulation_steps
        self._trainer.autocast = recipe.autocast
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = LibraCheckpointer(
            *(model, recipe.output_dir), run=self._identity, trainer=weakref.proxy(self)
        )
        self.max_iter = recipe.max_iter
        self._losses: Dict[str, torch.Tensor] = {}
        model.register_forward_hook(self._see_losses)
        self._evaluated = -1  # iteration of the last evaluation
        self._end_reason = ""  # of a training that ends early
        self._stop = StopOnSignal()
        self._resume = ExactResume(data_loader.loader, recipe.output_dir)
        self.best: Optional[BestModel] = None
        self.register_hooks(self.build_hooks())

    @staticmethod
    def _with_length(recipe: Recipe, loader: Any) -> Recipe:
        """The recipe in iterations, see :func:`set_length`."""
        if isinstance(loader, ResumableLoader):
            recipe = recipe.copy() if recipe.epochs > 0 else recipe
            set_length(recipe, loader.num_images)
        elif recipe.epochs > 0:
            raise InputError(
                f"{recipe.name_of('epochs')} needs Detectron2's data loader, which knows how many "
                f"images there are; with a {type(loader).__name__} use "
                f"{recipe.name_of('max_iter')}"
            )
        return recipe

    def build_hooks(self) -> List[Optional[HookBase]]:
        """
        Build the hooks of :class:`DefaultTrainer` and of this package. Hooks that change the state
        of the training precede the checkpoint.
        """
        recipe, is_main = self.recipe, comm.is_main_process()
        period, patience = recipe.eval_period, recipe.patience
        if is_main and recipe.best_metric:
            self.best = self._build_best_model()
        metric = recipe.best_metric or "bbox/AP"
        stopping = EarlyStopping(period, metric, patience, self._identity.validation_data)
        return [
            hooks.IterationTimer(),
            Throughput(recipe.batch_size) if is_main else None,
            hooks.LRScheduler(),
            self._build_precise_bn(),
            self.average,
            hooks.EvalHook(period, self._evaluate),
            hooks.EvalHook(0, self._evaluate_with_tta) if recipe.tta else None,
            self.best,
            stopping if patience > 0 else None,
            hooks.PeriodicWriter(self.build_writers(), self._log_period) if is_main else None,
            CheckpointHook(
                *(self.checkpointer, self._resume, recipe.checkpoint_period),
                max_to_keep=recipe.max_checkpoints or None,
            ),
            self._stop,
            self._resume,
        ]

    def register_hooks(self, hooks: List[Optional[HookBase]]) -> None:
        """See :meth:`TrainerBase.register_hooks`; ExactResume stays the last hook."""
        super().register_hooks(hooks)
        self._hooks.sort(key=lambda hook: isinstance(hook, ExactResume))

    def build_writers(self) -> List[EventWriter]:
        """See :meth:`DefaultTrainer.build_writers`."""
        folder = self.recipe.output_dir
        os.makedirs(folder, exist_ok=True)
        return [
            _Printer(self.max_iter),
            JSONWriter(os.path.join(folder, "metrics.json")),
            _TensorBoard(weakref.proxy(self)),
        ]

    def _build_best_model(self) -> BestModel:
        recipe = self.recipe
        # In the name of the task, or of the dataset if there are several.
        averaged = any(name.endswith("_EMA") for name in recipe.best_metric.split("/")[:-1])
        model = self.average.model if averaged and self.average else self.model
        checkpointer = LibraCheckpointer(model, recipe.output_dir, tag=False, run=self._identity)
        data = self._identity.validation_data
        return BestModel(recipe.eval_period, checkpointer, recipe.best_metric, data)

    @property
    def _log_period(self) -> int:
        """Logging period: every evaluation is logged, since writers keep only the latest value."""
        period = self.recipe.get("log_period", Recipe.log_period.default)
        return min(period, self.recipe.eval_period or period)

    def _build_precise_bn(self) -> Optional[HookBase]:
        """See :meth:`DefaultTrainer.build_hooks`."""
        if not (self.recipe.get("precise_bn") and get_bn_modules(self.model)):
            return None
        recipe = self.recipe.copy()
        recipe.num_workers = 0
        with seeded(0):
            loader = self.build_train_loader(recipe.config)
        number = recipe.precise_bn_iterations
        return PreciseStatistics(recipe.eval_period, self.model, loader, number)

    @property
    def results(self) -> Mapping[str, Any]:
        """Metrics of the last evaluation, see :meth:`test`; empty if there was none."""
        return getattr(self, "_last_eval_results", {})  # the parent's name

    @property
    def _is_unfinished(self) -> bool:
        """
        After the training: whether an error or a signal has ended it in its last iteration, which
        is counted when it is done.
        """
        return self.iter == self.max_iter - 1

    def _evaluate(self) -> Mapping[str, Any]:
        """Evaluate; if that fails, save the training first, from where it is evaluated again."""
        if self._evaluated == self.iter or self._is_unfinished:
            return {}  # nothing new
        with self._resume.held():
            try:
                with self._stop, keep_random_state():
                    self._last_eval_results = self._test()
            except Exception:
                self.save_state()
                raise
        self._evaluated = self.iter
        return self._last_eval_results

    def _test(self) -> Mapping[str, Any]:
        share_statistics(self.model)
        with finite_predictions(self.model, required=False):
            results = self.test(self.cfg, self.model)
        if self.average is not None:
            logger.info("Evaluating the averaged weights")
            share_statistics(self.average.model)
            averaged = self.test(recipe_in(self.recipe, "EMA").config, self.average.model)
            results = {**results, **{f"{name}_EMA": x for name, x in averaged.items()}}
        if self.recipe.validation_loss:
            for dataset in self.recipe.test_datasets:
                self._log_validation_losses(dataset)
        return results

    def _log_validation_losses(self, dataset: str) -> None:
        logger.info(f"Computing the validation losses of {dataset}")
        loader = self.build_validation_loader(self.cfg, dataset)
        with self.recipe.autocast():
            losses = validation_losses(self.checkpointer.model, loader)
        if losses:
            values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            logger.info(f"Validation losses of {dataset}: {values}")
        is_one_of_several = len(self.recipe.test_datasets) > 1
        prefix = f"validation/{dataset}/" if is_one_of_several else "validation/"
        for name, value in losses.items():
            self.storage.put_scalar(f"{prefix}{name}", value, smoothing_hint=False)
            # Otherwise Detectron2 would print the median of all evaluations, in each line.
            self.storage.histories().pop(f"{prefix}{name}")

    def _evaluate_with_tta(self) -> Mapping[str, Any]:
        if self._is_unfinished:
            return {}
        with keep_random_state():
            results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results = {**self.results, **results}
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """
        See :meth:`DefaultTrainer.resume_or_load`.

        Raises:
            InputError: if the weights cannot be loaded, see :class:`LibraCheckpointer`; if the
                checkpoint is of another run, see :class:`RunIdentity` and :meth:`load_state_dict`;
                if the processes find different ones.
        """
        self.checkpointer.resume_or_load(self.recipe.weights, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
            if not self._identity.is_compared:
                logger.warning(
                    "The checkpoint does not say which run it is of: its config and data are not "
                    "compared"
                )
            path = os.path.join(self.recipe.output_dir, "model_final_ema.pth")
            if self.average is None and comm.is_main_process() and os.path.isfile(path):
                name = self.recipe.name_of("ema_decay")
                logger.warning(f"{path} stays as it is: this training goes on without {name}")
        if len(set(comm.all_gather(self.start_iter))) > 1:
            raise InputError(
                f"{self.recipe.name_of('output_dir')}: {self.recipe.output_dir}: the processes "
                "find different checkpoints: use a directory that all of them share"
            )

    def train(self) -> Mapping[str, Any]:
        """See :meth:`DefaultTrainer.train`; returns the last results."""
        stopping = [h for h in self._hooks if isinstance(h, EarlyStopping)]
        if any(hook.is_over for hook in stopping):
            logger.info("This training has ended early")
            self.max_iter = self.start_iter
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except TrainingEnded as e:
            logger.info(f"The training ends early: {e}")
        except OSError as e:
            if e.filename:
                raise
            name = self.recipe.name_of("output_dir")
            raise InputError(
                f"{name}: {self.recipe.output_dir}: {one_line(e)}. {self.checkpointer.advice()}"
            ) from e
        if comm.is_main_process():
            self.recipe.verify(self.results)
        return self.results

    def end_early(self, reason: str) -> None:
        """Make this iteration the last one, and log the reason."""
        self.max_iter = self.iter + 1
        self._end_reason = reason

    def after_step(self) -> None:
        """See :meth:`TrainerBase.after_step`. Raises TrainingEnded after :meth:`end_early`."""
        super().after_step()
        if self._end_reason:
            raise TrainingEnded(self._end_reason)

    def after_train(self) -> None:
        """See :meth:`TrainerBase.after_train`; ends the data loading workers."""
        self._trainer.data_loader.close()
        if self._end_reason:  # as after the last iteration, whose metrics are written already
            if self._evaluated == self.iter:
                self._evaluated = self.max_iter
            self.iter = self.max_iter
        self.iter = min(self.iter, self.max_iter)  # no iteration may have been left
        super().after_train()

    def save_state(self) -> None:
        """
        Write a checkpoint of this iteration to resume from, unless the last one is done, which has
        one. All processes must call this.
        """
        if self.iter < self.max_iter - 1:
            with self._resume.held():
                self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)

    def before_train(self) -> None:
        """
        See :meth:`TrainerBase.before_train`. If the training was interrupted in an evaluation, this
        evaluates, and does what follows in an iteration.
        """
        super().before_train()
        start, period = self.start_iter, self.recipe.eval_period
        is_due = 0 < start < self.max_iter and period > 0 and start % period == 0
        if not is_due or self._evaluated == start - 1:
            return
        self.iter = self.storage.iter = start - 1
        is_before = [not isinstance(hook, hooks.EvalHook) for hook in self._hooks]
        for hook in self._hooks[is_before.index(False) :]:
            hook.after_step()
        if self._end_reason:
            raise TrainingEnded(self._end_reason)

    def state_dict(self) -> Dict[str, Any]:
        """See :meth:`DefaultTrainer.state_dict`, which in Detectron2 0.6 forgets the optimizer."""
        own = {"_trainer": self._trainer.state_dict(), "evaluated": self._evaluated}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """
        See :meth:`DefaultTrainer.load_state_dict`. Learning rate, momentum and weight decay are the
        config's.

        Raises:
            InputError: if the state has more iterations than this training, or is of another
                optimizer.
        """
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint lacks the optimizer's state: its momentum starts at 0")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        number = state_dict["iteration"] + 1
        if number > self.max_iter:
            raise InputError(
                f"{self.recipe.name_of('max_iter')} is {self.max_iter}, but the run that is "
                f"resumed has {number} iterations already: use more, or another output directory"
            )
        self._evaluated = state_dict.get("evaluated", number - 1)
        optimizer = self._trainer.optimizer
        options = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        base_lrs = getattr(self.scheduler, "base_lrs", None)
        try:
            super().load_state_dict(state_dict)
            self._trainer.load_state_dict(state_dict["_trainer"])
        except (KeyError, ValueError) as e:
            raise InputError(
                f"the checkpoint's optimizer is of another type or has other parameters than the "
                f"config's: {one_line(e)}"
            ) from e
        if isinstance(self.scheduler, LRMultiplier):
            # The config's learning rate, momentum and decay, which may have changed.
            self.scheduler.base_lrs = base_lrs
            rates = self.scheduler.get_lr()
            for group, own, rate in zip(optimizer.param_groups, options, rates):
                group.update(own, lr=rate)

    def _see_losses(self, model, inputs, losses) -> None:
        if model.training:  # detections are large
            self._losses = losses

    def run_step(self) -> None:
        """See :meth:`DefaultTrainer.run_step`. Raises InputError if a loss is not finite."""
        self._losses, reason = {}, ""
        try:
            super().run_step()
            # The main process has checked the mean over all; only this one knows its images.
            finite = comm.is_main_process() or torch.isfinite(sum(self._losses.values()))
        except FloatingPointError as e:  # in place of losses if the predictions are not finite
            finite, reason = False, one_line(e)
        if finite:
            return
        losses = {name: loss.item() for name, loss in self._losses.items()}
        bad = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
        terms = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items()) or reason
        elsewhere = losses and not bad and comm.get_world_size() > 1
        where = "in another process, not for these images; " if elsewhere else ""
        keys = [self.recipe.name_of("learning_rate")]
        keys += filter(self.recipe.has, ("SOLVER.WARMUP_ITERS", "SOLVER.CLIP_GRADIENTS.ENABLED"))
        raise InputError(
            f"a loss is not finite at iteration {self.iter} ({where}{terms}) for the images "
            f"{', '.join(self._trainer.data_loader.last_files)}. {self.checkpointer.advice()}; "
            "a lower learning rate, a longer warm-up or clipped gradients keep a training from "
            f"diverging ({', '.join(keys)})"
        )

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """See :meth:`DefaultTrainer.build_model` and :meth:`Recipe.build_model`."""
        model = make_recipe(cfg).build_model()
        logger.info(f"Model:\n{model}")
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        return make_recipe(cfg).build_optimizer(model)

    @classmethod
    def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer):
        return make_recipe(cfg).build_lr_scheduler(optimizer)

    @classmethod
    def build_train_loader(cls, cfg: Any):
        """See :meth:`DefaultTrainer.build_train_loader` and :meth:`Recipe.build_train_loader`."""
        return make_recipe(cfg).build_train_loader(comm.shared_random_seed())

    @classmethod
    def build_validation_loader(cls, cfg: Any, dataset_name: str):
        return make_recipe(cfg).build_validation_loader(dataset_name)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str):
        return make_recipe(cfg).build_test_loader(dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> DatasetEvaluator:
        """See :meth:`Recipe.build_evaluator`; adds pictures if the config asks for them."""
        recipe = make_recipe(cfg)
        folder = _results_dir(recipe, "inference", dataset_name)
        evaluator = recipe.build_evaluator(dataset_name, folder)
        if recipe.num_pictures == 0:
            return evaluator
        folder = pictures_dir(recipe, dataset_name)
        pictures = PredictionPictures(dataset_name, folder, num_images=recipe.num_pictures)
        return DatasetEvaluators([evaluator, pictures])

    @classmethod
    def test(
        cls, cfg: Any, model: nn.Module, evaluators: Optional[Sequence[DatasetEvaluator]] = None
    ) -> Mapping[str, Any]:
        """
        See :meth:`DefaultTrainer.test`, which finds the datasets in YAML configs only.

        Returns:
            the metrics of each task, or of each dataset and task if there are several datasets.
        """
        results: Dict[str, Any] = OrderedDict()
        recipe = make_recipe(cfg)
        for i, name in enumerate(recipe.test_datasets):
            evaluator = evaluators[i] if evaluators else cls.build_evaluator(cfg, name)
            loader = cls.build_test_loader(cfg, name)
            with torch.inference_mode(), recipe.autocast():
                results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def test_with_TTA(cls, cfg: Any, model: nn.Module) -> Mapping[str, Any]:
        """Evaluate with test-time augmentation: as :meth:`test`, with "_TTA" after each name."""
        logger.info("Evaluating with test-time augmentation")
        recipe = make_recipe(cfg)
        evaluators = [
            build_evaluator(
                name, _results_dir(recipe, "inference_TTA", name), recipe.max_detections
            )
            for name in recipe.test_datasets
        ]
        results = cls.test(cfg, recipe.add_test_time_augmentation(model), evaluators)
        return OrderedDict((f"{name}_TTA", result) for name, result in results.items())
