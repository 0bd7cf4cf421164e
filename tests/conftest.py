# SPDX-License-Identifier: Apache-2.0
"""Fixtures and small models that the test modules share."""

import logging
import multiprocessing
import os
import re
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.logger import setup_logger

from libra_d2 import add_libra_config
from libra_d2.config import make_recipe
from libra_d2.tools.export_checks import match
from libra_d2.tools.make_synthetic_dataset import make_synthetic_dataset

ROOT = Path(__file__).parent.parent
DEMO_CONFIG = ROOT / "configs/Demo/libra_faster_rcnn_R_18_FPN.yaml"
sys.path.insert(0, str(ROOT / "tests/reference"))
# What processes that are started by "forkserver" need not import again.
multiprocessing.get_context("forkserver").set_forkserver_preload(["libra_d2.engine.main"])


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the tests' random numbers")
    parser.addoption(
        "--slow", action="store_true", help="compare other, deep models with mmdetection's"
    )
    parser.addoption("--gpu", action="store_true", help="let the tests see the GPUs")


def pytest_configure(config):
    if not config.getoption("--gpu"):  # what is tested on one machine is tested on any other
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def mmdet():
    """The reference, ready to build models on the CPU."""
    from uncompiled_mmcv import import_mmdet

    return import_mmdet()


def reference_config(mmdet, name):
    """The config of mmdetection whose file name starts with ``name``, as "rpn_r50"."""
    from mmengine.config import Config

    folder = Path(mmdet.__file__).parent / ".mim/configs"
    (path,) = folder.glob(f"*/{name}_fpn_1x_coco.py")
    return Config.fromfile(path)


@pytest.fixture(autouse=True)
def _fresh_start(pytestconfig):
    """The same random numbers for each test, and the loggers as before a script set them up."""
    torch.manual_seed(pytestconfig.getoption("seed"))
    setup_logger.cache_clear()  # or what a script logs would depend on the tests before
    for name in ("detectron2", "fvcore", "libra_d2"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        # Otherwise trainers set up two of them, and caplog does not see what they log.
        logging.getLogger(name).setLevel(logging.NOTSET if name == "fvcore" else logging.INFO)


def load_cfg(path):
    """The config in a file of this project."""
    cfg = get_cfg()
    add_libra_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    return cfg


def demo_cfg(config=DEMO_CONFIG, **overrides):
    """The demo's config with smaller heads; ``overrides`` as MODEL__DEVICE="cpu"."""
    cfg = load_cfg(config)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def build_model(cfg):
    """The model of a config of either language."""
    return make_recipe(cfg).build_model()


def _process(function, args, environment, log):
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    function(*args)


def run_processes(function, args, environments, log):
    """Call a function in a process for each environment; returns what they print."""
    context, processes = multiprocessing.get_context("forkserver"), []
    logs = [Path(f"{log}.{i}") for i in range(len(environments))]
    for environment, path in zip(environments, logs):
        process = context.Process(target=_process, args=(function, args, environment, path))
        process.start()
        processes.append(process)
    for process, path in zip(processes, logs):
        process.join()
        assert process.exitcode == 0, path.read_text()
    return "".join(path.read_text() for path in logs)


@contextmanager
def full_disk(num_bytes=1000):
    """A limit on the size of files stands in for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def example(page, text):
    """The block of code with that text on a page of docs/."""
    blocks = re.findall(r"```\w+\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    (found,) = (block for block in blocks if text in block)
    return found


def evaluate(evaluator, found, *img_ids):
    """The results for what was found in each image, by its id: detections, or proposals."""
    evaluator.reset()
    for image_id, instances in found.items():
        kind = "proposals" if instances.has("proposal_boxes") else "instances"
        evaluator.process([{"image_id": image_id}], [{kind: instances}])
    return evaluator.evaluate(*img_ids)


def masks_of(boxes, size):
    """(n, h, w) bool: the pixels inside of each box."""
    ys, xs = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    return (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)


def random_inputs(*num_boxes, size=(96, 128)):
    """One input of a Detectron2 model for each number of boxes given."""
    height, width = size
    inputs = []
    for n in num_boxes:
        corner = torch.rand(n, 2) * torch.tensor([0.6 * width, 0.6 * height])
        side = 8 + torch.rand(n, 2) * 0.35 * min(size)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.arange(n) % 4
        instances.gt_masks = BitMasks(torch.rand(n, height, width) > 0.5)
        inputs.append({"image": torch.rand(3, height, width) * 255, "instances": instances})
    return inputs


@torch.no_grad()
def calibrate_norms(backbone, images):
    """
    Give the frozen batch norms the statistics of ``images``, (N, 3, H, W), for what ImageNet
    weights have: activations that neither explode nor vanish. Scale and shift are random.
    """

    def calibrate(norm, inputs):
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)) + 1e-3)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.2, 0.2)

    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    backbone(images)
    for hook in hooks:
        hook.remove()


def assert_same_detections(found, expected):
    """
    Fields of two Instances of float32 models. Nearly equal scores have no order; the bounds are a
    hundred times what rounding does to boxes of some hundred pixels, on any processor.
    """
    names = ("pred_boxes", "pred_classes", "scores")
    ours, theirs = (
        tuple(getattr(x[name], "tensor", x[name]) for name in names) for x in (found, expected)
    )
    assert len(ours[0]) == len(theirs[0])
    index = match(theirs, ours)
    assert len(index.unique()) == len(index)
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(a, b[index], rtol=1e-4, atol=1e-3)


@pytest.fixture
def float64():
    """All of a test is computed in float64, see :func:`oracle.double_precision`."""
    from oracle import double_precision  # imports mmdetection, which few tests need

    with double_precision():
        yield


@pytest.fixture
def refused(capsys):
    """Call a program, which must end with status 2; returns what it prints on stderr."""

    def call(program, *args, **kwargs):
        with pytest.raises(SystemExit, match="^2$"):
            program(*args, **kwargs)
        return capsys.readouterr().err

    return call


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """Directory of a synthetic dataset of 12 images of 96 pixels."""
    path = tmp_path_factory.mktemp("data") / "synthetic"
    make_synthetic_dataset(str(path), num_images=12, size=96, seed=3)
    return path
