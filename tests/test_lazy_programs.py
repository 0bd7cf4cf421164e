# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation with a LazyConfig."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from test_train_net import OneNumber, fails, number, own_data, small_data

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params

from libra_d2.engine import LibraPredictor, read_config
from libra_d2.engine.main import build_argument_parser
from libra_d2.engine.main import main as train_net
from libra_d2.engine.setup import setup
from libra_d2.errors import InputError

CONFIG = str(ROOT / "configs/Demo/libra_mask_rcnn_regnetx_FPN.py")
TINY = [
    *("train.max_iter=4", "train.checkpointer.period=2", "train.num_pictures=2"),
    *("train.device=cpu", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
    *("dataloader.train.total_batch_size=2", "model.roi_heads.box_predictor.test_topk_per_image=9"),
    "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
]


def run(*args, data, out, opts=()):
    opts = [f"train.output_dir={out}", *TINY, *opts]
    train_net(["--config-file", CONFIG, *map(str, [*args, *data]), *opts])


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    """Output directory of a training of 4 iterations."""
    out = tmp_path_factory.mktemp("lazy") / "out"
    run(data=own_data(synthetic, "train", "val"), out=out)
    return out


def test_training(trained):
    """Weights with the classes of the data, metrics, config, log, curves, tables and pictures."""
    checkpoint = torch.load(trained / "model_final.pth")
    assert checkpoint["iteration"] == 3
    weights = checkpoint["model"]
    assert len(weights["roi_heads.box_predictor.cls_score.bias"]) == 4 + 1
    assert len(weights["roi_heads.mask_head.predictor.bias"]) == 4
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    metrics = {key: value for line in lines for key, value in line.items()}
    assert {"segm/AP", "roi_head/num_bg_iou_bin_0", "loss_mask"} <= metrics.keys()
    for name in ("config.yaml", "log.txt", "curves.png", "results.md"):
        assert (trained / name).stat().st_size > 0
    assert len(list((trained / "pictures/own_val").glob("*.jpg"))) == 2


def test_saved_config(trained, synthetic, tmp_path):
    """The config.yaml of a training gives the same evaluation."""
    config = ["--eval-only", "--config-file", trained / "config.yaml"]
    opts = [f"train.init_checkpoint={trained}/model_final.pth", f"train.output_dir={tmp_path}"]
    train_net([str(x) for x in (*config, *own_data(synthetic, "val"), *TINY, *opts)])
    paths = (x / "inference/coco_instances_results.json" for x in (tmp_path, trained))
    found, expected = (json.loads(path.read_text()) for path in paths)
    assert found == expected


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["optimizer=null"], "optimizer: missing in the LazyConfig"),
        (["train.best_metric=segm/APx", "train.eval_period=1"], "train.best_metric is 'segm/A"),
        (["model.roi_heads.mask_head.num_classes=7"], ""),  # set by the data
    ],
)
def test_errors_before_the_training(opts, message, synthetic, tmp_path, capsys):
    """One line and exit status 2; what an earlier run has left stays where it is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    args = [*map(str, own_data(synthetic, "train", "val")), f"train.output_dir={out}", *TINY]
    if message:
        assert message in fails(capsys, *args, *opts, config=CONFIG)
        assert (out / "metrics.json").exists()
        return
    recipe = setup(build_argument_parser().parse_args(["--config-file", str(CONFIG), *args, *opts]))
    assert set(recipe.class_counts.values()) == {4}


def own_loader(dataset, mapper, total_batch_size, num_workers):
    """Each batch consists of the first images."""
    while True:
        yield [mapper(x) for x in dataset[:total_batch_size]]


class OwnEvaluator(DatasetEvaluator):
    """Counts the images of a dataset, whose name it must be given."""

    def __init__(self, dataset_name):
        self.name, self.number = dataset_name, 0

    def process(self, inputs, outputs):
        self.number += len(inputs)

    def evaluate(self):
        return {f"of_{self.name}": {"AP": float(self.number)}}


def test_own_parts(tmp_path):
    """Loader, evaluators, schedule and mapper of the config are used, for each of its datasets."""
    for name, box in (("first", (8, 8, 32, 24)), ("second", (0, 0, 8, 8))):
        folder = small_data(tmp_path / name, box=box)
        register_coco_instances(name, {}, str(folder / "instances.json"), str(folder / "images"))
    config = OmegaConf.create({}, flags={"allow_objects": True})
    config.model = L(OneNumber)(num_classes=2, proposal_generator="none")
    config.optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.5
    )
    config.lr_multiplier = L(MultiStepParamScheduler)(
        values=[1.0, 0.5], milestones=[2], num_updates="${train.max_iter}"
    )
    config.train = model_zoo.get_config("common/train.py").train
    config.train.update(max_iter=4, log_period=1, device="cpu", output_dir=str(tmp_path / "out"))
    config.train.num_pictures = 1
    config.dataloader = model_zoo.get_config("common/data/coco.py").dataloader
    loaders = config.dataloader
    loaders.train.update(num_workers=0, total_batch_size=2)
    loaders.train.dataset.names, loaders.test.dataset.names = "first", ["first", "second"]
    loaders.train._target_, loaders.test.num_workers = own_loader, 0
    loaders.evaluator = [L(COCOEvaluator)(dataset_name="?"), L(OwnEvaluator)(dataset_name="?")]
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_net(["--config-file", str(path)])
    assert re.findall("^(?:first|second) .*", printed.getvalue(), re.MULTILINE) == [
        "first bbox: AP 100.0, AP50 100.0, AP75 100.0",
        "first of_first: AP 2.0",
        "second bbox: AP 0.0, AP50 0.0, AP75 0.0",
        "second of_second: AP 2.0",
    ]
    pictures = f"pictures: {tmp_path}/out/pictures/first, {tmp_path}/out/pictures/second"
    assert printed.getvalue().splitlines()[-1] == pictures
    assert number(tmp_path / "out/model_final.pth") == 2 * 0.5 + 2 * 0.25
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in lines if '"lr"' in line]
    assert rates == [0.5, 0.5, 0.25, 0.25]
    opts = [f"train.init_checkpoint={tmp_path}/out/model_final.pth"]
    predictor = LibraPredictor(read_config(str(path), opts))
    assert "instances" in predictor(np.zeros((48, 64, 3), np.uint8))
    loaders.test.mapper.augmentations = [*loaders.test.mapper.augmentations] * 2
    LazyConfig.save(config, str(path))
    with pytest.raises(InputError, match="single augmentation, but the config has 2 for eval"):
        LibraPredictor(read_config(str(path), opts))
    for name in ("first", "second"):
        DatasetCatalog.remove(name)
