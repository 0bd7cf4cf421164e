#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Show what the three ideas of Libra R-CNN do for a model and a dataset: numbers, figures and one HTML
page of the imbalances of samples, features and losses.

    python tools/analyze_balance.py --config-file configs/Demo/libra_faster_rcnn_R_18_FPN.yaml \
        --train-json a.json --train-images a/ MODEL.WEIGHTS model_final.pth OUTPUT_DIR output

writes OUTPUT_DIR/balance/index.html, its figures and balance.json. The model computes its losses
for a few images; nothing is trained. Without --train-json and --val-json the images are those of
DATASETS.TRAIN.
"""

import argparse
import json
import logging
import os
from typing import Any, Dict, List

import numpy as np
import torch
from tqdm import tqdm

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils.logger import setup_logger

from libra_d2.analysis import (
    Recording,
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
from libra_d2.analysis.html_page import Section, write_page
from libra_d2.checkpoint import build_trained_model
from libra_d2.data import build_augmentation, build_mapper, read_image
from libra_d2.engine import (
    add_data_arguments,
    check_datasets,
    config_argument_parser,
    prepare_proposal_files,
    read_config,
    register_own_data,
    report_errors,
)
from libra_d2.errors import InputError
from libra_d2.plain_detector import box_loss_name

logger = logging.getLogger("libra_d2.analyze_balance")


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = config_argument_parser(__doc__)
    parser.add_argument("--num-images", type=int, default=32, help="how many to look at")
    add_data_arguments(parser)
    return parser


def read_images(cfg: CfgNode, dataset: str, split: str, num_images: int) -> List[Dict[str, Any]]:
    """
    Inputs of a model in training, of images spread over a dataset, not augmented.

    Args:
        cfg: for image sizes, and proposals if the model needs them.
        dataset: a registered dataset.
        split: "TRAIN" or "TEST", where ``cfg.DATASETS`` names it.
        num_images: at most so many, of those with annotations.
    """
    files = cfg.DATASETS[f"PROPOSAL_FILES_{split}"] if cfg.MODEL.LOAD_PROPOSALS else None
    records = get_detection_dataset_dicts([dataset], proposal_files=files)
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round().astype(int)
    mapper = build_mapper(cfg, is_train=True, augmentations=build_augmentation(cfg, is_train=False))
    return [mapper(records[i]) for i in chosen]


def merge(recordings: List[Recording]) -> Recording:
    """All of them as one."""
    merged = Recording()
    for recording in recordings:
        for name, values in vars(recording).items():
            getattr(merged, name).extend(values)
    return merged


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def analyze(cfg: CfgNode, model: torch.nn.Module, images: List[Dict], folder: str) -> Dict:
    """
    Write figures and page into ``folder``.

    Returns:
        the numbers: "samples", "features" and "objective", as far as the model has them.
    """
    recording = merge([record(model, [[image]]) for image in tqdm(images, unit="image")])
    numbers: Dict[str, Any] = {"num_images": len(images)}
    sections: List[Section] = []

    def add(figure, name: str, title: str, text: str) -> None:
        path = os.path.join(folder, f"{name}.png")
        figure.savefig(path, dpi=130)
        sections.append(Section(title, text, path))

    if recording.candidates:
        numbers["samples"] = samples = sample_statistics(
            recording.candidates,
            num_bins=cfg.MODEL.LIBRA.SAMPLER.NUM_BINS,
            negative_iou_thresh=cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0],
        )
        easy = [percent(samples[name]["negatives"][0]) for name in ("candidates", "random")]
        paper = samples["balanced, paper's bins"]
        add(
            plot_sampling(samples),
            "samples",
            "Samples: which negatives the second stage is trained on",
            f"{easy[0]} of the negative proposals, and {easy[1]} of those drawn at random, overlap "
            f"with an object by less than {samples['interval_ends'][0]:.2f} IoU. Drawn equally "
            f"from each bin (dotted lines) it is {percent(paper['negatives'][0])}, as far as the "
            "bins hold enough; and each object gets the same number of positives.",
        )
    numbers["features"] = features = feature_statistics(recording.levels)
    names = sorted(
        model.backbone.output_shape(), key=lambda name: model.backbone.output_shape()[name].stride
    )
    if "added" in features:
        size = model.backbone.bfp.refine_level
        text = (
            "The balanced feature pyramid adds the same features, the refined average of all "
            f"levels at the size of {names[size]}, to every level (middle bars). The levels "
            "resemble each other more the more they share: compare the two matrices."
        )
    else:
        text = (
            "This model has no balanced feature pyramid. The bars show the energy of each level, "
            "the matrix how much the levels resemble each other at the same place."
        )
    add(plot_levels(features, names), "levels", "Features: what the pyramid's levels hold", text)
    add(
        plot_heat_maps(recording.levels[0], names, _thumbnail(images[0])),
        "heat_maps",
        "Features: the levels of one image",
        "Bright places have large features; each map has a scale of its own. Where the first and "
        "the last level of a plain pyramid see different things, after balancing both hold what "
        "all levels have seen.",
    )
    retina = cfg.MODEL.META_ARCHITECTURE.endswith("RetinaNet")
    losses = {name.lower(): value for name, value in cfg.MODEL.LIBRA.BALANCED_L1.items()}
    # That of the baseline, which libra_d2.plain_detector defines.
    beta = (
        cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA if retina else cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA
    )
    loss_name = box_loss_name(beta)
    add(
        plot_losses(**losses, smooth_l1_beta=beta),
        "losses",
        f"Objective: balanced L1 and {loss_name}",
        "A smaller alpha raises the gradient of errors below beta (vertical line), the inliers. "
        "Gamma is the gradient of all larger errors, the outliers.",
    )
    errors = torch.cat(recording.box_errors) if recording.box_errors else torch.empty(0)
    if len(errors):
        numbers["objective"] = objective = objective_statistics(
            errors.cpu(), **losses, smooth_l1_beta=beta
        )
        shares = {k: percent(v["inlier_gradient"]) for k, v in objective.items() if "L1" in k}
        add(
            plot_gradient_shares(objective),
            "gradient_shares",
            "Objective: who sets the gradient in these images",
            f"{percent(objective['inliers'])} of the errors are inliers. They contribute "
            f"{shares[loss_name]} of the gradient of {loss_name} loss, the plain detector's; "
            f"{shares[box_loss_name(losses['beta'])]} of that of smooth L1 loss with the same "
            f"beta, which the paper compares with; and {shares['balanced L1']} of that of balanced "
            "L1 loss.",
        )
    write_page(
        os.path.join(folder, "index.html"),
        "Balance of a detector",
        f"{os.path.basename(cfg.MODEL.WEIGHTS) or 'A model with random weights'}, "
        f"{len(images)} images. Proposals, features and errors are those of training.",
        sections,
    )
    return numbers


def _thumbnail(image: Dict[str, Any]) -> np.ndarray:
    """The image as its file has it."""
    return read_image(image["file_name"], format="RGB")


def run(args: argparse.Namespace) -> None:
    """Read config, data and weights, and analyze."""
    if args.num_images < 1:
        raise InputError(f"--num-images is {args.num_images}: use 1 or more")
    cfg = read_config(args.config_file, args.opts)
    setup_logger(name="libra_d2", output=cfg.OUTPUT_DIR)
    own = register_own_data(cfg, args)
    dataset = (own or cfg.DATASETS.TRAIN or [None])[0]
    if dataset is None:
        raise InputError("no images: use --train-json and --train-images, or set DATASETS.TRAIN")
    split = "TRAIN" if dataset in cfg.DATASETS.TRAIN else "TEST"
    check_datasets([dataset])
    prepare_proposal_files(cfg, (split,))
    model = build_trained_model(cfg)
    folder = os.path.join(cfg.OUTPUT_DIR, "balance")
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(0)
    numbers = analyze(cfg, model, read_images(cfg, dataset, split, args.num_images), folder)
    with open(os.path.join(folder, "balance.json"), "w", encoding="utf-8") as f:
        json.dump(numbers, f, indent=1)
    print(os.path.join(folder, "index.html"))


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
