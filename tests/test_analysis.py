# SPDX-License-Identifier: Apache-2.0
import base64
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, random_inputs

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from libra_d2.analysis import (
    feature_statistics,
    objective_statistics,
    plot_gradient_shares,
    plot_heat_maps,
    plot_levels,
    plot_losses,
    plot_sampling,
    record,
    sample_statistics,
)
from libra_d2.analysis.html_page import Section, write_page
from libra_d2.analysis.objective_level import loss_and_gradient
from libra_d2.analysis.recording import Candidates, Levels
from libra_d2.modeling import balanced_l1_loss

CONFIGS = {
    "faster": "configs/Demo/libra_faster_rcnn_R_18_FPN.yaml",
    "cascade": "configs/Demo/libra_cascade_rcnn_R_18_FPN.yaml",
    "retinanet": "configs/Demo/libra_retinanet_R_18_FPN.yaml",
}
BASELINE = {
    "MODEL__LIBRA__BFP__ENABLED": False,
    "MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL__RETINANET__BBOX_REG_LOSS_TYPE": "smooth_l1",
}


@pytest.mark.parametrize("system", CONFIGS)
@pytest.mark.parametrize("balanced", [True, False])
def test_record(system, balanced):
    """All that the model has is recorded, balanced or not, and the model stays as it was."""
    overrides = {} if balanced else BASELINE
    model = build_model(demo_cfg(ROOT / CONFIGS[system], **overrides)).eval()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    recording = record(model, [random_inputs(3, 2), random_inputs(1)])
    assert len(recording.levels) == 3
    assert all((image.after is not None) == balanced for image in recording.levels)
    assert [x.shape[-1] for x in recording.levels[0].before[:2]] in ([32, 16], [16, 8])
    if system == "retinanet":
        assert recording.candidates == []
    else:
        assert [c.num_instances for c in recording.candidates] == [3, 2, 1]
        assert all((c.labels == 1).sum() >= c.num_instances for c in recording.candidates)
    errors = torch.cat(recording.box_errors)
    assert len(errors) % 4 == 0
    assert len(errors) > 0
    assert (errors >= 0).all()
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    watched = ("training", "proposal_sampler", "balanced_l1", "box_reg_loss_type")
    for name, module in model.named_modules():
        before = {k: v for k, v in attributes[name].items() if k in watched}
        assert {k: v for k, v in vars(module).items() if k in watched} == before, name


def test_recorded_errors_are_those_of_the_loss():
    """The loss of the recorded errors is the loss that the model computes from the same draw."""
    overrides = {"MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 16}
    cfg = demo_cfg(ROOT / CONFIGS["faster"], **overrides)
    model, inputs = build_model(cfg).eval(), random_inputs(3)
    torch.manual_seed(1)
    (errors,) = record(model, [inputs]).box_errors
    seen = {}

    def loss(module, inputs):
        seen["loss"] = balanced_l1_loss(*inputs, reduction="sum").item()

    model.roi_heads.box_predictor.balanced_l1.register_forward_pre_hook(loss)
    torch.manual_seed(1)
    record_again = record(model, [inputs]).box_errors[0]
    assert torch.equal(record_again, errors)
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    torch.manual_seed(1)
    with EventStorage(), torch.no_grad():
        model(inputs)
    expected = balanced_l1_loss(errors, torch.zeros_like(errors), reduction="sum").item()
    assert seen["loss"] == pytest.approx(expected, rel=1e-6)


def candidates():
    """90 negatives of each tenth of a balanced bin would hold 30; positives 40, 4 and 1."""
    ious = torch.cat([0.03 * torch.rand(900), 0.2 + 0.01 * torch.rand(60), 0.4 * torch.ones(60)])
    labels = torch.cat([torch.zeros(1020, dtype=torch.int8), torch.ones(45, dtype=torch.int8)])
    matched = torch.cat(
        [torch.zeros(1020, dtype=torch.long), torch.arange(3).repeat_interleave(15)]
    )
    matched[1020:] = torch.tensor([0] * 40 + [1] * 4 + [2])
    return Candidates(labels, torch.cat([ious, torch.full((45,), 0.8)]), matched, 3, 60, 0.25)


def test_sample_statistics():
    statistics = sample_statistics([candidates()] * 40)
    assert statistics["interval_ends"] == pytest.approx(np.arange(0.05, 0.51, 0.05))
    everything, paper = statistics["candidates"], statistics["balanced, paper's bins"]
    assert everything["negatives"][0] == pytest.approx(900 / 1020)
    assert everything["instances"] == 1
    assert everything["largest_share"] == pytest.approx(40 / 45)
    # A third of the 45 from each bin.
    assert paper["negatives"][0] == pytest.approx(1 / 3)
    assert paper["negatives"][4] == pytest.approx(1 / 3)
    assert paper["negatives"][8] == pytest.approx(1 / 3)
    # round(15 / 3) + 1 = 6 of the first instance, 4, 1, and 4 more of the first.
    assert paper["instances"] == 1
    assert paper["largest_share"] == pytest.approx(10 / 15)
    assert statistics["random"]["negatives"][0] > 0.8
    assert statistics["random"]["instances"] < 0.9


def test_sample_statistics_without_objects():
    empty = Candidates(
        torch.zeros(9, dtype=torch.int8), torch.zeros(9), torch.zeros(9).long(), 0, 8, 0.25
    )
    statistics = sample_statistics([empty])
    assert statistics["random"]["instances"] == 0
    assert statistics["random"]["negatives"][0] == 1


def test_feature_statistics():
    """Levels that have nothing in common, to each of which the same is added."""
    one, other = torch.zeros(2, 8, 8), torch.zeros(2, 4, 4)
    one[0], other[1] = 3.0, 4.0
    levels = [Levels([one, other], [one + 1, other + 1])]
    statistics = feature_statistics(levels)
    assert statistics["before"]["energy"] == pytest.approx([3 / 2**0.5, 4 / 2**0.5])
    assert statistics["before"]["similarity"][0] == pytest.approx([1, 0])
    assert statistics["added"] == pytest.approx([1, 1])
    expected = (4 * 1 + 1 * 5) / (17**0.5 * 26**0.5)
    assert statistics["after"]["similarity"][1] == pytest.approx([expected, 1])
    assert "after" not in feature_statistics([Levels([one, other], None)])


def test_objective_statistics():
    """Two errors: x = 0.5 with gradients 0.5 and alpha ln(b / 2 + 1), and 3 with 1 and gamma."""
    statistics = objective_statistics(torch.tensor([3.0, 0.5]), smooth_l1_beta=1.0)
    assert statistics["inliers"] == 0.5
    assert statistics["smooth L1 (beta 1)"]["inlier_gradient"] == pytest.approx(0.5 / 1.5)
    plain = objective_statistics(torch.tensor([3.0, 0.5]))["L1"]
    assert plain["inlier_gradient"] == pytest.approx(1 / 2)
    inlier = 0.5 * np.log((np.exp(3) - 1) / 2 + 1)
    share = inlier / (inlier + 1.5)
    assert statistics["balanced L1"]["inlier_gradient"] == pytest.approx(share)
    assert statistics["balanced L1"]["cumulative"][-1] == pytest.approx(1)


def test_loss_and_gradient():
    value, gradient = loss_and_gradient(lambda x, y: 2 * (x - y).square(), torch.tensor([1.0, 2.0]))
    assert value.tolist() == [2, 8]
    assert gradient.tolist() == [4, 8]


@pytest.mark.parametrize("after", [True, False])
def test_figures(after, tmp_path):
    """Each can be saved, and says what its axes are."""
    levels = [torch.rand(4, 8, 8), torch.rand(4, 4, 4)]
    seen = Levels(levels, levels if after else None)
    figures = [
        plot_sampling(sample_statistics([candidates()])),
        plot_levels(feature_statistics([seen]), ["p2", "p3"]),
        plot_heat_maps(seen, ["p2", "p3"], np.zeros((8, 8, 3), np.uint8)),
        plot_losses(beta=0.11, form="reference"),
        plot_gradient_shares(objective_statistics(torch.rand(500) * 2)),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 3000
        assert all(axis.get_title() for axis in figure.axes[:2] if i != 3)
    assert "IoU" in figures[0].axes[0].get_xlabel()


def test_page(tmp_path):
    """Self-contained: the picture is inside, and text is text."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"not really a picture")
    write_page(
        str(tmp_path / "index.html"), "A <title>", "b & c", [Section("d", "e", str(picture))]
    )
    page = (tmp_path / "index.html").read_text()
    assert "A &lt;title&gt;" in page
    assert "b &amp; c" in page
    (data,) = re.findall(r'src="([^"]*)"', page)
    assert base64.b64decode(data.split(",")[1]) == picture.read_bytes()
