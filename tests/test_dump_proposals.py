# SPDX-License-Identifier: Apache-2.0
"""The route of a Fast R-CNN: train an RPN, write its proposals, train and evaluate on them."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, load_cfg
from test_train_net import TINY, own_data, run

from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image

from libra_d2.tools.dump_proposals import main

DEMO = ROOT / "configs/Demo"


def dump(*args):
    main(["--config-file", str(DEMO / "rpn_R_18_FPN.yaml"), *map(str, args)])


@pytest.fixture(scope="module")
def rpn(synthetic, tmp_path_factory):
    """An RPN trained for four iterations, as options."""
    out = tmp_path_factory.mktemp("rpn")
    args = [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", out, *TINY]
    assert any("AR@1000" in x for x in run(*args, config=DEMO / "rpn_R_18_FPN.yaml"))
    return ["MODEL.WEIGHTS", out / "model_final.pth", *TINY]


@pytest.fixture(scope="module")
def data(synthetic, tmp_path_factory):
    """Arguments that name the synthetic dataset, whose third image is emptied."""
    folder = tmp_path_factory.mktemp("data") / "data"
    shutil.copytree(synthetic, folder)
    dataset = json.loads((folder / "instances.json").read_text())
    dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] != 3]
    (folder / "instances.json").write_text(json.dumps(dataset))
    return own_data(folder, "train", "val")


@pytest.fixture(scope="module")
def dumped(rpn, data, tmp_path_factory):
    """Folder of the proposals of both."""
    out = tmp_path_factory.mktemp("dumped")
    dump(*data, *rpn, "OUTPUT_DIR", out, "INPUT.MIN_SIZE_TEST", 144)
    return out / "proposals"


def load(path):
    return pickle.loads(path.read_bytes())


def test_proposals_are_those_of_the_model(rpn, dumped, synthetic):
    """In pixels of the file, for an image that the model sees at another size; of each image."""
    assert sorted(p.name for p in dumped.iterdir()) == ["own_train.pkl", "own_val.pkl"]
    content = load(dumped / "own_val.pkl")
    assert content["ids"] == list(range(1, 13))
    cfg = load_cfg(DEMO / "rpn_R_18_FPN.yaml")
    cfg.merge_from_list([str(x) for x in rpn])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    for i in (2, 4):
        image = read_image(str(synthetic / f"images/00000{i}.jpg"), "RGB")
        image = T.ResizeShortestEdge(144, 1333).get_transform(image).apply_image(image)
        image = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        with torch.no_grad():
            (expected,) = model([{"image": image, "height": 96, "width": 96}])
        expected = expected["proposals"]
        assert len(expected) > 20
        boxes, logits = expected.proposal_boxes.tensor, expected.objectness_logits
        np.testing.assert_allclose(content["boxes"][i], boxes, atol=1e-3)
        np.testing.assert_allclose(content["objectness_logits"][i], logits, atol=1e-4)


def test_which_datasets(rpn, data, dumped, tmp_path):
    """Those of --dataset, or else one's own, or else the config's, each of them once."""
    sets = ["DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_train', 'own_train')"]
    sets += ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "INPUT.MIN_SIZE_TEST", 144]
    dump(*rpn, *sets, "OUTPUT_DIR", tmp_path)  # it is registered
    assert [p.name for p in (tmp_path / "proposals").iterdir()] == ["own_train.pkl"]
    (path,) = (tmp_path / "proposals").iterdir()
    assert path.read_bytes() == (dumped / "own_train.pkl").read_bytes()
    assert (tmp_path / "log.txt").read_text().count(f"Proposals: {path}") == 1
    dump("--dataset", "own_val", *data, *rpn, "OUTPUT_DIR", tmp_path / "val")
    assert [p.name for p in (tmp_path / "val/proposals").iterdir()] == ["own_val.pkl"]


def test_fast_rcnn(dumped, data, tmp_path):
    """Train on the proposals and evaluate on them, the latter in the format of mmdetection."""
    content = load(dumped / "own_val.pkl")
    scores = [1 / (1 + np.exp(-x)) for x in content["objectness_logits"]]
    arrays = [np.column_stack(x) for x in zip(content["boxes"], scores)]
    (tmp_path / "val.pkl").write_bytes(pickle.dumps(arrays))
    args = ["--train-proposals", dumped / "own_train.pkl", "--val-proposals", tmp_path / "val.pkl"]
    config = DEMO / "libra_fast_rcnn_R_18_FPN.yaml"
    printed = run(*data, *args, "OUTPUT_DIR", tmp_path / "out", *TINY, config=config)
    assert any(x.startswith("bbox: AP") for x in printed)
    weights = torch.load(tmp_path / "out/model_final.pth")["model"]
    assert not any(key.startswith("proposal_generator") for key in weights)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "MODEL.WEIGHTS: name the weights of a trained model"),
        (["MODEL.WEIGHTS", __file__], "test_dump_proposals.py: not loaded"),
        (["--dataset", "none", "MODEL.WEIGHTS", "x"], "'none' is not a registered dataset"),
    ],
)
def test_bad_arguments(args, message, tmp_path, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        dump(*data, *args, "OUTPUT_DIR", tmp_path)
    assert re.match(f"error: .*{message}", capsys.readouterr().err.splitlines()[-1])
