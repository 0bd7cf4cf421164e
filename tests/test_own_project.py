# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/own_project.md."""

import re

import pytest
import torch
from conftest import ROOT, build_model, demo_cfg, random_inputs

from detectron2.utils.events import EventStorage
from detectron2.utils.registry import locate

TEXT = (ROOT / "docs/own_project.md").read_text()


@pytest.fixture(scope="module")
def registered():
    """Run the examples that register something. Returns: their names and values."""
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        if ".register()" in block:
            exec(block, namespace)
    return namespace


@pytest.mark.parametrize(
    ("key", "name"), [("BFP__REFINE_TYPE", "depthwise"), ("SAMPLER__NAME", "HardSampler")]
)
def test_examples(registered, key, name):
    """A model with the part of that name trains."""
    model = build_model(demo_cfg(**{f"MODEL__LIBRA__{key}": name}))
    used = [type(m) for m in model.modules()]
    assert (registered["HardSampler"] in used) == (name == "HardSampler")
    if name == "depthwise":
        assert model.backbone.bfp.refine.groups == 16
    with EventStorage() as storage:
        losses = model(random_inputs(3, 2))
        sum(losses.values()).backward()
        assert "roi_head/num_bg_iou_bin_2" in storage.latest()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_names_exist():
    """Each class and function that the page names exists."""
    names = re.findall(r"`libra_d2\.(\w+\.\w+)`", TEXT)
    parts = re.findall(r"`((?:Balanced|Libra)\w+|balanced_l1_loss)`", TEXT)
    for name in (*names, *(f"modeling.{part}" for part in parts)):
        locate(f"libra_d2.{name}")  # raises if there is none
