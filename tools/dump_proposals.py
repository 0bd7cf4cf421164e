#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Compute the proposals of a trained region proposal network, for models that have none.

    python tools/dump_proposals.py --config-file configs/COCO-Detection/rpn_R_50_FPN_1x.yaml \
        MODEL.WEIGHTS output/model_final.pth OUTPUT_DIR output

takes the config and weights of any model with an RPN, Faster R-CNN and Mask R-CNN included, and
writes OUTPUT_DIR/proposals/<dataset>.pkl in Detectron2's format for each dataset of the config, or
for your own data, or for those named with --dataset. The same command continues an interrupted run.
MODEL.RPN.PRE_NMS_TOPK_TEST and POST_NMS_TOPK_TEST set the number of proposals.
"""

import argparse
import hashlib
import logging
import os
from typing import List

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils.logger import setup_logger

from libra_d2.checkpoint import build_trained_model
from libra_d2.data import build_mapper
from libra_d2.data.proposals import PartialProposals, is_complete
from libra_d2.engine import (
    add_data_arguments,
    check_datasets,
    config_argument_parser,
    read_config,
    register_own_data,
    report_errors,
)
from libra_d2.lazy import LazyView

logger = logging.getLogger("libra_d2.dump_proposals")


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = config_argument_parser(__doc__)
    parser.add_argument(
        "--dataset",
        action="append",
        metavar="NAME",
        help="a registered dataset; may be given several times. Default: your own, or DATASETS.*",
    )
    add_data_arguments(parser)
    return parser


def identify(cfg: CfgNode, model: torch.nn.Module) -> str:
    """Hash of all that the proposals depend on, except for the dataset."""
    text = cfg.dump() if isinstance(cfg, LazyView) else f"{cfg.MODEL.dump()}{cfg.INPUT.dump()}"
    digest = hashlib.sha256(text.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def dump(cfg: CfgNode, model: torch.nn.Module, dataset_name: str, path: str, identity: str) -> None:
    """
    Write the proposals of ``model`` for a dataset to ``path``, going on with ``path.partial``.
    Nothing is done if they are there already.

    Args:
        cfg: for the size of the images and the data loader.
        model: a ProposalNetwork in eval mode.
        dataset_name: a registered dataset.
        path: the file to write.
        identity: of config and weights.
    """
    dataset = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    ids: List = [d["image_id"] for d in dataset]
    identity = f"{identity} {hashlib.sha256(str(ids).encode()).hexdigest()}"
    if is_complete(path, identity):
        logger.info(f"{path}: complete already")
        return
    with PartialProposals(f"{path}.partial", identity) as partial, torch.no_grad():
        done = len(partial.arrays)
        if done:
            logger.info(f"{path}: going on after {done} of {len(ids)} images")
        loader = build_detection_test_loader(
            Subset(DatasetFromList(dataset, copy=True), range(done, len(ids))),
            mapper=build_mapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        progress = tqdm(loader, desc=dataset_name, unit="image", initial=done, total=len(ids))
        for (image,) in progress:
            (output,) = model([image])
            proposals = output["proposals"].to("cpu")
            partial.append(
                proposals.proposal_boxes.tensor.numpy(), proposals.objectness_logits.numpy()
            )
        partial.finish(path, ids)
    logger.info(f"{path}: {sum(map(len, partial.arrays))} proposals in {len(ids)} images")


def run(args: argparse.Namespace) -> None:
    """Read config and weights, and write the proposals of each dataset that has none yet."""
    cfg = read_config(args.config_file, args.opts)
    setup_logger(name="libra_d2", output=cfg.OUTPUT_DIR)
    setup_logger(output=cfg.OUTPUT_DIR)
    own = register_own_data(cfg, args)
    datasets = args.dataset or own or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    check_datasets(datasets)
    # The same names and weights as the model's, without what comes after the proposals.
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    model = build_trained_model(cfg)
    identity = identify(cfg, model)
    for name in dict.fromkeys(datasets):
        dump(cfg, model, name, os.path.join(cfg.OUTPUT_DIR, "proposals", f"{name}.pkl"), identity)


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
