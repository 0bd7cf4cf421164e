# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg, load_cfg

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from libra_d2.modeling.reference_recipe.padding import pad_masks

pytestmark = pytest.mark.rounding

SIZES = [(96, 130), (160, 64), (150, 129)]  # padded to (160, 160) together
ALONE = [(96, 160), (160, 64)]  # the last one is the largest: all of the batch is its own


def rpn(padding_anchors):
    cfg = demo_cfg(MODEL__LIBRA__RPN__PADDING_ANCHORS=padding_anchors)
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 10**6  # all of them
    cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = -1
    generator = build_model(cfg).proposal_generator
    return generator.anchor_generator, generator.label_and_sample_anchors


def retinanet(padding_anchors):
    cfg = load_cfg(ROOT / "configs/Demo/libra_retinanet_R_18_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.LIBRA.RETINANET.PADDING_ANCHORS = padding_anchors
    model = build_model(cfg)
    return model.anchor_generator, model.label_anchors


@pytest.mark.parametrize(("build", "lowest_level"), [(rpn, 2), (retinanet, 3)])
@pytest.mark.parametrize("batch_size", [(160, 160), (192, 160)])  # some backbones need more
def test_as_if_alone_in_the_batch(build, lowest_level, batch_size):
    """Labels and boxes are those of the image in a batch of its own; padding is labeled -1."""
    instances = []
    for height, width in SIZES:
        boxes = Boxes(torch.tensor([[8.0, 8, 40, 50], [20, 60, 60, 95]]))
        instances.append(
            Instances((height, width), gt_boxes=boxes, gt_classes=torch.tensor([1, 2]))
        )

    built = {padding_anchors: build(padding_anchors) for padding_anchors in (False, True)}

    def label(padding_anchors, batch_size, instances):
        anchor_generator, label_anchors = built[padding_anchors]
        strides = [2**level for level in range(lowest_level, lowest_level + 5)]
        grids = [[-(-side // stride) for side in batch_size] for stride in strides]
        anchors = anchor_generator([torch.zeros(1, 1, *grid) for grid in grids])
        return Boxes.cat(anchors).tensor, *label_anchors(anchors, instances)

    anchors, labels, boxes = label(False, batch_size, instances)
    _, plain_labels, _ = label(True, batch_size, instances)
    for i, size in enumerate([*ALONE, batch_size]):
        alone, (expected_labels,), (expected_boxes,) = label(True, size, [instances[i]])
        known = set(map(tuple, alone.tolist()))
        inside = torch.tensor([tuple(x) in known for x in anchors.tolist()])
        assert inside.sum() == len(alone)
        assert torch.equal(labels[i][inside], expected_labels.to(labels[i].dtype))
        assert torch.equal(boxes[i][inside], expected_boxes)
        assert (labels[i][~inside] == -1).all()
        assert labels[i].dtype == plain_labels[i].dtype
        if size == batch_size:
            assert inside.all()
        else:  # Detectron2 labels padding as background, unless it overlaps an object
            assert (plain_labels[i][~inside] >= 0).double().mean() > 0.9


def test_pad_masks():
    """To 64 x 96, the size of the batch, at the bottom and on the right; what has none stays."""
    masks = BitMasks(torch.ones(2, 40, 70, dtype=torch.bool))
    images = [Instances((40, 70), gt_masks=masks, gt_classes=torch.tensor([1, 2]))]
    images.append(Instances((50, 20), gt_classes=torch.tensor([3])))
    images.append(Instances((50, 20), gt_masks=PolygonMasks([[np.array([0.0, 0, 9, 0, 9, 9])]])))
    first, second, third = pad_masks(images)
    assert third is images[2]
    expected = torch.zeros(2, 64, 96, dtype=torch.bool)
    expected[:, :40, :70] = True
    assert torch.equal(first.gt_masks.tensor, expected)
    assert (first.image_size, first.gt_classes.tolist()) == ((40, 70), [1, 2])
    assert second is images[1]
