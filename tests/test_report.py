# SPDX-License-Identifier: Apache-2.0
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from libra_d2.evaluation import plot_learning_curves, read_metrics, write_results


def test_read_metrics(tmp_path):
    """Of a resumed training, the last value of each metric counts; broken lines do not."""
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 20, "loss": 3.0, "lr": 0.1}\n{"iteration": 30, "loss": 2.0}\n{"iterat\n'
        '7\n{"loss": 4.0}\n{"iteration": null}\n\xff\x00\n'
        '{"iteration": 10, "loss": 1.0}\n{"iteration": 20, "loss": 1.0, "bbox/AP": 40.0}\n',
        encoding="latin-1",
    )
    assert read_metrics(str(tmp_path / "metrics.json")) == [
        {"iteration": 10, "loss": 1.0},
        {"iteration": 20, "loss": 1.0, "lr": 0.1, "bbox/AP": 40.0},
        {"iteration": 30, "loss": 2.0},
    ]


def panels(metrics, tmp_path, monkeypatch):
    """Each panel that is drawn, with its curves by label."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(save(self, *a, **k) or self)
    )
    plot_learning_curves(metrics, str(tmp_path / "curves.png"))
    lines = [(axis, axis.lines) for figure in figures for axis in figure.axes]
    return [(a, {x.get_label(): tuple(map(list, x.get_data())) for x in b}) for a, b in lines]


def test_curves(tmp_path, monkeypatch):
    """Losses, AP and IoU bins by iteration, counted from 1; the final evaluation is at the last."""
    metrics = [
        {"iteration": 0, "total_loss": 3.0, "loss_cls": 2.0, "lr": 0.1, "time": 1.0},
        {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.5, "roi_head/num_bg_iou_bin_1": 7.0},
        {"iteration": 29, "bbox/AP": 10.0, "bbox/AP75": 4.0, "bbox/AP-cat": 5.0},
        {"iteration": 39, "total_loss": 1.0, "loss_cls": 0.5, "validation/loss_cls": 0.75},
        {"iteration": 40, "bbox/AP": 20.0, "bbox/AP50": 40.0, "segm/AP": 15.0, "bbox/APs": 1.0},
    ]
    metrics[4]["val/bbox/AP"] = 6.0  # of one of several datasets
    losses = {"loss cls": ([1, 20, 40], [2.0, 1.5, 0.5]), "validation/loss cls": ([40], [0.75])}
    precisions = {"bbox/AP": ([30, 40], [10.0, 20.0]), "bbox/AP50": ([40], [40.0])}
    precisions.update({"bbox/AP75": ([30], [4.0]), "segm/AP": ([40], [15.0])})
    precisions["val/bbox/AP"] = ([40], [6.0])
    monkeypatch.setitem(rcParams, "savefig.format", "svg")  # a PNG whatever the user prefers
    drawn = panels(metrics, tmp_path, monkeypatch)
    assert {axis.get_ylabel(): curves for axis, curves in drawn} == {
        "loss": {**losses, "total loss": ([1, 20, 40], [3.0, 2.0, 1.0])},
        "average precision (%)": precisions,
        "negatives drawn": {"IoU bin 1": ([20], [7.0])},
    }
    for axis, curves in drawn:
        assert (axis.get_xlabel(), axis.get_xlim()[0], axis.get_ylim()[0]) == ("iteration", 0, 0)
        legend = axis.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == list(curves)
        assert {text.get_fontsize() for text in legend.get_texts()} == {8}
        assert not legend.get_frame_on()
        assert legend.get_window_extent().y1 < axis.xaxis.label.get_window_extent().y0
    # 4.5 x 3.6 inches each, and 0.2 for each of three rows of names, 120 dots per inch
    assert Image.open(tmp_path / "curves.png").size == (3 * 540, 504)


@pytest.mark.parametrize("num", [0, 29, 30])
def test_points(tmp_path, monkeypatch, num):
    """Up to 29 points are marked; without losses there is no last iteration; no empty figures."""
    metrics = [{"iteration": i, "lr": 1.0, **({"bbox/AP": i} if i else {})} for i in range(num + 1)]
    drawn = panels(metrics, tmp_path, monkeypatch)
    assert [list(*curves.values()) for _, curves in drawn] == (num > 0) * [
        [list(range(2, num + 2)), list(range(1, num + 1))]
    ]
    marker = [(a.lines[0].get_marker(), a.lines[0].get_markersize()) for a, _ in drawn]
    assert marker == {0: [], 29: [("o", 3)], 30: [("None", 3)]}[num]
    assert (tmp_path / "curves.png").exists() == (num > 0)


def test_write_results(tmp_path, monkeypatch):
    """All numbers, by size and by class; NaN is left empty."""
    bbox = {"AP": 41.26, "AP50": 60.0, "APs": float("nan"), "AP-cat": 30.0, "AP-AP-dog|": 52.44}
    results = {"a_val": {"bbox": bbox, "segm": {"AP": 5.0}}, "b_val": None, "c_val": {}}
    write_results(str(tmp_path / "new/results.md"), results, "Title", "Remark")
    assert (tmp_path / "new/results.md").read_text() == (
        "# Title\n\nRemark\n\n## bbox on a_val\n\n"
        "| AP   | AP50   | APs   |\n|------|--------|-------|\n| 41.3 | 60.0   |       |\n\n"
        "| class    | AP   |\n|----------|------|\n| cat      | 30.0 |\n| AP-dog\\| | 52.4 |\n\n"
        "## segm on a_val\n\n| AP   |\n|------|\n| 5.0  |\n"
    )
    monkeypatch.chdir(tmp_path)
    write_results("results.md", {}, "Title", about={"a": "b|c", "d": [1]})
    assert (tmp_path / "results.md").read_text() == (
        "# Title\n\n## What was evaluated\n\n"
        "|    |       |\n|----|-------|\n| a  | b\\|c  |\n| d  | \\[1\\] |\n"
    )
