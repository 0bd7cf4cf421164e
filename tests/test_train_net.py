# SPDX-License-Identifier: Apache-2.0
"""The training program, in this process and with models that take no time."""

import argparse
import contextlib
import io
import json
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG, build_model, demo_cfg
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

import libra_d2.engine.main
from libra_d2.config import make_recipe
from libra_d2.engine import Trainer, prepare_proposal_files, read_config, register_own_data
from libra_d2.engine.arguments import add_data_arguments, config_argument_parser
from libra_d2.engine.main import build_argument_parser, evaluate, main
from libra_d2.engine.setup import run_inputs, setup
from libra_d2.errors import InputError

TINY = [
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "INPUT.MIN_SIZE_TRAIN"),
    *("(96,)", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS"),
    *("0", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("MODEL.LIBRA.NUM_PICTURES", "2"),
]


def own_data(synthetic, *splits):
    """Arguments that name the synthetic dataset for each of ``splits``."""
    args = []
    for split in splits:
        args += [f"--{split}-json", synthetic / "instances.json"]
        args += [f"--{split}-images", synthetic / "images"]
    return args


def test_no_config(refused):
    """Detectron2's program would train its default, a model of C4 features on COCO."""
    assert refused(main, ["--eval-only"]) == (
        "error: --config-file: name a file, or a config of the model zoo\n"
    )


def run(*args, config=DEMO_CONFIG):
    """The script's main function in this process; returns the lines that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["--config-file", str(config), *map(str, args)])
    return printed.getvalue().splitlines()


@META_ARCH_REGISTRY.register()
class OneNumber(torch.nn.Module):
    """
    A fast detector: its number grows by the learning rate in each step, and from 1.0 on it finds
    the object of each image of `small_data`.
    """

    def __init__(self, cfg=None, num_classes=0, proposal_generator=None):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        OneNumber.cfg = cfg

    def forward(self, inputs):
        if self.training:
            return {"loss_number": -self.number}
        n = int(self.number >= 1)
        outputs = []
        for image in inputs:
            found = Instances((image["height"], image["width"]), scores=torch.ones(n))
            found.pred_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 32.0]])[:n])
            found.pred_classes = torch.zeros(n, dtype=torch.int64)
            outputs.append({"instances": found})
        return outputs


def small_data(folder, box=(8, 8, 32, 24), classes="ab"):
    """A folder as `synthetic`, of two images of 64 x 48 pixels with an object each."""
    (folder / "images").mkdir(parents=True)
    of_object = {"category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    size = {"width": 64, "height": 48}
    dataset = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        "images": [{"id": i, "file_name": f"{i}.png", **size} for i in (1, 2)],
        "annotations": [{"id": i, "image_id": i, **of_object} for i in (1, 2)],
    }
    for i in (1, 2):
        Image.new("RGB", (64, 48)).save(folder / f"images/{i}.png")
    (folder / "instances.json").write_text(json.dumps(dataset))
    return folder


@pytest.fixture
def small(tmp_path):
    return small_data(tmp_path / "data")


QUICK = [
    *("MODEL.META_ARCHITECTURE", "OneNumber", "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu"),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.5, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS"),
    *("()", "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.MAX_ITER", 4),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "SOLVER.CHECKPOINT_PERIOD", 1),
]


def test_training(synthetic, tmp_path):
    """Weights with the classes of the data; pictures; metrics, in TensorBoard, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(*own_data(synthetic, "train", "val"), "OUTPUT_DIR", tmp_path, *TINY)
    checkpoint = torch.load(tmp_path / "model_final.pth")
    assert checkpoint["iteration"] == 3
    assert len(checkpoint["model"]["roi_heads.box_predictor.cls_score.bias"]) == 4 + 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    metrics = {k: v for line in lines for k, v in line.items()}
    assert {"total_loss", "bbox/AP50", "roi_head/num_fg_instances"} <= metrics.keys()
    assert 0 < sum(metrics[f"roi_head/num_bg_iou_bin_{k}"] for k in range(3)) <= 64
    assert len(list((tmp_path / "pictures/own_val").glob("*.jpg"))) == 2
    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {"total_loss", "bbox/AP", "roi_head/num_bg_iou_bin_2"} <= set(events["scalars"])
    assert len([name for name in events["images"] if name.startswith("validation/")]) == 2


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--eval-only", "MODEL.WEIGHTS: name the weights to evaluate"),
        ("--eval-only --resume OUTPUT_DIR none", "MODEL.WEIGHTS: name the weights to evaluate"),
        ("MODEL.WEIGHTS none.pth", "MODEL.WEIGHTS: none.pth: no such file"),
        (f"DATASETS.TRAIN () MODEL.WEIGHTS {__file__}?x=1", "no dataset to train on: set DATASETS"),
        ("DATASETS.TRAIN () MODEL.WEIGHTS libra://x", "no dataset to train on: set DATASETS"),
        (f"--eval-only DATASETS.TEST () MODEL.WEIGHTS {__file__}", "no dataset to evaluate on: "),
        ("--num-gpus 2", "--num-gpus: this machine has no GPU"),
        ("DATASETS.TRAIN ('coco',)", "'coco' is not a registered dataset"),
        ("DATASETS.TRAIN ('coco_2017_train',)", ".*instances_train2017.json: dataset 'coco_2017_"),
        ("DATASETS.TRAIN ('voc_2007_train',)", ".*VOC2007: dataset 'voc_2007_train' is not there"),
        (
            f"--eval-only MODEL.WEIGHTS {__file__} DATASETS.TEST ('cityscapes_fine_sem_seg_val',)",
            "dataset 'cityscapes_fine_sem_seg_val': no evaluator for its type 'cityscapes_sem_seg'",
        ),
        ("OUTPUT_DIR /proc", "OUTPUT_DIR: /proc cannot be written: "),  # which takes no files
        ("--train-images .", "--train-json and --train-images go together"),
        ("--val-proposals a.pkl", "--val-proposals goes with --val-json"),
        ("--train-json none.json --train-images .", "none.json: no such annotation file"),
    ],
)
def test_bad_arguments(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the config's output directory is
    if torch.cuda.is_available() and "--num-gpus" in args:
        pytest.skip("fine on this machine")
    assert re.match(f"error: {message}", fails(capsys, *args.split()))


def test_weights_to_evaluate(capsys, tmp_path):
    """The message names those that a training has left."""
    weights = tmp_path / "model_final.pth"
    weights.touch()
    message = f"error: MODEL.WEIGHTS: name the weights to evaluate, such as {weights}"
    assert fails(capsys, "--eval-only", "OUTPUT_DIR", tmp_path) == message


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("INPUT.MIN_SIZE_TRAIN (64,99999) INPUT.MAX_SIZE_TRAIN 99998", "_TRAIN (99999, 99998)"),
        ("INPUT.MIN_SIZE_TEST 99999 INPUT.MAX_SIZE_TEST 99998", "_TEST (99999, 99998)"),
        (
            "TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES (64,99999) TEST.AUG.MAX_SIZE 99998",
            "with TEST.AUG.MIN_SIZES and TEST.AUG.MAX_SIZE (99999, 99998)",
        ),
        ("MODEL.MASK_ON True", "instances.json: annotation id 1 has no 'segmentation'"),
        (
            "MODEL.LOAD_PROPOSALS True",
            "DATASETS.PROPOSAL_FILES_TRAIN (--train-proposals, --val-proposals) must name a file "
            "for each of ('own_train',), because the model has no RPN; tools/dump_proposals.py",
        ),
    ],
)
def test_bad_values(opts, message, small, tmp_path, capsys):
    """Values that do not fit the data, found before training."""
    flags = own_data(small, *(["val"] if "AUG" in opts else ["train", "val"]))
    assert message in fails(capsys, *flags, "OUTPUT_DIR", tmp_path, *opts.split())


def number(path):
    """That of a OneNumber's checkpoint."""
    return torch.load(path)["model"]["number"].item()


@pytest.mark.parametrize(("rate", "best"), [(0.5, 2), (0.25, 4), (0.125, None)])
def test_best_model(rate, best, small, tmp_path):
    """The first of equally good ones; an evaluation without detections is NaN."""
    opts = ["SOLVER.BASE_LR", rate, "TEST.EVAL_PERIOD", 1, "MODEL.LIBRA.TRAINER.BEST_METRIC"]
    flags = own_data(small, "train", "val")
    printed = run(*flags, *QUICK, *opts, "bbox/AP", "OUTPUT_DIR", tmp_path, config="")
    path = tmp_path / "model_best.pth"
    line = f"best: bbox/AP 100.0 after {best} iterations, {path}"
    assert not any(x.startswith("averaged") for x in printed)
    assert [x for x in printed if x.startswith("best")] == ([line] if best else [])
    assert (line in (tmp_path / "results.md").read_text()) == path.exists() == bool(best)
    assert not best or number(path) == 1
    assert number(tmp_path / "model_final.pth") == 4 * rate


def test_weights_of_the_earlier_run(small, tmp_path, capsys):
    """They would be moved before they are read, as would proposals."""
    flags = [*own_data(small, "train"), *QUICK, "OUTPUT_DIR", tmp_path]
    run(*flags, config="")
    path = tmp_path / "model_final.pth"
    for name, value in (("MODEL.WEIGHTS", path), ("DATASETS.PROPOSAL_FILES_TEST", (str(path),))):
        error = fails(capsys, *flags, name, value, config="")
        assert re.search(rf"{name}\S*: {path} belongs to the run in OUTPUT_DIR", error)
    path = tmp_path / "inference/a.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((small / "instances.json").read_bytes())
    flags[flags.index("--train-json") + 1] = path
    assert f"--train-json: {path} belongs to the run" in fails(capsys, *flags, config="")


def test_summary(small, tmp_path):
    """Printed lines and files of trainings and of evaluations."""
    (tmp_path / "a.b.yaml").write_text("MODEL: {LIBRA: {TRAINER: {EMA_DECAY: 0.5}}}")
    out = ["OUTPUT_DIR", tmp_path]
    names = {"weights": "model_final.pth", "log": "log.txt", "metrics": "metrics.json"}
    names.update({"averaged weights": "model_final_ema.pth", "curves": "curves.png"})
    files = [f"{what}: {tmp_path / name}" for what, name in names.items()]
    config = tmp_path / "a.b.yaml"
    printed = run(*own_data(small, "train"), *QUICK, *out, config=config)
    assert printed[-5:] == files
    assert all((tmp_path / name).exists() for name in names.values())
    assert not any(x.startswith("bbox") for x in printed)
    assert not (tmp_path / "results.md").exists()
    results = [f"results: {tmp_path}/evaluation.md"]
    flags = ["--eval-only", *own_data(small, "val")]
    weights = ["MODEL.WEIGHTS", tmp_path / "model_final.pth", "MODEL.LIBRA.NUM_PICTURES", 1]
    printed = run(*flags, *QUICK, *out, *weights, config=config)
    assert printed[-4:-2] == ["bbox: AP 100.0, AP50 100.0, AP75 100.0", files[1]]
    assert printed[-2:] == [*results, f"pictures: {tmp_path}/evaluation/pictures/own_val"]
    text = (tmp_path / "evaluation.md").read_text()
    assert text.startswith("# a.b\n\n## bbox on own_val\n")
    assert "| precision | float32 |" in " ".join(text.split())
    run(*flags, *QUICK, *out, *weights, config="")
    assert (tmp_path / "evaluation.md").read_text().startswith(f"# {tmp_path}\n")


def test_weights_that_are_evaluated(small, tmp_path, capsys):
    """MODEL.WEIGHTS, or with --resume the last checkpoint; expected results are verified."""
    out = [*QUICK, "OUTPUT_DIR", tmp_path]
    run(*own_data(small, "train"), *out, "SOLVER.MAX_ITER", 2, config="")
    flags = ["--eval-only", *own_data(small, "val")]
    out += ["MODEL.WEIGHTS", f"{tmp_path}/model_0000000.pth", "TEST.EXPECTED_RESULTS"]
    ap = {}
    for resume in ([], ["--resume"]):
        printed = run(*flags, *resume, *out, "[]", config="")
        (ap[len(resume)],) = [x for x in printed if x.startswith("bbox")]
    assert ap == {0: ap[1].replace("100.0", "nan"), 1: "bbox: AP 100.0, AP50 100.0, AP75 100.0"}
    run(*flags, "--resume", *out, "[['bbox', 'AP', 99.0, 1.5]]", config="")
    with pytest.raises(SystemExit, match="^1$"):
        run(*flags, "--resume", *out, "[['bbox', 'AP', 98.0, 1.5]]", config="")
    augmented = [*flags, "--resume", *out, "[]", "TEST.AUG.ENABLED", True]
    assert "no test-time augmentation of a OneNumber" in fails(capsys, *augmented, config="")
    names = ("own_val", "own_train")  # registered above
    out += ["[]", "DATASETS.TEST", names, "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    register_coco_instances("unread", {}, str(small / "instances.json"), str(small / "images"))
    printed = run("--eval-only", "--resume", *out, "DATASETS.TRAIN", ("unread",), config="")
    DatasetCatalog.remove("unread"), MetadataCatalog.remove("unread")
    assert [x for x in printed if "bbox" in x] == [f"{name} {ap[1]}" for name in names]
    assert not [*tmp_path.glob("datasets/unread*")]


def test_resume(small, tmp_path):
    """From the last checkpoint, schedule included; changed values are logged once, in order."""
    flags, out = own_data(small, "train"), [*QUICK, "OUTPUT_DIR", tmp_path, "SOLVER.STEPS"]
    run(*flags, *out, "(3,)", "SOLVER.MAX_ITER", 2, config="")
    weights = ["MODEL.WEIGHTS", "none.pth"]  # not read
    run("--resume", *flags, *out, "(3, 9)", "SOLVER.GAMMA", 0.5, *weights, config="")
    assert number(tmp_path / "model_final.pth") == 0.5 * 3 + 0.25
    log = (tmp_path / "log.txt").read_text()
    assert "Starting training from iteration 2" in log
    assert re.findall("Resuming: (.*)", log) == [
        "SOLVER.GAMMA is 0.5, but was 0.1 before",
        "SOLVER.MAX_ITER is 4, but was 2 before",
        "SOLVER.STEPS is [3, 9], but was [3] before",
    ]
    assert read_config(str(tmp_path / "config.yaml"), []).config.SOLVER.GAMMA == 0.5
    (tmp_path / "config.yaml").write_text("")  # not read
    (tmp_path / "last_checkpoint").unlink()
    run("--resume", *flags, *out, "(3, 9)", "SOLVER.GAMMA", 0.5, "SOLVER.MAX_ITER", 5, config="")
    assert number(tmp_path / "model_final.pth") == 0.5 * 3 + 2 * 0.25
    iterations = [json.loads(x)["iteration"] for x in (tmp_path / "metrics.json").open()]
    assert iterations == [1, 3, 4]
    assert not (tmp_path / "earlier_runs").exists()


def files_in(folder):
    """The contents of all files but the log."""
    files = [x for x in folder.rglob("*") if x.is_file() and x.name != "log.txt"]
    return {str(x): x.read_bytes() for x in files}


def test_config_of_a_script(small, tmp_path):
    """Which calls `setup`: the config that was there is replaced by that of a new training."""
    path, flags = tmp_path / "config.yaml", [*own_data(small, "train", "val"), *QUICK]
    flags = ["--config-file", DEMO_CONFIG, *flags, "OUTPUT_DIR", tmp_path]
    flags += ["MODEL.WEIGHTS", __file__]
    for option, is_kept in ((["--eval-only"], True), ([], False)):
        path.write_text("VERSION: 2\n")
        setup(build_argument_parser().parse_args([str(x) for x in (*option, *flags)]))
        assert (path.read_text() == "VERSION: 2\n") == is_kept


def broken(*args, **kwargs):
    raise InputError("a part is wrong")


def test_files_of_a_training(small, tmp_path, capsys, monkeypatch):
    """An evaluation leaves them alone, and a config that is read is not written over."""
    flags = [*own_data(small, "train", "val"), *QUICK, "OUTPUT_DIR", tmp_path / "out"]
    given = tmp_path / "out/config.yaml"
    given.parent.mkdir()
    given.write_text("# mine\nVERSION: 2\n")
    other = {"model": {"number": torch.tensor(9.0)}}  # which is not resumed from
    torch.save(other, tmp_path / "out/model_0000000.pth")
    for _ in range(2):
        run(*flags, config=given)
        assert number(tmp_path / "out/model_final.pth") == 4 * 0.5
        assert given.read_text() == "# mine\nVERSION: 2\n"
    assert (tmp_path / "out/earlier_runs/1/model_final.pth").exists()
    before = files_in(tmp_path / "out")
    run("--eval-only", "--resume", *flags, "SEED", 5, "MODEL.LIBRA.NUM_PICTURES", 1, config=given)
    assert before.items() <= files_in(tmp_path / "out").items()
    assert (tmp_path / "out/evaluation.md").exists()
    for name in ("inference/coco_instances_results.json", "pictures/own_val"):
        assert (tmp_path / "out/evaluation" / name).exists()
    # What cannot be built moves nothing.
    with monkeypatch.context() as patch:
        patch.setattr(OneNumber, "__init__", broken)
        assert "error: a part is wrong" in fails(capsys, *flags, config=given)
    assert before.items() <= files_in(tmp_path / "out").items()


def test_inputs():
    """All that a run reads, by its option or key; as many proposal files as datasets."""
    config = "COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml"
    opts = ["DATASETS.PROPOSAL_FILES_TRAIN", "('x',)", "DATASETS.PROPOSAL_FILES_TEST", "('y', 'z')"]
    recipe = read_config(config, [*opts, "MODEL.WEIGHTS", "w"])
    flags = [f"{split}_{x}" for split in ("train", "val") for x in ("json", "images", "proposals")]
    args = {"config_file": "c", **{name: name for name in flags}}
    assert run_inputs(recipe, argparse.Namespace(**args)) == {
        **{f"--{name.replace('_', '-')}": value for name, value in args.items()},
        **{"MODEL.WEIGHTS": "w", "DATASETS.PROPOSAL_FILES_TRAIN[0]": "x"},
        **{f"DATASETS.PROPOSAL_FILES_TEST[{i}]": name for i, name in enumerate("yz")},
    }
    assert run_inputs(recipe, argparse.Namespace(**dict.fromkeys(args))).keys() == {
        *(
            "MODEL.WEIGHTS",
            *(f"DATASETS.PROPOSAL_FILES_{x}" for x in ("TRAIN[0]", "TEST[0]", "TEST[1]")),
        )
    }
    recipe.test_datasets = ("a",)
    with pytest.raises(InputError, match=r"must name a file for each of \('a',\)"):
        prepare_proposal_files(recipe, ("test",))


def test_verified_in_the_main_process(monkeypatch):
    """Other processes have no results; those of test-time augmentation must be finite, too."""
    active = []

    @contextlib.contextmanager
    def finite(model):
        active.append(1)
        yield
        active.pop()

    model = torch.nn.Identity()
    recipe = argparse.Namespace(output_dir="", test_datasets=(), config=None, tta=True)
    recipe.build_trained_model = lambda *args, **kwargs: model
    recipe.verify = lambda results: verified.append(results)
    monkeypatch.setattr(libra_d2.engine.main, "finite_predictions", finite)
    monkeypatch.setattr(Trainer, "test", lambda *args: {"bbox": len(active)})
    monkeypatch.setattr(Trainer, "test_with_TTA", lambda *args: {"bbox_TTA": len(active)})
    for is_main in (False, True):
        verified = []
        monkeypatch.setattr(comm, "is_main_process", lambda is_main=is_main: is_main)
        assert evaluate(recipe, resume=False) == {"bbox": 1, "bbox_TTA": 1}
        assert len(verified) == is_main


def test_new_run_in_a_used_directory(small, tmp_path):
    """The earlier run's files are kept aside, and nothing of it shows in the new one's."""
    flags = [*own_data(small, "train", "val"), *QUICK, "OUTPUT_DIR", tmp_path]
    flags += ["MODEL.LIBRA.TRAINER.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 1]
    printed = run(*flags, "SOLVER.MAX_ITER", 3, config="")
    assert "best: bbox/AP 100.0 after 2 iterations" in "".join(printed)
    for resume in ([], ["--resume"]):  # there is nothing to resume in the second case
        printed = run(*resume, *flags, "SOLVER.MAX_ITER", 1, config="")
        assert "best: " not in "".join(printed)
        iterations = {json.loads(x)["iteration"] for x in (tmp_path / "metrics.json").open()}
        assert iterations == {0, 1}
        for path in tmp_path.glob("model_*.pth"):
            path.unlink()
        (tmp_path / "last_checkpoint").unlink()
    warning = f"There is no checkpoint to resume from in {tmp_path}"
    assert (tmp_path / "log.txt").read_text().count(warning) == 1
    earlier = tmp_path / "earlier_runs"
    assert number(earlier / "1/model_final.pth") == 1.5
    assert {p.name for p in earlier.iterdir()} == {"1", "2"}
    results = (tmp_path / "results.md").read_text()
    assert "100.0" not in results
    assert "| validation data 'own_val' images      | 2 (" in results


def test_evaluation_of_other_classes(small, tmp_path, capsys):
    out = [*QUICK, "OUTPUT_DIR", tmp_path / "out"]
    run(*own_data(small, "train"), *out, config="")
    other = own_data(small_data(tmp_path / "other", classes="ba"), "val")
    weights = ["MODEL.WEIGHTS", tmp_path / "out/model_final.pth"]
    for args in (["--resume", *other, *out], [*other, *out, *weights]):
        error = fails(capsys, "--eval-only", *args, config="")
        assert "trained on the classes ['a', 'b'], but dataset 'own_val' has ['b', 'a']" in error


def test_own_data(tmp_path):
    """Your own data replaces the datasets, proposals and classes of the config."""
    small = small_data(tmp_path / "data", box=(8, 8, 32, 80))  # beyond the image
    out = ["OUTPUT_DIR", tmp_path, "DATASETS.PROPOSAL_FILES_TRAIN", "('x.pkl',)", *QUICK]
    out += ["TEST.AUG.MIN_SIZES", "(64,99999)", "TEST.AUG.MAX_SIZE", 99998]  # not used
    for splits, names in (("train",), ((), ())), (("train", "val"), (("own_val",), ("y.pkl",))):
        proposals = ["--val-proposals", "y.pkl"] if "val" in splits else []
        run(*own_data(small, *splits), *proposals, *out, config="")
        recipe = read_config(str(tmp_path / "config.yaml"), [])
        assert (recipe.train_datasets, recipe.train_proposals) == (("own_train",), ())
        assert names == (recipe.test_datasets, recipe.test_proposals)
    assert recipe.num_classes == 2
    assert OneNumber.cfg.is_frozen()
    for splits in (("val",), ("train", "val")):
        parser = argparse.ArgumentParser()
        add_data_arguments(parser)
        args = parser.parse_args([*map(str, own_data(small, *splits))])
        recipe = make_recipe(demo_cfg(OUTPUT_DIR=str(tmp_path)))
        assert register_own_data(recipe, args) == [f"own_{x}" for x in splits]
    (path,) = {*tmp_path.glob("datasets/own_train-*.json")}
    changed = json.loads(path.read_text())
    assert changed["annotations"][0]["bbox"] == [8, 8, 32, 40]
    log = (tmp_path / "log.txt").read_text()
    assert "ROI_HEADS.NUM_CLASSES is 2, as in the data, instead of 4" in log
    assert "SOLVER.IMS_PER_BATCH is" not in log
    assert "Running on the CPU" in log
    proposals = pickle.dumps([np.array([[0.0, 0, 9, 9, 0.5]])] * 2)
    (tmp_path / "p.pkl").write_bytes(proposals)
    given = ["--train-proposals", tmp_path / "p.pkl", *out, "MODEL.LOAD_PROPOSALS", True]
    run(*own_data(small, "train"), *given, config="")
    (path,) = read_config(str(tmp_path / "config.yaml"), []).train_proposals
    assert path.startswith(f"{tmp_path}/proposals/own_train-")
    recipe.needs_proposals, recipe.test_datasets = True, ("own_val", "own_train")
    recipe.test_proposals = (str(tmp_path / "p.pkl"),) * 2
    prepare_proposal_files(recipe, ("test",))
    found = [path.rpartition("-")[0] for path in recipe.test_proposals]
    assert found == [f"{tmp_path}/proposals/{name}" for name in recipe.test_datasets]


def test_arguments(refused):
    """Of other programs."""
    parser = config_argument_parser("One line.\n\nAnother.")
    add_data_arguments(parser)
    assert "required: --config-file" in refused(parser.parse_args, [])
    given = ["--config-file", "a", "--val-images", "b", "A.B", "-1", "--x"]
    assert parser.parse_args(given).opts == ["A.B", "-1", "--x"]
    text = parser.format_help()
    assert "One line.\n\nAnother." in text
    assert re.search(r"--train-json FILE +annotations to train on\n", text)


def test_categories_must_agree(small, tmp_path, capsys):
    other = own_data(small_data(tmp_path / "other", classes="az"), "val")
    error = fails(capsys, *own_data(small, "train"), *other, "OUTPUT_DIR", tmp_path)
    assert f"other/instances.json: its categories ['a', 'z'] are not those of {small}" in error


def test_interrupted(small, tmp_path, capsys, monkeypatch):
    """One line on stderr, and exit status 130."""

    def interrupt(model, inputs):
        raise KeyboardInterrupt

    out = [*own_data(small, "train"), *QUICK, "OUTPUT_DIR", tmp_path]
    monkeypatch.setattr(OneNumber, "forward", interrupt)
    with pytest.raises(SystemExit, match="130"):
        run(*out, config="")
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted. ")


def test_predictions_that_are_not_finite(small, tmp_path, capsys):
    """An evaluation of finite weights whose activations overflow is no result."""
    out = ["OUTPUT_DIR", tmp_path, *TINY]
    model = build_model(demo_cfg(MODEL__ROI_HEADS__NUM_CLASSES=2))
    model.roi_heads.box_predictor.cls_score.weight.data.fill_(3e38)
    torch.save({"model": model.state_dict()}, tmp_path / "huge.pth")
    flags = ["--eval-only", *own_data(small, "val"), "MODEL.WEIGHTS", tmp_path / "huge.pth"]
    error = fails(capsys, *flags, *out)
    assert "predictions of roi_heads.box_predictor are not finite" in error
