# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from conftest import build_model, demo_cfg

from libra_d2.errors import InputError
from libra_d2.evaluation.finite_predictions import finite_predictions

DENSE = {"MODEL__META_ARCHITECTURE": "LibraRetinaNet"}
DENSE["MODEL__BACKBONE__NAME"] = "build_libra_retinanet_resnet_fpn_backbone"
DENSE["MODEL__RETINANET__IN_FEATURES"] = ["p3", "p4", "p5", "p6", "p7"]


def hooks(model):
    return [list(module._forward_hooks.values()) for module in model.modules()]


@pytest.mark.parametrize(
    ("options", "part", "value"),
    [
        ({}, "roi_heads.box_predictor.bbox_pred", "nan"),
        ({}, "roi_heads.box_predictor.cls_score", "inf"),
        ({}, "proposal_generator.rpn_head.objectness_logits", "nan"),
        (DENSE, "head.cls_score", "inf"),
    ],
)
def test_heads(options, part, value, caplog):
    """A head whose outputs are not finite for one of two images is named, once."""
    model = torch.nn.Sequential(build_model(demo_cfg(**options)).eval())
    before = hooks(model)
    images = [{"image": torch.rand(3, 64, 96) * 255} for _ in range(2)]
    with torch.inference_mode(), finite_predictions(model):
        model(images)
    module = model.get_submodule(f"0.{part}")
    head = part.rpartition(".")[0]
    message = f"predictions of 0.{head}(, |.* )are not finite, so that detections are missing"
    for required in (True, False):
        with torch.no_grad():
            module.bias[0] = float(value)
        context = pytest.raises(InputError, match=message) if required else torch.no_grad()
        options = {} if required else {"required": False}
        with context, torch.inference_mode(), finite_predictions(model, **options):
            model(images)
            with torch.inference_mode(False), torch.no_grad():
                module.bias[0] = 0
            model(images)
    assert caplog.text.count("are not finite") == 1
    assert hooks(model) == before


def test_last_image():
    """It counts as the others do."""
    model = torch.nn.Sequential(build_model(demo_cfg()).eval())
    head = model[0].proposal_generator.rpn_head.objectness_logits
    images = [{"image": torch.rand(3, 64, 96) * 255}]
    context = pytest.raises(InputError, match="rpn_head")
    with context, torch.no_grad(), finite_predictions(model):
        model(images)
        head.bias[0] = float("nan")
        model(images)


def test_errors_of_the_body():
    """They are not hidden, and the hooks are taken off. A head may predict nothing."""
    model = torch.nn.Sequential(build_model(demo_cfg()).eval())
    head = model[0].proposal_generator.rpn_head
    head.forward, before = lambda x: ([], None), hooks(model)
    with finite_predictions(model):
        head([])
    with pytest.raises(KeyError), finite_predictions(model):
        raise KeyError
    assert hooks(model) == before
