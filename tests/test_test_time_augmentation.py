# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, demo_cfg, random_inputs
from test_train_net import TINY, own_data, train_net

from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage

from libra_d2.errors import InputError
from libra_d2.evaluation import RetinaNetWithTTA, add_test_time_augmentation

SYSTEMS = ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet"]
LOW = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.1, "MODEL__RETINANET__SCORE_THRESH_TEST": 0.02}


def detector(system, **overrides):
    """A model that finds something, and its config."""
    cfg = demo_cfg(
        ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml",
        **{"MODEL__RETINANET__NUM_CLASSES": 4, "TEST__AUG__ENABLED": True, **LOW, **overrides},
    )
    model = build_model(cfg)
    with EventStorage():
        for _ in range(3):  # running statistics of batch norm
            model(random_inputs(3, 3))
    if system == "retinanet":
        torch.nn.init.normal_(model.head.cls_score.weight, std=2.0)
        torch.nn.init.constant_(model.head.cls_score.bias, -1.0)
        torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.5)
    return cfg, model.eval()


def one_image(size=(96, 128)):
    image = random_inputs(0, size=size)[0]["image"].to(torch.uint8)
    return [{"image": image, "height": 2 * size[0], "width": 2 * size[1]}]


@pytest.mark.parametrize("system", SYSTEMS[:3])
def test_rcnn_is_detectron2s(system):
    """The same detections, masks included, as with Detectron2's own class."""
    sizes = {"TEST__AUG__MIN_SIZES": (80, 112), "TEST__AUG__MAX_SIZE": 300}
    cfg, model = detector(system, **sizes)
    inputs = one_image()
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
    sizes = {"TEST__AUG__MIN_SIZES": (96,), "TEST__AUG__FLIP": False}
    cfg, model = detector("retinanet", **sizes)
    inputs = one_image()
    with torch.no_grad():
        (expected,), (found,) = model(inputs), add_test_time_augmentation(cfg, model)(inputs)
    expected, found = expected["instances"], found["instances"]
    assert len(expected) > 10
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert found.image_size == (192, 256)


def test_retinanet_merges():
    """Flipped and not: each detection is one of either image, and none overlaps a better one."""
    sizes = {"TEST__AUG__MIN_SIZES": (96,), "TEST__AUG__FLIP": True}
    # All that either finds, so that nothing is in the one and cut off in the other.
    limits = {"TEST__DETECTIONS_PER_IMAGE": 2000, "MODEL__RETINANET__SCORE_THRESH_TEST": 0.3}
    cfg, model = detector("retinanet", **sizes, **limits)
    tta, inputs = add_test_time_augmentation(cfg, model), one_image()
    assert isinstance(tta, RetinaNetWithTTA)
    mirrored = [{**inputs[0], "image": inputs[0]["image"].flip(2)}]
    with torch.no_grad():
        found, a, b = (
            m(x)[0]["instances"] for m, x in ((tta, inputs), (model, inputs), (model, mirrored))
        )
    # Back to where its objects are.
    x0, y0, x1, y1 = b.pred_boxes.tensor.unbind(dim=1)
    b.pred_boxes.tensor = torch.stack([256 - x1, y0, 256 - x0, y1], dim=1)
    sources = []
    for i in range(len(found)):
        # Rounding may depend on what else is in the batch; 0.05 pixels and 1e-3 are beyond that.
        for name, other in (("plain", a), ("mirrored", b)):
            distance = (other.pred_boxes.tensor - found.pred_boxes.tensor[i]).abs().amax(dim=1)
            near = (other.scores - found.scores[i]).abs() < 1e-3
            same = near & (other.pred_classes == found.pred_classes[i])
            if (distance[same] < 0.05).any():
                sources.append(name)
                break
    assert len(sources) == len(found)
    assert sources.count("plain") > 3
    assert sources.count("mirrored") > 3
    for c in found.pred_classes.unique():
        boxes = found.pred_boxes[found.pred_classes == c]
        iou = pairwise_iou(boxes, boxes).fill_diagonal_(0)
        assert iou.max() <= cfg.MODEL.RETINANET.NMS_THRESH_TEST + 1e-5


@pytest.mark.parametrize("interpolation", ["pillow", "opencv"])
def test_interpolation(interpolation):
    """The augmented images are resized as the config says."""
    sizes = {"TEST__AUG__MIN_SIZES": (40, 80), "MODEL__LIBRA__INPUT__INTERPOLATION": interpolation}
    cfg, model = detector("faster_rcnn", **sizes)
    inputs = one_image()
    image = inputs[0]["image"].permute(1, 2, 0).numpy()
    augmented = add_test_time_augmentation(cfg, model).tta_mapper(inputs[0])
    assert [x["image"].shape[1:] for x in augmented] == [(40, 53)] * 2 + [(80, 107)] * 2
    for i, size in ((0, (53, 40)), (2, (107, 80))):
        expected = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
        is_opencv = np.array_equal(augmented[i]["image"].numpy(), expected)
        assert is_opencv == (interpolation == "opencv")
        assert torch.equal(augmented[i]["image"].flip(2), augmented[i + 1]["image"])
        box = np.array([[10.0, 20, 60, 70]])
        there = augmented[i + 1]["transforms"].apply_box(box)
        assert np.allclose(augmented[i + 1]["transforms"].inverse().apply_box(there), box)


@pytest.mark.parametrize("system", ["faster_rcnn", "retinanet"])
def test_evaluation(synthetic, tmp_path, system):
    """Next to the plain evaluation, at the end of a training and alone."""
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    aug = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.FLIP", "False"]
    args = [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", tmp_path / "out", *TINY, *aug]
    result = train_net(*args, "SOLVER.MAX_ITER", 2, config=config)
    assert result.returncode == 0, result.stderr
    lines = [x for x in result.stdout.splitlines() if x.startswith("bbox")]
    assert [x.split(":")[0] for x in lines] == ["bbox", "bbox_TTA"]
    assert "## bbox_TTA on own_val" in (tmp_path / "out/results.md").read_text()
    assert '"bbox_TTA/AP"' in (tmp_path / "out/metrics.json").read_text()
    weights = ["MODEL.WEIGHTS", tmp_path / "out/model_final.pth"]
    data = own_data(synthetic, "val")
    args = [*data, "OUTPUT_DIR", tmp_path / "eval", *TINY, *aug, *weights]
    result = train_net("--eval-only", *args, config=config)
    assert result.returncode == 0, result.stderr
    assert [x for x in result.stdout.splitlines() if x.startswith("bbox")] == lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__LOAD_PROPOSALS": True}, "MODEL.LOAD_PROPOSALS"),
        ({"MODEL__KEYPOINT_ON": True}, "MODEL.KEYPOINT_ON"),
        ({"MODEL__META_ARCHITECTURE": "ProposalNetwork"}, "a ProposalNetwork"),
    ],
)
def test_not_supported(overrides, message):
    cfg = demo_cfg(DEMO_CONFIG, TEST__AUG__ENABLED=True, **overrides)
    with pytest.raises(InputError, match=f"TEST.AUG.ENABLED: {message}"):
        add_test_time_augmentation(cfg, torch.nn.Identity())
