# SPDX-License-Identifier: Apache-2.0
"""The length of a training in epochs."""

import json

import pytest
from conftest import demo_cfg
from test_train_net import QUICK, own_data, run, small_data

from libra_d2 import model_zoo
from libra_d2.config import make_recipe, set_length
from libra_d2.errors import counted

EPOCHS = "MODEL.LIBRA.TRAINER.EPOCHS"
SCHEDULE = {"SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR", "SOLVER__WARMUP_ITERS": 2}
BATCH = {"SOLVER__IMS_PER_BATCH": 4, "DATASETS__TRAIN": ("a",), "DATASETS__TEST": ("b",)}


def recipe_of(**settings):
    """Steps after 60 and 80 of 90 iterations of 4 images."""
    given = {"SOLVER__MAX_ITER": 90, "SOLVER__STEPS": (60, 80), "TEST__EVAL_PERIOD": 0}
    return make_recipe(demo_cfg(**{**SCHEDULE, **BATCH, **given, **settings}))


@pytest.mark.parametrize(
    ("epochs", "period", "expected"),
    [
        (0.0, 0, (90, (60, 80), 0)),
        (12.0, 0, (36, (24, 32), 3)),
        (0.5, 7, (2, (1,), 7)),
        (20.0, 7, (60, (40, 53), 7)),
        (0.25, 7, (1, (), 7)),
        (10.0, 7, (30, (20, 27), 7)),
    ],
)
def test_epochs(epochs, period, expected, caplog):
    """Of 12 images in batches of 4; a period of evaluations that was chosen stays."""
    settings = {"TEST__EVAL_PERIOD": period, "SOLVER__WARMUP_ITERS": 4}
    recipe = recipe_of(MODEL__LIBRA__TRAINER__EPOCHS=epochs, **settings)
    before = recipe.checkpoint_period
    with caplog.at_level("INFO"):
        set_length(recipe, 12)
    solver = recipe.config.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, recipe.eval_period) == expected
    # A tenth of the training at most is warm-up, if its length is in epochs.
    assert min(4, expected[0] // 10 if epochs else 4) == solver.WARMUP_ITERS
    assert (3 if epochs and not period else before) == solver.CHECKPOINT_PERIOD
    found = expected[0] * 4 / 12
    assert (
        f"{counted(expected[0], 'iteration')} of 4 images: {found:.3g} epochs of 12 imag"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "expected"), [(7, 58, 7, 58), (1.1, 100, 1, 110)]
)
def test_exact_epochs(epochs, images, batch, expected):
    """In floating point numbers, 58 / 7 * 7 and 1.1 * 100 are a little more than 58 and 110."""
    recipe = recipe_of(MODEL__LIBRA__TRAINER__EPOCHS=float(epochs), SOLVER__IMS_PER_BATCH=batch)
    set_length(recipe, images)
    assert recipe.max_iter == expected


def test_no_step_and_no_validation_data():
    """
    Steps that become 0 are left out, and those that become equal are one; without data, nothing is
    evaluated after each epoch.
    """
    settings = {"SOLVER__STEPS": (9, 40, 50, 80), "DATASETS__TEST": ()}
    recipe = recipe_of(MODEL__LIBRA__TRAINER__EPOCHS=0.5, **settings)
    before = recipe.checkpoint_period
    set_length(recipe, 12)  # 0.2, 0.9, 1.1 and 1.8 of 2 iterations
    assert recipe.config.SOLVER.STEPS == (1,)
    assert (recipe.eval_period, recipe.checkpoint_period) == (0, before)


def test_lazy_config():
    """Its schedule is in proportion by itself; one image more is one iteration more."""
    recipe = make_recipe(model_zoo.get_config("COCO-Detection/libra_retinanet_R_50_FPN_1x.py"))
    recipe.epochs, recipe.eval_period = 3, 0
    set_length(recipe, 16 * 5 + 1)
    assert (recipe.max_iter, recipe.eval_period, recipe.checkpoint_period) == (16, 6, 6)


@pytest.mark.parametrize(
    ("settings", "num_images", "warning"),
    [
        ({}, 12, ""),
        ({}, 360, ""),  # one epoch
        ({"SOLVER__MAX_ITER": 100}, 2, ""),  # 200
        ({"SOLVER__STEPS": (60, 90), "SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR"}, 12, ""),
        ({"DATASETS__TEST": (), "TEST__EVAL_PERIOD": 0}, 12, ""),
        ({"SOLVER__MAX_ITER": 401}, 8, "MAX_ITER 401 is 200 epochs of 8 images"),
        ({}, 1, "SOLVER.MAX_ITER 90 is 360 epochs of 1 image:"),
        ({}, 400, "SOLVER.MAX_ITER 90 is 0.9 epochs of 400 images"),
        ({"SOLVER__STEPS": (60, 90)}, 12, "the learning rate is not reduced at 90"),
        (
            {"SOLVER__STEPS": (60, 90), "MODEL__LIBRA__TRAINER__EPOCHS": 99.0},
            *(12, "the learning rate is not reduced at 90"),
        ),
        ({"SOLVER__WARMUP_ITERS": 30}, 12, ""),
        ({"SOLVER__WARMUP_ITERS": 31}, 12, "WARMUP_ITERS 31 is more than a third of the training"),
        ({"TEST__EVAL_PERIOD": 0}, 12, "TEST.EVAL_PERIOD is 0: the model is evaluated only"),
        ({"TEST__EVAL_PERIOD": 90}, 12, "the model is evaluated only at the end"),
    ],
)
def test_warnings(settings, num_images, warning, caplog):
    """What a schedule hardly means is said once, and nothing else."""
    settings = {"TEST__EVAL_PERIOD": 30, **settings}
    set_length(recipe_of(**settings), num_images)
    found = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(found) == bool(warning)
    assert warning in "".join(found)


def test_training(tmp_path):
    """Of 2 images: an evaluation and a checkpoint each epoch; iterations that are named count."""
    data = own_data(small_data(tmp_path / "data"), "train", "val")
    opts = [*QUICK, "SOLVER.IMS_PER_BATCH", 1]
    at = opts.index("SOLVER.MAX_ITER")
    quick, out = opts[:at] + opts[at + 2 :], tmp_path / "out"
    run(*data, *quick, EPOCHS, 3, "OUTPUT_DIR", out, config="")
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [x["iteration"] for x in metrics if "bbox/AP50" in x] == [1, 3, 6]
    assert len([*out.glob("model_0*.pth")]) == 3
    run(*data, *opts, EPOCHS, 3, "OUTPUT_DIR", tmp_path / "both", config="")
    assert "6 iterations of 1 image: 3 epochs" in (tmp_path / "both/log.txt").read_text()


def test_counted():
    assert counted(1, "box") == "1 box"
    assert [counted(n, "iteration") for n in (0, 2)] == ["0 iterations", "2 iterations"]
    assert [counted(2, noun) for noun in ("box", "process")] == ["2 boxes", "2 processes"]
