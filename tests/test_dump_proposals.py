# SPDX-License-Identifier: Apache-2.0
"""The route of a Fast R-CNN: train an RPN, write its proposals, train and evaluate on them."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_cfg
from test_train_net import TINY, own_data, train_net

from detectron2.modeling import build_model

DEMO = ROOT / "configs/Demo"


def dump_proposals(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/dump_proposals.py"), *[str(a) for a in args]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


@pytest.fixture(scope="module")
def rpn(synthetic, tmp_path_factory):
    """Output directory of an RPN trained for four iterations, and the arguments to use it."""
    out = tmp_path_factory.mktemp("rpn")
    args = [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", out, *TINY]
    result = train_net(*args, config=DEMO / "rpn_R_18_FPN.yaml")
    assert result.returncode == 0, result.stderr
    assert "AR@1000" in result.stdout
    return out, [*args, "MODEL.WEIGHTS", out / "model_final.pth"]


@pytest.fixture(scope="module")
def dumped(rpn):
    out, args = rpn
    result = dump_proposals("--config-file", DEMO / "rpn_R_18_FPN.yaml", *args)
    assert result.returncode == 0, result.stderr
    assert "own_train: 100%" in result.stderr
    return out / "proposals"


def load(path):
    with open(path, "rb") as f:
        return pickle.load(f)


def test_proposals_are_those_of_the_model(rpn, dumped, synthetic):
    """In pixels of the file, for an image that the model sees at another size."""
    out, args = rpn
    assert sorted(p.name for p in dumped.iterdir()) == ["own_train.pkl", "own_val.pkl"]
    content = load(dumped / "own_val.pkl")
    assert content["ids"] == list(range(1, 13))
    cfg = load_cfg(DEMO / "rpn_R_18_FPN.yaml")
    cfg.merge_from_list([str(x) for x in TINY])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(out / "model_final.pth")["model"])
    from detectron2.data.detection_utils import read_image

    image = read_image(str(synthetic / "images/000004.jpg"), "RGB")
    with torch.no_grad():
        image = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        (expected,) = model([{"image": image, "height": 96, "width": 96}])
    expected = expected["proposals"]
    assert len(expected) > 20
    np.testing.assert_allclose(content["boxes"][4], expected.proposal_boxes.tensor, atol=1e-3)
    np.testing.assert_allclose(
        content["objectness_logits"][4], expected.objectness_logits, atol=1e-4
    )


def test_stopped_and_continued(rpn, dumped):
    """A file that is there is kept, one that is not whole is continued; both are the same."""
    out, args = rpn
    expected = (dumped / "own_val.pkl").read_bytes()
    content = load(dumped / "own_val.pkl")
    from libra_d2.data.proposals import PartialProposals

    (dumped / "own_val.pkl").unlink()
    partial = PartialProposals(str(dumped / "own_val.pkl.partial"), content["identity"])
    with partial:
        for boxes, logits in list(zip(content["boxes"], content["objectness_logits"]))[:5]:
            partial.append(boxes, logits)
    result = dump_proposals("--config-file", DEMO / "rpn_R_18_FPN.yaml", *args)
    assert result.returncode == 0, result.stderr
    assert "own_train.pkl: complete already" in result.stdout
    assert "own_val.pkl: going on after 5 of 12 images" in result.stdout
    assert (dumped / "own_val.pkl").read_bytes() == expected
    assert len(list(dumped.iterdir())) == 2


def test_other_weights_are_not_mixed(rpn, dumped, tmp_path):
    """Proposals of other weights are computed anew."""
    out, args = rpn
    checkpoint = torch.load(out / "model_final.pth")
    checkpoint["model"]["proposal_generator.rpn_head.conv.bias"] += 1
    torch.save(checkpoint, tmp_path / "other.pth")
    before = load(dumped / "own_val.pkl")
    args = [*args, "MODEL.WEIGHTS", tmp_path / "other.pth"]
    result = dump_proposals(
        "--config-file", DEMO / "rpn_R_18_FPN.yaml", "--dataset", "own_val", *args
    )
    assert result.returncode == 0, result.stderr
    assert "complete already" not in result.stdout
    after = load(dumped / "own_val.pkl")
    assert after["identity"] != before["identity"]
    assert not np.array_equal(before["objectness_logits"][0], after["objectness_logits"][0])


@pytest.mark.parametrize("mmdetection", [False, True])
def test_fast_rcnn(dumped, synthetic, tmp_path, mmdetection):
    """Train on the proposals and evaluate, whoever wrote them."""
    if mmdetection:
        for split in ("train", "val"):
            content = load(dumped / f"own_{split}.pkl")
            scores = [1 / (1 + np.exp(-x)) for x in content["objectness_logits"]]
            arrays = [np.column_stack(x) for x in zip(content["boxes"], scores)]
            (tmp_path / f"own_{split}.pkl").write_bytes(pickle.dumps(arrays))
    folder = tmp_path if mmdetection else dumped
    args = own_data(synthetic, "train", "val")
    for split in ("train", "val"):
        args += [f"--{split}-proposals", folder / f"own_{split}.pkl"]
    result = train_net(
        *args, "OUTPUT_DIR", tmp_path / "out", *TINY, config=DEMO / "libra_fast_rcnn_R_18_FPN.yaml"
    )
    assert result.returncode == 0, result.stderr
    assert "bbox: AP" in result.stdout
    weights = torch.load(tmp_path / "out/model_final.pth")["model"]
    assert not any(key.startswith("proposal_generator") for key in weights)
    assert (tmp_path / "out/proposals/own_val.pkl").exists() == mmdetection


def test_proposals_of_a_whole_detector(synthetic, tmp_path):
    """The RPN of a Faster R-CNN, whose other weights are not used; a random one will do."""
    config = DEMO / "libra_faster_rcnn_R_18_FPN.yaml"
    cfg = load_cfg(config)
    cfg.merge_from_list([*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.DEVICE", "cpu"])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    args = [*own_data(synthetic, "val"), "MODEL.WEIGHTS", tmp_path / "model.pth", *TINY]
    result = dump_proposals(
        "--config-file", config, "--dataset", "own_val", *args, "OUTPUT_DIR", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert len(load(tmp_path / "proposals/own_val.pkl")["ids"]) == 12


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "MODEL.WEIGHTS: name the weights of a trained model"),
        (["MODEL.WEIGHTS", __file__], "test_dump_proposals.py: not loaded"),
        (
            ["--dataset", "none", "MODEL.WEIGHTS", "x"],
            "DATASETS: 'none' is not a registered dataset",
        ),
    ],
)
def test_bad_arguments(args, message, tmp_path, synthetic):
    data = own_data(synthetic, "val")
    result = dump_proposals(
        "--config-file", DEMO / "rpn_R_18_FPN.yaml", *data, *args, "OUTPUT_DIR", tmp_path
    )
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
