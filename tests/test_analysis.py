# SPDX-License-Identifier: Apache-2.0
import copy
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, random_inputs
from fvcore.nn import smooth_l1_loss

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from libra_d2 import analysis
from libra_d2.analysis.objective_level import loss_and_gradient
from libra_d2.analysis.recording import Candidates, Levels
from libra_d2.config import BASELINE
from libra_d2.modeling import BalancedSampler, balanced_l1_loss

pytestmark = pytest.mark.rounding

NAMES = ["candidates", "random", "balanced, paper's bins", "balanced, mmdetection's bins"]
SYSTEMS = [
    *(("libra_faster_rcnn", 3, 2), ("libra_cascade_rcnn", 3, 6), ("libra_retinanet", 0, 2)),
    ("libra_cascade_rcnn MODEL.LIBRA.CASCADE.RESAMPLE True", 3, 6),
]


def approx(values, **tolerance):
    return pytest.approx(np.array(values), **tolerance)


def bars(axis):
    """(3, n): left ends, widths and heights."""
    return np.array([(x.get_x(), x.get_width(), x.get_height()) for x in axis.patches]).T


def looks(figure):
    """Its size, and title and labels of each axis."""
    texts = [(x.get_title(), x.get_xlabel(), x.get_ylabel()) for x in figure.axes]
    return figure.get_size_inches().tolist(), texts


def build(system, *options):
    cfg = demo_cfg(ROOT / f"configs/Demo/{system}_R_18_FPN.yaml")
    cfg.merge_from_list(options)
    return build_model(cfg).eval()


@pytest.mark.parametrize(("system", "num_candidates", "num_errors"), SYSTEMS)
@pytest.mark.parametrize("balanced", [True, False])
@torch.no_grad()
def test_record(system, num_candidates, num_errors, balanced):
    """
    Candidates, of the first stage of a cascade, errors and levels are recorded; the model does not
    change.
    """
    model = build(*system.split(), *([] if balanced else BASELINE))
    weights = copy.deepcopy(model.state_dict())
    attributes = [dict(vars(module)) for module in model.modules()]
    batches = [random_inputs(3, 2), random_inputs(1)]
    recording = analysis.record(model, batches)
    for module, before in zip(model.modules(), attributes):
        assert {k: v for k, v in vars(module).items() if v is not before[k]} == {}
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert [c.num_instances for c in recording.candidates] == [3, 2, 1][:num_candidates]
    for c in recording.candidates:
        assert (c.num_samples, c.positive_fraction) == (64, 0.25)
        assert torch.equal(c.labels == 1, c.max_iou >= 0.5)
        # The ground truth is appended to the proposals.
        assert c.max_iou[-c.num_instances :].numpy() == approx([1] * c.num_instances)
        assert c.matched_idxs[-c.num_instances :].tolist() == [*range(c.num_instances)]
    assert len(recording.box_errors) == num_errors
    assert len(recording.levels) == 3
    levels = iter(recording.levels)
    for batch in batches:
        outputs = model.backbone(model.preprocess_image(batch).tensor).values()
        for i, image in zip(range(len(batch)), levels):
            assert (image.after is not None) == balanced
            last = [x[i] for x in outputs]
            torch.testing.assert_close(image.after if balanced else image.before, last)
            if balanced:
                after = model.backbone.bfp([x[None] for x in image.before])
                torch.testing.assert_close([x[0] for x in after], last)


def test_recorded_errors_are_those_of_the_loss():
    """Their loss is that of the model for the same random samples."""
    model = build("libra_faster_rcnn", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16)
    inputs = random_inputs(3)
    torch.manual_seed(1)
    (errors,) = analysis.record(model, [inputs]).box_errors
    assert not errors.requires_grad
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    torch.manual_seed(1)
    with EventStorage(), torch.no_grad():
        loss = model(inputs)["loss_box_reg"].item()
    expected = balanced_l1_loss(errors, torch.zeros_like(errors), reduction="sum").item() / 16
    assert loss == pytest.approx(expected, rel=1e-6)


def test_levels_of_other_models():
    """In the order of their width, whatever that of the backbone is."""
    shapes = {"p3": (8, 2, 3), "p2": (4, 4, 6)}
    backbone = torch.nn.Module()
    backbone.forward = lambda batch: {k: torch.ones(1, *x) for k, x in shapes.items()}
    model = torch.nn.Sequential(OrderedDict(backbone=backbone))
    (levels,) = analysis.record(model, [[{}]]).levels
    assert [x.shape for x in levels.before] == [(4, 4, 6), (8, 2, 3)]


def candidates(ious, instances, num_instances, num_samples=99):
    """Negatives with these IoUs, positives of these instances, and an ignored proposal."""
    labels = torch.tensor([0] * len(ious) + [1] * len(instances) + [-1])
    max_iou = torch.tensor([*ious, *[0.8] * len(instances), 0.45])
    matched = torch.tensor([0] * len(ious) + instances + [0])
    return Candidates(labels, max_iou, matched, num_instances, num_samples, 0.25)


def test_sample_statistics():
    """All candidates are sampled, so that all samplers have the same statistics."""
    first = candidates([0.01, 0.02, 0.07, 0.12, 0.31, 0.49], [1, 1, 1, 0], 3)
    second, third = candidates([0.04, 0.25], [0], 1), candidates([], [], 2)
    statistics = analysis.sample_statistics([first, second, third])
    assert statistics.pop("interval_ends") == approx(np.arange(0.05, 0.51, 0.05))
    assert list(statistics) == NAMES
    borders = [numbers.pop("bin_borders") for numbers in statistics.values()]
    assert borders[:2] == [[], []]
    assert np.array(borders[2:]) == approx([[1 / 6, 1 / 3], [1 / 3, 2 / 3]])
    for numbers in statistics.values():
        assert np.multiply(numbers["negatives"], 8).tolist() == [3, 1, 1, 0, 0, 1, 1, 0, 0, 1]
        assert numbers["mean_iou"] == approx(1.31 / 8)
        assert numbers["instances"] == 3 / 6
        assert numbers["largest_share"] == (3 / 4 + 1) / 2  # mean over images with positives
    numbers = analysis.sample_statistics([candidates([0.0], [], 0)])["random"]
    assert list(numbers.values()) == [[], [1] + [0] * 9, 0, 0, 0]
    numbers = analysis.sample_statistics([candidates([], [0], 1)])["random"]
    assert list(numbers.values()) == [[], [0] * 10, 0, 1, 1]


def test_samplers():
    """Each sampler has its own settings, with the given number of bins and threshold."""
    images = [candidates([i / 200 for i in range(90)], [0] * 40 + [1] * 4 + [2], 3, 60)]
    bins = {"num_bins": 2, "negative_iou_thresh": 0.4}
    settings = ({"negatives": "random", "positives": "random"}, {"mode": "paper"})
    torch.manual_seed(1)
    statistics = analysis.sample_statistics(images, **bins)
    assert statistics["interval_ends"] == approx(np.arange(0.04, 0.41, 0.04))
    torch.manual_seed(1)
    for name, kwargs in zip(NAMES[1:], (*settings, {"mode": "reference"})):
        (c,), numbers = images, statistics[name]
        positives, negatives = BalancedSampler(**bins, **kwargs)(*c)[:2]
        counts = c.matched_idxs[positives].bincount(minlength=3)
        borders = {"paper": [0.2], "reference": [0.5]}.get(kwargs.get("mode"), [])
        assert numbers["bin_borders"] == pytest.approx(borders)
        assert numbers["mean_iou"] == pytest.approx(c.max_iou[negatives].mean().item())
        assert numbers["instances"] == pytest.approx((counts > 0).float().mean().item())
        assert numbers["largest_share"] == pytest.approx((counts.max() / counts.sum()).item())


def test_figure_of_samples():
    """Bars span the intervals; each axis has the numbers of its sampler and the borders it has."""
    shares = np.arange(1, 11) / 55
    one = {"bin_borders": [], "negatives": shares, "mean_iou": 0.171, "instances": 0.5}
    other = {"bin_borders": [0.3, 0.38, 0.4], "negatives": 1 - shares}
    other.update(mean_iou=0.2, instances=0.756)
    statistics = {"interval_ends": np.arange(1, 11) * 0.04, "candidates": one, "a, b": other}
    figure = analysis.plot_sampling(statistics)
    x, y = "IoU with the nearest object", "share of the negatives (%)"
    assert looks(figure) == ([10, 4], [("candidates", x, y), ("a,\nb", x, "")])
    axes = figure.axes
    for axis, expected in zip(axes, (shares, 1 - shares)):
        assert bars(axis) == approx([np.arange(0.002, 0.4, 0.04), [0.036] * 10, 100 * expected])
    assert [[line.get_xdata()[0] for line in axis.lines] for axis in axes] == [[], [0.3, 0.38]]
    notes = [note for axis in axes for note in axis.texts]
    assert [note.get_text() for note in notes] == [
        "mean IoU 0.17\n50% of objects covered",
        "mean IoU 0.20\n76% of objects covered\nbins end at 0.30, 0.38, 0.40",
    ]
    for note in notes:  # above the axis, below its title
        assert (note.xy, note.xyann, note.get_fontsize()) == ((0.5, 1), (0, 42), 9)
        assert (note.xycoords, note.anncoords) == ("axes fraction", "offset points")
    axes[0].set_ylim(0, 7)
    assert axes[1].get_ylim() == (0, 7)


def test_energy():
    """Root mean squares of the levels and of what is added, averaged over two images."""
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
    Cosine similarities of pooled levels. The first, pooled to two locations, is (3, 4) and (0, 2);
    the second (5, 0) and (0, 5), in the other image (0, 5) twice; the third (0, -1).
    """
    first = torch.tensor([[[12.0, 0, 0, 0], [0, 0, 0, 0]], [[0, 8, 2, 2], [8, 0, 2, 2]]])
    seconds = torch.tensor([[[[5.0, 0]], [[0, 5]]], [[[0, 0]], [[5, 5]]]])
    third = torch.tensor([[[0.0]], [[-1]]])
    statistics = analysis.feature_statistics([Levels([first, x, third], None) for x in seconds])
    one_two = ((3 / 5 + 1) / 2 + (4 / 5 + 1) / 2) / 2
    one_three, two_three = -2 / 5**0.5, -(1 / 2**0.5 + 1) / 2
    expected = [[1, one_two, one_three], [one_two, 1, two_three], [one_three, two_three, 1]]
    assert np.array(statistics["before"]["similarity"]) == approx(expected)
    assert list(statistics) == ["before", "repeated"]
    assert statistics["repeated"] == [False] * 3
    levels = [Levels([first, x, x[..., ::2], third], None) for x in seconds]
    assert analysis.feature_statistics(levels)["repeated"] == [False, False, True, False]


def test_figure_of_levels():
    """Grouped bars for each level and stage, and a similarity matrix for each stage."""
    statistics = {"before": {"energy": [5.0, 1.0], "similarity": [[1, 0.25], [0.75, 1]]}}
    alone = looks(analysis.plot_levels(statistics, ["p2", "p3"]))
    statistics["after"] = {"energy": [4.0, 3.0], "similarity": [[1, 0.5], [0.9, 1]]}
    statistics["added"] = [2.0, 6.0]
    figure = analysis.plot_levels(statistics, ["p2", "p3"])
    y = "root mean square of the features"
    titles = [("energy of the levels", "", y), ("similarity, before", "", "")]
    bar = ("", "", "cosine similarity")
    assert alone == ([7, 3.4], [*titles, bar])
    rises = "It rises by construction:\none map is added to all levels."
    assert looks(figure) == ([10, 3.4], [*titles, ("similarity, after", rises, ""), bar])
    figure.draw_without_rendering()  # which places the axes
    places = [axis.get_position().x0 for axis in figure.axes]
    assert places == sorted(places)
    left, *matrices, _ = figure.axes
    starts = np.array([-0.4, 0.6, -0.4, 0.6, -0.4, 0.6]) + np.repeat([0, 0.8 / 3, 1.6 / 3], 2)
    assert bars(left) == approx([starts, [0.8 / 3] * 6, [5, 1, 2, 6, 4, 3]])
    assert left.get_ylim() == (0, pytest.approx(6 * 1.2))
    assert [x for x in left.spines if left.spines[x].get_visible()] == ["left", "bottom"]
    assert [x.get_label() for x in left.containers] == ["before", "added", "after"]
    legend = left.get_legend()
    assert [x.get_text() for x in legend.get_texts()] == ["before", "added", "after"]
    assert len({x.get_window_extent().y0 for x in legend.get_texts()}) == 1  # one row
    assert (legend.get_frame_on(), legend.columnspacing, legend.handlelength) == (False, 1, 1)
    assert [x.get_text() for x in left.get_xticklabels()] == ["p2", "p3"]
    for axis, stage in zip(matrices, ("before", "after")):
        matrix = np.array(statistics[stage]["similarity"])
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            assert [x.get_text() for x in labels] == ["p2", "p3"]
        assert np.array_equal(axis.images[0].get_array(), matrix)
        assert (axis.images[0].get_clim(), axis.images[0].get_cmap().name) == ((0, 1), "Blues")
        written = {x.get_position(): x.get_text() for x in axis.texts}
        assert written == {(j, i): f"{matrix[i, j]:.2f}" for i, j in np.ndindex(2, 2)}


def heat_maps(levels, *image):
    """The figure, and what is shown in each cell of its grid, by row and column."""
    figure = analysis.plot_heat_maps(levels, ["p2", "p3"], *image)
    cells = {}
    for axis in figure.axes[:-1]:
        place = axis.get_subplotspec()
        (cells[place.rowspan.start, place.colspan.start],) = axis.images
    return figure, cells


def test_figure_of_heat_maps():
    """One image, and root mean squares over the channels on one scale, the difference last."""
    feature = torch.tensor([[[1.0, 2], [3, 4]], [[7.0, 2], [3, 4]]])
    levels = Levels([feature, 2 * feature], [-3 * feature, 4 * feature])
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    figure, cells = heat_maps(levels, picture)
    titles = [("image", "", ""), ("p2", "", "before"), ("p3", "", ""), ("", "", "after")]
    titles += [("", "", ""), ("", "", "after - before"), ("", "", "")]
    bar = ("", "", "root mean square of the features")
    assert looks(figure) == (pytest.approx([10, 0.7 + 1.6 * 3]), [*titles, bar])
    assert np.array_equal(cells.pop((0, 0)).get_array(), picture)
    factors = {(0, 1): 1, (0, 2): 2, (1, 1): 3, (1, 2): 4, (2, 1): 4, (2, 2): 2}
    assert cells.keys() == factors.keys()
    for place, factor in factors.items():
        assert np.array(cells[place].get_array()) == approx(np.array([[5, 2], [3, 4]]) * factor)
        assert cells[place].get_clim() == pytest.approx((0, 5 * 4))
    axes = figure.axes
    assert not any(len(axis.get_xticks()) + len(axis.get_yticks()) for axis in axes[:-1])
    figure.draw_without_rendering()
    image, first, second, *_, last, bar = (axis.get_position() for axis in axes)
    assert bar.height > 2 * last.height  # it is that of all rows
    assert image.x1 < first.x0 < second.x0 < last.x1 < bar.x0
    assert bar.width < 0.0245  # 4% of the room; else its height alone would limit it, at 0.0256


def test_figure_of_plain_heat_maps():
    """Neither an image nor a balanced feature pyramid; the first level gives the proportions."""
    figure, cells = heat_maps(Levels([torch.ones(2, 4, 6), 3 * torch.ones(2, 2, 2)], None))
    size, texts = looks(figure)
    assert size == pytest.approx([10, 0.7 + 1.6 * 4 / 6])
    assert texts[:-1] == [("p2", "", "before"), ("p3", "", "")]
    assert [cell.get_array().max() for cell in cells.values()] == [1, 3]
    assert {cell.get_clim() for cell in cells.values()} == {(0, 3)}
    assert {cell.get_cmap().name for cell in cells.values()} == {"magma"}


SETTINGS = {"alpha": 0.4, "gamma": 1.2, "beta": 0.5, "form": "reference"}


def losses(beta, smooth_l1_beta, **settings):
    """Losses by their names."""
    smooth = {f"smooth L1 (beta {x})": x for x in (smooth_l1_beta, beta)}
    return {
        **{k: partial(smooth_l1_loss, beta=x, reduction="none") for k, x in smooth.items()},
        "balanced L1": partial(balanced_l1_loss, beta=beta, **settings),
    }


@torch.no_grad()
def test_objective_statistics():
    """Four errors: one inlier, one equal to beta, and two outliers."""
    x = torch.tensor([0.125, 0.5, 1, 2])
    statistics = analysis.objective_statistics(x[[3, 0, 2, 1]], **SETTINGS, smooth_l1_beta=0.25)
    names = ("beta", "smooth_l1_beta", "num_errors", "inliers")
    assert [statistics.pop(x) for x in names] == [0.5, 0.25, 4, 0.25]
    ranks = [0] * 49 + [1] * 25 + [2] * 25 + [3]
    assert statistics.pop("percentiles") == x[ranks].tolist()
    expected = losses(**SETTINGS, smooth_l1_beta=0.25)
    assert list(statistics) == list(expected)
    for name, loss in expected.items():
        gradient = loss_and_gradient(loss, x)[1]
        cumulative = gradient.cumsum(0) / gradient.sum()
        assert statistics[name]["inlier_gradient"] == approx(cumulative[0])
        assert statistics[name]["cumulative"] == approx(cumulative[ranks])
    many = analysis.objective_statistics(torch.arange(1.0, 101))
    assert many["percentiles"] == [*range(1, 101)]


def test_default_objective():
    """That of the paper, against L1 loss, also of small errors and of none."""
    small, settings = torch.tensor([0.02, 0.01]), {"alpha": 0.5, "gamma": 1.5, "beta": 1.0}
    found = analysis.objective_statistics(small)
    assert found == analysis.objective_statistics(small, **settings, smooth_l1_beta=0.0)
    assert [*found][5:] == ["L1", "smooth L1 (beta 1)", "balanced L1"]
    shares = [1 / 3] * 99 + [1]  # of a gradient that is the error
    assert found["smooth L1 (beta 1)"] == {"inlier_gradient": 1, "cumulative": approx(shares)}
    zero = analysis.objective_statistics(torch.zeros(3))
    assert zero["balanced L1"] == {"inlier_gradient": 0, "cumulative": [0] * 100}
    axes = analysis.plot_losses().axes
    titles = ["alpha varied, gamma 1.5", "gamma varied, alpha 0.5"]
    assert [axis.get_title() for axis in axes[:2]] == titles
    assert [line.get_label() for line in axes[0].lines[:2]] == ["smooth L1 (beta 1)", "L1"]


def test_figure_of_losses():
    """Gradients above, values below; alpha is varied on the left, gamma on the right."""
    figure, x = analysis.plot_losses(**SETTINGS, smooth_l1_beta=0.25), torch.arange(1, 401) / 400
    titles, xlabel = ("alpha varied, gamma 1.2", "gamma varied, alpha 0.4"), "error of a box delta"
    above = [(titles[0], "", "gradient"), (titles[1], "", "")]
    assert looks(figure) == ([9, 6], [*above, ("", xlabel, "loss"), ("", xlabel, "")])
    for column, name in zip(np.reshape(figure.axes, (2, 2)).T, ("alpha", "gamma")):
        expected = losses(**SETTINGS, smooth_l1_beta=0.25)
        del expected["balanced L1"]
        for value in (0.2, 0.3, 0.5, 1.0) if name == "alpha" else (0.5, 1.0, 1.5, 2.0):
            varied = losses(**{**SETTINGS, name: value}, smooth_l1_beta=0.25)
            expected[f"{name} {value}"] = varied["balanced L1"]
        above, below = ({x.get_label(): x.get_xydata().T for x in y.lines} for y in column)
        for label, loss in expected.items():
            value, gradient = loss_and_gradient(loss, x)
            np.testing.assert_allclose(above[label], [x, gradient], rtol=1e-3)
            np.testing.assert_allclose(below[label], [x, value], rtol=1e-3)
        slope = (x / 0.25).clamp(max=1)
        np.testing.assert_allclose(above["smooth L1 (beta 0.25)"][1], slope, rtol=1e-3)
        for line in (axis.lines[-1] for axis in column):
            assert (list(line.get_xdata()), line.get_linewidth()) == ([0.5, 0.5], 0.8)
        legend = column[1].get_legend()
        assert [x.get_text() for x in legend.get_texts()] == [*below][:6]
        assert (column[0].get_legend(), legend.get_frame_on()) == (None, False)
    figure.axes[0].set_xlim(0, 9)
    assert {axis.get_xlim() for axis in figure.axes[::2]} == {(0, 9)}


def test_figure_of_gradient_shares():
    """Sorted errors on the left, cumulative gradients on the right."""
    names, ranks = ["smooth L1 (beta 2)", "balanced L1"], np.arange(1, 101)
    statistics = {"beta": 2.0, "num_errors": 7, "inliers": 0.756, "percentiles": ranks / 30}
    for i, name in enumerate(names):
        statistics[name] = {"inlier_gradient": 0.204 + i / 10, "cumulative": (ranks / 100) ** i}
    figure = analysis.plot_gradient_shares(statistics)
    titles = [("7 box errors, sorted", "smallest errors (%)", "error of a box delta")]
    share = "share of the gradient (%)"
    titles.append(("their share of the gradient", "smallest errors (%)", share))
    assert looks(figure) == ([9, 3.4], titles)
    left, right = figure.axes
    assert approx([ranks, ranks / 30]) == left.lines[0].get_xydata().T
    assert list(left.lines[1].get_ydata()) == [2, 2]
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    *lines, inliers = right.lines
    assert len(lines) == 2
    for i, line in enumerate(lines):
        assert line.get_label() == f"{names[i]}: {20 + 10 * i}% from inliers"
        assert approx([ranks, 100 * (ranks / 100) ** i]) == line.get_xydata().T
    assert inliers.get_xdata() == approx([75.6, 75.6])
    assert [x.get_linewidth() for x in (left.lines[1], inliers)] == [0.8, 0.8]
    texts = [(x.get_text(), x.get_position(), x.get_fontsize()) for x in left.texts + right.texts]
    assert texts == [("beta", (2, 2), 9), ("76% inliers ", (75.6, 2), 9)]
    legend = right.get_legend()
    assert [x.get_text() for x in legend.get_texts()] == [x.get_label() for x in lines]
    assert not legend.get_frame_on()
