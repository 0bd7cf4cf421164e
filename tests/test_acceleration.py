# SPDX-License-Identifier: Apache-2.0
import copy
import sys

import pytest
import torch
from conftest import ROOT, calibrate_norms, demo_cfg, random_inputs
from torch import nn

from detectron2 import modeling
from detectron2.utils.events import EventStorage

from libra_d2.config import BASELINE
from libra_d2.errors import ArgumentError
from libra_d2.modeling import acceleration
from libra_d2.modeling.acceleration import CHANNELS_LAST, accelerate, choose_channels_last
from libra_d2.modeling.folded_conv import FoldedConv2d
from libra_d2.modeling.lean_fpn import LeanFPN
from libra_d2.modeling.roi_align import ParallelROIAlign
from libra_d2.modeling.winograd_conv import WinogradConv2d, is_available

pytestmark = pytest.mark.rounding

# R-18 has no bottlenecks; test_fused_bottleneck.py looks at these.
KINDS = {
    "fold_norm": FoldedConv2d,
    "parallel_roi_align": ParallelROIAlign,
    "winograd": WinogradConv2d,
    "lean_fpn": LeanFPN,
}
LAST = torch.channels_last
NONE = {"channels_last": "never", **dict.fromkeys(KINDS, False)}


def make_model(name):
    """In float64, with frozen batch norms that do something."""
    file = "libra_faster_rcnn" if name == "plain" else name
    options = {"MODEL__RESNETS__NORM": "FrozenBN", "MODEL__FPN__OUT_CHANNELS": 128}
    cfg = demo_cfg(ROOT / f"configs/Demo/{file}_R_18_FPN.yaml", **options)
    if name == "plain":
        cfg.merge_from_list(BASELINE)
        cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.PROPOSAL_GENERATOR.NAME = "StandardROIHeads", "RPN"
    else:
        cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE = True
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    model = modeling.build_model(cfg).double()
    calibrate_norms(model.backbone, torch.randn(2, 3, 64, 64, dtype=torch.float64) * 60)
    return model


def outputs(model, inputs):
    """Losses, gradients and detections."""
    torch.manual_seed(1)
    with EventStorage():
        losses = model.train()(copy.deepcopy(inputs))
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found = model.eval()(copy.deepcopy(inputs))[0]["instances"]
    return {**losses, **gradients, "boxes": found.pred_boxes.tensor, "scores": found.scores}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["libra_retinanet", "plain"])
def test_same_numbers(name):
    """Losses, gradients and detections in float64, with all levers; checkpoint keys stay."""
    plain = make_model(name)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    missing = set(KINDS.values()) - {type(module) for module in fast.modules()}
    assert missing == ({ParallelROIAlign} if name == "libra_retinanet" else set())
    folded = [module for module in fast.modules() if isinstance(module, FoldedConv2d)]
    assert any(isinstance(module, WinogradConv2d) for module in folded)  # those of bottlenecks
    assert list(fast.state_dict()) == list(plain.state_dict())
    inputs = random_inputs(3, 2)
    found, expected = outputs(fast, inputs), outputs(plain, inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Gradients are sums over all pixels, of terms that cancel.
        bound = 1e-9 * max(value.abs().max().item(), 1) if value.numel() else 0
        torch.testing.assert_close(found[key], value, rtol=0, atol=bound)
    assert has_channels_last(fast)


def has_channels_last(model):
    """Whether all features of the backbone have."""
    features = model.backbone(torch.randn(1, 3, 64, 96, dtype=torch.float64)).values()
    return all(x.is_contiguous(memory_format=LAST) for x in features)


@pytest.mark.parametrize("lever", NONE)
def test_levers(lever, caplog):
    """Each alone does what it says, and nothing else; nothing is compiled."""
    model = make_model("libra_faster_rcnn")
    value = "always" if lever == "channels_last" else True
    accelerate(model, **{**NONE, lever: value}, backend="no such backend")
    assert not caplog.text
    types = {type(module) for module in model.modules()}
    assert has_channels_last(model) == (lever == "channels_last")
    for name, kind in KINDS.items():
        assert (kind in types) == (lever == name)


@pytest.mark.parametrize(
    ("when", "training", "inference"),
    zip(CHANNELS_LAST, ("small large", "large", "", ""), (*["small large"] * 3, "")),
)
def test_channels_last(when, training, inference):
    """Whose features have the format, where there is a backbone; weights keep theirs."""
    model = nn.Sequential()
    model.backbone = nn.Conv2d(3, 2, 1)
    accelerate(model, channels_last=when)
    images = {"small": torch.zeros(1, 3, 512, 1023), "large": torch.zeros(1, 3, 512, 1024)}
    for is_training, expected in ((True, training), (False, inference)):
        features = {k: model.train(is_training).backbone(x) for k, x in images.items()}
        found = [k for k, x in features.items() if x.is_contiguous(memory_format=LAST)]
        assert found == expected.split()
    assert model.backbone.weight.is_contiguous()
    torch.jit.script(model.backbone)
    accelerate(torch.nn.ReLU(), channels_last=when, compile_backbone=True)
    with pytest.raises(ArgumentError, match="^channels_last is 'sometimes': use one of"):
        accelerate(model, channels_last="sometimes")


@pytest.fixture
def pretend(monkeypatch):
    """Makes this machine another one."""

    def change(platform, capability):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        monkeypatch.setattr(torch, "_nnpack_available", lambda: True)
        is_available.cache_clear()

    yield change
    is_available.cache_clear()


def conv(kernel=3, channels=64, **kwargs):
    return nn.Conv2d(channels, 64, kernel, padding=kernel // 2, **kwargs)


def test_no_nnpack(pretend, monkeypatch):
    """Some builds of PyTorch lack it."""
    pretend("linux", "AVX2")
    monkeypatch.setattr(torch, "_nnpack_available", lambda: False)
    assert not is_available()
    assert choose_channels_last(conv(), "cpu", False) == "inference"


@pytest.mark.parametrize(
    ("platform", "device", "mixed", "capability", "expected"),
    [
        ("linux", "cpu", False, "AVX512", "always"),
        ("linux", "cpu", False, "AVX2", "large"),
        ("linux", "cpu", True, "AVX2", "inference"),
        ("linux", "cpu", False, "DEFAULT", "inference"),
        ("win32", "cuda", True, "AVX512", "never"),
        ("darwin", "mps", False, "AVX512", "never"),
        ("linux", "cuda", True, "AVX2", "always"),
    ],
)
def test_choose_channels_last(platform, device, mixed, capability, expected, pretend):
    pretend(platform, capability)
    assert choose_channels_last(conv(), device, mixed) == expected


@pytest.mark.parametrize(
    ("convs", "winograd", "expected"),
    [
        ([conv()], True, "large"),
        ([conv()], False, "inference"),
        ([conv(), conv(stride=2), conv(1), conv(1, 3)], True, "large"),
        ([conv(), conv(7, 3).requires_grad_(False)], True, "large"),
        *(([conv(), other], True, "inference") for other in (conv(7), conv(channels=63))),
        ([conv(), conv(groups=2)], True, "inference"),
        *(([other], True, "inference") for other in (conv(stride=2), conv(1))),
    ],
)
def test_channels_last_of_model(convs, winograd, expected, pretend):
    """For large images in training, if Winograd's algorithm has most gradients of the weights."""
    pretend("linux", "AVX2")
    assert choose_channels_last(nn.Sequential(*convs), "cpu", False, winograd) == expected


class OwnConv2d(nn.Conv2d):
    """PyTorch 2.6 does not compile its own modules alone."""

    def forward(self, x):
        return super().forward(x)


def test_compiled_for_any_size():
    torch._dynamo.reset()
    module = OwnConv2d(1, 1, 1)
    acceleration._compile(module, "eager")
    torch._dynamo.utils.counters.clear()
    for size in (8, 10, 12):
        module(torch.zeros(1, 1, size, size + 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_backbone():
    """Without graph breaks, in training and evaluation; the keys of checkpoints stay."""
    model = make_model("libra_faster_rcnn")
    keys, image = list(model.state_dict()), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    same = copy.deepcopy(model)  # batch norms count images
    expected = [same.train(mode).backbone(image) for mode in (True, False)]
    torch._dynamo.reset()
    accelerate(model, compile_backbone=True, backend="eager")
    assert list(model.state_dict()) == keys
    torch._dynamo.utils.counters.clear()
    counts = [0]
    for features, mode in zip(expected, (True, False)):
        for name, feature in model.train(mode).backbone(image).items():
            torch.testing.assert_close(feature, features[name], rtol=1e-9, atol=1e-9)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] < counts[1] < counts[2]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiler_that_fails(caplog):
    """Always, or on the backbone, but not on something small: it is said, and the model works."""

    @torch._dynamo.register_backend(name="only_small")
    def compile_small(graph, inputs):
        if len(inputs) > 1:
            raise NotImplementedError("too large")
        return graph.forward

    model, image = nn.Module(), torch.randn(1, 3, 64, 96)
    model.backbone = OwnConv2d(3, 2, 1)
    expected = model.backbone(image)
    accelerate(model, **NONE, compile_backbone=True, backend="no such backend")
    assert "The backbone runs without torch.compile" in caplog.text
    assert torch.equal(model.backbone(image), expected)
    caplog.clear()
    torch._dynamo.reset()
    accelerate(model, **NONE, compile_backbone=True, backend="only_small")
    assert "without torch.compile" not in caplog.text
    assert torch.equal(model.backbone(image), expected)
    assert "The backbone runs without torch.compile: too large" in caplog.text

    @torch._dynamo.register_backend(name="starts_again")
    def start_again(graph, inputs):
        raise torch._dynamo.exc.RestartAnalysis

    with pytest.raises(torch._dynamo.exc.RestartAnalysis):
        acceleration._or_eager("starts_again")(None, [])
