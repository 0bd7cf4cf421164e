# SPDX-License-Identifier: Apache-2.0
import copy
import weakref
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import detectron2.export  # noqa: F401 (makes FPN scriptable)
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from libra_d2.modeling.lean_fpn import LeanFPN


class BottomUp(Backbone):
    """One convolution for each level. The pyramid does not use the first."""

    def __init__(self):
        super().__init__()
        self._out_features = ["res2", "res3", "res4", "res5"]
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32)))
        self._out_feature_channels = dict(zip(self._out_features, (4, 5, 6, 7)))
        for i, name in enumerate(self._out_features):
            side = 4 if i == 0 else 2
            self.add_module(name, nn.Conv2d(3 + i, 4 + i, side, stride=side))

    def forward(self, x):
        res2 = self.res2(x)
        res3 = self.res3(res2)
        res4 = self.res4(res3)
        return {"res2": res2, "res3": res3, "res4": res4, "res5": self.res5(res4)}


TOP_BLOCKS = {
    "none": lambda: None,
    "pooling": LastLevelMaxPool,
    "of the backbone": lambda: LastLevelP6P7(7, 32, in_feature="res5"),
    "of the pyramid": lambda: LastLevelP6P7(32, 32, in_feature="p4"),
    "of a level that is not used": lambda: LastLevelP6P7(4, 32, in_feature="res2"),
}


def build(top_block="pooling", fuse_type="sum"):
    torch.manual_seed(0)
    levels, top_block = ["res3", "res4", "res5"], TOP_BLOCKS[top_block]()
    fpn = FPN(BottomUp(), levels, 32, norm="GN", top_block=top_block, fuse_type=fuse_type)
    lean = copy.deepcopy(fpn)
    LeanFPN.replace_in(lean)
    assert type(lean) is LeanFPN
    return fpn, lean, torch.randn(2, 3, 64, 96)


@pytest.mark.parametrize("top_block", TOP_BLOCKS)
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_same_bits(top_block, fuse_type):
    """Features and gradients, as the operations are the same."""
    results = []
    *pyramids, image = build(top_block, fuse_type)
    for fpn in pyramids:
        features = fpn(image)
        sum(torch.sin(x).sum() for x in features.values()).backward()
        gradients = {n: p.grad for n, p in fpn.named_parameters() if p.grad is not None}
        results.append([*features.items(), *gradients.items()])
    assert len(results[0]) > 20
    for (name, expected), (found_name, found) in zip(*results):
        assert name == found_name
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("seen", ["nothing", "convolution", "norm", "forward", "everything"])
def test_in_place(seen, fuse_type, format):
    """Without gradients there are no copies, and what others have seen is not overwritten."""
    fpn, lean, image = build(fuse_type=fuse_type)
    image, kept = image.contiguous(memory_format=format), []

    def keep(module, args, output):
        if module in (conv, conv.norm):
            kept.append((output, output.clone()))

    conv = lean.fpn_lateral3
    forward = conv.forward

    def keep_result(x):
        keep(conv, x, result := forward(x))
        return result

    registers = {
        "convolution": conv.register_forward_hook,
        "norm": conv.norm.register_forward_hook,
        "everything": register_module_forward_hook,
    }
    with torch.no_grad(), ExitStack() as hooks:
        expected = fpn(image)
        if seen == "forward":
            conv.forward = keep_result
        elif seen != "nothing":
            hooks.enter_context(registers[seen](keep))
        found = lean(image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(kept) == {"nothing": 0, "everything": 2}.get(seen, 1)
    assert all(torch.equal(output, then) for output, then in kept)


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_results(has_gradients, dtype):
    """A coarser level in float32 makes the finer ones float32, as in the parent."""
    _, lean, _ = build()
    lateral, coarser = torch.ones(1, 2, 4, 4, dtype=dtype), torch.full((1, 2, 2, 2), 0.001)
    with torch.set_grad_enabled(has_gradients):
        merged = lean._merge(lateral, coarser, lean.fpn_lateral3)
    assert torch.equal(merged, torch.full((1, 2, 4, 4), 1.001))
    assert (merged is lateral) == (not has_gradients and dtype == torch.float32)
    if merged is not lateral:
        assert (lateral == 1).all()


def test_features_of_others():
    """What is no convolution may return its input, a feature map of the backbone. They all stay."""
    _, lean, image = build()
    outputs = []
    lean.bottom_up.register_forward_hook(lambda *args: outputs.append(args[2]))
    lean(image)
    assert list(outputs[0]) == ["res2", "res3", "res4", "res5"]
    lateral = torch.ones(1, 2, 4, 4)
    with torch.no_grad():
        assert lean._merge(lateral, torch.ones(1, 2, 2, 2), nn.Identity()) is not lateral


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (3, 3)])
def test_levels_that_do_not_fit(size):
    """Refused, and never broadcast."""
    _, lean, _ = build()
    with torch.no_grad(), pytest.raises(RuntimeError):
        lean._merge(torch.ones(1, 2, 4, 4), torch.ones(1, 2, *size), lean.fpn_lateral3)


@pytest.mark.parametrize(
    ("top_block", "kept"), [("of the pyramid", ["res2"]), ("of the backbone", ["res2", "res5"])]
)
def test_what_is_kept(top_block, kept):
    """The parent keeps all until it returns; here, what is not used any more is free by then."""
    alive = []
    *pyramids, image = build(top_block)
    for fpn in pyramids:
        maps = {}

        def note(module, args, output, maps=maps):
            outputs = output if isinstance(output, dict) else {f"lateral {len(maps)}": output}
            maps.update({name: weakref.ref(x) for name, x in outputs.items()})

        for module in (fpn.bottom_up, fpn.fpn_lateral5, fpn.fpn_lateral4, fpn.fpn_lateral3):
            module.register_forward_hook(note)
        fpn.fpn_output3.register_forward_hook(
            lambda *args, maps=maps: alive.append([n for n, x in maps.items() if x() is not None])
        )
        with torch.no_grad():
            fpn(image)
    assert set(alive[0]) >= {"res2", "res3", "res4", "res5", "lateral 6"}
    assert alive[1] == kept


@pytest.mark.filterwarnings("ignore")  # torch.jit announces its end
def test_captured():
    """Scripts, traces and compiled graphs are those of the parent."""
    fpn, lean, image = build()
    expected = fpn(image)
    torch._dynamo.reset()
    for captured in (
        torch.jit.trace(lean, image, strict=False),
        torch.jit.script(lean),
        torch.compile(lean, backend="eager", fullgraph=True),
    ):
        found = captured(image)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
