# SPDX-License-Identifier: Apache-2.0
"""The training script as its user runs it, on a model small enough for a few seconds."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DEMO_CONFIG, ROOT
from PIL import Image

from libra_d2.engine.main import main

TINY = [
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "INPUT.MIN_SIZE_TRAIN"),
    *("(96,)", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS"),
    *("0", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("MODEL.LIBRA.NUM_PICTURES", "2"),
]


def train_net(*args, config=DEMO_CONFIG, folder=None, datasets="/none"):
    """Run the script in a process of its own, as from the command line."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "DETECTRON2_DATASETS": str(datasets)}
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config)]
        + [str(a) for a in args],
        capture_output=True,
        text=True,
        cwd=folder or ROOT,
        env=environment,
    )


def own_data(synthetic, *splits):
    """Arguments that name the synthetic dataset for each of ``splits``."""
    args = []
    for split in splits:
        args += [f"--{split}-json", synthetic / "instances.json"]
        args += [f"--{split}-images", synthetic / "images"]
    return args


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    """A training of 4 iterations: its output directory and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    data = own_data(synthetic, "train", "val")
    result = train_net(*data, "OUTPUT_DIR", "out", *TINY, folder=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out", result


def test_training(trained):
    """Weights, metrics with the statistics of the sampler, log, pictures, and a summary."""
    out, result = trained
    assert torch.load(out / "model_final.pth")["iteration"] == 3
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    metrics = {k: v for line in lines for k, v in line.items()}
    assert {"total_loss", "bbox/AP50", "roi_head/num_fg_instances"} <= metrics.keys()
    bins = [metrics[f"roi_head/num_bg_iou_bin_{k}"] for k in range(3)]
    assert sum(bins) <= 64
    assert "Running on the CPU" in (out / "log.txt").read_text()
    assert len(list((out / "pictures/own_val").glob("*.jpg"))) == 2
    summary = result.stdout.splitlines()[-7:]
    assert re.fullmatch(r"bbox: AP \S+, AP50 \S+, AP75 \S+", summary[0])
    assert summary[1:] == [
        "weights: out/model_final.pth",
        "log: out/log.txt",
        "metrics: out/metrics.json",
        "curves: out/curves.png",
        "results: out/results.md",
        "pictures: out/pictures/own_val",
    ]


def test_tensorboard(trained):
    """Losses, the balance of the samples, and pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0])).Reload().Tags()
    assert {"total_loss", "bbox/AP", "roi_head/num_bg_iou_bin_2"} <= set(events["scalars"])
    assert len([name for name in events["images"] if name.startswith("validation/")]) == 2


def test_class_count_is_that_of_the_json(trained):
    out, _ = trained
    weights = torch.load(out / "model_final.pth")["model"]
    assert weights["roi_heads.box_predictor.cls_score.weight"].shape[0] == 4 + 1


def test_evaluation(trained, synthetic):
    """The same numbers as at the end of training."""
    out, result = trained
    data = own_data(synthetic, "val")
    args = ["MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", out / "eval", *TINY]
    evaluation = train_net("--eval-only", *data, *args)
    assert evaluation.returncode == 0, evaluation.stderr
    (line,) = [x for x in evaluation.stdout.splitlines() if x.startswith("bbox: AP")]
    assert line in result.stdout


def test_resume(trained, synthetic, tmp_path):
    """An interrupted training goes on from its last checkpoint, weights and schedule included."""
    out, _ = trained
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/model_final.pth").unlink()
    (tmp_path / "out/last_checkpoint").write_text("model_0000001.pth")
    data = own_data(synthetic, "train", "val")
    result = train_net("--resume", *data, "OUTPUT_DIR", "out", *TINY, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Starting training from iteration 2" in result.stdout
    assert torch.load(tmp_path / "out/model_final.pth")["iteration"] == 3


def test_training_without_validation(synthetic, tmp_path):
    args = [*own_data(synthetic, "train"), "OUTPUT_DIR", tmp_path, *TINY, "SOLVER.MAX_ITER", 1]
    result = train_net(*args)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model_final.pth").exists()


def test_pascal_voc(synthetic, tmp_path):
    """Detectron2's builtin dataset, with its own evaluator."""
    root = tmp_path / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(synthetic / "images", root / "JPEGImages")
    dataset = json.loads((synthetic / "instances.json").read_text())
    names = ["aeroplane", "bicycle", "bird", "boat"]
    for image in dataset["images"]:
        objects = ""
        for a in dataset["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = a["bbox"]
                objects += (
                    f"<object><name>{names[a['category_id'] - 1]}</name><pose/><truncated>0"
                    f"</truncated><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}"
                    f"</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                )
        stem = image["file_name"][:-4]
        (root / f"Annotations/{stem}.xml").write_text(
            f"<annotation><size><width>96</width><height>96</height></size>{objects}</annotation>"
        )
    stems = "\n".join(image["file_name"][:-4] for image in dataset["images"])
    for split in ("train", "val"):
        (root / f"ImageSets/Main/{split}.txt").write_text(stems)
    sets = ["DATASETS.TRAIN", "('voc_2007_train',)", "DATASETS.TEST", "('voc_2007_val',)"]
    args = [*sets, "MODEL.ROI_HEADS.NUM_CLASSES", "20", "OUTPUT_DIR", tmp_path / "out", *TINY]
    result = train_net(*args, datasets=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^bbox: AP \S+, AP50 \S+, AP75 \S+$", result.stdout, re.MULTILINE)
    assert len(list((tmp_path / "out/pictures/voc_2007_val").glob("*.jpg"))) == 2


def fails(capsys, *args, config=DEMO_CONFIG):
    """Run the script's main function, which must fail; returns the one line that it prints."""
    with pytest.raises(SystemExit) as exit:
        main(["--config-file", str(config), *[str(a) for a in args]])
    error = capsys.readouterr().err
    if isinstance(exit.value.code, str):  # printed by Python, with status 1
        return exit.value.code
    assert exit.value.code == 2
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def _loggers():
    """Take off the handlers that a training in this process adds."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "libra_d2")]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before):
        logger.handlers = handlers


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--eval-only"], "MODEL.WEIGHTS: name the weights to evaluate"),
        (
            ["--eval-only", "--resume", "OUTPUT_DIR", "/none"],
            "MODEL.WEIGHTS: name the weights to evaluate",
        ),
        (["MODEL.WEIGHTS", "none.pth"], "MODEL.WEIGHTS: none.pth: no such file"),
        (["MODEL.LIBRA.BFP.LEVEL", "1"], "command line: .*MODEL.LIBRA.BFP.LEVEL"),
        (["MODEL.LIBRA.BFP.REFINE_LEVEL", "x"], "command line: .*REFINE_LEVEL"),
        (["MODEL.LIBRA.BFP.REFINE_LEVEL"], "command line: .*odd length"),
        (["--num-gpus", "2"], "--num-gpus: this machine has no GPU"),
        (["SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED: .*on GPUs only"),
        (["DATASETS.TRAIN", "()"], "no dataset to train on: set DATASETS"),
        (["DATASETS.TRAIN", "('coco',)"], "DATASETS: 'coco' is not a registered dataset"),
        (
            ["DATASETS.TRAIN", "('coco_2017_train',)"],
            ".*coco/annotations/instances_train2017.json: dataset 'coco_2017_train' is not there",
        ),
        (
            ["DATASETS.TRAIN", "('voc_2007_train',)"],
            ".*VOC2007: dataset 'voc_2007_train' is not there",
        ),
        (
            [
                *("--eval-only", "MODEL.WEIGHTS", __file__),
                *("DATASETS.TEST", "('cityscapes_fine_instance_seg_val',)"),
            ],
            "dataset 'cityscapes_fine_instance_seg_val': no evaluator for its type 'cityscapes_",
        ),
        (["OUTPUT_DIR", "/dev/null/out"], "OUTPUT_DIR: /dev/null/out: "),
        (["--train-json", "a.json"], "--train-json and --train-images go together"),
        (["--val-proposals", "a.pkl"], "--val-proposals goes with --val-json"),
        (
            ["--train-json", "none.json", "--train-images", "."],
            "none.json: no such annotation file",
        ),
    ],
)
def test_bad_arguments(args, message, capsys):
    if torch.cuda.is_available() and ("--num-gpus" in args or "SOLVER.AMP.ENABLED" in args):
        pytest.skip("fine on this machine")
    assert re.match(f"error: {message}", fails(capsys, *args))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is neither a file nor a config of"),
        ("MODEL:\n  LIBRA:\n    BPF: 1\n", "Non-existent config key: MODEL.LIBRA.BPF"),
        ("MODEL: [\n", "while parsing"),
        ("MODEL: !!python/object/apply:os.system ['echo bad']\n", "could not determine a constr"),
        ("- 1\n", "."),
        ("_BASE_: none.yaml\n", ".*none.yaml"),
    ],
)
def test_bad_config(content, message, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    error = fails(capsys, config=path)
    expected = f"{path}: {message}" if content is not None else f"'{path}' {message}"
    assert re.match(f"error: {expected}", error)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["MODEL.LIBRA.BFP.REFINE_LEVEL", "5"], "MODEL.LIBRA.BFP.REFINE_LEVEL is 5: the pyramid"),
        (["MODEL.LIBRA.SAMPLER.NUM_BINS", "0"], "MODEL.LIBRA.SAMPLER.NUM_BINS is 0"),
        (["MODEL.LIBRA.BALANCED_L1.BETA", "0."], "MODEL.LIBRA.BALANCED_L1.BETA is 0.0: use a pos"),
        (["MODEL.LIBRA.RPN.NORMALIZER", "all"], "MODEL.LIBRA.RPN.NORMALIZER is 'all'"),
        (["MODEL.BACKBONE.NAME", "build_x"], "MODEL.BACKBONE.NAME is 'build_x': nothing has"),
        (["MODEL.ROI_HEADS.NAME", "X"], "MODEL.ROI_HEADS.NAME is 'X': nothing has that name"),
        (["MODEL.META_ARCHITECTURE", "X"], "MODEL.META_ARCHITECTURE is 'X': nothing has"),
        (["MODEL.LIBRA.SAMPLER.NAME", "X"], "MODEL.LIBRA.SAMPLER.NAME is 'X': use one of"),
    ],
)
def test_bad_model(args, message, synthetic, tmp_path, capsys):
    data = own_data(synthetic, "train")
    error = fails(capsys, *data, "OUTPUT_DIR", tmp_path, *args)
    assert error.startswith(f"error: {message}")


def broken(synthetic, tmp_path, change):
    """Arguments that train on a changed copy of the synthetic annotations."""
    dataset = json.loads((synthetic / "instances.json").read_text())
    change(dataset)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(dataset))
    return ["--train-json", path, "--train-images", synthetic / "images"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][0].update(image_id=999), ".*broken.json: annotation id 1 name"),
        (lambda d: d["images"][3].update(file_name="x.jpg"), ".*x.jpg: no such image"),
        (lambda d: d.update(categories=[]), ".*broken.json: there are no categories"),
    ],
)
def test_bad_data(change, message, synthetic, tmp_path, capsys):
    args = broken(synthetic, tmp_path, change)
    assert re.match(f"error: {message}", fails(capsys, *args, "OUTPUT_DIR", tmp_path))


def test_proposals_are_needed(synthetic, tmp_path, capsys):
    """Said before training, and what to do about it."""
    config = ROOT / "configs/Demo/libra_fast_rcnn_R_18_FPN.yaml"
    args = own_data(synthetic, "train", "val")
    error = fails(capsys, *args, "OUTPUT_DIR", tmp_path, config=config)
    assert "DATASETS.PROPOSAL_FILES_TRAIN (--train-proposals, --val-proposals) must name" in error
    assert "tools/dump_proposals.py" in error
    args += ["--train-proposals", "none.pkl", "OUTPUT_DIR", tmp_path]
    error = fails(capsys, *args, config=config)
    assert error.startswith("error: none.pkl: no such proposal file")


def test_masks_are_needed(synthetic, tmp_path, capsys):
    config = ROOT / "configs/Demo/libra_mask_rcnn_R_18_FPN.yaml"
    args = broken(synthetic, tmp_path, lambda d: d["annotations"][2].pop("segmentation"))
    error = fails(capsys, *args, "OUTPUT_DIR", tmp_path, config=config)
    assert "broken.json: annotation id 3 has no 'segmentation'" in error
    args = [*own_data(synthetic, "train"), "OUTPUT_DIR", tmp_path]
    error = fails(capsys, *args, "INPUT.MASK_FORMAT", "polygon", config=config)
    assert "set INPUT.MASK_FORMAT to 'bitmask'" in error


@pytest.mark.parametrize("name", ["mask", "cascade"])
def test_beyond_the_paper(synthetic, tmp_path, name):
    """Mask and Cascade R-CNN train on the synthetic data and are evaluated."""
    config = ROOT / f"configs/Demo/libra_{name}_rcnn_R_18_FPN.yaml"
    args = [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", tmp_path, *TINY]
    result = train_net(*args, config=config)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^bbox: AP \S+, AP50 \S+, AP75 \S+$", result.stdout, re.MULTILINE)
    has_masks = re.search(r"^segm: AP \S+, AP50 \S+, AP75 \S+$", result.stdout, re.MULTILINE)
    assert bool(has_masks) == (name == "mask")
    metrics = (tmp_path / "metrics.json").read_text()
    assert ("loss_mask" if name == "mask" else "loss_box_reg_stage2") in metrics


def test_several_test_datasets(synthetic, tmp_path):
    """The summary names each of them."""
    code = f"""
import sys
from detectron2.data.datasets import register_coco_instances
for name in ("first", "second"):
    register_coco_instances(name, {{}}, r"{synthetic}/instances.json", r"{synthetic}/images")
from libra_d2.engine.main import main
main(sys.argv[1:])
"""
    args = ["--config-file", DEMO_CONFIG, *TINY, "OUTPUT_DIR", tmp_path, "DATASETS.TRAIN"]
    args += ["('first',)", "DATASETS.TEST", "('first', 'second')", "SOLVER.MAX_ITER", 1]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *[str(a) for a in args]],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^first bbox: AP .*\nsecond bbox: AP ", result.stdout, re.MULTILINE)
    pictures = f"{tmp_path}/pictures"
    assert f"pictures: {pictures}/first, {pictures}/second" in result.stdout


def test_categories_must_agree(synthetic, tmp_path, capsys):
    args = broken(synthetic, tmp_path, lambda d: d["categories"].append({"id": 9, "name": "z"}))
    error = fails(capsys, *args, *own_data(synthetic, "val"), "OUTPUT_DIR", tmp_path)
    assert re.match("error: .*instances.json: its categories .* are not those of .*broken", error)


def test_unreadable_image(synthetic, tmp_path, capsys):
    """An image whose header is fine is found before the training, with its name."""
    shutil.copytree(synthetic, tmp_path / "data")
    for path in (tmp_path / "data/images").iterdir():
        Image.effect_noise((96, 96), 50).save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:1200])
    data = own_data(tmp_path / "data", "train")
    error = fails(capsys, *data, "OUTPUT_DIR", tmp_path, *TINY)
    assert re.match(r"error: .*\d+.jpg: the image cannot be used: ", error)


def test_weights_of_another_model(synthetic, tmp_path, capsys):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    args = ["MODEL.WEIGHTS", tmp_path / "other.pth", "OUTPUT_DIR", tmp_path, *TINY]
    for mode in (own_data(synthetic, "train"), ["--eval-only", *own_data(synthetic, "val")]):
        assert "other.pth: these are weights of another model" in fails(capsys, *mode, *args)


def test_pictures_need_opencv(capsys, monkeypatch):
    """Said before training, not at the evaluation after it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cv2" else find_spec(name)
    )
    error = fails(capsys, "MODEL.LIBRA.NUM_PICTURES", 1)
    assert error.startswith("error: MODEL.LIBRA.NUM_PICTURES: drawing needs OpenCV")


def test_error_on_the_command_line():
    """What the functions above find, in a process of its own."""
    result = train_net("MODEL.WEIGHTS", "none.pth")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "error: MODEL.WEIGHTS: none.pth: no such file"


def test_help():
    result = train_net("--help")
    assert result.returncode == 0
    assert "--val-images DIR" in result.stdout
