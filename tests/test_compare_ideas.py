# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, load_cfg
from matplotlib.figure import Figure
from PIL import Image
from test_error_page import read as read_page
from test_train_net import TINY, own_data

from libra_d2.config import VARIANTS, make_recipe
from libra_d2.data import register_coco_json
from libra_d2.evaluation.significance import (
    detectable_difference,
    deviation_limit,
    pairs_needed,
    power,
)
from libra_d2.tools import compare_ideas, comparison_summary
from libra_d2.tools.compare_ideas import main
from libra_d2.tools.comparison_summary import (
    differences,
    found_differences,
    plan,
    plot,
    table,
    uncertainty,
    weakness,
)

PLAIN = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.ROI_HEADS.NAME"]
PLAIN += ["StandardROIHeads"]
OTHER = ["--variant", "b", "SOLVER.BASE_LR", "0.1"]


def options_of(variant):
    """The command line options of a variant."""
    recipe = make_recipe(load_cfg(DEMO_CONFIG))
    return recipe.variant_options(VARIANTS[variant], reference_bins=variant == "all_reference")


@pytest.fixture
def trainings(monkeypatch):
    """Replaces trainings; lists their (variant, seed, command, environment)."""
    started = []

    def run(command, stdout, stderr, env):
        lazy = [x[len("train.output_dir='") : -1] for x in command if "train.output_dir" in x]
        folder = Path(*lazy or [command[command.index("OUTPUT_DIR") + 1]])
        started.append((folder.parent.name, folder.name, command, env))
        time.sleep(float(os.environ.get("SECONDS", 0)))
        if "FAILS" in os.environ:
            time.sleep(0.1)
            stdout.buffer.write(b"\xff\n" + os.environ["FAILS"].encode())
            return subprocess.CompletedProcess("command", 3)
        (folder / "model_final.pth").touch()
        ap = int(folder.name[5:]) * (1 if folder.parent.name == "baseline" else 3)
        lines = [json.dumps({"iteration": i, "bbox/AP": ap + i - 8}) for i in (3, 8)]
        if "EMPTY" in os.environ:
            lines = [json.dumps({"iteration": i, "bbox/AP": float("nan")}) for i in (3, 8)]
        (folder / "metrics.json").write_text("\n".join(lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(compare_ideas, "plot", lambda runs, path: path.touch())
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return started


def compare(synthetic, out, *options, config="faster_rcnn", jobs=1, opts=()):
    """Run the program; returns the arguments that it passes to the trainings."""
    data = [*own_data(synthetic, "train", "val"), "--val-proposals", "p.pkl"]
    args = ["--config-file", ROOT / f"configs/Demo/libra_{config}_R_18_FPN.yaml", *data]
    parallel = ["--jobs", jobs] if jobs is not None else ["--output", out]
    main([str(x) for x in [*options, *args, "--output", out, *parallel, *TINY, *opts]])
    return [str(x) for x in args]


def test_what_is_trained(trainings, synthetic, tmp_path, capsys, monkeypatch):
    """Seed by seed, with the arguments and the share of the cores; finished trainings are kept."""
    monkeypatch.setattr(sys, "argv", ["compare_ideas.py", "a", "(160,)"])
    monkeypatch.setattr(compare_ideas, "plot", plot)
    options = ["--variants", "baseline", "sampling", "--seeds", 5, 7]
    args = compare(synthetic, tmp_path, *options)
    # Trainings in this process may have turned the log on.
    printed = re.sub(".*(dataset_cache|engine.setup).*\n", "", capsys.readouterr().out)
    order = [(v, f"seed_{seed}") for seed in (5, 7) for v in ("baseline", "sampling")]
    assert [x[:2] for x in trainings] == order
    for variant, seed, command, env in trainings:
        assert command == [
            *(sys.executable, "-m", "libra_d2.engine.main", "--resume", *args),
            *(*TINY, *options_of(variant)),
            *("OUTPUT_DIR", str(tmp_path / variant / seed), "SEED", seed[5:]),
        ]
        assert env == {**os.environ, "OMP_NUM_THREADS": "8"}
    summary = tmp_path / "summary"
    table = printed.replace(f"{summary / 'results.md'}\n", "")
    assert (summary / "results.md").read_text() == (
        "# libra_faster_rcnn_R_18_FPN\n\nSeeds 5, 7: mean and standard deviation of AP (%) on "
        f"`{synthetic / 'instances.json'}`.\n\n{table}\n![AP](curves.png)\n\n"
        "```bash\npython tools/compare_ideas.py a '(160,)'\n```\n"
    )
    assert [row[:4] for row in cells(table) if row[0] in ("baseline", "sampling")] == [
        *(["baseline", "6.0 ± 1.4"], ["sampling", "18.0 ± 4.2"]),
        ["sampling", "2", "+12.00", "2.00"],  # of 10 and 14
    ]
    assert {p.name: p.read_text() for p in (summary / "metrics").iterdir()} == {
        f"{v}_{seed}.json": (tmp_path / v / seed / "metrics.json").read_text() for v, seed in order
    }
    assert Image.open(summary / "curves.png").format == "PNG"
    (tmp_path / "baseline/seed_7/model_final.pth").unlink()
    with open(tmp_path / "sampling/seed_5/metrics.json", "a") as f:
        f.write('\n{"iteration": 9}')  # trained on, not evaluated
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    compare(synthetic, tmp_path, *options)
    assert [x[:2] for x in trainings[4:]] == order[1:3]
    assert {x[3]["OMP_NUM_THREADS"] for x in trainings[4:]} == {"5"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["SOLVER.BASE_LR", 0.5], "SOLVER.BASE_LR is 0.5, but was 0.04 before"),
        (["MODEL.WEIGHTS", __file__], "initial weights is '"),
        ("weights", "initial weights is '"),
        ("data", "instances.json) have changed, from '"),
        ("proposals", "validation data 'own_val' proposals have changed, from '"),
        ("forgotten", "a training with unknown settings"),
        ("broken", "run.json: Expecting value"),
    ],
)
def test_other_settings(trainings, synthetic, tmp_path, capsys, monkeypatch, change, message):
    """Runs of other settings or data are not taken for those of this command."""
    options, data = ["--variants", "baseline", "baseline", "--seeds", 5, 5], tmp_path / "data"
    shutil.copytree(synthetic, data)
    weights = tmp_path / "weights.pth"
    torch.save({"model": {}}, weights)
    opts = ["MODEL.WEIGHTS", weights] if change == "weights" else []
    config = "fast_rcnn" if change == "proposals" else "faster_rcnn"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pkl").write_text("1")
    compare(data, tmp_path / "out", *options, opts=opts, config=config)
    folder = tmp_path / "out/baseline/seed_5"
    assert len(trainings) == 1
    if change == "data":
        content = json.loads((data / "instances.json").read_text())
        content["annotations"].pop()
        (data / "instances.json").write_text(json.dumps(content))
    elif change == "weights":
        torch.save({"model": {"a": torch.zeros(1)}}, weights)
    elif change == "proposals":
        (tmp_path / "p.pkl").write_text("2")
    elif change == "forgotten":
        (folder / "run.json").unlink()
    elif change == "broken":
        (folder / "run.json").write_text("")
    opts = change if isinstance(change, list) else opts
    with pytest.raises(SystemExit, match="2"):
        compare(data, tmp_path / "out", *options, opts=opts, config=config)
    error = capsys.readouterr().err
    assert f"error: {folder}" in error
    assert message in error
    assert len(trainings) == 1


@pytest.mark.parametrize(
    ("config", "opts", "variants"),
    [
        ("faster_rcnn", [], [*VARIANTS]),
        ("retinanet", [], ["baseline", "feature_pyramid", "balanced_l1", "all"]),
        ("faster_rcnn", PLAIN, ["baseline"]),
    ],
)
def test_default_variants(trainings, synthetic, tmp_path, config, opts, variants, capsys):
    """All variants that the model can have, and five seeds."""
    seeds = [] if opts else ["--seeds", 1, 2]
    compare(synthetic, tmp_path, *seeds, config=config, jobs=3, opts=opts)
    printed = capsys.readouterr().out
    assert [row[0] for row in cells(printed)][2 : 2 + len(variants)] == variants
    seeds = range(1, 6 if opts else 3)
    assert {x[:2] for x in trainings} == {(v, f"seed_{i}") for v in variants for i in seeds}
    assert {x[3]["OMP_NUM_THREADS"] for x in trainings} == {"2"}
    assert ("has nothing of Libra R-CNN" in printed) == bool(opts)


@pytest.mark.parametrize("output", ["start\nits own message\n", ""])
def test_failed_training(trainings, synthetic, tmp_path, capsys, monkeypatch, output):
    """The error has the last line of its output; no further training starts; no summary."""
    monkeypatch.setenv("FAILS", output)
    with pytest.raises(SystemExit, match="2"):
        compare(synthetic, tmp_path, "--variants", "baseline", "--seeds", *range(1, 13))
    message = "its own message" if output else "\ufffd"
    assert re.search(rf"/seed_1: the training failed: {message}", capsys.readouterr().err)
    assert not (tmp_path / "summary").exists()
    assert len(trainings) == 1
    with pytest.raises(SystemExit, match="2"):
        compare(synthetic, tmp_path, jobs=0)
    assert "--jobs is 0: use 1 or more" in capsys.readouterr().err


def test_own_variants(trainings, synthetic, tmp_path, capsys):
    """A name with overrides, a config, or both; the config as it is comes first."""
    retinanet = str(ROOT / "configs/Demo/libra_retinanet_R_18_FPN.yaml")
    overrides = ["MODEL.LIBRA.BALANCED_L1.BETA", "0.5"]
    options = ["--variant", "half", *overrides, "--variant", "retina", retinanet, "--variant", "b"]
    compare(synthetic, tmp_path, *options, retinanet, *overrides, "--seeds", 1, 2)
    found = {x[0]: x[2] for x in trainings}
    assert list(found) == ["all", "half", "retina", "b"]
    for name, command in found.items():
        config = command[command.index("--config-file") + 1]
        assert (config == retinanet) == (name in ("retina", "b"))
        own = command[command.index(TINY[0]) + len(TINY) : command.index("OUTPUT_DIR")]
        assert own == (overrides if name in ("half", "b") else [])
    assert "AP, less that of all" in capsys.readouterr().out
    compare(synthetic, tmp_path, "--variants", "sampling", "baseline", "--seeds", 1, 2)
    assert "AP, less that of baseline" in capsys.readouterr().out
    for name in ("all", "summary", "../a", "-", "a b"):
        with pytest.raises(SystemExit, match="2"):
            compare(synthetic, tmp_path, "--variant", name)
        problem = "this name is taken" if name.isalpha() else "use a name of letters"
        assert f"--variant '{name}': {problem}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        compare(synthetic, tmp_path, "--variant", "c", "MODEL.LIBRA.BALANCED_L1.BTA", "1")
    assert "MODEL.LIBRA.BALANCED_L1.BTA" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        compare(synthetic, tmp_path, "--variant", "c", "none.py")
    assert "'none.py' is neither a file nor a config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "jobs", "expected"),
    [(None, None, "012"), ("5,3", None, "53"), (None, 4, "0120"), ("", None, ["", None])],
)
def test_gpus(monkeypatch, visible, jobs, expected):
    """One training on each; more share them; without GPUs nothing is set."""
    num = 0 if visible == "" else len(visible.split(",")) if visible else 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: num)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = compare_ideas.visible_gpus()
    shares = compare_ideas.environments(jobs or max(len(gpus), 1))
    assert [x.get("CUDA_VISIBLE_DEVICES") for x in shares] == list(expected)[: len(shares)]
    assert {x["OMP_NUM_THREADS"] for x in shares} == {str(8 // len(shares))}
    assert compare_ideas.environments(9)[0]["OMP_NUM_THREADS"] == "1"


def test_shares_are_given_back(trainings, synthetic, tmp_path, monkeypatch):
    """Each of two GPUs has several trainings, never two at the same time."""
    busy, seen, run = [], [], subprocess.run

    def see(command, stdout, stderr, env):
        assert env["CUDA_VISIBLE_DEVICES"] not in busy
        busy.append(env["CUDA_VISIBLE_DEVICES"])
        time.sleep(0.05)
        seen.append(busy.pop(busy.index(env["CUDA_VISIBLE_DEVICES"])))
        return run(command, stdout, stderr, env)

    monkeypatch.setattr(subprocess, "run", see)
    monkeypatch.setattr(compare_ideas, "visible_gpus", lambda: ["0", "1"])
    compare(synthetic, tmp_path, "--variants", "baseline", "--seeds", *range(6), jobs=None)
    assert (set(seen), len(seen)) == ({"0", "1"}, 6)


def test_how_many_seeds(trainings, synthetic, tmp_path, capsys):
    """From the runs that are there, or a given deviation, or that on BCCD; nothing is trained."""
    variants = ["--variants", "baseline", "all"]
    compare(synthetic, tmp_path, *variants, "--seeds", 11, 12, 14)
    for options, deviation, source in (
        ([], "3.06", f"of the runs in {tmp_path}"),  # of differences 22, 24 and 28
        (["--deviation", 1.1], "1.10", "--deviation"),
        ([], "1.10", "of a small detector on BCCD"),
    ):
        folder = tmp_path / ("other" if "BCCD" in source else ".")
        capsys.readouterr()
        compare(synthetic, folder, *variants, "--find", 0.9, *options)
        printed = capsys.readouterr().out
        assert f"a standard deviation of {deviation} AP ({source}" in printed
        if deviation == "1.10":
            assert ["0.9", "14"] in cells(printed)
            assert "an estimate" not in printed
        else:  # with 2 degrees of freedom, chi-squared is above 0.446 with a probability of 80%
            assert ["AP", "seeds", "seeds if it is 6.47"] in cells(printed)
            assert [row[0] for row in cells(printed)[2:]] == ["0.9", "1.5", "3.1", "6.1"]
            assert ["6.1", "5", str(pairs_needed(6.1, 6.467))] in cells(printed)
    assert len(trainings) == 6
    for option in ("--find", "--deviation"):
        with pytest.raises(SystemExit, match="2"):
            compare(synthetic, tmp_path, "--find", 1, option, 0)
        assert f"{option} is 0: use a difference" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # a new seed each time, so that there are no pairs
        compare(synthetic, tmp_path, "--seeds", 1, -1)
    assert "--seeds -1: use 0 or more" in capsys.readouterr().err
    assert ["2", "more than 1000"] in cells(plan(2, 100, "", 1))
    compare(synthetic, tmp_path / "other", "--variants", *VARIANTS, "--find", 0.9)
    text = "a true difference in each of 5 comparisons with a probability of 80%"
    assert text in capsys.readouterr().out


def test_interrupted(trainings, synthetic, tmp_path, capsys, monkeypatch):
    """By Ctrl-C: no further training starts."""
    monkeypatch.setenv("SECONDS", "0.1")

    def interrupt(jobs, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_ideas, "as_completed", interrupt)
    with pytest.raises(SystemExit, match="130"):
        compare(synthetic, tmp_path, "--variants", "baseline", "--seeds", *range(1, 13))
    assert len(trainings) < 10


def test_initial_weights(trainings, synthetic, tmp_path, capsys):
    """Weights with a balanced feature pyramid are unfair to the variants without, if there are."""
    recipe = make_recipe(load_cfg(DEMO_CONFIG))
    keys = {"ours": "backbone.bfp.refine.g.weight", "mmdet": "neck.1.refine.g.weight", "a": "b"}
    keys["bare"] = keys["ours"]
    for name, key in keys.items():
        state = {"state_dict" if name == "mmdet" else "model": {key: torch.zeros(1)}}
        torch.save(state["model"] if name == "bare" else state, tmp_path / name)
    for name in (*keys, "libra://a", "torchvision://a"):
        recipe.weights = name if "://" in name else str(tmp_path / name)
        warning = compare_ideas.unfairness(recipe)
        is_unfair = name in ("ours", "mmdet", "bare", "libra://a")
        assert warning.startswith(f"MODEL.WEIGHTS {recipe.weights} is a") == is_unfair
        assert bool(warning) == is_unfair
    opts = ["MODEL.WEIGHTS", tmp_path / "ours"]
    for i, (variants, more) in enumerate(
        [(["--variants", "all"], []), (["--variants", "baseline", "all"], []), (OTHER, PLAIN)]
    ):
        compare(synthetic, tmp_path / f"out_{i}", *variants, "--seeds", 1, opts=[*opts, *more])
        assert ("warning: MODEL.WEIGHTS" in capsys.readouterr().err) == (i == 1)
        text = (tmp_path / f"out_{i}/summary/results.md").read_text()
        assert ("**Warning**: MODEL.WEIGHTS" in text.split("|")[0]) == (i == 1)


def test_registered_datasets(trainings, synthetic, tmp_path, capsys):
    """Those of the config, of which one is evaluated on, the same for all variants."""
    for name in ("one", "two"):
        register_coco_json(name, *map(str, own_data(synthetic, "train")[1::2]), str(tmp_path))
    config = ROOT / "configs/Demo/libra_faster_rcnn_R_18_FPN.yaml"
    command = ["--variants", "all", "--seeds", 1, "--config-file", config, "--output", tmp_path]
    opts = ["DATASETS.TRAIN", "('one',)", "DATASETS.TEST"]
    main([str(x) for x in [*command, *opts, "('two',)"]])
    assert "mean and standard deviation of AP (%) on `two`" in (
        (tmp_path / "summary/results.md").read_text()
    )
    assert "--train-json" not in trainings[0][2]
    own = own_data(synthetic, "val")  # may also be evaluated on
    main([str(x) for x in [*own, *command[:3], 2, *command[4:], *opts, "('one',)"]])
    assert f"on `{own[1]}`" in (tmp_path / "summary/results.md").read_text()
    for test, more, message in (
        ("('one', 'two')", [], "variants are compared on one dataset"),
        ("('two',)", ["--variant", "a", "DATASETS.TEST", "('one',)"], "evaluate all on the same"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(x) for x in [*more, *command, *opts, test]])
        assert message in capsys.readouterr().err


def test_output_of_a_lazy_config(trainings, synthetic, tmp_path):
    """The value of an option can be anything."""
    config, out = ROOT / "configs/Demo/libra_mask_rcnn_regnetx_FPN.py", tmp_path / "a (1), b=c"
    command = ["--config-file", config, *own_data(synthetic, "train", "val"), "--output", out]
    main([str(x) for x in [*command, "--variants", "all", "--seeds", 1]])
    assert trainings[0][:2] == ("all", "seed_1")


def test_page(trainings, synthetic, tmp_path, monkeypatch):
    """
    All variants with pairs, the reference first, by seed, below a warning; not without detections,
    the reference or Plotly, nor of too many.
    """
    monkeypatch.setattr(compare_ideas, "unfairness", lambda recipe: "a <b>")
    options = ["--variants", "all", "baseline", "--seeds", 3, 4]
    compare(synthetic, tmp_path, *options)
    assert not (tmp_path / "summary/index.html").exists()
    dataset = json.loads((synthetic / "instances.json").read_text())
    detections = [{**x, "score": 0.9} for x in dataset["annotations"]]
    for variant, seed, *_ in trainings:
        folder = tmp_path / variant / seed / "inference"
        folder.mkdir()
        own = detections[int(seed[5:]) :] if variant == "all" else detections[:9]
        (folder / "coco_instances_results.json").write_text(json.dumps(own))
    path = tmp_path / "all/seed_3/metrics.json"  # without detections at first
    path.write_text(path.read_text().replace('"bbox/AP": 4}', '"bbox/AP": NaN}'))
    compare(synthetic, tmp_path, *options)
    numbers = json.loads((tmp_path / "summary/errors.json").read_text())
    assert [(x["name"], x["seeds"]) for x in numbers["models"]] == [
        *(("baseline", [3, 4]), ("all", [3, 4]))
    ]
    assert numbers["comparisons"][0]["pairs"] == 2
    data, pictures = read_page(tmp_path / "summary/index.html")
    assert data["names"] == ["baseline", "all"]
    page = (tmp_path / "summary/index.html").read_text(encoding="utf-8")
    assert "<p><b>Warning: a &lt;b&gt;.</b></p>" in page.split('id="metrics-table"')[0]
    assert data["curves"][1] == {
        "iterations": [4, 8], "mean": [3.5, 10.5], "low": [0, 9], "high": [7, 12]
    }  # fmt: skip
    assert len(pictures[0]["detections"][1]) > 0
    for picture in pictures:  # of the first run of each variant, all right
        for *box, label, score, kind, number in picture["detections"][1]:
            assert (score, kind, picture["objects"][number][:5]) == (0.9, "right", [*box, label])
    assert pictures[0]["jpeg"]
    for module, name, value in (
        (compare_ideas, "is_finished", lambda x: x.parts[-2:] == ("all", "seed_4")),
        (compare_ideas, "find_spec", lambda name: None),
        (comparison_summary, "MAX_MODELS", 1),
    ):
        (tmp_path / "summary/index.html").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            compare(synthetic, tmp_path, *options)
        assert not (tmp_path / "summary/index.html").exists()
    pair = ("all", "seed_4"), ("baseline", "seed_3")
    monkeypatch.setattr(compare_ideas, "is_finished", lambda x: x.parts[-2:] in pair)
    compare(synthetic, tmp_path, *options)
    assert read_page(tmp_path / "summary/index.html")[0]["names"] == ["baseline"]


def test_no_detections(trainings, synthetic, tmp_path, capsys, monkeypatch):
    """Their AP is 0, which is said first, and differences of nothing are none."""
    monkeypatch.setenv("EMPTY", "1")
    compare(synthetic, tmp_path, "--variants", "baseline", "all", "--seeds", 1, 2)
    printed = capsys.readouterr().out
    rows = cells(printed)
    assert "highest mean AP is 0.00" in printed.split("|")[0]
    assert ["all", "0.0 ± 0.0"] in rows
    assert ["all", "2", "+0.00", "0.00"] in [row[:4] for row in rows]


def runs(*aps, first_seed=1, **metrics):
    """Of one variant: the last evaluation of each seed."""
    return {
        seed: [{"bbox/AP": 99.0}, {"bbox/AP": ap, **metrics}]
        for seed, ap in enumerate(aps, first_seed)
    }


def cells(text):
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[x.strip() for x in row.split("|")[1:-1]] for row in rows]


def test_table():
    """Mean and standard deviation of the last evaluation; sizes before classes."""
    metrics = {f"bbox/{k}": v for k, v in {"AP-b": 2.0, "AP-a": 1.0, "APl": 5.0}.items()}
    metrics.update({"bbox/APs": float("nan"), "bbox/AP75": 3.0, "segm/AP": 7.0, "bbox/AP50": 4.0})
    found = cells(
        table({"baseline": runs(40.0, 44.0, 45.0, **metrics), "all": runs(30.0, **metrics)})
    )
    assert found[0] == ["", "AP", "AP50", "AP75", "APl", "AP a", "AP b"]
    # 3, 1 and 2 from their mean: the root of 14 / 2.
    assert found[2][:3] == ["baseline", "43.0 ± 2.6", "4.0 ± 0.0"]
    assert found[3] == ["all", "30.0", "4.0", "3.0", "5.0", "1.0", "2.0"]


def test_class_names_in_tables():
    """Classes whose names begin alike are not one, and "|" does not end a cell."""
    metrics = {"bbox/AP-a/b": 1.0, "bbox/AP-a/c": 2.0, "bbox/AP-AP-d|e": 3.0}
    lines = table({"all": runs(4.0, **metrics)}).splitlines()
    assert [x.strip() for x in lines[0].split(" |")[1:-1]] == [
        "AP",
        r"AP AP-d\|e",
        "AP a/b",
        "AP a/c",
    ]
    assert [x.strip() for x in lines[2].split(" |")[1:-1]] == ["4.0", "3.0", "1.0", "2.0"]


def test_uncertainty():
    """Variances of 8 and 9, with 1 and 2 degrees of freedom: the root of (8 + 18) / 3."""
    several = {"baseline": runs(40.0, 44.0), "all": runs(10.0, 13.0, 16.0)}
    text = (
        "A run's AP has a standard deviation of 2.94 (pooled over all variants, 3 degrees of "
        "freedom), the difference of two means of {} runs one of {}."
    )
    assert uncertainty(several) == text.format(2, 2.94)
    assert uncertainty({**several, "sampling": runs(1.0)}) == text.format(1, 4.16)
    assert uncertainty({"all": runs(1.0)}).startswith("One run of each does not say")


def test_table_without_detections():
    """Their APs are NaN, or missing for classes, in one run of several, be it the first."""
    empty = {1: [{"bbox/AP": 0.0, "bbox/AP50": float("nan"), "bbox/APs": float("nan")}]}
    metrics = {"bbox/AP50": 6.0, "bbox/APs": float("nan"), "bbox/AP-a": 8.0}
    found = cells(table({"all": {**empty, **runs(4.0, first_seed=2, **metrics)}, "b": empty}))
    assert found[0] == ["", "AP", "AP50", "AP a"]
    assert found[2:] == [["all", "2.0 ± 2.8", "3.0 ± 4.2", "4.0 ± 5.7"], ["b", *["0.0"] * 3]]


def test_weakness():
    """A mean of 1 is enough, of one variant."""
    text = weakness({"baseline": runs(0.25, 0.5), "all": runs(0.0, 1.5)})
    assert text.startswith(
        "**No variant has learned to find objects**: the highest mean AP is 0.75."
    )
    assert weakness({"baseline": runs(0.0), "all": runs(0.5, 1.5)}) == ""


def test_differences():
    """Differences of pairs of runs with the same seed."""
    found = {
        "baseline": runs(10.0, 50.0, 30.0),
        "sampling": runs(11.0, 51.1, 30.9),
        "feature_pyramid": runs(9.0, 49.1, 28.9),
        "balanced_l1": runs(51.0, 32.0, 7.0, first_seed=2),
        "all_reference": runs(13.0, 47.0),
        "all": runs(20.0),
    }
    headers, _, *rows = cells(differences(found))
    turned = cells(differences(found, "sampling"))
    assert turned[0][0] == "AP, less that of sampling"
    assert ["baseline", "3", "-1.00"] in [row[:3] for row in turned]
    assert headers == [
        *("AP, less that of baseline", "pairs", "mean", "standard error"),
        *("95% confidence interval", "corrected p-value", "which says that it"),
    ]
    # Differences 1.0, 1.1 and 0.9: their standard error is 0.1 / sqrt(3), Student's t 4.303; of
    # two, 1 and 2 or 3 and -3, half their distance, and 12.706. Their t-tests have the p-values
    # 0.0033, 0.0033, 0.205 and 1, of which the smallest is multiplied by 4, the next by 3, ...
    chance = "cannot be told from chance"
    assert rows == [
        ["sampling", "3", "+1.00", "0.06", "+0.75 to +1.25", "0.013", "helps"],
        ["feature_pyramid", "3", "-1.00", "0.06", "-1.25 to -0.75", "0.013", "harms"],
        ["balanced_l1", "2", "+1.50", "0.50", "-4.85 to +7.85", "0.410", chance],
        ["all_reference", "2", "+0.00", "3.00", "-38.12 to +38.12", "1.000", chance],
    ]
    headers, _, row, *_ = cells(differences(found, level=0.9))
    assert (headers[4], row[4]) == ("90% confidence interval", "+0.83 to +1.17")  # t 2.920
    # An interval that excludes 0 is not enough among several.
    found = {"baseline": runs(10.0, 50.0, 30.0), "all": runs(11.0, 51.3, 30.8)}
    alone = ["all", "3", "+1.03", "0.15", "+0.41 to +1.66"]  # t 7.1
    assert cells(differences(found))[2] == [*alone, "0.019", "helps"]
    found.update(sampling=found["all"], balanced_l1=found["all"])
    assert cells(differences(found))[2] == [*alone, "0.058", chance]
    assert differences({"all": runs(1.0, 2.0)}) == ""
    # Pairs that differ by the same have no spread to be compared with.
    found = {"baseline": runs(1.0, 2.0), "all": runs(3.0, 4.0)}
    assert cells(differences(found))[2] == ["all", "2", "+2.00", "0.00", "", "0.500", chance]


def test_found_differences():
    """Differences of 1, 2 and 3, and of 0 and 1: a deviation of sqrt(2.5 / 3)."""
    found = {"a": runs(1.0, 2.0, 3.0), "b": runs(2.0, 4.0, 6.0), "c": runs(1.0, 3.0)}
    text = found_differences(found, "a")
    assert "have a standard deviation of 0.91. With 2 pairs of each" in text
    smallest = detectable_difference((2.5 / 3) ** 0.5, 2, 2)
    assert f"difference of {smallest:.1f} AP is found with a probability of 80%" in text
    assert f"1 AP with {power(1, (2.5 / 3) ** 0.5, 2, 2):.0%}" in text
    limit = deviation_limit((2.5 / 3) ** 0.5, 3)
    assert f"as large as {limit:.2f} (" in text
    assert f"only a difference of {detectable_difference(limit, 2, 2):.1f} AP" in text
    # The deviation of one pair of 0 and one of 5 AP may be four times as large as it seems.
    for second, number in ((5.0, 0), (20.0, 1)):
        text = found_differences({"a": runs(0.0, 0.0), "b": runs(0.0, second)}, "a")
        assert text.count("not even a difference of 100 AP is found with a") == number
        assert "and then no difference is found so often. Train more seeds. A" in text
    assert found_differences({"a": runs(1.0), "b": runs(2.0)}, "a") == ""
    assert found_differences({"a": runs(1.0, 2.0), "b": runs(2.0, 3.0)}, "a") == ""


def test_plot(tmp_path, monkeypatch):
    """Mean and range where all runs were evaluated; each run, and the mean, at the end."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: figures.append(self))
    points = {
        "baseline": {1: {9: 10.0, 20: 30.0}, 2: {9: 20.0, 14: 90.0, 20: 60.0}},
        "all": {1: {9: 5.0, 12: None, 20: 40.0}},
    }
    found = {
        variant: {
            seed: [{"iteration": i, **({"bbox/AP": x} if x else {})} for i, x in by_step.items()]
            for seed, by_step in by_seed.items()
        }
        for variant, by_seed in points.items()
    }
    plot(found, tmp_path / "a.png")
    left, right = figures[0].axes
    curves = [(x.get_label(), x.get_color(), *map(list, x.get_data())) for x in left.lines]
    assert curves == [("baseline", "C0", [10, 20], [15, 45]), ("all", "C1", [10, 20], [5, 40])]
    corners = [set(map(tuple, x.get_paths()[0].vertices.tolist())) for x in left.collections]
    assert corners == [{(10, 10), (10, 20), (20, 30), (20, 60)}, {(10, 5), (20, 40)}]
    ends = [(x.get_marker(), x.get_color(), *map(list, x.get_data())) for x in right.lines]
    assert ends == [
        *(("o", "C0", [30, 60], [0, 0]), ("|", "C0", [45], [0])),
        *(("o", "C1", [40], [1]), ("|", "C1", [40], [1])),
    ]
    assert [t.get_text() for t in right.get_yticklabels()] == list(points)
    assert (left.get_legend() is not None, left.get_title()) == (True, "during training")
    plot({"all": {1: [{"iteration": 9, "bbox/AP": 5.0}]}}, tmp_path / "a.png")
    left, right = figures[1].axes
    assert (left.get_legend(), left.get_title()) == (None, "no evaluation during training")
    assert (len(left.lines), len(right.lines)) == (0, 2)


def test_nothing_finished(trainings, synthetic, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_ideas, "is_finished", lambda folder: False)
    with pytest.raises(SystemExit, match="^2$"):
        compare(synthetic, tmp_path, "--variants", "all", "--seeds", 1)
    assert "no training has ended with an evaluation in AP" in capsys.readouterr().err
