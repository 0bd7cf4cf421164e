# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, random_inputs
from test_train_net import TINY, own_data, run
from torch.nn.parallel import DistributedDataParallel

from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.data.resize import OpenCVResizeTransform
from libra_d2.errors import InputError
from libra_d2.evaluation import RetinaNetWithTTA, add_test_time_augmentation
from libra_d2.tools.make_synthetic_dataset import make_synthetic_dataset

pytestmark = pytest.mark.rounding

RETINANET = ROOT / "configs/Demo/libra_retinanet_R_18_FPN.yaml"


def tta_cfg(config, sizes, **overrides):
    options = {"MODEL__RETINANET__NUM_CLASSES": 6, "TEST__AUG__ENABLED": True, **overrides}
    return demo_cfg(config, TEST__AUG__MIN_SIZES=sizes, TEST__AUG__MAX_SIZE=300, **options)


def one_image():
    """Input of 96 x 128 pixels from a file of twice that size."""
    image = random_inputs(0, size=(96, 128))[0]["image"].to(torch.uint8)
    return [{"image": image, "height": 192, "width": 256}]


@pytest.mark.parametrize("system", ["mask_rcnn", "cascade_rcnn"])
def test_rcnn(system):
    """The same detections, masks included, as with Detectron2's own class."""
    cfg = tta_cfg(ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml", (80, 112))
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.1
    model = build_model(cfg)
    with EventStorage(), torch.no_grad():
        for _ in range(3):  # running statistics of batch norm
            model(random_inputs(3, 3))
        model.eval()
        inputs = one_image()
        (ours,) = add_test_time_augmentation(cfg, model)(inputs)
        (theirs,) = GeneralizedRCNNWithTTA(cfg, model)(inputs)
    ours, theirs = ours["instances"], theirs["instances"]
    assert len(ours) > 3
    assert ours.has("pred_masks") == theirs.has("pred_masks") == (system == "mask_rcnn")
    for name, value in ours.get_fields().items():
        value, other = (getattr(x, "tensor", x) for x in (value, theirs.get(name)))
        assert torch.equal(value, other), name


def test_models():
    """A RetinaNet, also in a DistributedDataParallel; other models are refused."""
    cfg = tta_cfg(RETINANET, (96,))
    parallel = DistributedDataParallel.__new__(DistributedDataParallel)  # without processes
    torch.nn.Module.__init__(parallel)
    parallel.module = build_model(cfg)
    for model in (parallel, parallel.module):
        tta = add_test_time_augmentation(cfg, model)
        assert (type(tta), tta.model) == (RetinaNetWithTTA, parallel.module)
    with pytest.raises(InputError, match="there is no test-time augmentation of a Identity"):
        add_test_time_augmentation(cfg, torch.nn.Identity())


def test_retinanet_merges():
    """Detections at two sizes, flipped and not, in batches of 3: NMS in coordinates of the file."""
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
    cfg.freeze()
    before = cfg.clone()
    merged = RetinaNetWithTTA(cfg, Model())(one_image())[0]["instances"]
    assert batches == [[(96, 128), (96, 128), (48, 64)], [(48, 64)]]
    same = [20, 20, 60, 60]
    assert merged.pred_boxes.tensor.tolist() == [same, same, [80, 40, 160, 120]]
    assert merged.scores.tolist() == [0.875, 0.625, 0.375]
    assert merged.pred_classes.tolist() == [5, 2, 5]
    assert merged.image_size == (192, 256)
    assert cfg == before


@pytest.mark.parametrize("interpolation", ["pillow", "opencv"])
def test_interpolation(interpolation):
    """Augmented images are resized with the interpolation of the config, and boxes accordingly."""
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
            kinds = {type(x) for x in augmented[j]["transforms"].transforms}
            assert (OpenCVResizeTransform in kinds) == is_opencv


def test_evaluation(tmp_path):
    """Reported as "bbox_TTA" besides "bbox"; without any augmentation the numbers are the same."""
    opts = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.FLIP", False]
    opts += [*TINY, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path]
    opts += ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    data = tmp_path / "data"
    make_synthetic_dataset(str(data), num_images=3, size=96, seed=3)
    lines = run(*own_data(data, "train", "val"), *opts, config=RETINANET)
    plain, augmented = [x for x in lines if x.startswith("bbox")]
    assert augmented.replace("bbox_TTA", "bbox") == plain
    opts += ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    lines = run("--eval-only", *own_data(data, "val"), *opts, config=RETINANET)
    assert [x for x in lines if x.startswith("bbox")] == [plain, augmented]
