#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Train and evaluate Libra R-CNN, as Detectron2's own ``tools/train_net.py`` does for its models.

    ./train_net.py --config-file configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml
    ./train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
    ./train_net.py --config-file ... --train-json a.json --train-images a/ \
        --val-json b.json --val-images b/
"""

import importlib.util
import logging
import os
import sys
from contextlib import contextmanager

import torch
from torch.multiprocessing import ProcessExitedException

from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import DatasetEvaluators, verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from libra_d2 import add_libra_config
from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.data import LibraDatasetMapper, register_coco_json
from libra_d2.errors import InputError, one_line
from libra_d2.evaluation import PredictionPictures, build_evaluator, check_evaluator_type

logger = logging.getLogger("libra_d2.train_net")


class Trainer(DefaultTrainer):
    """:class:`DefaultTrainer` with the evaluators, the checkpointer and the errors of libra_d2."""

    def build_hooks(self):
        # DefaultTrainer makes its checkpointer right before the hooks, which hold on to it.
        self.checkpointer = LibraCheckpointer(
            self.checkpointer.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        return super().build_hooks()

    @classmethod
    def build_model(cls, cfg):
        try:
            return super().build_model(cfg)
        except (KeyError, ValueError) as e:  # a value out of range, or an unknown name
            raise InputError(one_line(e)) from e

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=LibraDatasetMapper(cfg, is_train=True))

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


@contextmanager
def blamed_on(source: str):
    """Turn what is raised while ``source`` is being read into an InputError that names it."""
    try:
        yield
    except Exception as e:
        raise InputError(f"{source}: {one_line(e)}") from e


def build_argument_parser():
    """Detectron2's arguments, and those for data of the user's own."""
    parser = default_argument_parser()
    data = parser.add_argument_group(
        "your own data", "in COCO format; sets the number of classes. Instead of DATASETS.*"
    )
    for split in ("train", "val"):
        data.add_argument(f"--{split}-json", metavar="FILE", help=f"annotations to {split} on")
        data.add_argument(f"--{split}-images", metavar="DIR", help="where their images are")
    return parser


def register_own_data(cfg: CfgNode, args) -> None:
    """Register the datasets named on the command line and make ``cfg`` use them."""
    known_classes = None
    for split, key in (("train", "TRAIN"), ("val", "TEST")):
        json_file, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if (json_file is None) != (images is None):
            raise InputError(f"--{split}-json and --{split}-images go together")
        if json_file is None:
            continue
        name = f"own_{split}"
        classes = register_coco_json(
            name, json_file, images, cache_dir=os.path.join(cfg.OUTPUT_DIR, "datasets")
        )
        if known_classes not in (None, classes):
            raise InputError(
                f"{json_file}: its categories {classes} are not those of {args.train_json}, "
                f"{known_classes}"
            )
        known_classes = classes
        cfg.DATASETS[key] = (name,)
    if known_classes is not None:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(known_classes)
        cfg.MODEL.RETINANET.NUM_CLASSES = len(known_classes)
        if args.train_json and not args.val_json:
            cfg.DATASETS.TEST = ()


def check_datasets(cfg: CfgNode, args) -> None:
    """Raise InputError if a dataset that will be needed is not there."""
    names = cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST
    if not (cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN):
        raise InputError(
            f"no dataset to {'evaluate' if args.eval_only else 'train'} on: set DATASETS.* or use "
            "--train-json, --train-images, --val-json and --val-images"
        )
    for name in names:
        if name not in DatasetCatalog:
            raise InputError(
                f"DATASETS: {name!r} is not a registered dataset; for your own data use "
                "--train-json, --train-images, --val-json and --val-images"
            )
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("dirname")):
            if path is not None and "://" not in path and not os.path.exists(path):
                raise InputError(
                    f"{path}: dataset {name!r} is not there. The environment variable "
                    "DETECTRON2_DATASETS names the directory of Detectron2's builtin datasets"
                )
        if name in cfg.DATASETS.TEST:
            check_evaluator_type(name)


def setup(args) -> CfgNode:
    """Make the config, check what can be checked before work starts, and set up logging."""
    cfg = get_cfg()
    add_libra_config(cfg)
    if args.config_file:
        with blamed_on(args.config_file):
            cfg.merge_from_file(args.config_file, allow_unsafe=False)
    with blamed_on("command line"):
        cfg.merge_from_list(args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise InputError("SOLVER.AMP.ENABLED: Detectron2 trains with mixed precision on GPUs only")
    if cfg.MODEL.LIBRA.NUM_PICTURES and importlib.util.find_spec("cv2") is None:
        raise InputError(
            "MODEL.LIBRA.NUM_PICTURES: drawing needs OpenCV; `pip install opencv-python-headless`"
        )
    weights = cfg.MODEL.WEIGHTS
    if not (args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        if args.eval_only and not weights:
            raise InputError("MODEL.WEIGHTS: name the weights to evaluate")
        if weights and "://" not in weights and not os.path.isfile(weights):
            raise InputError(f"MODEL.WEIGHTS: {weights}: no such file")
    with blamed_on(f"OUTPUT_DIR: {cfg.OUTPUT_DIR}"):
        PathManager.mkdirs(cfg.OUTPUT_DIR)
    setup_logger(name="libra_d2", output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    register_own_data(cfg, args)
    check_datasets(cfg, args)
    cfg.freeze()
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":
        logger.warning("Running on the CPU, which is slow for anything but small images.")
    return cfg


def print_summary(cfg: CfgNode, results, args) -> None:
    """Say what came out and where it is."""
    files = {
        "weights": None if args.eval_only else os.path.join(cfg.OUTPUT_DIR, "model_final.pth"),
        "log": os.path.join(cfg.OUTPUT_DIR, "log.txt"),
        "metrics": None if args.eval_only else os.path.join(cfg.OUTPUT_DIR, "metrics.json"),
    }
    if cfg.MODEL.LIBRA.NUM_PICTURES:
        for name in cfg.DATASETS.TEST:
            files["pictures"] = pictures_dir(cfg, name)
    # With several datasets the results are nested once more, by dataset.
    nested = results if len(cfg.DATASETS.TEST) > 1 else {"": results}
    for dataset, tasks in nested.items():
        for task, metrics in (tasks or {}).items():
            numbers = [f"{k} {metrics[k]:.1f}" for k in ("AP", "AP50", "AP75") if k in metrics]
            print(f"{dataset} {task}: {', '.join(numbers)}".strip())
    for what, path in files.items():
        if path is not None:
            print(f"{what}: {path}")


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
        print_summary(cfg, results, args)
    return results


def main(args) -> None:
    """:func:`run`, with one line and exit status 2 for what the user can put right."""
    try:
        run(args)
    except InputError as e:
        # Only one process may have met the broken image, so that each speaks for itself.
        process = f"[process {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
        print(f"{process}error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)


def invoke_main(argv=None) -> None:
    """Command line entry point."""
    args = build_argument_parser().parse_args(argv)
    if args.num_gpus * args.num_machines > 1 and not torch.cuda.is_available():
        sys.exit("error: --num-gpus: this machine has no GPU that PyTorch can use")
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
