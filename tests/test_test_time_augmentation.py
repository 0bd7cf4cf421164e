# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, demo_cfg, random_inputs
from test_train_net import TINY, own_data
from torch.nn.parallel import DistributedDataParallel

from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.config import check_values, make_recipe
from libra_d2.engine.main import main
from libra_d2.errors import InputError
from libra_d2.evaluation import RetinaNetWithTTA, add_test_time_augmentation

RETINANET = ROOT / "configs/Demo/libra_retinanet_R_18_FPN.yaml"
LOW = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.1, "MODEL__RETINANET__SCORE_THRESH_TEST": 0.02}


def tta_cfg(config, sizes, **overrides):
    options = {"MODEL__RETINANET__NUM_CLASSES": 6, "TEST__AUG__ENABLED": True, **LOW, **overrides}
    return demo_cfg(config, TEST__AUG__MIN_SIZES=sizes, TEST__AUG__MAX_SIZE=300, **options)


def detector(cfg):
    """A model that finds something."""
    model = build_model(cfg)
    with EventStorage():
        for _ in range(3):  # running statistics of batch norm
            model(random_inputs(3, 3))
    return model.eval()


def one_image():
    """Of 96 x 128 pixels, twice as large in its file."""
    image = random_inputs(0, size=(96, 128))[0]["image"].to(torch.uint8)
    return [{"image": image, "height": 192, "width": 256}]


@pytest.mark.parametrize("system", ["mask_rcnn", "cascade_rcnn"])
def test_rcnn_is_detectron2s(system):
    """The same detections, masks included, as with Detectron2's own class."""
    cfg = tta_cfg(ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml", (80, 112))
    model, inputs = detector(cfg), one_image()
    with torch.no_grad():
        (ours,) = add_test_time_augmentation(cfg, model)(inputs)
        (theirs,) = GeneralizedRCNNWithTTA(cfg, model)(inputs)
    ours, theirs = ours["instances"].get_fields(), theirs["instances"].get_fields()
    assert len(ours["scores"]) > 3
    assert ours.keys() == theirs.keys()
    assert ("pred_masks" in ours) == (system == "mask_rcnn")
    for name, value in ours.items():
        value, other = (getattr(x, "tensor", x) for x in (value, theirs[name]))
        assert torch.equal(value, other), name


def test_retinanet_without_augmentation():
    """One size, that of the image, and no flip: the model's own detections."""
    cfg = tta_cfg(RETINANET, (96,), TEST__AUG__FLIP=False)
    model, inputs = detector(cfg), one_image()
    torch.nn.init.normal_(model.head.cls_score.weight, std=2.0)
    torch.nn.init.constant_(model.head.cls_score.bias, -1.0)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.5)
    parallel = DistributedDataParallel.__new__(DistributedDataParallel)  # without processes
    torch.nn.Module.__init__(parallel)
    parallel.module = model
    tta = add_test_time_augmentation(cfg, parallel)
    assert isinstance(tta, RetinaNetWithTTA)
    with torch.no_grad():
        (expected,), (found,) = model(inputs), tta(inputs)
    expected, found = expected["instances"], found["instances"]
    assert len(expected) > 10
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert found.image_size == (192, 256)


def test_retinanet_merges():
    """
    Two sizes, flipped and not, in batches of 3: of boxes of a class that overlap by more than 0.4,
    where they are in the file, the best one.
    """
    found = [  # in each image: boxes, scores and classes
        ([[10, 10, 30, 30]], [0.875], [5]),  # 20, 20, 60, 60 in the file
        ([[98, 10, 118, 30], [98, 10, 118, 19]], [0.75, 0.5], [5, 5]),  # the same; 0.45 of it
        ([[5, 5, 15, 15]], [0.625], [2]),  # the same, of another class
        ([[24, 10, 44, 30]], [0.375], [5]),  # 80, 40, 160, 120
    ]
    batches = []

    class Model(torch.nn.Module):
        def forward(self, inputs):
            batches.append([tuple(x["image"].shape[1:]) for x in inputs])
            outputs = []
            for x, (boxes, scores, classes) in zip(inputs, found[len(sum(batches[:-1], [])) :]):
                instances = Instances(x["image"].shape[1:], pred_boxes=Boxes(torch.tensor(boxes)))
                instances.scores, instances.pred_classes = map(torch.tensor, (scores, classes))
                outputs.append({"instances": instances})
                assert x.keys() == {"image"}
            return outputs

    cfg = tta_cfg(RETINANET, (96, 48), MODEL__RETINANET__NMS_THRESH_TEST=0.4)
    before = cfg.clone()
    merged = RetinaNetWithTTA(cfg, Model())(one_image())[0]["instances"]
    assert batches == [[(96, 128), (96, 128), (48, 64)], [(48, 64)]]
    same = [20, 20, 60, 60]
    assert merged.pred_boxes.tensor.tolist() == [same, same, [80, 40, 160, 120]]
    assert merged.scores.tolist() == [0.875, 0.625, 0.375]
    assert merged.pred_classes.tolist() == [5, 2, 5]
    assert cfg == before


@pytest.mark.parametrize("interpolation", ["pillow", "opencv"])
def test_interpolation(interpolation):
    """The augmented images are resized as the config says; boxes go with them."""
    cfg = tta_cfg(RETINANET, (40, 80), MODEL__LIBRA__INPUT__INTERPOLATION=interpolation)
    inputs = one_image()
    image = inputs[0]["image"].permute(1, 2, 0).numpy()
    augmented = add_test_time_augmentation(cfg, build_model(cfg)).tta_mapper(inputs[0])
    assert [x["image"].shape[1:] for x in augmented] == [(40, 53)] * 2 + [(80, 107)] * 2
    for i, size in ((0, (53, 40)), (2, (107, 80))):
        expected = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
        is_opencv = np.array_equal(augmented[i]["image"].numpy(), expected)
        assert is_opencv == (interpolation == "opencv")
        assert torch.equal(augmented[i]["image"].flip(2), augmented[i + 1]["image"])
        box = np.array([10.0, 20, 60, 70])  # in the file
        x0, y0, x1, y1 = box * np.tile([size[0] / 256, size[1] / 192], 2)
        for j, expected in ((i, (x0, y0, x1, y1)), (i + 1, (size[0] - x1, y0, size[0] - x0, y1))):
            there = augmented[j]["transforms"].apply_box(box[None])
            assert np.allclose(there, expected)
            assert np.allclose(augmented[j]["transforms"].inverse().apply_box(there), box)


def test_evaluation(synthetic, tmp_path, capsys):
    """Next to the plain evaluation, at the end of a training and alone."""

    def run(*args):
        aug = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.FLIP", False]
        args = ["--config-file", RETINANET, *args, *TINY, *aug, "SOLVER.MAX_ITER", 1]
        main([str(x) for x in args])
        return [x for x in capsys.readouterr().out.splitlines() if x.startswith("bbox")]

    lines = run(*own_data(synthetic, "train", "val"), "OUTPUT_DIR", tmp_path / "out")
    assert [x.split(":")[0] for x in lines] == ["bbox", "bbox_TTA"]
    assert "## bbox_TTA on own_val" in (tmp_path / "out/results.md").read_text()
    assert '"bbox_TTA/AP"' in (tmp_path / "out/metrics.json").read_text()
    weights = ["MODEL.WEIGHTS", tmp_path / "out/model_final.pth", "OUTPUT_DIR", tmp_path / "eval"]
    assert run("--eval-only", *own_data(synthetic, "val"), *weights) == lines


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("MODEL__LOAD_PROPOSALS", True, "a model without RPN"),
        ("MODEL__KEYPOINT_ON", True, "a model of keypoints"),
        ("MODEL__META_ARCHITECTURE", "ProposalNetwork", "a ProposalNetwork"),
    ],
)
def test_not_supported(key, value, what):
    recipe = make_recipe(demo_cfg(DEMO_CONFIG, TEST__AUG__ENABLED=True, **{key: value}))
    message = f"there is no test-time augmentation of {what}"
    with pytest.raises(InputError, match=f"TEST.AUG.ENABLED: {message}"):
        check_values(recipe)
    recipe.tta = False
    check_values(recipe)
    with pytest.raises(InputError, match="there is no test-time augmentation of a Identity"):
        recipe.add_test_time_augmentation(torch.nn.Identity())
