# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from PIL import Image

from libra_d2.evaluation import plot_learning_curves, read_metrics, write_results


@pytest.fixture
def metrics_file(tmp_path):
    """Of a training that was stopped while it wrote, and resumed two lines back."""
    entries = [{"iteration": i, "total_loss": 3.0 - i / 10, "lr": 0.1} for i in (0, 10, 20)]
    entries += [{"iteration": i, "total_loss": 1.0, "bbox/AP": 20.0 + i} for i in (10, 20)]
    lines = [json.dumps(entry) for entry in entries]
    lines.insert(3, lines[2][:20])
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_read_metrics(metrics_file):
    metrics = read_metrics(metrics_file)
    assert [entry["iteration"] for entry in metrics] == [0, 10, 20]
    assert [entry["total_loss"] for entry in metrics] == [3.0, 1.0, 1.0]
    assert metrics[2]["bbox/AP"] == 40


def test_plot_learning_curves(metrics_file, tmp_path):
    """One panel for losses, one for AP; none, and no file, without either."""
    plot_learning_curves(read_metrics(metrics_file), str(tmp_path / "curves.png"))
    assert Image.open(tmp_path / "curves.png").size == (1080, 432)
    plot_learning_curves([{"iteration": 0, "lr": 1.0}], str(tmp_path / "none.png"))
    assert not (tmp_path / "none.png").exists()


def test_write_results(tmp_path):
    """All numbers, by size and by class; those that do not exist stay empty."""
    bbox = {"AP": 41.23, "AP50": 60.0, "APs": float("nan"), "AP-cat": 30.0, "AP-dog-house": 52.44}
    write_results(str(tmp_path / "results.md"), {"own_val": {"bbox": bbox}}, "Title")
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Title\n\n## bbox on own_val\n")
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert rows[0] == ["AP", "AP50", "APs"]
    assert rows[2] == ["41.2", "60.0", ""]
    assert rows[5:] == [["cat", "30.0"], ["dog-house", "52.4"]]
