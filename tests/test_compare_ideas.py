# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from conftest import DEMO_CONFIG, ROOT, load_cfg
from test_config import ablations
from test_train_net import TINY, own_data

from libra_d2.plain_detector import VARIANTS, variant_options
from libra_d2.tools.compare_ideas import build_argument_parser, differences, main, summarize


def test_variants():
    """Each is what docs/ablations.md's table says."""
    names = {"feature_pyramid": "feature pyramid", "balanced_l1": "balanced L1"}
    for name in VARIANTS:
        if name == "all_reference":
            continue
        configs = [load_cfg(DEMO_CONFIG) for _ in range(2)]
        configs[0].merge_from_list(variant_options(configs[0], name))
        configs[1].merge_from_list(ablations()[names.get(name, name)])
        for cfg in configs:
            cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = "balanced_l1"
        assert configs[0] == configs[1], name


def test_trainings_and_summary(synthetic, tmp_path, capsys):
    """Two variants, both at a time; the second call trains nothing."""
    out = tmp_path / "out"
    args = [
        *("--config-file", DEMO_CONFIG, *own_data(synthetic, "train", "val"), "--seeds", 2),
        *("--variants", "baseline", "all", "--jobs", 2, "--output", out, *TINY),
    ]
    args = [str(a) for a in args]
    main(args)
    text = (out / "summary/results.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["", "baseline", "all"]
    assert len(list((out / "summary/metrics").iterdir())) == 2
    assert (out / "summary/curves.png").stat().st_size > 5000
    changed = {p: p.stat().st_mtime_ns for p in out.rglob("model_final.pth")}
    assert len(changed) == 2
    for name in ("baseline", "all"):
        config = (out / f"{name}/seed_2/config.yaml").read_text()
        assert "SEED: 2" in config
        assert f"ENABLED: {str(name == 'all').lower()}\n      REFINE_LEVEL" in config
    main(args)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("model_final.pth")} == changed
    assert "| baseline |" in capsys.readouterr().out


def test_table(tmp_path):
    """Mean and standard deviation of the last evaluation."""
    for seed, ap in ((1, 40.0), (2, 44.0)):
        folder = tmp_path / f"all/seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "model_final.pth").touch()
        entries = [{"iteration": i, "bbox/AP": ap - 20 + i, "bbox/AP-a": 1.0} for i in (9, 20)]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, entries)))
    args = ["--config-file", "a.yaml", *(str(x) for x in own_data(ROOT, "train", "val"))]
    args = build_argument_parser().parse_args([*args, "--output", str(tmp_path)])
    rows = summarize(args, ["baseline", "all"]).splitlines()
    assert [x.strip() for x in rows[0].split("|")[1:-1]] == ["", "AP", "AP a"]
    assert [x.strip() for x in rows[2].split("|")[1:-1]] == ["all", "42.0 ± 2.8", "1.0 ± 0.0"]
    assert len(rows) == 5
    # Both runs differ by 2 from their mean: a variance of 8 with one degree of freedom.
    assert "standard deviation of 2.83" in rows[4]
    assert "two means of 2 runs one of 2.83" in rows[4]


def test_failed_training(synthetic, tmp_path, capsys):
    """Its own message, and no summary."""
    data = own_data(synthetic, "train", "val")
    data[1] = tmp_path / "none.json"
    args = ["--config-file", DEMO_CONFIG, *data, "--variants", "all", "--seeds", 1]
    args += ["--output", tmp_path / "out", *TINY]
    with pytest.raises(SystemExit, match="2"):
        main([str(a) for a in args])
    assert "none.json" in capsys.readouterr().err
    assert not (tmp_path / "out/summary").exists()


def test_differences():
    """Pair by pair: what is common to a seed does not count."""

    def runs(*aps):
        return {seed: [{"bbox/AP": ap}] for seed, ap in enumerate(aps, 1)}

    text = differences(
        {
            "baseline": runs(10.0, 50.0, 30.0),
            "sampling": runs(11.0, 51.1, 30.9),
            "feature_pyramid": runs(9.0, 49.1, 28.9),
            "balanced_l1": runs(13.0, 47.0),
            "all": runs(20.0),
        }
    )
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    # Differences 1.0, 1.1 and 0.9: their standard error is 0.1 / sqrt(3), Student's t 4.303.
    assert rows[0] == ["sampling", "3", "+1.00", "0.06", "+0.75 to +1.25", "helps"]
    assert rows[1][0] == "feature_pyramid"
    assert rows[1][-1] == "harms"
    assert rows[2][1:3] == ["2", "+0.00"]
    assert rows[2][-1] == "cannot be told from chance"
    assert len(rows) == 3
    assert differences({"all": runs(1.0, 2.0)}) == ""
