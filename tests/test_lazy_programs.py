# SPDX-License-Identifier: Apache-2.0
"""The programs with a LazyConfig: what they do with a YAML config, they do with it."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train_net import own_data

from libra_d2.demo import demo
from libra_d2.engine import read_config
from libra_d2.engine.main import main as train_net
from libra_d2.errors import InputError
from libra_d2.tools import analyze_balance, compare_ideas, dump_proposals, export_model

CONFIG = str(ROOT / "configs/Demo/libra_mask_rcnn_regnetx_FPN.py")
TINY = [
    *("train.max_iter=4", "train.checkpointer.period=2", "train.num_pictures=2"),
    *("train.device=cpu", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
    *("dataloader.train.total_batch_size=2", "model.roi_heads.box_predictor.test_topk_per_image=9"),
    "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
]


def run(*args, data, out, opts=()):
    train_net(
        ["--config-file", CONFIG, *map(str, [*args, *data])]
        + [f"train.output_dir={out}", *TINY, *map(str, opts)]
    )


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    """A training of 4 iterations: its output directory."""
    out = tmp_path_factory.mktemp("lazy") / "out"
    run(data=own_data(synthetic, "train", "val"), out=out)
    return out


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


def test_training(trained):
    """Weights with the classes of the data, metrics, config, log, curves, tables and pictures."""
    checkpoint = torch.load(trained / "model_final.pth")
    assert checkpoint["iteration"] == 3
    weights = checkpoint["model"]
    assert len(weights["roi_heads.box_predictor.cls_score.bias"]) == 4 + 1
    assert len(weights["roi_heads.mask_head.predictor.bias"]) == 4
    assert {"segm/AP", "roi_head/num_bg_iou_bin_0", "loss_mask"} <= metrics(trained).keys()
    for name in ("config.yaml", "log.txt", "curves.png", "results.md"):
        assert (trained / name).stat().st_size > 0
    assert len(list((trained / "pictures/own_val").glob("*.jpg"))) == 2


def test_saved_config_evaluates_the_same(trained, synthetic, tmp_path, capsys):
    """--eval-only, with the config.yaml that the training has written."""
    for config in (CONFIG, str(trained / "config.yaml")):
        train_net(
            [
                *("--eval-only", "--config-file", config, *map(str, own_data(synthetic, "val"))),
                *(f"train.init_checkpoint={trained}/model_final.pth", *TINY),
                f"train.output_dir={tmp_path}",
            ]
        )
        found = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
        expected = json.loads((trained / "inference/coco_instances_results.json").read_text())
        assert found == expected


def test_resume(trained, synthetic, tmp_path, caplog):
    """From the last checkpoint; what has changed is said."""
    for name in ("model_0000001.pth", "last_checkpoint", "config.yaml"):
        shutil.copy(trained / name, tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    data = own_data(synthetic, "train", "val")
    run("--resume", data=data, out=tmp_path, opts=["optimizer.lr=0.01"])
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 3
    log = (tmp_path / "log.txt").read_text()
    assert "Starting training from iteration 2" in log
    assert "--resume: optimizer.lr is 0.01, but was 0.04 before" in log
    assert log.count("--resume: ") == 1


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["train.max_iter=0"], "train.max_iter is 0: use 1 or more"),
        (["SOLVER.MAX_ITER", "10"], "write what is set in a LazyConfig as key=value"),
        (["model.roi_heads.box_predictor.box_reg_loss_type=l3"], "knows smooth_l1, giou"),
        (["model.backbone.refine_level=9"], "refine_level is 9: the pyramid has 5 levels"),
        (["model.backbone.refine=conv"], "unexpected keyword argument 'refine'"),
        (["train.init_checkpoint=none.pth"], "train.init_checkpoint: none.pth: no such file"),
        (["train.device=cuda:9"], "train.device is 'cuda:9': this machine has"),
        (["dataloader.train.total_batch_size=0"], "dataloader.train.total_batch_size is 0"),
        (["train.amp.enabled=True"], "train.amp.enabled: Detectron2 trains with mixed precision"),
    ],
)
def test_errors(opts, message, synthetic, tmp_path, capsys):
    if torch.cuda.is_available() and "amp" in opts[0]:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        run(data=own_data(synthetic, "train"), out=tmp_path, opts=opts)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert message in line


def test_broken_file(tmp_path, capsys):
    for text, message in (("model = 3\n", "needs a model"), ("model = dict(\n", "config.py")):
        (tmp_path / "config.py").write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(str(tmp_path / "config.py"), [])


def test_demo(trained, synthetic, tmp_path):
    """With a plain detector, the same config without the ideas, beside it."""
    image = next((synthetic / "images").iterdir())
    weights = torch.load(trained / "model_final.pth")["model"]
    weights = {key: value for key, value in weights.items() if "bfp" not in key}
    torch.save({"model": weights}, tmp_path / "plain.pth")
    demo.main(
        [
            *("--config-file", CONFIG, "--input", str(image), "--output", str(tmp_path / "a.png")),
            *("--categories", str(synthetic / "instances.json"), "--confidence-threshold", "0.1"),
            *("--plain-weights", str(tmp_path / "plain.pth"), "--opts", "train.device=cpu"),
            f"train.init_checkpoint={trained}/model_final.pth",
        ]
    )
    assert Image.open(tmp_path / "a.png").size == (1280, 640)


def test_analysis(trained, synthetic, tmp_path):
    arguments = ["--config-file", CONFIG, "--num-images", "2", *own_data(synthetic, "val")]
    opts = [f"train.init_checkpoint={trained}/model_final.pth", f"train.output_dir={tmp_path}"]
    analyze_balance.main([*map(str, arguments), *opts, *TINY])
    numbers = json.loads((tmp_path / "balance/balance.json").read_text())
    assert set(numbers) == {"num_images", "features", "samples", "objective"}
    assert "added" in numbers["features"]


def test_export(trained, synthetic, tmp_path):
    image = next((synthetic / "images").iterdir())
    export_model.main(
        [
            *("--config-file", CONFIG, "--sample-image", str(image)),
            *("--output", str(tmp_path / "model.ts"), *TINY),
            "model.roi_heads.num_classes=4",
            f"train.init_checkpoint={trained}/model_final.pth",
        ]
    )
    description = json.loads((tmp_path / "model.ts.json").read_text())
    assert description["input"]["shorter_side"] == 96
    assert "libra_d2.modeling" in description["config"]


def test_proposals(trained, synthetic, tmp_path):
    arguments = ["--config-file", CONFIG, *map(str, own_data(synthetic, "val"))]
    opts = [f"train.init_checkpoint={trained}/model_final.pth", f"train.output_dir={tmp_path}"]
    dump_proposals.main([*arguments, *opts, *TINY])
    assert (tmp_path / "proposals/own_val.pkl").exists()


def test_comparison(synthetic, tmp_path):
    """Variants differ in what is on; the plain detector has no balanced pyramid."""
    arguments = ["--config-file", CONFIG, *own_data(synthetic, "train", "val")]
    arguments += ["--variants", "baseline", "all", "--seeds", "1", "--output", tmp_path, *TINY]
    compare_ideas.main([str(x) for x in arguments])
    keys = {
        variant: set(torch.load(tmp_path / variant / "seed_1/model_final.pth")["model"])
        for variant in ("baseline", "all")
    }
    assert {k for k in keys["all"] if "bfp" not in k} == keys["baseline"] != keys["all"]
    assert "| baseline" in (tmp_path / "summary/results.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.py",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    ],
)
def test_names_of_detectron2(name):
    """Its zoo's configs and weights, for the plain detector."""
    cfg = read_config(name, [], output=False)
    assert cfg.SOLVER.MAX_ITER == 90000
    assert demo.find_weights(name).startswith("https://")
    assert not compare_ideas.has_ideas(cfg)
    ours = read_config("COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.py", [], output=False)
    assert compare_ideas.has_ideas(ours)
