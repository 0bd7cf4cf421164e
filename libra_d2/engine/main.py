# SPDX-License-Identifier: Apache-2.0
"""What ``train_net.py`` does: train or evaluate a config, and say what came out."""

import argparse
import os
from typing import Any, List, Mapping, Optional

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..checkpoint import build_trained_model
from ..errors import Interrupted
from ..evaluation import plot_learning_curves, read_metrics, write_results
from .arguments import add_data_arguments
from .launch import launch
from .setup import setup
from .trainer import Trainer, pictures_dir

__all__ = ["build_argument_parser", "evaluate", "main", "run", "summarize", "train"]


def build_argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and those that name data of one's own."""
    parser = default_argument_parser()
    add_data_arguments(parser)
    return parser


def evaluate(cfg: CfgNode, resume: bool) -> Mapping[str, Any]:
    """
    Evaluate the weights of ``cfg.MODEL.WEIGHTS``, or with ``resume`` the last checkpoint.

    Returns:
        the metrics of each task, or of each dataset and task if there are several datasets.
    """
    model = build_trained_model(cfg, save_dir=cfg.OUTPUT_DIR, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results = {**results, **Trainer.test_with_TTA(cfg, model)}
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(cfg: CfgNode, resume: bool) -> Mapping[str, Any]:
    """
    Train, or with ``resume`` continue from the last checkpoint.

    Returns:
        as :func:`evaluate`, of the last evaluation.
    """
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    try:
        trainer.train()
    except KeyboardInterrupt as e:
        raise Interrupted(trainer.checkpointer.advice()) from e
    return trainer.results


def best_model(cfg: CfgNode) -> str:
    """Which checkpoint of a training is the best one, and how good; "" if it was not asked for."""
    metric = cfg.MODEL.LIBRA.TRAINER.BEST_METRIC
    path = os.path.join(cfg.OUTPUT_DIR, "model_best.pth")
    entries = read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) if metric else []
    values = [(entry[metric], -entry["iteration"]) for entry in entries if metric in entry]
    if not values or not os.path.isfile(path):
        return ""
    value, iteration = max(values)
    end = max(entry["iteration"] for entry in entries if "total_loss" in entry)
    return f"best: {metric} {value:.1f} after {min(1 - iteration, end + 1)} iterations, {path}"


def summarize(cfg: CfgNode, results: Mapping[str, Any], title: str, trained: bool) -> None:
    """
    Write tables and curves of what came out, and say what it is and where.

    Args:
        cfg: the config.
        results: see :func:`evaluate`.
        title: of the tables.
        trained: whether there was a training.
    """
    datasets = cfg.DATASETS.TEST
    by_dataset = results if len(datasets) > 1 else {datasets[0]: results} if results else {}
    for dataset, tasks in by_dataset.items():
        prefix = f"{dataset} " if len(datasets) > 1 else ""
        for task, metrics in (tasks or {}).items():
            numbers = [f"{k} {metrics[k]:.1f}" for k in ("AP", "AP50", "AP75") if k in metrics]
            print(f"{prefix}{task}: {', '.join(numbers)}")
    files = {"log": "log.txt"}
    if trained:
        files = {"weights": "model_final.pth", "log": "log.txt", "metrics": "metrics.json"}
        metrics = read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
        if cfg.MODEL.LIBRA.TRAINER.EMA_DECAY > 0:
            files["averaged weights"] = "model_final_ema.pth"
        files["curves"] = "curves.png"
        plot_learning_curves(metrics, os.path.join(cfg.OUTPUT_DIR, files["curves"]))
    best = best_model(cfg) if trained else ""
    if best:
        print(best)
    if by_dataset:
        files["results"] = "results.md"
        write_results(os.path.join(cfg.OUTPUT_DIR, files["results"]), by_dataset, title, best)
    for what, name in files.items():
        print(f"{what}: {os.path.join(cfg.OUTPUT_DIR, name)}")
    if cfg.MODEL.LIBRA.NUM_PICTURES and by_dataset:
        print(f"pictures: {', '.join(pictures_dir(cfg, name) for name in datasets)}")


def run(args: argparse.Namespace) -> None:
    """Train or evaluate, in one of possibly several processes."""
    cfg = setup(args)
    results = evaluate(cfg, args.resume) if args.eval_only else train(cfg, args.resume)
    if comm.is_main_process():
        name = os.path.splitext(os.path.basename(args.config_file))[0]
        summarize(cfg, results, name or cfg.OUTPUT_DIR, trained=not args.eval_only)


def main(argv: Optional[List[str]] = None) -> None:
    """Command line entry point."""
    launch(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
