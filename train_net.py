#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Train and evaluate Libra R-CNN, as Detectron2's own ``tools/train_net.py`` does for its models.

    ./train_net.py --config-file configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml
    ./train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
    ./train_net.py --config-file ... --train-json a.json --train-images a/ \
        --val-json b.json --val-images b/
"""

import logging
import math
import os
import sys
from functools import partial
from unittest.mock import patch

import torch
from torch.multiprocessing import ProcessExitedException

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import (
    DefaultTrainer,
    default_argument_parser,
    default_setup,
    defaults,
    launch,
)
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluators, verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.command_line import (
    add_data_arguments,
    check_datasets,
    prepare_proposal_files,
    read_config,
    register_own_data,
    report_errors,
)
from libra_d2.data import LibraDatasetMapper
from libra_d2.engine import StopOnSignal, WatchedLoader, join_processes, started_by_launcher
from libra_d2.errors import InputError, one_line
from libra_d2.evaluation import (
    PredictionPictures,
    build_evaluator,
    check_evaluator_type,
    plot_learning_curves,
    read_metrics,
    write_results,
)

logger = logging.getLogger("libra_d2.train_net")


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` with the evaluators, the checkpointer and the errors of libra_d2. It
    also runs in several processes on CPUs.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer takes it for granted that processes have GPUs.
        on_cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        with patch.object(
            defaults, "create_ddp_model", partial(defaults.create_ddp_model, **on_cpu)
        ):
            super().__init__(cfg)
        self._trainer.model.register_forward_hook(self._see_losses)

    def state_dict(self):
        """See :meth:`DefaultTrainer.state_dict`, which in Detectron2 0.6 forgets the optimizer."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict) -> None:
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
        where = "" if bad else "in another process, not for these images; "
        raise InputError(
            f"a loss is not finite at iteration {self.iter} ({where}{terms}) for the images "
            f"{', '.join(self._trainer.data_loader.last_files)}. {self.checkpointer.advice()}; "
            "a lower SOLVER.BASE_LR, longer SOLVER.WARMUP_ITERS or "
            "SOLVER.CLIP_GRADIENTS.ENABLED True keep a training from diverging"
        )

    def build_hooks(self):
        # DefaultTrainer makes its checkpointer right before the hooks, which hold on to it.
        self.checkpointer = LibraCheckpointer(
            self.checkpointer.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        hooks = super().build_hooks()
        # Behind what a checkpoint must know of, such as the schedule; before what may take long.
        evaluation = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks.insert(evaluation, StopOnSignal())
        return hooks

    @classmethod
    def build_model(cls, cfg):
        try:
            return super().build_model(cfg)
        except (KeyError, ValueError) as e:  # a value out of range, or an unknown name
            raise InputError(one_line(e)) from e

    @classmethod
    def build_train_loader(cls, cfg):
        mapper = LibraDatasetMapper(cfg, is_train=True)
        return WatchedLoader(build_detection_train_loader(cfg, mapper=mapper))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = LibraDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        evaluator = build_evaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))
        num_images = cfg.MODEL.LIBRA.NUM_PICTURES
        if num_images == 0:
            return evaluator
        output_dir = pictures_dir(cfg, dataset_name)
        pictures = PredictionPictures(dataset_name, output_dir, num_images=num_images)
        return DatasetEvaluators([evaluator, pictures])


def pictures_dir(cfg: CfgNode, dataset_name: str) -> str:
    """Directory of the pictures of ``dataset_name``."""
    return os.path.join(cfg.OUTPUT_DIR, "pictures", dataset_name)


def check_batch_size(cfg: CfgNode) -> None:
    """
    Say what the batch size of all processes together is.

    Raises:
        InputError: if it cannot be divided among them.
    """
    world_size, reference = comm.get_world_size(), cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference != 0:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which is not a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {reference}"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size).SOLVER
    if scaled.IMS_PER_BATCH % world_size != 0:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {scaled.IMS_PER_BATCH}, which {world_size} processes cannot "
            "share: use a multiple, and change SOLVER.BASE_LR in proportion. With "
            "SOLVER.REFERENCE_WORLD_SIZE, the number of processes that the config was made for, "
            "both are scaled"
        )
    logger.info(
        f"Training with {scaled.IMS_PER_BATCH} images in each iteration, "
        f"{scaled.IMS_PER_BATCH // world_size} in each of {world_size} processes, and a learning "
        f"rate of {scaled.BASE_LR:g}"
    )


def setup(args) -> CfgNode:
    """Make the config, check what can be checked before work starts, and set up logging."""
    cfg = read_config(args.config_file, args.opts)
    resuming = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    weights = cfg.MODEL.WEIGHTS
    if not resuming:
        if args.eval_only and not weights:
            raise InputError("MODEL.WEIGHTS: name the weights to evaluate")
        if weights and "://" not in weights and not os.path.isfile(weights):
            raise InputError(f"MODEL.WEIGHTS: {weights}: no such file")
    setup_logger(name="libra_d2", output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    register_own_data(cfg, args)
    needed = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    if not cfg.DATASETS[needed[0]]:
        raise InputError(
            f"no dataset to {'evaluate' if args.eval_only else 'train'} on: set DATASETS.* or use "
            "--train-json, --train-images, --val-json and --val-images"
        )
    check_datasets([name for split in needed for name in cfg.DATASETS[split]])
    for name in cfg.DATASETS.TEST:
        check_evaluator_type(name)
    prepare_proposal_files(cfg, needed)
    if not args.eval_only:
        check_batch_size(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":
        logger.warning("Running on the CPU, which is slow for anything but small images.")
    return cfg


def summarize(cfg: CfgNode, results, args) -> None:
    """Write tables and curves of what came out, and say what it is and where."""
    # With several datasets the results are nested once more, by dataset.
    datasets = cfg.DATASETS.TEST
    nested = results if len(datasets) > 1 else {datasets[0]: results} if results else {}
    for dataset, tasks in nested.items():
        prefix = f"{dataset} " if len(datasets) > 1 else ""
        for task, metrics in (tasks or {}).items():
            numbers = [f"{k} {metrics[k]:.1f}" for k in ("AP", "AP50", "AP75") if k in metrics]
            print(f"{prefix}{task}: {', '.join(numbers)}")
    files = {"log": "log.txt"}
    if not args.eval_only:
        files = {"weights": "model_final.pth", "log": "log.txt", "metrics": "metrics.json"}
        metrics = read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
        files["curves"] = "curves.png"
        plot_learning_curves(metrics, os.path.join(cfg.OUTPUT_DIR, files["curves"]))
    if nested:
        files["results"] = "results.md"
        title = os.path.splitext(os.path.basename(args.config_file))[0] or cfg.OUTPUT_DIR
        write_results(os.path.join(cfg.OUTPUT_DIR, files["results"]), nested, title)
    for what, name in files.items():
        print(f"{what}: {os.path.join(cfg.OUTPUT_DIR, name)}")
    if cfg.MODEL.LIBRA.NUM_PICTURES and nested:
        print(f"pictures: {', '.join(pictures_dir(cfg, name) for name in datasets)}")


def run(args):
    """Train or evaluate, in one of possibly several processes; returns the results."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = LibraCheckpointer(model, cfg.OUTPUT_DIR, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        results = getattr(trainer, "_last_eval_results", {})
    if comm.is_main_process():
        summarize(cfg, results, args)
    return results


def main(args) -> None:
    """:func:`run`, with one line and exit status 2 for what the user can put right."""
    report_errors(run, args)


def invoke_main(argv=None) -> None:
    """Command line entry point."""
    parser = default_argument_parser()
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    if started_by_launcher():
        if args.num_gpus * args.num_machines > 1:
            sys.exit("error: --num-gpus: torchrun or SLURM has started the processes already")
        report_errors(lambda args: join_processes(), args)
        main(args)
        return
    if args.num_gpus * args.num_machines > 1 and not torch.cuda.is_available():
        sys.exit(
            "error: --num-gpus: this machine has no GPU that PyTorch can use; for several "
            "processes on CPUs use torchrun --nproc-per-node N train_net.py ..."
        )
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as e:  # the process has said why
        sys.exit(e.exit_code)


if __name__ == "__main__":
    invoke_main()
