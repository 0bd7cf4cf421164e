# SPDX-License-Identifier: Apache-2.0
"""docs/own_project.md: what plugs in from outside of the package."""

import re

import pytest
import torch
from conftest import ROOT, build_model, demo_cfg, random_inputs

from detectron2.utils.events import EventStorage

TEXT = (ROOT / "docs/own_project.md").read_text()


@pytest.fixture(scope="module")
def registered():
    """Run the examples that register something; returns their names."""
    blocks = [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.S) if ".register()" in b]
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    return namespace


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("MODEL__LIBRA__BFP__REFINE_TYPE", "depthwise"),
        ("MODEL__LIBRA__SAMPLER__NAME", "HardSampler"),
    ],
)
def test_examples(registered, key, name):
    """They are used by name, and trained."""
    model = build_model(demo_cfg(**{key: name}))
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
    """Each class and function that the page names is there."""
    import libra_d2.checkpoint
    import libra_d2.data
    import libra_d2.engine
    import libra_d2.modeling

    for module, name in re.findall(r"`libra_d2\.(\w+)\.(\w+)`", TEXT):
        assert hasattr(getattr(libra_d2, module), name), name
    for name in re.findall(r"`((?:Balanced|Libra)\w+|balanced_l1_loss)`", TEXT):
        assert hasattr(libra_d2.modeling, name), name
