# SPDX-License-Identifier: Apache-2.0
"""Best model, early stopping, averaged weights, validation loss: by the program, resumed, off."""

import copy
import shutil

import pytest
import torch
from conftest import DEMO_CONFIG, demo_cfg, random_inputs
from test_train_net import TINY, own_data

from detectron2.utils.events import EventStorage

from libra_d2.checkpoint import build_model
from libra_d2.data.random_state import get_random_state
from libra_d2.engine import Trainer
from libra_d2.engine.hooks import EarlyStopping
from libra_d2.engine.main import main
from libra_d2.evaluation import read_metrics
from libra_d2.evaluation.validation_loss import validation_losses

SECTION = "MODEL.LIBRA.TRAINER."
OPTIONS = [
    *(f"{SECTION}BEST_METRIC", "bbox_EMA/AP50", f"{SECTION}EMA_DECAY", "0.8"),
    *(f"{SECTION}VALIDATION_LOSS", "True", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "8", "MODEL.DEVICE", "cpu"),
    *("MODEL.LIBRA.NUM_PICTURES", "0", "SEED", "3", f"{SECTION}MAX_CHECKPOINTS", "0"),
]


def run(synthetic, out, *args):
    data = [str(x) for x in own_data(synthetic, "train", "val")]
    args = [str(x) for x in args]
    flags = [x for x in args if x.startswith("--")]
    opts = [x for x in args if not x.startswith("--")]
    main(["--config-file", str(DEMO_CONFIG), *flags, *data, *TINY, "OUTPUT_DIR", str(out), *opts])


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("hooks") / "out"
    run(synthetic, out, *OPTIONS)
    return out


def test_what_is_written(trained):
    """Losses and balance on the validation images, AP of averaged weights, the best model."""
    metrics = read_metrics(str(trained / "metrics.json"))
    evaluated = [m for m in metrics if "bbox/AP" in m]
    assert len(evaluated) == 4
    for entry in evaluated:
        assert {"bbox_EMA/AP", "validation/total_loss", "validation/loss_cls"} <= entry.keys()
        assert "validation/roi_head/num_bg_iou_bin_0" in entry
    losses = [m["validation/total_loss"] for m in evaluated]
    assert all(0 < x < 20 for x in losses)
    assert len(set(losses)) == 4
    best = max(evaluated, key=lambda m: m["bbox_EMA/AP50"])
    state = torch.load(trained / "model_best.pth")
    assert set(state) == {"model", "iteration"}
    assert state["iteration"] == best["iteration"]
    assert "best: bbox_EMA/AP50" in (trained / "results.md").read_text()
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"


def test_averaged_weights(trained):
    """The average is that of the checkpoints' weights, and a model by itself."""
    average = torch.load(trained / "model_final_ema.pth")["model"]
    final = torch.load(trained / "model_final.pth")["model"]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert average.keys() == final.keys()
    assert not torch.equal(average[name], final[name])
    buffer = "backbone.bottom_up.stem.conv1.norm.running_mean"
    assert torch.equal(average[buffer], final[buffer])


def test_resumed(trained, synthetic, tmp_path):
    """The average, the best model and the metrics are those of the uninterrupted training."""
    for name in ("model_0000003.pth", "metrics.json", "model_best.pth"):
        shutil.copy(trained / name, tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    run(synthetic, tmp_path, "--resume", *OPTIONS)
    for name in ("model_final.pth", "model_final_ema.pth", "model_best.pth"):
        a, b = (torch.load(folder / name)["model"] for folder in (trained, tmp_path))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    lines = [
        [
            {k: v for k, v in m.items() if "time" not in k and "eta" not in k}
            for m in read_metrics(str(folder / "metrics.json"))
        ]
        for folder in (trained, tmp_path)
    ]
    assert lines[0] == lines[1]


def test_average_begins_with_the_weights(trained, synthetic, tmp_path):
    """Also in a training that had none before it was resumed."""
    shutil.copy(trained / "model_0000003.pth", tmp_path)
    path = tmp_path / "model_0000003.pth"
    state = torch.load(path)
    del state["trainer"]["hooks"]["AverageWeights"]
    torch.save(state, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    run(synthetic, tmp_path, "--resume", *OPTIONS, "SOLVER.BASE_LR", 1e-20)
    average = torch.load(tmp_path / "model_final_ema.pth")["model"]
    name = "roi_heads.box_predictor.cls_score.weight"
    # Four small steps away from them; other random weights would be a hundred times as far.
    torch.testing.assert_close(average[name], state["model"][name], rtol=0, atol=1e-3)
    assert state["model"][name].std() > 5e-3


def test_early_stopping(synthetic, tmp_path, capsys):
    """A learning rate of nearly 0 changes nothing: it ends after the second evaluation."""
    opts = [*OPTIONS, f"{SECTION}PATIENCE", 1, "SOLVER.BASE_LR", 1e-12, "SOLVER.MAX_ITER", 40]
    opts += [f"{SECTION}EMA_DECAY", 0.0, f"{SECTION}BEST_METRIC", "", "SOLVER.WARMUP_ITERS", 0]
    opts += ["MODEL.BACKBONE.FREEZE_AT", 5, "MODEL.RESNETS.NORM", "FrozenBN"]
    opts += ["MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", ""]
    run(synthetic, tmp_path, *opts)
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 3
    assert "The training ends early: bbox/AP has not risen" in (tmp_path / "log.txt").read_text()
    evaluations = [m for m in read_metrics(str(tmp_path / "metrics.json")) if "bbox/AP" in m]
    assert [m["iteration"] for m in evaluations] == [1, 3]
    run(synthetic, tmp_path, "--resume", *opts)
    assert "This training has ended early" in (tmp_path / "log.txt").read_text()
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 3


def test_patience():
    class FakeTrainer:
        max_iter, ended = 100, False

        def __init__(self):
            self.storage = EventStorage(0)

        def end_early(self, reason):
            self.ended = True

    hook = EarlyStopping(1, "bbox/AP", patience=2)
    hook.trainer = FakeTrainer()
    seen = []
    for i, ap in enumerate([1.0, float("nan"), 2.0, 1.5, 2.0]):
        hook.trainer.iter = hook.trainer.storage.iter = i
        hook.trainer.storage.put_scalar("bbox/AP", ap)
        hook.after_step()
        seen.append(hook.trainer.ended)
    assert seen == [False, False, False, False, True]


@pytest.mark.parametrize("training", [True, False])
def test_validation_leaves_the_model_alone(training):
    """Its mode, its buffers and the random state; the losses are the same each time."""
    model = build_model(demo_cfg()).train(training)
    before = copy.deepcopy(model.state_dict())
    random = get_random_state()["torch"]
    batches = [random_inputs(3), random_inputs(1)]
    losses = [validation_losses(model, copy.deepcopy(batches)) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0]["total_loss"] == pytest.approx(
        sum(v for k, v in losses[0].items() if k.startswith("loss"))
    )
    assert model.training == model.backbone.training == training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert not torch.equal(random, get_random_state()["torch"])  # by random_inputs above


def test_off_by_default(synthetic, tmp_path):
    run(synthetic, tmp_path, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 2)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000001.pth",
        "model_final.pth",
    ]
    metrics = {k for m in read_metrics(str(tmp_path / "metrics.json")) for k in m}
    assert not any("EMA" in k or "validation" in k for k in metrics)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ([f"{SECTION}BEST_METRIC", "bbox/AP"], "BEST_METRIC needs evaluations"),
        ([f"{SECTION}PATIENCE", 2], "PATIENCE needs evaluations"),
        ([f"{SECTION}EMA_DECAY", 1.0], "EMA_DECAY is 1.0: use a value in"),
        (
            [f"{SECTION}ACCUMULATION_STEPS", 3],
            "ACCUMULATION_STEPS is 3, which does not divide the 2",
        ),
    ],
)
def test_impossible_values(synthetic, tmp_path, capsys, opts, message):
    with pytest.raises(SystemExit, match="2"):
        run(synthetic, tmp_path, *opts)
    assert message in capsys.readouterr().err


def test_trainer_takes_another_loader(tmp_path, caplog):
    """One of the user's cannot be resumed, and that is said."""

    class OwnTrainer(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [random_inputs(2)] * 10

    cfg = demo_cfg(OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=2)
    cfg.DATASETS.TEST = ()
    OwnTrainer(cfg).train()
    cfg.SOLVER.MAX_ITER = 3
    trainer = OwnTrainer(cfg)
    trainer.resume_or_load(resume=True)
    caplog.set_level("WARNING")
    trainer.train()
    assert "a list cannot go on where it was: the order of the images starts anew" in caplog.text
