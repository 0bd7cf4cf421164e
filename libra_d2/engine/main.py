# SPDX-License-Identifier: Apache-2.0
"""The program behind ``train_net.py``: trains or evaluates a config, and summarizes the results."""

import argparse
import os
from typing import Any, List, Mapping, Optional

from detectron2.engine import default_argument_parser, hooks
from detectron2.utils import comm

from ..config import Recipe, describe
from ..errors import Interrupted
from ..evaluation import finite_predictions, plot_learning_curves, read_metrics, write_results
from .arguments import add_data_arguments
from .launch import launch
from .output_dir import evaluation_recipe, save_config, title_of
from .setup import setup
from .trainer import Trainer, pictures_dir

__all__ = ["build_argument_parser", "evaluate", "main", "run", "summarize", "train"]

# Of detections and of proposals.
_MAIN_METRICS = ("AP", "AP50", "AP75", "AR@100", "AR@1000")


def build_argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and those for your own data."""
    parser = default_argument_parser()
    parser.set_defaults(config_file=None)  # in place of Detectron2's own, a model of C4 features
    add_data_arguments(parser)
    return parser


def evaluate(recipe: Recipe, resume: bool) -> Mapping[str, Any]:
    """
    Evaluate the weights of a recipe, or with ``resume`` the last checkpoint.

    Returns:
        see :meth:`Trainer.test`.

    Raises:
        InputError: if the weights cannot be evaluated, see :meth:`Recipe.build_trained_model` and
            :func:`finite_predictions`.
    """
    checkpoint_dir = recipe.output_dir if resume else ""
    model = recipe.build_trained_model(checkpoint_dir, datasets=recipe.test_datasets)
    own = evaluation_recipe(recipe)
    with finite_predictions(model):
        results = Trainer.test(own.config, model)
        if own.tta:
            results = {**results, **Trainer.test_with_TTA(own.config, model)}
    if comm.is_main_process():
        recipe.verify(results)
    return results


def train(trainer: Trainer, resume: bool) -> Mapping[str, Any]:
    """Train, or with ``resume`` continue; returns the results of the last evaluation."""
    trainer.resume_or_load(resume=resume)
    try:
        return trainer.train()
    except KeyboardInterrupt as e:
        raise Interrupted(trainer.checkpointer.advice()) from e


def print_results(recipe: Recipe, by_dataset: Mapping[str, Any]) -> None:
    """Print the average precision, or recall of proposals, of each task, in a line."""
    for dataset, tasks in by_dataset.items():
        prefix = f"{dataset} " if len(recipe.test_datasets) > 1 else ""
        for task, metrics in (tasks or {}).items():
            numbers = [f"{k} {metrics[k]:.1f}" for k in _MAIN_METRICS if k in metrics]
            print(f"{prefix}{task}: {', '.join(numbers)}")


def summarize(
    recipe: Recipe, results: Mapping[str, Any], title: str, trainer: Optional[Trainer] = None
) -> None:
    """
    Write tables of the results and the learning curves of a training; print results and files.

    Args:
        results: see :func:`evaluate`.
        title: of the tables.
        trainer: None after an evaluation.
    """
    datasets, files = recipe.test_datasets, {"log": "log.txt"}
    by_dataset = results if len(datasets) > 1 else {datasets[0]: results} if results else {}
    print_results(recipe, by_dataset)
    best = trainer.best.describe() if trainer and trainer.best else ""
    if best:
        print(best)
    if trainer:
        files = {"weights": "model_final.pth", "log": "log.txt", "metrics": "metrics.json"}
        if recipe.ema_decay > 0:
            files["averaged weights"] = "model_final_ema.pth"
        files["curves"] = "curves.png"
        metrics = read_metrics(os.path.join(recipe.output_dir, files["metrics"]))
        plot_learning_curves(metrics, os.path.join(recipe.output_dir, files["curves"]))
    if by_dataset:
        files["results"] = "results.md" if trainer else "evaluation.md"
        path = os.path.join(recipe.output_dir, files["results"])
        about = {"precision": str(recipe.precision).replace("torch.", ""), **describe(recipe)}
        write_results(path, by_dataset, title, best, about)
    for what, name in files.items():
        print(f"{what}: {os.path.join(recipe.output_dir, name)}")
    if recipe.num_pictures and by_dataset:
        own = recipe if trainer else evaluation_recipe(recipe)
        print(f"pictures: {', '.join(pictures_dir(own, name) for name in datasets)}")


def run(args: argparse.Namespace) -> None:
    """Train or evaluate, in one of possibly several processes."""
    recipe, trainer = setup(args), None
    if args.eval_only:
        results = evaluate(recipe, args.resume)
    else:
        trainer = Trainer(recipe)
        trainer.register_hooks(  # the training may begin only then, if it is resumed
            [hooks.CallbackHook(before_train=lambda _: save_config(recipe, args.config_file))]
        )
        results = train(trainer, args.resume)
    if comm.is_main_process():
        title = title_of(args.config_file) if args.config_file else recipe.output_dir
        summarize(recipe, results, title, trainer)


def main(argv: Optional[List[str]] = None) -> None:
    """Command line entry point."""
    launch(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
