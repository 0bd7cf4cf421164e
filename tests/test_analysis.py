# SPDX-License-Identifier: Apache-2.0
import re
from base64 import b64decode

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, random_inputs

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from libra_d2 import analysis
from libra_d2.analysis.html_page import Section, write_page
from libra_d2.analysis.objective_level import loss_and_gradient
from libra_d2.analysis.recording import Candidates, Levels
from libra_d2.config import BASELINE
from libra_d2.modeling import balanced_l1_loss

NAMES = ["candidates", "random", "balanced, paper's bins", "balanced, mmdetection's bins"]
SYSTEMS = [("libra_faster_rcnn", 3, 2), ("libra_cascade_rcnn", 3, 6), ("libra_retinanet", 0, 2)]


def approx(values, **tolerance):
    return pytest.approx(np.array(values), **tolerance)


def bars(axis):
    """Left ends, widths and heights."""
    return np.array([(x.get_x(), x.get_width(), x.get_height()) for x in axis.patches]).T


def build(system, *options):
    cfg = demo_cfg(ROOT / f"configs/Demo/{system}_R_18_FPN.yaml")
    cfg.merge_from_list(options)
    return build_model(cfg).eval()


@pytest.mark.parametrize(("system", "num_candidates", "num_errors"), SYSTEMS)
@pytest.mark.parametrize("balanced", [True, False])
@torch.no_grad()
def test_record(system, num_candidates, num_errors, balanced):
    """All that the model has is recorded, balanced or not, and the model stays as it was."""
    model = build(system, *([] if balanced else BASELINE))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    batches = [random_inputs(3, 2), random_inputs(1)]
    recording = analysis.record(model, batches)
    for module, before in zip(model.modules(), attributes):
        assert {k: v for k, v in vars(module).items() if v is not before[k]} == {}
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert [c.num_instances for c in recording.candidates] == [3, 2, 1][:num_candidates]
    for c in recording.candidates:
        assert (c.num_samples, c.positive_fraction) == (64, 0.25)
        assert torch.equal(c.labels, (c.max_iou >= 0.5).to(c.labels))
        # The last proposals are the ground truth.
        assert c.max_iou[-c.num_instances :].numpy() == approx([1] * c.num_instances)
        assert c.matched_idxs[-c.num_instances :].tolist() == [*range(c.num_instances)]
    assert len(recording.box_errors) == num_errors
    for errors in recording.box_errors:
        assert errors.shape == (len(errors) // 4 * 4,)
        assert errors.min() >= 0
    images = iter(recording.levels)
    for batch in batches:
        outputs = model.backbone(model.preprocess_image(batch).tensor).values()
        for i in range(len(batch)):
            image = next(images)
            assert (image.after is not None) == balanced
            last = [x[i] for x in outputs]
            torch.testing.assert_close(image.after if balanced else image.before, last)
            if balanced:
                after = model.backbone.bfp([x[None] for x in image.before])
                torch.testing.assert_close([x[0] for x in after], last)
    assert list(images) == []


def test_recorded_errors_are_those_of_the_loss():
    """The loss of the recorded errors is the loss that the model computes from the same draw."""
    model = build("libra_faster_rcnn", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16)
    inputs = random_inputs(3)
    torch.manual_seed(1)
    (errors,) = analysis.record(model, [inputs]).box_errors
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    torch.manual_seed(1)
    with EventStorage(), torch.no_grad():
        loss = model(inputs)["loss_box_reg"].item()
    expected = balanced_l1_loss(errors, torch.zeros_like(errors), reduction="sum").item() / 16
    assert loss == pytest.approx(expected, rel=1e-6)


def candidates(ious, instances, num_instances, num_samples=99):
    """Negatives of these IoUs, positives of these instances, and a proposal that is neither."""
    labels = torch.tensor([0] * len(ious) + [1] * len(instances) + [-1])
    max_iou = torch.tensor([*ious, *[0.8] * len(instances), 0.45])
    matched = torch.tensor([0] * len(ious) + instances + [0])
    return Candidates(labels, max_iou, matched, num_instances, num_samples, 0.25)


def test_sample_statistics():
    """All may be drawn, so that all samplers draw the same."""
    first = candidates([0.01, 0.02, 0.07, 0.12, 0.31, 0.49], [1, 1, 1, 0], 3)
    second, third = candidates([0.04, 0.25], [0], 1), candidates([], [], 2)
    statistics = analysis.sample_statistics([first, second, third])
    assert statistics.pop("interval_ends") == approx(np.arange(0.05, 0.51, 0.05))
    assert statistics.pop("num_bins") == 3
    assert list(statistics) == NAMES
    for numbers in statistics.values():
        assert np.multiply(numbers["negatives"], 8).tolist() == [3, 1, 1, 0, 0, 1, 1, 0, 0, 1]
        assert numbers["mean_iou"] == approx(1.31 / 8)
        assert numbers["instances"] == 3 / 6
        assert numbers["largest_share"] == (3 / 4 + 1) / 2  # the mean over images that have any
    numbers = analysis.sample_statistics([candidates([0.0], [], 0)])["random"]
    assert list(numbers.values()) == [[1] + [0] * 9, 0, 0, 0]
    numbers = analysis.sample_statistics([candidates([], [0], 1)])["random"]
    assert list(numbers.values()) == [[0] * 10, 0, 1, 1]


def test_samplers():
    """What each draws of too many; tolerances are five standard errors of the random draws."""
    ious = [0.015] * 900 + [0.205] * 60 + [0.4] * 60
    images = [candidates(ious, [0] * 40 + [1] * 4 + [2], 3, num_samples=60)] * 40
    statistics = analysis.sample_statistics(images)
    _, random, paper, reference = (statistics[name] for name in NAMES)
    assert random["negatives"][0] == approx(900 / 1020, abs=0.04)
    # Of 15 among 45: a third of the only positive of its instance, 0.816 of one of four or more.
    assert random["instances"] == approx((1 + 0.816 + 1 / 3) / 3, abs=0.15)
    # A third of 45 from each bin; round(15 / 3) + 1 = 6 of the first instance, 4, 1, and 4 more.
    assert np.array(paper["negatives"])[[0, 4, 8]] == approx([1 / 3] * 3)
    assert (paper["instances"], paper["largest_share"]) == (1, pytest.approx(10 / 15))
    # Bins up to 0.8, the highest IoU: 15 of the 960 of the first, 15 of the second, 15 of the rest.
    assert reference["negatives"][4] == approx(29.3 * 60 / 960 / 45, abs=0.03)
    # 6, 4, 1, and four among 45 of which the 11 are not replaced: fewer than 15.
    assert reference["largest_share"] == approx(9.02 / 14.02, abs=0.03)
    # Two bins, the first with 960; a threshold of 0.3, above which 60 are in no bin.
    two = analysis.sample_statistics(images[:1], num_bins=2)[NAMES[2]]
    assert two["negatives"][8] == approx(22 / 45, abs=1.1 / 45)
    low = analysis.sample_statistics(images, negative_iou_thresh=0.3)
    assert low["interval_ends"] == approx(np.arange(0.03, 0.31, 0.03))
    assert low[NAMES[2]]["negatives"][6] == approx(15.7 / 44.1, abs=0.02)


def test_figure_of_samples():
    """Bars over their intervals, lines between the bins, and each sampler's own numbers."""
    shares = np.arange(1, 11) / 55
    statistics = {"interval_ends": np.arange(1, 11) * 0.04, "num_bins": 4}
    statistics["candidates"] = {"negatives": shares, "mean_iou": 0.171, "instances": 0.5}
    statistics["random"] = {"negatives": 1 - shares, "mean_iou": 0.2, "instances": 0.756}
    axes = analysis.plot_sampling(statistics).axes
    assert [axis.get_title() for axis in axes] == ["candidates", "random"]
    for axis, expected, text in zip(axes, (shares, 1 - shares), ("0.17, 50", "0.20, 76")):
        assert bars(axis) == approx([np.arange(0.002, 0.4, 0.04), [0.036] * 10, 100 * expected])
        lines = [line.get_xdata() for line in axis.lines]
        assert np.array(lines) == approx([[0.1] * 2, [0.2] * 2, [0.3] * 2])
        assert [x.get_text() for x in axis.texts] == [f"mean IoU {text}% of the objects covered"]
        assert axis.get_ylim() == axes[0].get_ylim()


def test_energy():
    """Root mean squares: of each level, of what is added to it, and then the mean of two images."""
    one, other = torch.zeros(2, 8, 8), torch.zeros(2, 4, 4)
    one[0], other[1] = 3.0, 4.0
    levels = [Levels([one, other], [one + 1, other - 2])]
    levels.append(Levels([3 * one, other], [3 * one, 2 * other]))
    statistics = analysis.feature_statistics(levels)
    assert statistics["before"]["energy"] == approx([6 / 2**0.5, 4 / 2**0.5])
    after = [(8.5**0.5 + 9 / 2**0.5) / 2, (2 + 8 / 2**0.5) / 2]
    assert statistics["after"]["energy"] == approx(after)
    assert statistics["added"] == approx([1 / 2, (2 + 4 / 2**0.5) / 2])


def test_similarity():
    """
    Two places, at which the first level is (3, 4), on average of four pixels, and (0, 2). The
    second is (5, 0) and (0, 5), in another image (0, 5) twice; the third is one place, (0, -1).
    """
    first = torch.tensor([[[12.0, 0, 0, 0], [0, 0, 0, 0]], [[0, 8, 2, 2], [8, 0, 2, 2]]])
    seconds = torch.tensor([[[[5.0, 0]], [[0, 5]]], [[[0, 0]], [[5, 5]]]])
    third = torch.tensor([[[0.0]], [[-1]]])
    statistics = analysis.feature_statistics([Levels([first, x, third], None) for x in seconds])
    one_two = ((3 / 5 + 1) / 2 + (4 / 5 + 1) / 2) / 2
    one_three, two_three = -2 / 5**0.5, -(1 / 2**0.5 + 1) / 2
    expected = [[1, one_two, one_three], [one_two, 1, two_three], [one_three, two_three, 1]]
    assert np.array(statistics["before"]["similarity"]) == approx(expected)
    assert list(statistics) == ["before"]


@pytest.mark.parametrize("balanced", [True, False])
def test_figure_of_levels(balanced):
    """A bar for each level and stage, side by side; and a matrix for each stage, row by row."""
    statistics = {"before": {"energy": [5.0, 1.0], "similarity": [[1, 0.25], [0.75, 1]]}}
    names, heights = ["before"], [5, 1]
    if balanced:
        statistics["after"] = {"energy": [4.0, 3.0], "similarity": [[1, 0.5], [0.9, 1]]}
        statistics["added"] = [2.0, 6.0]
        names, heights = ["before", "added", "after"], [5, 1, 2, 6, 4, 3]
    left, *matrices, _ = analysis.plot_levels(statistics, ["p2", "p3"]).axes
    width = 0.8 / len(names)
    ends = [level - 0.4 + i * width for i in range(len(names)) for level in (0, 1)]
    assert bars(left) == approx([ends, [width] * len(ends), heights])
    assert [x.get_label() for x in left.containers] == names
    labels = [*left.get_xticklabels(), *(x for y in matrices for x in y.get_yticklabels())]
    assert [x.get_text() for x in labels] == ["p2", "p3"] * (1 + len(matrices))
    for axis, stage in zip(matrices, names[::2]):
        matrix = np.array(statistics[stage]["similarity"])
        assert axis.get_title() == f"similarity of the levels, {stage}"
        assert np.array_equal(axis.images[0].get_array(), matrix)
        assert axis.images[0].get_clim() == (0, 1)
        for text in axis.texts:
            value = matrix[text.get_position()[::-1]]
            assert text.get_text() == f"{value:.2f}"
            assert text.get_color() == ("white" if value > 0.6 else "black")


@pytest.mark.parametrize("balanced", [True, False])
def test_figure_of_heat_maps(balanced):
    """Root mean squares over the channels, each in a range of its own; one row for each stage."""
    feature = torch.tensor([[[1.0, 2], [3, 4]], [[7.0, 2], [3, 4]]])
    levels = Levels([feature, 2 * feature], [3 * feature, 4 * feature] if balanced else None)
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) if balanced else None
    axes = analysis.plot_heat_maps(levels, ["p2", "p3"], picture).axes
    axes = {axis.get_subplotspec().num1: axis for axis in axes if axis.get_title()}
    if balanced:
        for image in (axes.pop(0), axes.pop(3)):
            assert np.array_equal(image.images[0].get_array(), picture)
    assert list(axes) == ([1, 2, 4, 5] if balanced else [0, 1])
    titles = ("p2, before", "p3, before", "p2, after", "p3, after")
    for factor, (title, axis) in enumerate(zip(titles, axes.values()), 1):
        assert axis.get_title() == title
        assert np.array(axis.images[0].get_array()) == approx(np.array([[5, 2], [3, 4]]) * factor)
        assert axis.images[0].get_clim() == pytest.approx((2 * factor, 5 * factor))


SCALED = {"alpha": 0.4, "gamma": 1.2, "beta": 0.5, "smooth_l1_beta": 0.25}
SETTINGS = [{}, SCALED, {**SCALED, "form": "reference"}]


def gradients(x, alpha=0.5, gamma=1.5, beta=1.0, form="scaled", smooth_l1_beta=0.0):
    """Of each loss, in its order, for errors ``x``; balanced L1 loss as it is documented."""
    b = np.expm1(gamma / alpha)
    balanced = alpha * np.log(b * x / beta + 1)
    if form == "reference":  # the value is alpha / b (b x + 1) ln(b x / beta + 1) - alpha x
        balanced += alpha * (b * x + 1) / (b * x + beta) - alpha
    plain = f"smooth L1 (beta {smooth_l1_beta})" if smooth_l1_beta else "L1"
    return {
        plain: np.minimum(x / smooth_l1_beta, 1) if smooth_l1_beta else np.ones_like(x),
        f"smooth L1 (beta {beta:g})": np.minimum(x / beta, 1),
        "balanced L1": np.where(x < beta, balanced, gamma),
    }


def test_loss_and_gradient():
    """In this order, the gradient without its sign, and wherever gradients are turned off."""
    with torch.no_grad():
        value, gradient = loss_and_gradient(lambda x, y: 2 * (x - y) ** 2, torch.tensor([-1.0, 2]))
    assert (value.tolist(), gradient.tolist()) == ([2, 8], [4, 8])
    assert not value.requires_grad


@pytest.mark.parametrize("settings", SETTINGS)
def test_objective_statistics(settings):
    """Four errors, one an inlier, one beta itself. Up to 49% of the ranks are the first's."""
    beta = settings.get("beta", 1.0)
    x = beta * np.array([0.25, 1, 2, 4])
    errors = torch.tensor(x[[3, 0, 2, 1]], dtype=torch.float32)
    statistics = analysis.objective_statistics(errors, **settings)
    assert [statistics.pop(x) for x in ("beta", "num_errors", "inliers")] == [beta, 4, 0.25]
    ranks = [0] * 49 + [1] * 25 + [2] * 25 + [3]
    assert statistics.pop("percentiles") == x[ranks].tolist()
    expected = gradients(x, **settings)
    assert list(statistics) == list(expected)
    for name, gradient in expected.items():
        cumulative = gradient.cumsum() / gradient.sum()
        assert statistics[name]["inlier_gradient"] == approx(cumulative[0]), name
        assert statistics[name]["cumulative"] == approx(cumulative[ranks]), name
    perfect = analysis.objective_statistics(torch.zeros(3))["balanced L1"]
    assert perfect == {"inlier_gradient": 0, "cumulative": [0] * 100}


@pytest.mark.parametrize("settings", SETTINGS)
def test_figure_of_losses(settings):
    """Gradients above, and below what they are the gradients of; alpha left, gamma right."""
    axes = np.reshape(analysis.plot_losses(**settings).axes, (2, 2))
    beta = settings.get("beta", 1.0)
    x = np.arange(1, 401) * beta / 200
    smooth = np.arange(400) != 199  # float32's gradient at beta is of either side
    columns = zip(axes.T, ("alpha", "gamma"), ((0.2, 0.3, 0.5, 1.0), (0.5, 1.0, 1.5, 2.0)))
    for column, name, values in columns:
        expected = gradients(x, **settings)
        del expected["balanced L1"]
        for value in values:
            varied = gradients(x, **{**settings, name: value})
            expected[f"{name} {value}"] = varied["balanced L1"]
        above, below = ({x.get_label(): x.get_xydata().T for x in y.lines} for y in column)
        for label, gradient in expected.items():
            (errors, slope), (_, loss) = above[label], below[label]
            assert errors == approx(x)
            assert slope[smooth] == approx(gradient[smooth], rel=1e-4)
            # The trapezoid rule; it is worst next to 0, where the logarithm bends most.
            area = np.diff(x) * (gradient[1:] + gradient[:-1]) / 2
            assert np.diff(loss) == approx(area, abs=1e-3 * beta)
            assert 0 < loss[0] < 0.02 * beta
        fixed, value = ("gamma", 1.5) if name == "alpha" else ("alpha", 0.5)
        title = f"{name} varied, {fixed} {settings.get(fixed, value)}"
        assert column[0].get_title() == title
        for axis in column:
            assert list(axis.lines[-1].get_xdata()) == [beta, beta]
            assert len({(x.get_color(), x.get_linestyle()) for x in axis.lines}) == 7
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["gradient", "loss"]


@pytest.mark.parametrize("others", [["L1", "smooth L1 (beta 2)"], ["smooth L1 (beta 2)"]])
def test_figure_of_gradient_shares(others):
    """Errors left, the losses' cumulative gradients right, with the share of the inliers."""
    names, ranks = [*others, "balanced L1"], np.arange(1, 101)
    statistics = {"beta": 2.0, "num_errors": 7, "inliers": 0.756, "percentiles": ranks / 30}
    for i, name in enumerate(names):
        statistics[name] = {"inlier_gradient": 0.204 + i / 10, "cumulative": (ranks / 100) ** i}
    left, right = analysis.plot_gradient_shares(statistics).axes
    np.testing.assert_allclose(left.lines[0].get_xydata().T, [ranks, ranks / 30])
    assert list(left.lines[1].get_ydata()) == [2, 2]
    assert (left.get_yscale(), left.get_title()) == ("log", "7 box errors, sorted")
    *lines, inliers = right.lines
    for i, (name, line) in enumerate(zip(names, lines)):
        assert line.get_label() == f"{name}: {20 + 10 * i}% from inliers"
        np.testing.assert_allclose(line.get_xydata().T, [ranks, 100 * (ranks / 100) ** i])
        assert line.get_color() == ("#555555", "#9aa5b1", "#3b6fb6")[i - len(names)]
    assert inliers.get_xdata() == approx([75.6, 75.6])
    assert [x.get_text() for x in right.texts] == ["76% inliers "]


def test_page(tmp_path):
    """Self-contained: the pictures are inside, below what they show, and text is text."""
    for name in ("x", "y"):
        (tmp_path / name).write_text("ÿ" + name, encoding="latin-1")
    sections = [Section("<é>", "d & e", tmp_path / "x"), Section('"f"', "g < h", tmp_path / "y")]
    write_page(str(tmp_path / "index.html"), "A <title>", "b & c", sections)
    head, body = (tmp_path / "index.html").read_text(encoding="utf-8").split("</head>")
    assert '<meta charset="utf-8"><title>A &lt;title&gt;</title>' in head
    body = re.sub('base64,([^"]+)', lambda x: b64decode(x[1]).decode("latin-1"), body)
    assert body.replace("\n", "") == (
        "<body><h1>A &lt;title&gt;</h1><p>b &amp; c</p><h2>&lt;é&gt;</h2><p>d &amp; e</p>"
        '<img alt="&lt;é&gt;" src="data:image/png;ÿx"><h2>&quot;f&quot;</h2><p>g &lt; h</p>'
        '<img alt="&quot;f&quot;" src="data:image/png;ÿy"></body></html>'
    )
