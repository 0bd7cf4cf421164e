# SPDX-License-Identifier: Apache-2.0
"""Trainings of a model with one weight: values, files, and exact resuming."""

import errno
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
from argparse import Namespace
from collections import defaultdict
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import demo_cfg, run_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.logger import setup_logger

import libra_d2.engine.trainer
from libra_d2.config import Recipe
from libra_d2.data import register_coco_json
from libra_d2.engine import Trainer, launch
from libra_d2.engine.accumulation import AccumulationTrainer, AMPAccumulationTrainer
from libra_d2.engine.hooks import PreciseStatistics, Throughput
from libra_d2.engine.resuming import _cut_metrics
from libra_d2.engine.trainer import _Printer
from libra_d2.errors import InputError
from libra_d2.evaluation import build_evaluator
from libra_d2.utils.random_state import set_random_state

SECTION = "MODEL.LIBRA.TRAINER."
NO_OBJECTS = {"pred_boxes": Boxes(torch.zeros(0, 4)), "scores": torch.zeros(0)}
NO_OBJECTS["pred_classes"] = torch.zeros(0)


def autocast_type():
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


class Toy(DenseDetector):
    """Its losses depend on images, two random generators, batch norm and a moving average."""

    def __init__(self):
        nn.Module.__init__(self)
        self.backbone = nn.BatchNorm1d(1, dtype=torch.float64, affine=False)
        self.backbone.loss_normalizer = None  # not a detector's
        # With statistics that are trained ones: 0 and 1 are what it has without.
        self.frozen = FrozenBatchNorm2d(1).double()
        self.frozen.running_mean.fill_(0.25), self.frozen.running_var.fill_(0.5)
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.loss_normalizer = 100.0
        self.sizes, self.types = [], set()

    def forward(self, batch):
        self.sizes.append(len(batch)), self.types.add(autocast_type())
        self.files = [x["file_name"] for x in batch]
        left = torch.stack([x["image"][:, :, :20].double().mean() / 255 for x in batch])
        number = sum(len(x["instances"]) for x in batch)
        if self.loss_normalizer:
            self.loss_normalizer = 0.9 * self.loss_normalizer + 0.1 * number
        drawn = torch.rand(len(batch)).double() + np.random.rand()
        get_event_storage().put_scalar("roi_head/drawn", drawn.sum())
        left = self.frozen(left[:, None, None, None])[:, 0, 0, 0]
        out = self.weight * self.backbone(left[:, None])[:, 0] + left
        return {
            "loss_out": (out - drawn).square().mean(),
            "loss_weight": 10 * self.weight.abs() / self.loss_normalizer,
        }


class At(HookBase):
    """Calls ``action(trainer)`` before an iteration."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.action(self.trainer)


class Drawing(HookBase):
    """Draws random numbers, which those of a resumed training do not depend on."""

    def before_train(self):
        torch.rand(1), np.random.rand(), random.random()


class Failure(Exception):
    """Of a test."""


def fail(*args):
    raise Failure


def send(*numbers):
    return lambda *_: [os.kill(os.getpid(), number) for number in numbers]


def spoil(trainer):
    """Make one of the two losses infinite."""
    getattr(trainer.model, "module", trainer.model).loss_normalizer = 0.0


class ToyTrainer(Trainer):
    """Its evaluation depends on the weight and the statistics, and draws random numbers."""

    @classmethod
    def build_model(cls, cfg):
        return Toy()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        model = getattr(model, "module", model)
        torch.rand(3), np.random.rand(3), random.random()
        if not comm.is_main_process():
            return {}
        results = {"bbox": {"AP": model.weight.item(), "AP50": model.backbone.running_var.item()}}
        names = cfg.DATASETS.TEST
        return results if len(names) == 1 else dict.fromkeys(names, results)

    @classmethod
    def test_with_TTA(cls, cfg, model):
        torch.rand(1)
        return {"bbox_TTA": {"AP": 7.0 * model.weight.item()}}


def register(synthetic, folder):
    """Register datasets of all images ("toy", "again") and of one image ("one")."""
    files = (synthetic / "instances.json", synthetic / "images", folder)
    for name in ("toy", "again"):
        register_coco_json(name, *map(str, files))
    if "one" in DatasetCatalog:
        DatasetCatalog.remove("one")
    DatasetCatalog.register("one", lambda: DatasetCatalog.get("toy")[:1])


@pytest.fixture(scope="session")
def toy_data(synthetic, tmp_path_factory):
    register(synthetic, tmp_path_factory.mktemp("toy"))


def make(out, *opts, trainer=ToyTrainer, seed=3):
    """A trainer of 11 iterations with all features, changed by ``opts``."""
    cfg = demo_cfg(OUTPUT_DIR=str(out))
    every = ["SOLVER.MAX_ITER", 11, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 3]
    every += ["SOLVER.BASE_LR", 0.2, "SOLVER.WARMUP_ITERS", 4, "SOLVER.IMS_PER_BATCH", 3]
    every += ["DATALOADER.NUM_WORKERS", 0, "MODEL.LIBRA.NUM_PICTURES", 0]
    every += ["INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96]
    every += ["DATASETS.TRAIN", ("toy",), "DATASETS.TEST", ("toy",)]
    every += [f"{SECTION}EMA_DECAY", 0.75, f"{SECTION}VALIDATION_LOSS", True]
    every += [f"{SECTION}BEST_METRIC", "bbox/AP", f"{SECTION}MAX_CHECKPOINTS", 0]
    cfg.merge_from_list([*every, *opts])
    for function in (torch.manual_seed, np.random.seed, random.seed):
        function(seed)
    trainer = trainer(cfg)
    trainer.resume_or_load()
    return trainer


def run(out, *opts, until=None, action=fail, **kwargs):
    """Train or resume; ``action`` is called before iteration ``until``."""
    trainer = make(out, *opts, **kwargs)
    trainer.register_hooks([At(until, action), Drawing()])
    with pytest.raises(Failure) if action is fail and until else nullcontext():
        trainer.train()
    return trainer


def weights(out, name="model_final"):
    """Of a checkpoint: the weight and the two running statistics."""
    model = torch.load(out / f"{name}.pth")["model"]
    keys = ("weight", "backbone.running_mean", "backbone.running_var")
    return [model[key].item() for key in keys]


def lines(out):
    """Each line of ``metrics.json``, without times."""
    found = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in x.items() if "time" not in k and "eta" not in k} for x in found]


def scalars(out):
    """What TensorBoard shows, without times: values by name and iteration."""
    events = EventAccumulator(str(out), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if "time" not in name and "eta" not in name]
    return {name: [(x.step, str(x.value)) for x in events.Scalars(name)] for name in names}


@pytest.fixture(scope="module")
def whole(toy_data, tmp_path_factory):
    """The output directory of an uninterrupted training."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


def assert_same(out, whole):
    """The same weights and metrics, without duplicates."""
    names = sorted(p.name for p in whole.glob("*.pth"))
    assert sorted(p.name for p in out.glob("*.pth")) == names
    for name in names:
        assert weights(out, name[:-4]) == weights(whole, name[:-4]), name
    assert lines(out) == lines(whole)


@pytest.mark.parametrize("until", [7, 9])
def test_resumed(whole, tmp_path, until, caplog):
    """
    Resumed from one iteration before, with or without an evaluation there: average, best model,
    statistics, moving average, images, random numbers and medians are those of the whole training.
    """
    run(tmp_path, until=until)
    assert "does not say which run" not in caplog.text
    assert not (tmp_path / "model_final_ema.pth").exists()
    assert until - 1 in [x["iteration"] for x in lines(tmp_path)]
    with (tmp_path / "metrics.json").open("a") as f:
        f.write('{"iteration": 1, "loss_o')  # cut short
    run(tmp_path, seed=99)
    assert "does not say which run" not in caplog.text
    assert_same(tmp_path, whole)


def test_metrics(whole):
    """Each evaluation is logged, with the values of its weights."""
    found = lines(whole)
    assert [x["iteration"] for x in found] == [2, 5, 8, 10, 11]
    assert [x["iteration"] for x in found if "bbox/AP" in x] == [2, 5, 8, 11]
    value, _, variance = weights(whole)
    assert (found[-1]["bbox/AP"], found[-1]["bbox/AP50"]) == (value, variance)
    assert weights(whole, "model_0000005")[0] == found[1]["bbox/AP"]
    rates = [0.1 * (1 + math.cos(math.pi * i / 11)) for i in (5, 8, 10)]  # a half cosine from 0.2
    assert [x["lr"] for x in found[1:4]] == pytest.approx(rates)
    names = {f"validation/{x}" for x in ("total_loss", "loss_out", "loss_weight", "roi_head/drawn")}
    assert names == {name for name in found[-1] if name.startswith("validation/")}
    assert (whole / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(whole / "model_final.pth")["iteration"] == 10
    best = max(x["bbox/AP"] for x in found if "bbox/AP" in x)
    assert weights(whole, "model_best")[0] == best != weights(whole, "model_final_ema")[0]
    every = {"final": ["iteration", "trainer"], "best": ["iteration"], "final_ema": []}
    for name, others in every.items():
        assert torch.load(whole / f"model_{name}.pth").keys() == {"model", "run", *others}


def test_tensorboard(whole, tmp_path):
    """
    Shows no value twice that an interrupted training has written after its checkpoint, nor those of
    an earlier training, and each value at once.
    """

    def look(trainer):
        assert [step for step, _ in scalars(tmp_path)["lr"]] == [2, 5, 8]
        fail()

    with SummaryWriter(str(tmp_path)) as earlier:
        earlier.add_scalar("lr", 1.0, 0)
    for number, until in enumerate((10, None)):
        # It is the older one, also within a second.
        max(tmp_path.glob("events.*")).rename(tmp_path / f"events.out.tfevents.{number}")
        with pytest.raises(Failure) if until else nullcontext():
            run(tmp_path, until=until, action=look, seed=3 + number)
    assert scalars(tmp_path) == scalars(whole)


def test_evaluation_changes_nothing(whole, tmp_path):
    """Evaluation, averages and the best model have no effect; a signal at the end puts it off."""
    opts = ["TEST.EVAL_PERIOD", 0, f"{SECTION}EMA_DECAY", 0.0, f"{SECTION}BEST_METRIC", ""]
    opts += [f"{SECTION}VALIDATION_LOSS", False, "TEST.AUG.ENABLED", True]
    opts += [f"{SECTION}MAX_CHECKPOINTS", 2]
    stopped = make(tmp_path, *opts)
    stopped.register_hooks([At(10, send(signal.SIGTERM)), Drawing()])
    with pytest.raises(SystemExit):
        stopped.train()
    assert stopped.results == {}
    trainer = run(tmp_path, *opts)
    assert trainer.best is None
    assert weights(tmp_path) == weights(whole)
    saved = {p.name for p in tmp_path.glob("*.pth")}
    assert saved == {"model_0000007.pth", "model_0000009.pth", "model_final.pth"}
    value, _, variance = weights(whole)
    expected = {"bbox": {"AP": value, "AP50": variance}, "bbox_TTA": {"AP": 7 * value}}
    assert trainer.results == expected
    found = {f"{task}/{k}": v for task, values in expected.items() for k, v in values.items()}
    assert lines(tmp_path)[1:] == [{"iteration": 11, **found}]


class Failing(ToyTrainer):
    """Its ``left``-th evaluation fails."""

    left = 0

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.left -= 1
        torch.rand(2)
        return super().test(cfg, model) if cls.left else fail()


@pytest.mark.parametrize(("number", "iteration"), [(3, 5), (4, 5), (7, 10)])
def test_evaluation_that_fails(whole, tmp_path, number, iteration):
    """
    Of the weights at iteration 5, or of their average: the training is saved, and evaluated when it
    is resumed. At the end it has been saved already.
    """
    Failing.left = number
    opts = ["SOLVER.CHECKPOINT_PERIOD", 100]
    with pytest.raises(Failure):
        run(tmp_path, *opts, trainer=Failing)
    name = "model_final.pth" if iteration == 10 else "model_0000005.pth"
    assert {p.name for p in tmp_path.glob("*.pth")} == {
        *(name, "model_best.pth"),
        *(["model_final_ema.pth"] if iteration == 10 else []),
    }
    assert torch.load(tmp_path / name)["iteration"] == iteration
    trainer = run(tmp_path, *opts, seed=99)
    assert weights(tmp_path) == weights(whole)
    assert weights(tmp_path, "model_final_ema") == weights(whole, "model_final_ema")
    assert lines(tmp_path) == lines(whole)
    value, _, variance = weights(whole)
    assert trainer.results["bbox"] == {"AP": value, "AP50": variance}


def test_evaluation_of_each_iteration(toy_data, tmp_path, monkeypatch):
    """
    Of the first as well, which is made up for; its checkpoint, written again, counts once. None of
    them ends the training because predictions are not finite.
    """
    asked = []
    monkeypatch.setattr(
        *(libra_d2.engine.trainer, "finite_predictions"),
        lambda model, required=True: asked.append(required) or nullcontext(),
    )
    opts = ["TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 3, f"{SECTION}VALIDATION_LOSS", False]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 1, f"{SECTION}MAX_CHECKPOINTS", 3]
    Failing.left = 1
    with pytest.raises(Failure):
        make(tmp_path, *opts, trainer=Failing).train()
    run(tmp_path, *opts)
    assert [x["iteration"] for x in lines(tmp_path) if "bbox/AP" in x] == [0, 1, 3]
    saved = sorted(p.name for p in tmp_path.glob("model_0*"))
    assert saved == [f"model_{i:07d}.pth" for i in range(3)]
    assert asked == [False] * 4


def test_end_early(whole, tmp_path, caplog):
    """As if that iteration had been the last one."""
    caplog.set_level("INFO")
    trainer = run(tmp_path, until=8, action=lambda trainer: trainer.end_early("enough"))
    assert "The training ends early: enough" in caplog.text
    assert "images per second (median)" in caplog.text
    assert [x.batch_size for x in trainer._hooks if isinstance(x, Throughput)] == [3]
    trainer._see_losses(trainer.model.eval(), None, [])
    assert trainer._losses.keys() == {"loss_out", "loss_weight"}  # rather than detections
    assert trainer.storage.smoothing_hints()["validation/total_loss"] is False
    assert "validation/total_loss" not in trainer.storage.histories()  # the log has medians of it
    losses = re.findall("Validation losses of toy: total_loss ([^,]+), loss_out", caplog.text)
    expected = [x["validation/total_loss"] for x in lines(tmp_path) if "bbox/AP" in x]
    assert list(map(float, losses)) == pytest.approx(expected, rel=1e-3)
    assert caplog.text.count("Evaluating the averaged weights") == len(expected) == 3
    assert (tmp_path / "model_final_ema.pth").exists()
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 8
    *before, last, evaluated = lines(tmp_path)
    assert [*before, {**evaluated, **last}] == lines(whole)[:3]
    assert evaluated["iteration"] == 9
    value = lines(whole)[2]["bbox/AP"]
    assert weights(tmp_path)[0] == trainer.results["bbox"]["AP"] == value


@pytest.mark.parametrize(("period", "expected"), [(0, [19, 29]), (40, [19, 29]), (7, [6, 13, 20])])
def test_lines_of_metrics(toy_data, tmp_path, period, expected):
    """Every 20 iterations or at each evaluation, at the last iteration and the last evaluation."""
    opts = ["TEST.EVAL_PERIOD", period, "SOLVER.MAX_ITER", 30, "SOLVER.CHECKPOINT_PERIOD", 99]
    run(tmp_path, *opts, f"{SECTION}BEST_METRIC", "", f"{SECTION}VALIDATION_LOSS", False)
    found = [x["iteration"] for x in lines(tmp_path)]
    assert found[: len(expected)] == expected
    assert found[-2:] == [29, 30]
    state = torch.load(tmp_path / "model_final.pth")["trainer"]["hooks"]["ExactResume"]
    assert {len(values) for values in state["histories"].values()} == {20}  # what medians are of
    assert not [x for x in (*state["histories"], *state["latest"]) if re.search("time|eta", x)]


def test_precise_statistics(toy_data, tmp_path):
    """Exact statistics of one image, rather than a tenth of the way there."""
    opts = ["DATASETS.TRAIN", ("one",), "INPUT.RANDOM_FLIP", "none", "TEST.EVAL_PERIOD", 2]
    opts += ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "SOLVER.MAX_ITER", 4]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", 1]
    others = multiprocessing.active_children()
    trainer = run(tmp_path, *opts)
    assert set(multiprocessing.active_children()) <= set(others)
    image = next(iter(trainer.build_train_loader(trainer.cfg)))[0]["image"]
    mean = image[:, :, :20].double().mean() / 255
    left = trainer.model.frozen(mean.view(1, 1, 1, 1)).item()
    assert weights(tmp_path, "model_0000000")[1] == pytest.approx(0.1 * left)
    assert weights(tmp_path, "model_0000001")[1] == pytest.approx(left)
    assert weights(tmp_path)[1:] == pytest.approx([left, 0])


def test_precise_statistics_of_a_resumed_training(toy_data, tmp_path):
    """They are of the same images, whose number here is not that of a pass over the data."""
    opts = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3]
    assert run(tmp_path / "whole", *opts).model.sizes.count(3) == 11 + 4 * 3
    run(tmp_path / "resumed", *opts, until=7)
    run(tmp_path / "resumed", *opts, seed=99)
    assert_same(tmp_path / "resumed", tmp_path / "whole")
    PreciseStatistics(1, nn.Linear(1, 1), [], 3).update_stats()  # nothing to do


@pytest.mark.parametrize(
    ("opts", "sizes", "amp"),
    [
        ([], [6], True),
        *(([f"{SECTION}ACCUMULATION_STEPS", 3], [2] * 6, amp) for amp in (True, False)),
        (["SOLVER.REFERENCE_WORLD_SIZE", 3], [2] * 3, False),
    ],
)
def test_batches(toy_data, tmp_path, opts, sizes, amp):
    """
    Whole batches, micro-batches (computed twice), and batches scaled from three processes; in mixed
    precision, without a scaler, if the config says so, as are validation losses.
    """
    opts = [*opts, "SOLVER.IMS_PER_BATCH", 6, "SOLVER.MAX_ITER", 1, "DATALOADER.NUM_WORKERS", 1]
    opts += ["SOLVER.AMP.ENABLED", amp]
    others = multiprocessing.active_children()  # of loaders that no one has collected yet
    trainer = run(tmp_path, *opts)
    assert trainer.model.sizes == sizes + [1] * 11
    assert trainer.model.types == {torch.bfloat16 if amp else torch.float32}
    assert type(trainer._trainer) is AccumulationTrainer
    assert set(multiprocessing.active_children()) <= set(others)


def test_predictions_that_are_not_finite(toy_data, tmp_path):
    """Of which there are no losses; those of the step before are not shown."""

    def spoil(trainer):
        def forward(batch):
            raise FloatingPointError("Predicted boxes contain NaN")

        trainer.model.forward = forward

    message = r"not finite at iteration 4 \(Predicted boxes contain NaN\) for the images "
    with pytest.raises(InputError, match=message):
        run(tmp_path, until=4, action=spoil)


def test_loss_that_is_not_finite(toy_data, tmp_path):
    """The message has the losses, the iteration, the images and the last checkpoint."""
    spoiled = []
    with pytest.raises(InputError) as error:
        run(tmp_path, until=4, action=lambda trainer: (spoiled.append(trainer), spoil(trainer)))
    pattern = (
        r"a loss is not finite at iteration 4 \(loss_out [\d.]+, loss_weight inf\) for the images "
        rf"{', '.join(spoiled[0].model.files)}\. Training can be resumed "
        r"from \S+/model_0000003\.pth; a lower learning rate, .* \(SOLVER.BASE_LR, "
        r"SOLVER.WARMUP_ITERS, SOLVER.CLIP_GRADIENTS.ENABLED\)"
    )
    assert re.fullmatch(pattern, str(error.value))


def test_failure_in_the_last_iteration(toy_data, tmp_path):
    """Nothing is evaluated, or written as if the training were complete."""
    with pytest.raises(InputError, match="a loss is not finite at iteration 10 "):
        run(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 100, until=10, action=spoil)
    # The best model is none to resume from.
    assert [x.name for x in tmp_path.glob("*") if re.search("pth|last", x.name)] == [
        "model_best.pth"
    ]
    assert [x["iteration"] for x in lines(tmp_path) if "bbox/AP" in x] == [2, 5, 8]


def test_other_optimizer(toy_data, tmp_path):
    """
    A checkpoint of other parameters, or of more iterations, is refused in one line. The config's
    rate, momentum and decay count.
    """

    class Larger(ToyTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            optimizer = super().build_optimizer(cfg, model)
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
            return optimizer

    run(tmp_path, until=5)
    with pytest.raises(InputError, match="checkpoint's optimizer is of another type or has other"):
        make(tmp_path, trainer=Larger)
    with pytest.raises(InputError, match="^SOLVER.MAX_ITER is 3, but the run .* has 4 iterations"):
        make(tmp_path, "SOLVER.MAX_ITER", 3)
    opts = ["SOLVER.BASE_LR", 0.4, "SOLVER.MOMENTUM", 0.5, "SOLVER.WEIGHT_DECAY", 0.25]
    (group,) = make(tmp_path, *opts)._trainer.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.2 * (1 + math.cos(math.pi * 4 / 11)))
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)


@pytest.mark.parametrize("name", [None, "a.txt"])
def test_full_disk(toy_data, tmp_path, name):
    """An error of a file without a name, as of metrics.json, names the output directory."""

    def fill(trainer):
        raise OSError(errno.ENOSPC, "No space left", name)

    message = f"^OUTPUT_DIR: {tmp_path}: .*No space left. Training can be resumed from {tmp_path}/"
    with pytest.raises(OSError if name else InputError, match=None if name else message):
        run(tmp_path, until=5, action=fill)


def test_different_checkpoints(toy_data, tmp_path, monkeypatch):
    """Processes that do not share their output directory; a training that starts over."""
    cfg = run(tmp_path, until=5).cfg
    trainer = ToyTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert (trainer.cfg is cfg, trainer.start_iter, trainer.model.weight.item()) == (True, 0, 0.5)
    gather = comm.all_gather
    monkeypatch.setattr(comm, "all_gather", lambda x: [*gather(x), 0])
    with pytest.raises(InputError, match=f"{tmp_path}: the processes find different checkpoints"):
        make(tmp_path)


def test_zero_steps_left(whole, tmp_path):
    """A finished training resumed with averaging: the average is that of its weights."""
    opts = ["TEST.EVAL_PERIOD", 0, f"{SECTION}BEST_METRIC", ""]
    run(tmp_path, *opts, f"{SECTION}EMA_DECAY", 0.0)
    trainer = run(tmp_path, *opts)
    assert weights(tmp_path, "model_final_ema") == weights(tmp_path) == weights(whole)
    assert trainer.results["bbox_EMA"] == trainer.results["bbox"]
    assert lines(tmp_path)[-1]["iteration"] == 11
    (tmp_path / "metrics.json").unlink()
    state = trainer.state_dict()["hooks"]["ExactResume"]
    assert (len(state["processes"]), state["length"]) == (1, 0)


def test_without_state(whole, tmp_path, caplog):
    """A checkpoint of Detectron2 0.6 has neither the optimizer nor the state of ExactResume."""
    state = torch.load(whole / "model_0000005.pth")
    state["trainer"] = {k: state["trainer"][k] for k in ("iteration", "hooks")}
    del state["trainer"]["hooks"]["ExactResume"], state["run"]
    torch.save(state, tmp_path / "model_0000005.pth")
    shutil.copy(whole / "metrics.json", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    trainer = run(tmp_path)
    assert trainer.start_iter == 6
    assert "The checkpoint lacks the optimizer's state: its momentum starts at 0" in caplog.text
    assert "does not have the state of its training: the data order" in caplog.text
    assert "The checkpoint does not say which run it is of" in caplog.text
    rates = [x["lr"] for x in lines(whole) if "lr" in x]
    assert [x["lr"] for x in lines(tmp_path) if "lr" in x] == rates
    assert [x["iteration"] for x in lines(tmp_path)] == [2, 5, 8, 10, 11]


def test_length_is_unknown(tmp_path):
    """Lines of later iterations, and broken ones, are cut from metrics.json."""
    path, kept = tmp_path / "metrics.json", b'{"iteration": 3}\n{"iteration": 5}\n'
    path.write_bytes(kept + b'{"iteration": 6}\n[]\n{"x": 1}\n{"iteration": 4, "lo')
    assert (_cut_metrics(str(path), 6, -1), path.read_bytes()) == (5, kept)
    assert (_cut_metrics(str(path), 6, 17), path.read_bytes()) == (3, kept[:17])
    assert (_cut_metrics(str(path), 3, -1), path.read_bytes()) == (-1, b"")
    assert _cut_metrics(str(tmp_path / "none"), 3, -1) == -1


@pytest.mark.parametrize("names", [("one",), ("toy", "one")])
@pytest.mark.parametrize("averaged", [True, False])
def test_average_and_best(toy_data, tmp_path, names, averaged):
    """The moving average of the weights; the best model is that of the metric, averaged or not."""
    several, ema = len(names) > 1, "_EMA" * averaged
    metric = f"one{ema}/bbox/AP" if several else f"bbox{ema}/AP"
    opts = ["DATASETS.TEST", names, f"{SECTION}BEST_METRIC", metric, "TEST.EVAL_PERIOD", 2]
    folders = defaultdict(list)

    class Noting(ToyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            folders[cfg.OUTPUT_DIR].append(getattr(model, "module", model).weight.item())
            return super().test(cfg, model, evaluators)

    trainer = run(tmp_path, *opts, "SOLVER.CHECKPOINT_PERIOD", 1, trainer=Noting)
    states = [weights(tmp_path, f"model_{i:07d}") for i in range(11)]
    averages = [states[0][0]]
    for weight, *_ in states[1:]:
        averages.append(0.75 * averages[-1] + 0.25 * weight)
    # Buffers are copies.
    assert weights(tmp_path, "model_final_ema") == pytest.approx([averages[-1], *states[-1][1:]])
    evaluated = {min(x["iteration"], 10): x[metric] for x in lines(tmp_path) if metric in x}
    every = (1, 3, 5, 7, 9, 10)
    values = averages if averaged else [weight for weight, *_ in states]
    assert evaluated == pytest.approx({i: values[i] for i in every})
    assert folders[str(tmp_path)] == [states[i][0] for i in every]
    assert folders[f"{tmp_path}/EMA"] == pytest.approx([averages[i] for i in every])
    best = max(evaluated, key=evaluated.get)
    assert weights(tmp_path, "model_best") == pytest.approx([values[best], *states[best][1:]])
    line = f"best: {metric} {evaluated[best]:.1f} after {best + 1} iterations, "
    assert trainer.best.describe() == f"{line}{tmp_path}/model_best.pth"
    state = torch.load(tmp_path / "model_best.pth")
    assert (state.keys(), state["iteration"]) == ({"model", "iteration", "run"}, best)
    prefixes = [f"{name}/" for name in names] if several else [""]
    totals = {k for x in lines(tmp_path) for k in x if k.endswith("/total_loss")}
    assert totals == {f"validation/{x}total_loss" for x in prefixes}


@pytest.mark.parametrize(("until", "number"), [(None, 0), (3, 1), (5, 2), (8, 3)])
def test_patience(toy_data, tmp_path, until, number, caplog):
    """
    The training ends at the second evaluation in a row that is not above the best one, 4 at
    iteration 3, resumed or not, or made up for; the best model stays that one. An ended training is
    not continued.
    """
    caplog.set_level("INFO")
    scores, augmented = [3, 4, float("nan"), 4, 9, 9], {"bbox_TTA": {"AP": 5}}

    class Scored(ToyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": left.pop(0)}}

        @classmethod
        def test_with_TTA(cls, cfg, model):
            return augmented

    opts = ["TEST.EVAL_PERIOD", 2, f"{SECTION}EMA_DECAY", 0.0, f"{SECTION}PATIENCE", 2]
    opts += ["TEST.AUG.ENABLED", True, f"{SECTION}VALIDATION_LOSS", False]
    if until:
        left = scores[:number]
        with pytest.raises((Failure, IndexError)):  # the latter in the evaluation at iteration 7
            run(tmp_path, *opts, until=until, action=lambda trainer: fail(), trainer=Scored)
    left = scores[number:]
    trainer = run(tmp_path, *opts, trainer=Scored)
    assert len(left) == 2
    assert trainer.results == {"bbox": {"AP": 4}, **augmented}
    found = [(x["iteration"], x["bbox/AP"]) for x in lines(tmp_path) if x.get("bbox/AP", 0) > 0]
    assert found == [(1, 3), (3, 4), (7, 4)]
    assert lines(tmp_path)[-1] == {"iteration": 8, "bbox_TTA/AP": 5}
    assert "bbox/AP has not risen above 4.00 in 2 evaluations" in caplog.text
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 3
    run(tmp_path, *opts, trainer=Scored)
    assert "This training has ended early" in caplog.text
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 7


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signaled(ToyTrainer):
    """Receives a signal in one of its evaluations, two of which are at iterations 2, 5, 8, 10."""

    left, number = 0, 0

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.left -= 1
        if cls.left == 0:
            send(cls.number)()
        return super().test(cfg, model)


@pytest.mark.parametrize(
    ("until", "evaluation", "saved", "number"),
    [
        (0, 0, 0, signal.SIGTERM),
        (5, 0, 5, signal.SIGINT),
        (10, 0, 10, signal.SIGTERM),
        (None, 1, 2, signal.SIGUSR1),
        (None, 4, 5, signal.SIGTERM),
        (None, 7, 10, signal.SIGINT),
    ],
)
def test_signals(whole, tmp_path, capsys, until, evaluation, saved, number):
    """
    During an iteration, one before an evaluation, and an evaluation: the training is saved, exits
    with the status that shells expect, and resumes exactly, with all metrics.
    """
    handlers = [signal.getsignal(x) for x in SIGNALS]
    Signaled.left, Signaled.number = evaluation, number
    opts = ["SOLVER.CHECKPOINT_PERIOD", 100]
    with pytest.raises(SystemExit, match=str(128 + number)):
        run(tmp_path, *opts, until=until, action=send(number), trainer=Signaled)
    if evaluation == 7:  # the one after the last iteration is one of the last things to be done
        for x, handler in zip(SIGNALS, handlers):
            signal.signal(x, handler)
    else:
        assert [signal.getsignal(x) for x in SIGNALS] == handlers
    message = f"{number.name}: stopped after iteration {saved}; --resume continues\n"
    printed = capsys.readouterr().err
    assert printed.endswith(message)
    assert printed.count("stopped after") == 1
    saved_files = {p.name for p in tmp_path.glob("*.pth")} - {"model_best.pth"}
    last = [f"model_{saved:07d}.pth"] if saved < 10 else ["model_final.pth"]
    assert saved_files == {*last, *(["model_final_ema.pth"] if evaluation == 7 else [])}
    assert not any("bbox/AP" in x for x in lines(tmp_path) if x["iteration"] == saved)
    run(tmp_path, *opts, seed=99)
    assert weights(tmp_path) == weights(whole)
    for name in ("model_best", "model_final_ema"):
        assert weights(tmp_path, name) == weights(whole, name)
    assert lines(tmp_path) == lines(whole)


def test_expected_results(toy_data, tmp_path):
    """Others end a training with exit status 1. A new training adds to metrics.json."""
    (tmp_path / "metrics.json").write_text('{"iteration": 5}\n')
    opts = ["SOLVER.MAX_ITER", 1, "TEST.EXPECTED_RESULTS", [["bbox", "AP", 99.0, 1.0]]]
    with pytest.raises(SystemExit, match="^1$"):
        run(tmp_path, *opts)
    assert [x["iteration"] for x in lines(tmp_path)] == [5, 0, 1]


def test_printed_twice():
    """The same iteration, whose duration is 0."""
    printer = _Printer(9)
    with EventStorage(4):
        printer.write(), printer.write()


def test_old_average(whole, tmp_path, caplog):
    """The averaged weights of a training that goes on without averaging are no longer its own."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for decay in (0.75, 0.0):
        assert "model_final_ema.pth" not in caplog.text
        make(tmp_path, f"{SECTION}EMA_DECAY", decay)
    assert "model_final_ema.pth stays as it is: this training goes on without MODEL" in caplog.text
    (tmp_path / "model_final_ema.pth").unlink()
    caplog.clear()
    make(tmp_path, f"{SECTION}EMA_DECAY", 0.0)
    assert "model_final_ema.pth" not in caplog.text


@pytest.mark.parametrize("has_file", [True, False])
def test_logging(toy_data, tmp_path, has_file, capsys):
    """Messages of a script are printed once, and are in its ``log.txt`` if it has one."""
    for name in ("libra_d2", "detectron2"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    if has_file:
        setup_logger(str(tmp_path))
    for _ in range(2):
        make(tmp_path)
    capsys.readouterr()
    for name in ("libra_d2", "detectron2"):
        logging.getLogger(f"{name}.engine").info(f"sent by {name}")
    assert re.findall("sent by .*", capsys.readouterr().out) == [
        "sent by libra_d2",
        "sent by detectron2",
    ]
    assert not logging.getLogger("libra_d2").propagate
    path = tmp_path / "log.txt"
    assert path.exists() == has_file
    if has_file:
        assert re.findall("sent by .*", path.read_text()) == [
            "sent by libra_d2",
            "sent by detectron2",
        ]


def test_more_processes(whole, toy_data, tmp_path, monkeypatch, caplog):
    """
    Four processes after one: the first has its random numbers, the others their own, always the
    same. Normalizers are of a quarter of the batch.
    """
    caplog.set_level("INFO")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    state = torch.load(tmp_path / "model_0000005.pth")["trainer"]["hooks"]["ExactResume"]
    (process,) = state["processes"]
    drawn = []
    for rank in (0, 1, 2, 3, 3):
        trainer = make(tmp_path, seed=rank)
        with monkeypatch.context() as m, EventStorage(6) as trainer.storage:
            m.setattr(comm, "get_world_size", lambda: 4)
            m.setattr(comm, "all_gather", lambda data: [data])
            m.setattr(comm, "get_rank", lambda rank=rank: rank)
            trainer._resume.before_train()
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        assert trainer.model.loss_normalizer == process["normalizers"][""] / 4
        expected = {"start": 5 - (rank > 1), "pending": []}  # 18 of the images were seen
        assert expected.items() <= trainer._resume.loader.state_dict().items()
    assert len(set(drawn)) == 4
    assert drawn[3] == drawn[4]
    set_random_state(process["random"])
    assert drawn[0] == (torch.rand(()).item(), np.random.rand(), random.random())
    assert "had 1 process and has 4 now: it continues in the same order" in caplog.text


def test_loader_of_its_own(toy_data, tmp_path, caplog):
    """A user's data loader starts over, with a warning; a length in epochs needs the other one."""

    class Own(ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [*itertools.islice(super().build_train_loader(cfg), 11)]

    run(tmp_path, until=4, trainer=Own)
    assert "does not have the state of its training" not in caplog.text
    run(tmp_path, until=6)
    assert "A ResumableLoader cannot continue where it was: the data order restarts" in caplog.text
    cfg = run(tmp_path, trainer=Own).cfg.clone()
    assert "A list cannot continue where it was: the data order restarts" in caplog.text
    cfg.merge_from_list([f"{SECTION}EPOCHS", 2.0])
    with pytest.raises(InputError, match="EPOCHS needs .* with a list use SOLVER.MAX_ITER"):
        Own(cfg)
    assert ToyTrainer(cfg).cfg.SOLVER.MAX_ITER == 8  # 2 * 11 images, 3 at a time
    assert cfg.SOLVER.MAX_ITER == 11


def test_loaders(toy_data, tmp_path, monkeypatch):
    """Of training, of evaluation, and of validation losses, with annotations; other parts."""
    opts = ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 80, "DATASETS.TRAIN", ("one",)]
    opts += ["TEST.AUG.MIN_SIZES", (32,)]
    cfg, seeds = make(tmp_path, *opts).cfg, set()
    for seed in (1, 2):
        np.random.seed(seed)
        seeds.add(Trainer.build_train_loader(cfg).state_dict()["seed"])
    assert len(seeds) == 2
    trained = next(iter(Trainer.build_train_loader(cfg)))
    assert [x["image"].shape for x in trained] == [(3, 64, 64)] * 3
    ((tested,),) = Trainer.build_test_loader(cfg, "one")
    cfg.DATASETS.PROPOSAL_FILES_TEST = ("none.pkl",)  # which an RPN does not read
    ((validated,),) = Trainer.build_validation_loader(cfg, "one")
    assert tested["image"].shape == (3, 80, 80)
    assert torch.equal(tested["image"], validated["image"])
    assert "instances" not in tested
    assert len(validated["instances"]) == len(trained[0]["instances"]) > 0
    assert len(list(Trainer.build_validation_loader(cfg, "toy"))) == 11

    class OneImage(Trainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            return [next(iter(super().build_test_loader(cfg, dataset_name)))]

    model = Trainer.build_model(cfg)
    Trainer.build_lr_scheduler(cfg, Trainer.build_optimizer(cfg, model))
    build, limits = build_evaluator, []
    monkeypatch.setattr(
        libra_d2.engine.trainer, "build_evaluator", lambda *x: (limits.append(x[2]), build(*x))[1]
    )
    cfg.TEST.DETECTIONS_PER_IMAGE = 7
    assert OneImage.test_with_TTA(cfg, model).keys() == {"bbox_TTA"}
    assert limits == [7]
    assert (tmp_path / "inference_TTA/coco_instances_results.json").exists()
    cfg.DATASETS.TEST = ("toy", "again")
    assert OneImage.test_with_TTA(cfg, model).keys() == {"toy_TTA", "again_TTA"}
    for name in cfg.DATASETS.TEST:
        assert (tmp_path / f"inference_TTA/{name}/coco_instances_results.json").exists()


def test_float16(toy_data, tmp_path, monkeypatch):
    """The loss is scaled."""
    monkeypatch.setattr(Recipe, "precision", torch.float16)
    assert type(make(tmp_path)._trainer) is AMPAccumulationTrainer


class Numbered(DatasetEvaluator):
    """Its result is its number."""

    def __init__(self, number):
        self.number = number

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"bbox": {"AP": self.number}}


@pytest.mark.parametrize(("amp", "names"), [(True, ("toy",)), (False, ("again", "toy"))])
def test_evaluation(toy_data, tmp_path, amp, names, caplog):
    """
    In inference mode, in mixed precision if the config says so. The results of several datasets,
    which are printed, have a folder each, and a picture of the first image.
    """
    caplog.set_level("INFO")
    seen = []

    def detect(inputs):
        seen.append((autocast_type(), torch.is_inference_mode_enabled()))
        return [{"instances": Instances((96, 96), **NO_OBJECTS)} for _ in inputs]

    opts = ["SOLVER.AMP.ENABLED", amp, "MODEL.LIBRA.NUM_PICTURES", 1, "DATASETS.TEST", names]
    model = Toy()
    model.forward = detect
    cfg = make(tmp_path, *opts).cfg
    results = Trainer.test(cfg, model)
    several = len(names) > 1
    assert seen == [(torch.bfloat16 if amp else torch.float32, True)] * (12 * len(names))
    assert list(results) == (list(names) if several else ["bbox"])
    assert caplog.text.count("copypaste: AP,AP50") == len(names)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("inference/**/coco_*.json")}
    folders = [f"inference/{name}" for name in names] if several else ["inference"]
    assert found == {f"{folder}/coco_instances_results.json" for folder in folders}
    assert sorted(p.parent.name for p in tmp_path.glob("pictures/*/*.jpg")) == sorted(names)
    numbers = [{"bbox": {"AP": i}} for i in range(len(names))]
    results = Trainer.test(cfg, model, [Numbered(i) for i in range(len(names))])
    assert (list(results.values()) if several else [results]) == numbers


def one_of_two(*paths):
    launch(in_two_processes, Namespace(num_gpus=1, num_machines=1, paths=paths))
    assert not torch.distributed.is_initialized()


def in_two_processes(args):
    """The trainings of one of the processes; writes its state as JSON."""
    rank, (synthetic, out) = comm.get_rank(), args.paths
    assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)
    (out / str(rank)).mkdir()
    register(synthetic, out / str(rank))
    opts, found = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_PERIOD", 2], {}

    def state(trainer):
        model = trainer.model.module
        found[trainer.cfg.OUTPUT_DIR.split("/")[-1]] = [
            *(x.item() for x in model.state_dict().values()),
            *(x.item() for x in trainer.average.model.backbone.buffers()),
            *(model.loss_normalizer, torch.rand(1).item()),
        ]

    def count(trainer):
        """From here on, the calls in which processes communicate."""
        found["calls"] = calls = []
        for name in ("all_gather", "all_reduce", "barrier", "broadcast", "gather", "reduce"):
            function = getattr(torch.distributed, name)
            counted = functools.wraps(function)(
                lambda *args, f=function, name=name, **kwargs: (
                    calls.append((name, args[0].nbytes, sorted(kwargs))),
                    f(*args, **kwargs),
                )[1]
            )
            monkeypatch.setattr(torch.distributed, name, counted)

    def to_the_second(action):
        return lambda trainer: rank == 1 and action(trainer)

    with pytest.MonkeyPatch.context() as monkeypatch:
        trainer = make(out / "whole", *opts, seed=rank)
        trainer.register_hooks([At(6, count), At(7, lambda trainer: monkeypatch.undo()), Drawing()])
        trainer.train()
        state(trainer)
    run(out / "resumed", *opts, seed=rank, until=7)
    state(run(out / "resumed", *opts, seed=99 + rank))
    stop = to_the_second(lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as exit:
        run(out / "stopped", *opts, seed=rank, until=3, action=stop)
    found["exit"] = exit.value.code
    state(run(out / "stopped", *opts, seed=99 + rank))
    Failing.left = 4
    with pytest.raises(Failure):
        run(out / "failed", *opts, "SOLVER.CHECKPOINT_PERIOD", 99, trainer=Failing, seed=rank)
    state(run(out / "failed", *opts, seed=99 + rank))
    run(out / "early", *opts, f"{SECTION}PATIENCE", 1, f"{SECTION}BEST_METRIC", "", seed=rank)
    with pytest.raises(InputError) as error:
        run(out / "spoiled", *opts, until=3, action=to_the_second(spoil))
    found["error"] = str(error.value)
    (out / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes(synthetic, toy_data, tmp_path):
    """
    On two machines, as far as SLURM's variables say. Each resumes with its own normalizer, images
    and random numbers; evaluations use the statistics of the first. They stop after the same
    iteration, whichever got the signal, and end early by the metrics of the main process. A single
    process continues in the same order of images, with normalizers of the whole batch. A step adds
    two calls of communication to those of the model.
    """
    environment = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2"}
    environment.update(SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_LOCALID="0")
    ranks = [{"SLURM_PROCID": str(i), "MASTER_ADDR": "127.0.0.1", **environment} for i in range(2)]
    printed = run_processes(one_of_two, [synthetic, tmp_path], ranks, tmp_path / "log")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["whole"][:-2] == second["whole"][:-2]
    assert all(a != b for a, b in zip(first["whole"][-2:], second["whole"][-2:]))
    for found in (first, second):
        assert found["whole"] == found["resumed"] == found["stopped"] == found["failed"]
        assert found["exit"] == 143
        # The losses, three with the time of loading, and whether there was a signal.
        calls = [["gather", 24, ["group"]], ["all_reduce", 8, ["async_op", "group"]]]
        assert found["calls"] == calls
    for name in ("resumed", "stopped"):
        assert weights(tmp_path / name) == weights(tmp_path / "whole")
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")
    saved = {p.name for p in (tmp_path / "stopped").glob("model_0*")}
    assert saved - {p.name for p in (tmp_path / "whole").glob("*")} == {"model_0000004.pth"}
    assert printed.count("SIGTERM: stopped after iteration 4; --resume continues") == 1
    assert torch.load(tmp_path / "early/model_final.pth")["iteration"] == 5
    assert "in another process, not for these images; loss_out" in first["error"]
    assert "iteration 3 (loss_out" in second["error"]
    shutil.copytree(tmp_path / "whole", tmp_path / "one")
    (tmp_path / "one/last_checkpoint").write_text("model_0000005.pth")
    seen = []

    def see(trainer):
        seen.append((trainer.model.loss_normalizer, trainer._resume.loader.state_dict()["start"]))

    state = torch.load(tmp_path / "one/model_0000005.pth")["trainer"]["hooks"]["ExactResume"]
    run(tmp_path / "one", "SOLVER.IMS_PER_BATCH", 4, until=6, action=see)
    assert seen == [(2 * state["processes"][0]["normalizers"][""], 24)]
