# SPDX-License-Identifier: Apache-2.0
"""That the benchmark runs; what it finds is not tested."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def test_benchmark(tmp_path):
    """All components at tiny sizes, beside Detectron2 and mmdetection: table, JSON and picture."""
    arguments = ["--device", "cpu", "--only", "non-local", "pyramid", "sampling", "loss"]
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
    assert len(results) == 15
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(results)
    for measured in results:
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
