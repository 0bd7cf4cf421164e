# SPDX-License-Identifier: Apache-2.0
"""That the benchmark runs; what it finds is not tested."""

import json
import os
import subprocess
import sys

from conftest import ROOT

from libra_d2.tools import benchmark


def test_benchmark(tmp_path):
    """All components at tiny sizes, beside Detectron2 and mmdetection: table, JSON and picture."""
    parts = ("attention", "non-local", "pyramid", "sampling", "loss")
    arguments = ["--device", "cpu", "--only", *parts]
    arguments += ["--seconds", "0.01", "--p4-size", "4", "6"]
    arguments += ["--output", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tools/benchmark.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests/reference")},
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 15 + 6
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(results)
    for measured in results:
        if not measured["what"].startswith("attention"):
            assert measured["values"]["libra_d2"] >= 0
        assert len(measured["values"]) >= 2
        if measured["unit"] == "ms":
            assert min(measured["values"].values()) > 0
    by_name = {measured["what"]: measured["values"] for measured in results}
    assert set(by_name["box loss, 512 x 4, both passes"]) == {
        "libra_d2",
        "Detectron2",
        "mmdetection",
    }
    assert (tmp_path / "out.png").stat().st_size > 5000


class Once:
    """A meter that runs everything once and measures nothing."""

    device = "cpu"

    def times(self, what, steps, expected=None):
        for step in steps.values():
            step()
        return benchmark.Result(what, "ms", dict.fromkeys(steps, 1.0), expected=expected)

    def memory(self, what, steps):
        return benchmark.Result(what, "MB", dict.fromkeys(steps, 1.0))


def test_whole_models(mmdet):
    """Inference and training steps beside Detectron2 and mmdetection, and where the time goes."""
    results = list(benchmark.whole_models(Once(), (64, 64), reference=True, amp=False))
    assert len(results) == 8
    for result in results:
        assert set(result.values) == {"libra_d2", "Detectron2", "mmdetection"}
        if result.unit == "ms":
            assert result.expected > 0
    assert "training step of 2 images; host waits" in benchmark.profile("cpu", (64, 64))
