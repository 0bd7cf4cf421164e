#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Write the proposals of a trained RPN to files, for models without an RPN.

    python tools/dump_proposals.py --config-file configs/COCO-Detection/rpn_R_50_FPN_1x.yaml \
        MODEL.WEIGHTS output/model_final.pth OUTPUT_DIR output

The model can be any model with an RPN, such as Faster R-CNN or Mask R-CNN. For each dataset of the
config, your own data or each --dataset, the proposals are written to
OUTPUT_DIR/proposals/<dataset>.pkl in Detectron2's format. If the dataset has annotations, the
recall of the proposals is logged. MODEL.RPN.PRE_NMS_TOPK_TEST and POST_NMS_TOPK_TEST set their
number.
"""

import argparse
import logging
import os
import tempfile

import torch

from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.utils.logger import setup_logger

from libra_d2.config import Recipe, check_datasets
from libra_d2.data.fingerprint import record_fingerprint
from libra_d2.data.proposals import write_proposals
from libra_d2.engine import (
    add_data_arguments,
    config_argument_parser,
    prepare_output_dir,
    read_config,
    register_own_data,
    report_errors,
)
from libra_d2.errors import InputError
from libra_d2.utils.safe_reading import load_arrays

logger = logging.getLogger("libra_d2.dump_proposals")


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = config_argument_parser(__doc__)
    parser.add_argument(
        "--dataset",
        action="append",
        metavar="NAME",
        help="registered dataset; can be repeated. Default: your own data, or DATASETS.*",
    )
    add_data_arguments(parser)
    return parser


def dump(recipe: Recipe, model: torch.nn.Module, dataset_name: str, path: str) -> None:
    """Write the proposals of a ProposalNetwork for a registered dataset to ``path``."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        evaluator = COCOEvaluator(dataset_name, output_dir=folder)
        inference_on_dataset(model, recipe.build_test_loader(dataset_name), evaluator)
        found = load_arrays(os.path.join(folder, "box_proposals.pkl"))
    columns = (found[name] for name in ("ids", "boxes", "objectness_logits"))
    images = record_fingerprint(DatasetCatalog.get(dataset_name))
    write_proposals(path, *columns, images=images)
    logger.info(f"Proposals: {path}")


def run(args: argparse.Namespace) -> None:
    """Write the proposals for each dataset."""
    recipe = read_config(args.config_file, args.opts)
    prepare_output_dir(recipe)
    setup_logger(output=recipe.output_dir)
    own = register_own_data(recipe, args)
    datasets = args.dataset or own or [*recipe.train_datasets, *recipe.test_datasets]
    check_datasets(datasets)
    if recipe.is_retinanet or recipe.needs_proposals:
        raise InputError(f"{args.config_file}: this model has no RPN, which makes proposals")
    recipe = recipe.rpn_only()
    model = recipe.build_trained_model()
    for name in dict.fromkeys(datasets):
        dump(recipe, model, name, os.path.join(recipe.output_dir, "proposals", f"{name}.pkl"))


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
