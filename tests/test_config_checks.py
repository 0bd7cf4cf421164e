# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from conftest import DEMO_CONFIG
from test_config import MODELS

from detectron2.data import MetadataCatalog

from libra_d2.engine import read_config
from libra_d2.engine.config_checks import check_keypoints, warn_of_few_images
from libra_d2.errors import InputError


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_own_configs_pass(path):
    read_config(str(path), [], output=False)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.IMS_PER_BATCH", "0", "is 0: use 1 or more"),
        ("SOLVER.IMS_PER_BATCH", "-4", "is -4: use 1 or more"),
        ("SOLVER.MAX_ITER", "0", "is 0: use 1 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "is 0: use 1 or more"),
        ("SOLVER.BASE_LR", "-0.1", "is -0.1: use a positive number"),
        ("SOLVER.WARMUP_ITERS", "-1", "is -1: use 0 or more"),
        ("SOLVER.MOMENTUM", "1.0", "is 1.0: use a value in"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all", "is 'all': use one of ('value', 'norm')"),
        ("DATALOADER.NUM_WORKERS", "-1", "is -1: use 0 or more"),
        ("DATALOADER.SAMPLER_TRAIN", "Sampler", "is 'Sampler': use one of ('TrainingSampler'"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "is (): use 8 pixels or more"),
        ("INPUT.MIN_SIZE_TRAIN", "(-160,)", "is (-160,): use 8 pixels or more"),
        ("INPUT.MIN_SIZE_TRAIN", "(1,)", "is (1,): use 8 pixels or more"),
        ("INPUT.MIN_SIZE_TEST", "1", "is 1: use 8 pixels or more"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "any", "is 'any': use one of"),
        ("INPUT.CROP.TYPE", "square", "is 'square': use one of ('relative_range'"),
        ("INPUT.RANDOM_FLIP", "both", "is 'both': use one of"),
        ("SEED", str(2**32), "is 4294967296: use a number below"),
        ("MODEL.RESNETS.DEPTH", "19", "is 19: use one of (18, 34, 50, 101, 152)"),
        ("MODEL.RESNETS.NORM", "FooNorm", "is 'FooNorm': use one of '', 'BN'"),
        ("MODEL.FPN.NORM", "x", "is 'x': use one of"),
        ("TEST.DETECTIONS_PER_IMAGE", "0", "is 0: use 1 or more"),
        ("SOLVER.LR_SCHEDULER_NAME", "Warmup", "'Warmup' with SOLVER.STEPS"),
        ("MODEL.DEVICE", "gpu", "is 'gpu': "),
        ("MODEL.DEVICE", "cuda:99", f"has {torch.cuda.device_count()} GPUs"),
        ("MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS", "-1", "is -1: use 0 or more"),
    ],
)
def test_values(key, value, message):
    """The message names the key, the value and what to do."""
    with pytest.raises(InputError, match=f"{re.escape(key)}.*{re.escape(message)}"):
        read_config(str(DEMO_CONFIG), [key, value], output=False)


def test_named_gpu():
    """Named, it has to be there; Detectron2's default gives way to the CPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert read_config(str(DEMO_CONFIG), [], output=False).MODEL.DEVICE == "cpu"
    with pytest.raises(InputError, match="MODEL.DEVICE is 'cuda': this machine has 0 GPUs"):
        read_config(str(DEMO_CONFIG), ["MODEL.DEVICE", "cuda"], output=False)


def test_device_is_kept():
    """Another device than a GPU of NVIDIA's is the user's choice."""
    assert (
        read_config(str(DEMO_CONFIG), ["MODEL.DEVICE", "mps"], output=False).MODEL.DEVICE == "mps"
    )


def test_steps_out_of_order():
    opts = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(600, 400)"]
    with pytest.raises(InputError, match=r"SOLVER.STEPS \(600, 400\) cannot be used"):
        read_config(str(DEMO_CONFIG), opts, output=False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.yaml": "SOLVER: {BASE_LR: null}\n"}, "SOLVER.BASE_LR is null: leave it out"),
        ({"a.yaml": "SEED: 1\nSEED: 2\n"}, "SEED is there twice, once more in line 2"),
        (
            {"a.yaml": "_BASE_: b.yaml\n", "b.yaml": "SOLVER:\n  STEPS: (1,)\n  STEPS: (2,)\n"},
            "b.yaml: SOLVER.STEPS is there twice, once more in line 3",
        ),
        ({"a.yaml": "_BASE_: a.yaml\n"}, "a.yaml: its _BASE_ leads back to itself"),
        (
            {"a.yaml": "_BASE_: [b.yaml]\n", "b.yaml": "_BASE_: ./a.yaml\n"},
            "a.yaml: its _BASE_ leads back to itself",
        ),
        ({"a.yaml": "SOLVER:\n\tBASE_LR: 1\n"}, "found character .* cannot start any token"),
        ({"a.yaml": ""}, "a.yaml: "),
    ],
)
def test_files(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_config(str(tmp_path / "a.yaml"), [], output=False)
    assert "\n" not in str(error.value)


def test_numbers_that_yaml_reads_as_text(tmp_path):
    (tmp_path / "a.yaml").write_text("SOLVER: {BASE_LR: 1e-3}\n")
    assert read_config(str(tmp_path / "a.yaml"), [], output=False).SOLVER.BASE_LR == 0.001


def test_evaluation_that_never_comes(caplog):
    read_config(str(DEMO_CONFIG), ["TEST.EVAL_PERIOD", "900"], output=False)
    assert "TEST.EVAL_PERIOD 900 is longer than the training of 720 iterations" in caplog.text


def test_keypoints():
    cfg = read_config(str(DEMO_CONFIG), ["MODEL.KEYPOINT_ON", "True"], output=False)
    MetadataCatalog.get("test_keypoints").set(thing_classes=["a"])
    with pytest.raises(InputError, match="'test_keypoints' does not name its keypoints"):
        check_keypoints(cfg, ["test_keypoints"])


@pytest.mark.parametrize(("num_images", "num_warnings"), [(3, 1), (12, 0), (0, 2), (None, 0)])
def test_few_images(num_images, num_warnings, caplog):
    cfg = read_config(str(DEMO_CONFIG), [], output=False)
    cfg.DATASETS.TRAIN = (f"test_{num_images}_images",)
    if num_images is not None:
        MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).set(num_images=num_images)
    warn_of_few_images(cfg)
    assert caplog.text.count(f"but there are only {num_images} images") == num_warnings
