# SPDX-License-Identifier: Apache-2.0
"""The LazyConfigs of configs/, beside the YAML configs of the same names."""

import copy
from collections import Counter

import pytest
import torch
from conftest import ROOT, load_cfg, random_inputs

from detectron2.config import LazyConfig
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from libra_d2.config import make_recipe

PAIRS = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in (ROOT / "configs").glob("*/*.py")
    if path.with_suffix(".yaml").exists()
)


@pytest.fixture(params=PAIRS)
def pair(request):
    """The recipes of the same config in both languages, on the CPU."""
    path = ROOT / f"configs/{request.param}"
    configs = (load_cfg(f"{path}.yaml"), LazyConfig.load(f"{path}.py"))
    recipes = [make_recipe(config) for config in configs]
    for recipe in recipes:
        recipe.device = "cpu"
    return recipes


def test_all_systems_are_there():
    published = {p.stem for p in (ROOT / "configs/COCO-Detection").glob("libra_*.yaml")}
    assert published <= {name.split("/")[1] for name in PAIRS}
    assert len(PAIRS) == len(published) + 2  # Mask and Cascade R-CNN


def test_same_settings(pair):
    """What is no part of the model: data, input, schedule, starting weights."""
    for setting in (
        *("train_datasets", "test_datasets", "image_format", "interpolation", "max_iter"),
        *(
            "batch_size",
            "learning_rate",
            "weights",
            "needs_proposals",
            "has_masks",
            "max_detections",
        ),
        *("alpha", "beta", "gamma", "form", "num_classes"),
        *("score_threshold", "nms_threshold"),
    ):
        of_yaml, of_lazy = (getattr(recipe, setting) for recipe in pair)
        assert of_yaml == of_lazy, setting
    for is_train in (True, False):
        assert pair[0].sizes(is_train) == pair[1].sizes(is_train)
    assert [*pair[0].iou_thresholds] == [*pair[1].iou_thresholds]


def test_same_schedule(pair):
    """Learning rates of each parameter group, at every change of the schedule."""
    rates = []
    for recipe in pair:
        layer = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
        optimizer = recipe.build_optimizer(layer)
        scheduler = recipe.build_lr_scheduler(optimizer)
        steps = {name: optimizer.defaults[name] for name in ("momentum", "nesterov")}
        groups = []
        for iteration in (0, 1, 250, 498, 499, 500, 58639, 58640, 80629, 80630, 87959):
            scheduler.last_epoch = iteration - 1
            scheduler.step()
            # Parameters of one setting are in one group or in several.
            numbers = Counter()
            for group in optimizer.param_groups:
                numbers[group["lr"], group["weight_decay"]] += len(group["params"])
            groups.append(numbers)
        rates.append((steps, groups))
    assert rates[0] == rates[1]


def test_same_model(pair):
    """The same weights and seed give the same losses, gradients and detections, to the last bit."""
    results, weights = [], None
    inputs = random_inputs(3, 2, size=(64, 96))
    if pair[0].needs_proposals:
        for image in inputs:
            corner = torch.rand(40, 2) * 40
            boxes = torch.cat([corner, corner + 4 + 20 * torch.rand(40, 2)], dim=1)
            image["proposals"] = Instances(
                (64, 96), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(40)
            )
    for recipe in pair:
        torch.manual_seed(1)
        model = recipe.build_model()
        for value in model.state_dict().values():
            # Fewer digits for activations that do not explode with random weights.
            if value.is_floating_point() and value.dim() == 4:
                value.mul_(0.5)
        # Cascade R-CNN's heads are made, and drawn, in another order.
        weights = weights or copy.deepcopy(model.state_dict())
        model.load_state_dict(weights)
        torch.manual_seed(2)
        with EventStorage():
            losses = model(copy.deepcopy(inputs))
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        # At the real depth, all is trained but stem and res2.
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert gradients.keys() == trained
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        assert not [name for name in trained if "stem" in name or "res2" in name]
        assert [name for name in trained if "res3.0.conv1.weight" in name]
        model.eval()
        for part in model.modules():
            if hasattr(part, "test_score_thresh"):
                part.test_score_thresh = 0.0
                part.test_topk_per_image = part.max_detections_per_image = 20
        with torch.no_grad():
            found = model(copy.deepcopy(inputs))[0]["instances"].get_fields()
        found = {name: getattr(value, "tensor", value) for name, value in found.items()}
        results.append((dict(model.state_dict()), losses, gradients, found))
    for ours, theirs in zip(*results):
        assert list(ours) == list(theirs)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert len(results[0][3]["scores"]) > 0
    assert all(torch.isfinite(loss) for loss in results[0][1].values())
