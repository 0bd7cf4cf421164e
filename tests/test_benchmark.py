# SPDX-License-Identifier: Apache-2.0
"""That the benchmark runs and measures; what it finds is not tested."""

import json

import matplotlib.pyplot as plt
import pytest

from libra_d2.tools import benchmark
from libra_d2.tools.benchmark import OURS, PLAIN, REFERENCE, Result


def cells(table):
    """Of a table in Markdown, without the line below its head."""
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    return rows[:1] + rows[2:]


def test_benchmark(tmp_path, capsys, mmdet):
    """All components at tiny sizes, beside Detectron2 and mmdetection: table, JSON and picture."""
    arguments = ["--device", "cpu", "--seconds", "0.01", "--p4-size", "4", "6"]
    arguments += ["--only", "attention", "non-local", "pyramid", "sampling", "loss"]
    arguments += ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert benchmark.main(arguments) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 15 + 6
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(results)
    for measured in results:
        assert len(measured["values"]) >= 2
        assert min(measured["values"].values()) >= (1e-9 if measured["unit"] == "ms" else 0)
    by_name = {(measured["what"], measured["unit"]): measured["values"] for measured in results}
    assert set(by_name["box loss, 512 x 4, both passes", "ms"]) == {OURS, PLAIN, REFERENCE}
    sizes = [f"non-local block, {size}, training" for size in ("2 x 3", "4 x 6", "8 x 12")]
    for axis, unit in zip(plt.gcf().axes, ("ms", "MB")):
        assert [line.get_label() for line in axis.lines] == [OURS, REFERENCE]
        for line in axis.lines:
            assert line.get_xdata().tolist() == [2 * 3, 4 * 6, 8 * 12]
            expected = [by_name[size, unit][line.get_label()] for size in sizes]
            assert line.get_ydata().tolist() == expected
    plt.close()


def test_times(monkeypatch):
    """Medians and quartiles of a clock of our own, in ms, without the first two calls."""
    now, calls = [0.0], {"a": 0, "b": 0}
    durations = {"a": [9, 1, 0.02, 0.01, 0.1, 0.04, 0.03], "b": [9, 1, *[0.007] * 5]}

    def step(name):
        now[0] += durations[name][calls[name] % 7]
        calls[name] += 1

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    steps = {name: lambda name=name: step(name) for name in durations}
    result = benchmark.Meter("cpu", 0).times("what", steps)
    assert (result.what, result.unit, calls) == ("what", "ms", {"a": 7, "b": 7})
    assert result.values == pytest.approx({"a": 30, "b": 7})
    assert result.spreads == pytest.approx({"a": 70 - 15, "b": 0})


def test_tables():
    """Ours, Detectron2's and mmdetection's, half the spreads, and ratios of ours to theirs."""
    one = Result("one", "ms", {OURS: 2, PLAIN: 4, REFERENCE: 8}, {OURS: 0.5, PLAIN: 1}, 1.25)
    attention = Result("attention, 4 x 6", "ms", {"x": 1.0, "y": 3.1234})
    results = [one, attention, Result("two", "MB", {OURS: 3, REFERENCE: 2})]
    assert cells(benchmark.table(results))[1:] == [
        ["one", "ms", "2 ± 0.25", "4 ± 0.5", "8", "0.50 (1.25)", "0.25"],
        ["two", "MB", "3", "", "2", "", "1.50"],
    ]
    expected = [["what", "unit", "x", "y"], ["attention, 4 x 6", "ms", "1", "3.12"]]
    assert cells(benchmark.attention_table(results)) == expected


class Once:
    """A meter that runs everything once and measures nothing."""

    device = "cpu"

    def times(self, what, steps, expected=None):
        for step in steps.values():
            step()
        return Result(what, "ms", dict.fromkeys(steps, 1.0), expected=expected)

    def memory(self, what, steps):
        return Result(what, "MB", dict.fromkeys(steps, 1.0))


def test_whole_models(mmdet):
    """Inference and training steps beside Detectron2 and mmdetection, and where the time goes."""
    results = list(benchmark.whole_models(Once(), (64, 64), reference=True, amp=False))
    assert len(results) == 8
    for result in results:
        assert set(result.values) == {OURS, PLAIN, REFERENCE}
        if result.unit == "ms" and "RetinaNet" in result.what:
            assert 1 < result.expected < 1.1  # the pyramid's refinement costs little
    assert "training step of 2 images; host waits" in benchmark.profile("cpu", (64, 64))
