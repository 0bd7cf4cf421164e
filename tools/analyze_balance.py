#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Show what the three ideas of Libra R-CNN do for a model and a dataset: numbers, figures and an HTML
page about the imbalance of samples, features and losses.

    python tools/analyze_balance.py --config-file configs/Demo/libra_faster_rcnn_R_18_FPN.yaml \
        --train-json a.json --train-images a/ MODEL.WEIGHTS model_final.pth OUTPUT_DIR output

writes OUTPUT_DIR/balance/index.html, its figures and balance.json. The model computes its losses
for a few images; nothing is trained. Without --train-json and --val-json, images of DATASETS.TRAIN
are used. With --before-training the weights are those that a training starts from, of a model with
other classes perhaps: the page then shows samples and features, which do not depend on the classes.
With --weights-b, and --config-file-b if it has another config, a second model is shown beside it.
"""

import argparse
import json
import os
from typing import Any, Dict, List

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from libra_d2.analysis import (
    Recording,
    box_loss_name,
    feature_statistics,
    objective_statistics,
    plot_gradient_shares,
    plot_heat_maps,
    plot_levels,
    plot_losses,
    plot_sampling,
    record,
    sample_statistics,
)
from libra_d2.analysis.html_page import Section, Side, write_page
from libra_d2.analysis.judgments import judge
from libra_d2.config import Recipe, check_datasets
from libra_d2.data import read_image
from libra_d2.engine import (
    add_data_arguments,
    config_argument_parser,
    prepare_output_dir,
    prepare_proposal_files,
    read_config,
    register_own_data,
    report_errors,
)
from libra_d2.engine.setup import run_inputs
from libra_d2.errors import InputError, counted
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.output_path import output_path, output_paths

FIGURES = ("samples", "levels", "heat_maps", "losses", "gradient_shares")
FILES = ("index.html", "balance.json", *(f"{name}{x}.png" for name in FIGURES for x in ("", "_b")))


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = config_argument_parser(__doc__)
    parser.add_argument("--num-images", type=int, default=32, help="number of images to analyze")
    parser.add_argument(
        "--before-training",
        action="store_true",
        help="MODEL.WEIGHTS are those that a training starts from; leaves out box errors",
    )
    second = parser.add_argument_group("a second model on the same images")
    second.add_argument("--weights-b", metavar="FILE", help="in place of MODEL.WEIGHTS")
    second.add_argument(
        "--config-file-b", metavar="FILE or NAME", help="default: that of the first model"
    )
    add_data_arguments(parser)
    return parser


def read_images(recipe: Recipe, dataset: str, split: str, num_images: int) -> List[Dict[str, Any]]:
    """
    Training inputs without augmentation, for at most ``num_images`` images with annotations, spread
    over a registered dataset. Proposals are those of the ``split``, "train" or "test".
    """
    files = recipe.proposals_of(dataset, split)
    records = get_detection_dataset_dicts([dataset], proposal_files=files)
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round().astype(int)
    mapper = recipe.build_mapper(True, augmentations=recipe.build_augmentations(False))
    return [mapper(records[i]) for i in chosen]


class Report:
    """
    Numbers of a model, and its side of the page. Figures are saved in ``folder``, with a ``suffix``
    of their names. Those that show measurements have ``about``, the model and the data, above them.
    """

    def __init__(self, folder: str, about: str, suffix: str = ""):
        self.folder, self.suffix = folder, suffix
        self.side = Side(about)
        self.numbers: Dict[str, Any] = {}

    def add(
        self, figure: Figure, name: str, title: str, text: str, is_measured: bool = True
    ) -> None:
        """Save a figure as ``name``.png and add a section with it."""
        if is_measured:
            figure.suptitle(self.side.about, fontsize=9)
        path = os.path.join(self.folder, f"{name}{self.suffix}.png")
        with atomic_write(path) as f:
            figure.savefig(f, dpi=130, format="png")
        self.side.sections[name] = Section(title, text, path)


def report_samples(report: Report, recipe: Recipe, recording: Recording) -> None:
    """Add which proposals the second stage is trained on."""
    report.numbers["samples"] = samples = sample_statistics(
        recording.candidates,
        num_bins=recipe.num_bins,
        negative_iou_thresh=recipe.iou_thresholds[0],
    )
    candidates, random, paper = (
        f"{samples[name]['negatives'][0]:.0%}"
        for name in ("candidates", "random", "balanced, paper's bins")
    )
    report.add(
        plot_sampling(samples),
        "samples",
        "Samples: which negatives the second stage is trained on",
        f"{candidates} of the negative proposals, and {random} of those sampled at random, overlap "
        f"with an object by less than {samples['interval_ends'][0]:.2f} IoU. With "
        f"balanced sampling and the paper's bins it is {paper}: the same number is drawn from each "
        "bin, if the bin has enough. Dotted lines are the borders of bins. Positives are "
        "drawn equally often for each object.",
    )


def report_features(
    report: Report, model: torch.nn.Module, recording: Recording, image: np.ndarray
) -> None:
    """Add what the pyramid levels contain."""
    report.numbers["features"] = features = feature_statistics(recording.levels)
    shapes = model.backbone.output_shape()
    names = sorted(shapes, key=lambda name: shapes[name].stride)
    if "added" in features:
        text = (
            "The balanced feature pyramid adds the same features, the refined average of all "
            f"levels at the size of {names[model.backbone.bfp.refine_level]}, to every level "
            "(middle bars). The levels therefore resemble each other more afterwards, which is no "
            "sign of better features: compare the two matrices."
        )
    else:
        text = (
            "This model has no balanced feature pyramid. The bars show the energy of each level, "
            "the matrix how much the levels resemble each other at the same place."
        )
    title = "Features: what the pyramid levels contain"
    report.add(plot_levels(features, names), "levels", title, text)
    report.add(
        plot_heat_maps(recording.levels[0], names, image),
        "heat_maps",
        "Features: the levels of one image",
        "Bright locations have large features; all maps have the same color scale. Levels of a "
        "plain pyramid respond to objects of different sizes. The balanced feature pyramid adds "
        "one map, in the resolution of each level, to all: the row of the difference.",
    )


def report_objective(report: Report, recipe: Recipe, recording: Recording) -> None:
    """Add which errors dominate the gradient of the box loss."""
    names = ("alpha", "gamma", "beta", "form", "smooth_l1_beta")
    settings = {name: getattr(recipe, name) for name in names}
    plain = box_loss_name(recipe.smooth_l1_beta)
    report.add(
        plot_losses(**settings),
        "losses",
        f"Objective: balanced L1 and {plain}",
        "A smaller alpha raises the gradient of errors below beta (vertical line), the inliers. "
        "Gamma is the gradient of all larger errors, the outliers.",
        is_measured=False,
    )
    errors = torch.cat([torch.empty(0), *(x.cpu() for x in recording.box_errors)])
    if not len(errors):
        return
    report.numbers["objective"] = objective = objective_statistics(errors, **settings)
    shares = {k: f"{v['inlier_gradient']:.0%}" for k, v in objective.items() if "L1" in k}
    report.add(
        plot_gradient_shares(objective),
        "gradient_shares",
        "Objective: which errors dominate the gradient in these images",
        f"{objective['inliers']:.0%} of the errors are inliers. They contribute {shares[plain]} of "
        f"the gradient of {plain} loss, the plain detector's; {shares[box_loss_name(recipe.beta)]} "
        "of that of smooth L1 loss with the same beta, which the paper compares with; and "
        f"{shares['balanced L1']} of that of balanced L1 loss.",
    )


def end_of_path(path: str) -> str:
    """The last four parts of a path, which tell one config, model or dataset from another."""
    return "/".join(path.split("/")[-4:])


def analyze(
    report: Report,
    recipe: Recipe,
    model: torch.nn.Module,
    images: List[Dict],
    with_box_errors: bool = True,
) -> None:
    """Compute the numbers of a model on the images and draw its figures."""
    recording = record(model, ([image] for image in tqdm(images, unit="image")))
    report.numbers["num_images"] = len(images)
    if recording.candidates:
        report_samples(report, recipe, recording)
    report_features(report, model, recording, read_image(images[0]["file_name"], format="RGB"))
    if with_box_errors:
        report_objective(report, recipe, recording)
    report.side.judgments = judge(report.numbers)


def prepare_folder(recipe: Recipe, args: argparse.Namespace) -> str:
    """
    The folder of the report, which is made.

    Raises:
        InputError: if a file of the report cannot be written, or is an input.
    """
    inputs = run_inputs(recipe, args)
    inputs.update({"--config-file-b": args.config_file_b, "--weights-b": args.weights_b})
    option, folder = recipe.name_of("output_dir"), os.path.join(recipe.output_dir, "balance")
    output_path(option, folder, inputs, is_folder=True)
    output_paths(option, [os.path.join(folder, name) for name in FILES], inputs)
    return folder


def choose_dataset(recipe: Recipe, args: argparse.Namespace, folder: str) -> str:
    """
    The registered dataset whose images are analyzed, in a report in ``folder``.

    Raises:
        InputError: if there is none, or a file of the report is an image of it.
    """
    own = register_own_data(recipe, args)
    dataset = (*own, *recipe.train_datasets, None)[0]
    if dataset is None:
        name = recipe.name_of("train_datasets")
        raise InputError(f"no images: use --train-json and --train-images, or set {name}")
    check_datasets([dataset])
    images = {f"an image of {dataset}": [x["file_name"] for x in DatasetCatalog.get(dataset)]}
    files = [os.path.join(folder, name) for name in FILES]
    output_paths(recipe.name_of("output_dir"), files, images)
    return dataset


def second_recipe(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """That of the second model, for the same data and classes."""
    config_file = args.config_file_b or args.config_file
    second = read_config(config_file, args.opts)
    second.weights = args.weights_b
    for name in ("train_datasets", "test_datasets", "train_proposals", "test_proposals"):
        setattr(second, name, getattr(recipe, name))
    if args.train_json or args.val_json:
        second.num_classes = recipe.num_classes
    return second


def build_models(recipes: List[Recipe], args: argparse.Namespace) -> List[torch.nn.Module]:
    """
    Build each model with its weights.

    Raises:
        InputError: if the weights do not fit; for the second model it names --config-file-b.
    """
    models: List[torch.nn.Module] = []
    for recipe in recipes:
        before = args.before_training
        try:
            models.append(recipe.build_initial_model() if before else recipe.build_trained_model())
        except InputError as e:
            if not models or args.config_file_b:
                raise
            raise InputError(
                f"--weights-b: {e}; --config-file-b names a config for the second model alone"
            ) from e
    return models


def run(args: argparse.Namespace) -> None:
    """Load config, data and weights, and write the report."""
    if args.num_images < 1:
        raise InputError(f"--num-images is {args.num_images}: use 1 or more")
    if args.config_file_b and not args.weights_b:
        raise InputError("--config-file-b goes with --weights-b")
    recipe = read_config(args.config_file, args.opts)
    prepare_output_dir(recipe)
    folder = prepare_folder(recipe, args)
    dataset = choose_dataset(recipe, args, folder)
    split = "train" if dataset in recipe.train_datasets else "test"
    data = end_of_path(MetadataCatalog.get(dataset).get("json_file", dataset))
    recipes, config_files = [recipe], [args.config_file]
    if args.weights_b:
        recipes.append(second_recipe(recipe, args))
        config_files.append(args.config_file_b or args.config_file)
    for own in recipes:
        prepare_proposal_files(own, (split,))
    models, reports = build_models(recipes, args), []
    for own, model, config_file, suffix in zip(recipes, models, config_files, ("", "_b")):
        torch.manual_seed(0)
        images = read_images(own, dataset, split, args.num_images)
        weights, count = end_of_path(own.weights), counted(len(images), "image")
        about = f"{end_of_path(config_file)}, {weights},\n{count} of {data}"
        reports.append(Report(folder, about, suffix))
        analyze(reports[-1], own, model, images, with_box_errors=not args.before_training)
    write_page(
        os.path.join(folder, "index.html"),
        "Balance of a detector" if len(reports) == 1 else "Balance of two detectors",
        "Proposals, features and errors are those of training.",
        [x.side for x in reports],
    )
    numbers = [
        {**x.numbers, "judgments": [row._asdict() for row in x.side.judgments]} for x in reports
    ]
    with atomic_write(os.path.join(folder, "balance.json"), "w") as f:
        json.dump({**numbers[0], **({"b": numbers[1]} if args.weights_b else {})}, f, indent=1)
    print(os.path.join(folder, "index.html"))


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
