# SPDX-License-Identifier: Apache-2.0
"""That the benchmark runs and measures; what it finds is not tested."""

import io
import json
from contextlib import nullcontext

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from libra_d2.tools import benchmark, benchmark_models, benchmark_parts
from libra_d2.tools.benchmark_models import OURS, PLAIN, REFERENCE
from libra_d2.utils import meter
from libra_d2.utils.meter import Meter, Result

RETINANET = ["retinanet"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A ResNet-18 in place of the ResNet-50."""
    read = benchmark_models.model_config

    def model_config(*args):
        cfg = read(*args)
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        return cfg

    for module in (benchmark_models, benchmark_parts):
        monkeypatch.setattr(module, "model_config", model_config)


def cells(table):
    """Of a table in Markdown, without the line below its head."""
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    return rows[:1] + rows[2:]


def test_parts(tmp_path, capsys, mmdet):
    """At tiny sizes, beside Detectron2 and mmdetection: table, JSON and picture."""
    arguments = ["--device", "cpu", "--seconds", "0.01", "--p4-size", "4", "6"]
    arguments += ["--only", "attention", "non-local", "pyramid", "sampling", "loss", "loading"]
    arguments += ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    benchmark.main(arguments)
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 15 + 6 + 2
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + sum(len(result["values"]) for result in results)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--output", "a.json", "--profile", "./a.json"],
            "a.json and --profile, ./a.json, are the",
        ),
        (["--output", "file/a.json"], "--output: file/a.json cannot be written: File exists"),
        (["--profile", "/"], "--profile: / is not a file"),
        (["--plot", "a.docx"], "--plot: a.docx: use one of the suffixes"),
        (["--plot", "png"], "--plot: png: use one of the suffixes"),
    ],
)
def test_outputs(arguments, message, tmp_path, monkeypatch, capsys):
    """They are checked before anything is measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_times(monkeypatch):
    """Medians and quartiles of a clock of our own, in ms, but for two calls; in random order."""
    now, calls, order = [0.0], {"a": 0, "b": 0}, []
    durations = {"a": [9, 1, 0.02, 0.01, 0.1, 0.04, 0.03], "b": [9, 1, *[0.007] * 5]}

    def step(name):
        order.append(name)
        now[0] += durations[name][calls[name] % 7]
        calls[name] += 1

    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    steps = {name: lambda name=name: step(name) for name in durations}
    result = Meter("cpu", 0).times("what", steps)
    assert (result.what, result.unit, calls) == ("what", "ms", {"a": 7, "b": 7})
    assert result.values == pytest.approx({"a": 30, "b": 7})
    assert result.spreads == pytest.approx({"a": 70 - 15, "b": 0})
    for seconds, number in ((12.5, 6), (1e9, 2000)):  # both take 2 s when called once
        calls.update(a=0, b=0)
        Meter("cpu", seconds).times("what", steps)
        assert calls == {"a": 2 + number, "b": 2 + number}
    assert {*zip(order[-4000::2], order[-3999::2])} == {("a", "b"), ("b", "a")}


def test_gpu(monkeypatch):
    """Time between two events, once the GPU has finished; memory beyond what was there before."""
    log, names = [], ["start", "end"]

    class Event:
        def __init__(self, enable_timing):
            self.name = names.pop(0)

        def record(self):
            log.append(f"record {self.name}")

        def synchronize(self):
            log.append(f"wait for {self.name}")

        def elapsed_time(self, end):
            log.append(f"from {self.name} to {end.name}")
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert Meter("cuda", 0)._time(lambda: log.append("step")) == 2.5
    assert log == ["record start", "step", "record end", "wait for end", "from start to end"]
    log.clear()
    monkeypatch.setattr(meter.gc, "collect", lambda: log.append("collect"))
    for name, value in {"reset_peak_memory_stats": 0, "memory_allocated": 4e6}.items():
        monkeypatch.setattr(torch.cuda, name, lambda x=(name, value): log.append(x[0]) or x[1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9e6)
    result = Meter("cuda", 0).memory("what", {"a": lambda: log.append("step")})
    assert result.values == {"a": 5}
    assert log == ["step", "collect", "reset_peak_memory_stats", "memory_allocated", "step"]


def test_memory_of_this_process(monkeypatch):
    """The peak from Linux' account, which is reset, in MB."""
    reset = io.StringIO()
    for peak, expected in (("3000", 2.048), ("900", 0)):
        account = f"VmPeak: 7 kB\nVmHWM:  {peak} kB\nVmRSS:  1000 kB\n"
        files = lambda path, *_, text=account, **__: (  # noqa: E731
            io.StringIO(text) if path == "/proc/self/status" else nullcontext(reset)
        )
        monkeypatch.setattr(meter, "open", files, raising=False)
        assert Meter("cpu", 0).memory("what", {"a": lambda: None}).values == {"a": expected}
    assert reset.getvalue() == "55"


def test_memory():
    """What a step adds for a while, in MB; what stays allocated was there before."""
    kept, steps = [], {"a while": lambda: np.ones(10**8, np.uint8)}
    steps["kept"] = lambda: kept or kept.append(np.ones(10**8, np.uint8))
    result = Meter("cpu", 0).memory("what", steps)
    assert (result.what, result.unit) == ("what", "MB")
    assert result.values == pytest.approx({"a while": 100, "kept": 0}, abs=10)


def test_table():
    """Half the spreads, and ratios to Detectron2 and mmdetection, or to the first one."""
    values = {OURS: 2, PLAIN: 4, REFERENCE: 8, f"{OURS}, bfloat16": 1}
    one = Result("one", "ms", values, {OURS: 0.5, PLAIN: 1}, 1.25)
    results = [one, Result("two", "MB", {"x": 2.0, "y": 3.1234})]
    assert cells(benchmark.table(results))[1:] == [
        ["one", OURS, "ms", "2 ± 0.25", "0.50 (1.25)", "0.25"],
        ["", PLAIN, "ms", "4 ± 0.5", "", "0.50"],
        ["", REFERENCE, "ms", "8", "2.00", ""],
        ["", f"{OURS}, bfloat16", "ms", "1", "0.25", "0.12"],
        ["two", "x", "MB", "2", "", ""],
        ["", "y", "MB", "3.12", "1.56", ""],
    ]


def test_growth(tmp_path):
    """A line for each model, whose slope in logarithms is printed."""
    results = [Result(f"pixels, RetinaNet, {n}", "ms", {OURS: n**2 / 9}) for n in (10, 20, 40)]
    assert benchmark.exponents(results).endswith(
        "RetinaNet: libra_d2: time grows with the number to the 2.00"
    )
    benchmark.plot(results, str(tmp_path / "plot.png"))
    (axis,) = plt.gcf().axes
    assert (axis.get_xlabel(), axis.get_title()) == ("pixels", "RetinaNet")
    assert axis.lines[0].get_xydata().tolist() == [[n, n**2 / 9] for n in (10, 20, 40)]
    plt.close()


class Once(Meter):
    """Runs everything once and measures nothing."""

    def times(self, what, steps, expected=None):
        for step in steps.values():
            step()
        return Result(what, "ms", dict.fromkeys(steps, 1.0), expected=expected)

    def memory(self, what, steps):
        return Result(what, "MB", dict.fromkeys(steps, 1.0))


def test_whole_models(mmdet, monkeypatch):
    """Inference and training steps beside Detectron2 and mmdetection."""
    from mmengine.config import Config
    from oracle import shrink

    read = Config.fromfile

    def read_small(path):
        config = read(path)
        shrink(config.model)
        return config

    monkeypatch.setattr(Config, "fromfile", read_small)
    once, args = Once("cpu", 0), (RETINANET, (64, 64))
    results = list(benchmark_models.whole_models(once, *args, True, ["float32", "bfloat16"], 2))
    steps = ["inference", "training step of 2 images"]
    assert [x.what for x in results[::2]] == [f"RetinaNet R-50, 64 x 64, {x}" for x in steps]
    for result in results:
        assert set(result.values) == {OURS, f"{OURS}, bfloat16", PLAIN, REFERENCE}
        if result.unit == "ms":
            assert 1 < result.expected < 1.1  # the pyramid's refinement costs little
    assert "training step; host waits" in benchmark_models.profile("cpu", *args)


def test_exported_files(monkeypatch):
    """The models, and files of ours; that ONNX files can be run is tested in test_export_model."""
    seen = []
    export = lambda model, sample, what, path: lambda image: seen.append(image)  # noqa: E731
    monkeypatch.setattr(benchmark_models, "export_onnx", export)
    (result,) = benchmark_models.exported_files(Once("cpu", 0), RETINANET, (64, 96), False)
    assert result.what == "exported files, RetinaNet R-50, 64 x 96, inference"
    assert list(result.values) == [OURS, PLAIN, f"{OURS}, TorchScript", f"{OURS}, ONNX"]
    assert [x.shape for x in seen] == [(3, 64, 96)]


def test_systems(monkeypatch, capsys):
    """Those that are asked for; without mmdetection where nothing is compared with it."""
    monkeypatch.setattr(benchmark, "Meter", Once)
    monkeypatch.setattr(benchmark, "has_mmdetection", lambda: pytest.fail("asked for"))
    command = ["--device", "cpu", "--only", "growth", "--systems", "retinanet"]
    benchmark.main([*command, "--image-size", "64", "64"])
    printed = "\n".join(x for x in capsys.readouterr().out.splitlines() if x.startswith("|"))
    names = [row[0] for row in cells(printed)[1:] if row[0]]
    assert names == [f"pixels, RetinaNet, {side * side}" for side in (32, 32, 64)]


def test_levers():
    results = list(benchmark_models.levers(Once("cpu", 0), RETINANET, (64, 64), ["fold_norm"]))
    assert [list(result.values) for result in results] == [
        ["no lever", "fold_norm", "as by default"]
    ] * 4
