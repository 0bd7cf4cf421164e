# SPDX-License-Identifier: Apache-2.0
"""The LazyConfigs of configs/ are equivalent to the YAML configs of the same names."""

import copy
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, load_cfg
from omegaconf import OmegaConf
from test_devices import make_inputs

from detectron2.config import LazyConfig
from detectron2.utils.events import EventStorage

from libra_d2.config import make_recipe

PAIRS = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in (ROOT / "configs").glob("*/*.py")
    if path.with_suffix(".yaml").exists() and path.parent.name != "FineTuning"
)


DEEP = [name for name in PAIRS if "101" in name]


@pytest.fixture(params=PAIRS)
def pair(request):
    """The recipes of a YAML config and a LazyConfig of the same name, on the CPU."""
    path = ROOT / f"configs/{request.param}"
    configs = (load_cfg(f"{path}.yaml"), LazyConfig.load(f"{path}.py"))
    recipes = [make_recipe(config) for config in configs]
    for recipe in recipes:
        recipe.device = "cpu"
    return recipes


def test_all_systems():
    """Each published system has a LazyConfig, as have Mask, Cascade and Cascade Mask R-CNN."""
    published = {p.stem for p in (ROOT / "configs/COCO-Detection").glob("libra_*.yaml")}
    assert published <= {name.split("/")[1] for name in PAIRS}
    assert len(PAIRS) == len(published) + 3


def test_same_settings(pair):
    """Settings outside the model: data, input, schedule, initial weights."""
    for setting in (
        *("train_datasets", "test_datasets", "image_format", "interpolation", "needs_proposals"),
        *("weights", "batch_size", "learning_rate", "max_iter", "num_classes", "has_masks"),
        *("alpha", "beta", "gamma", "form", "score_threshold", "nms_threshold", "max_detections"),
    ):
        of_yaml, of_lazy = (getattr(recipe, setting) for recipe in pair)
        assert of_yaml == of_lazy, setting
    for is_train in (True, False):
        assert pair[0].sizes(is_train) == pair[1].sizes(is_train)
    assert [*pair[0].iou_thresholds] == [*pair[1].iou_thresholds]


def test_fine_tuning():
    """From the published weights, in epochs, with the best model, in both languages."""
    path = ROOT / "configs/FineTuning/libra_faster_rcnn_R_50_FPN"
    recipes = [make_recipe(load_cfg(f"{path}.yaml")), make_recipe(LazyConfig.load(f"{path}.py"))]
    for recipe in recipes:
        assert recipe.weights == "libra://COCO-Detection/libra_faster_rcnn_R_50_FPN_1x"
        found = (recipe.epochs, recipe.eval_period, recipe.best_metric, recipe.max_checkpoints)
        assert found == (12, 0, "bbox/AP", 1)
        assert (recipe.batch_size, recipe.learning_rate, recipe.amp) == (4, 0.005, True)
        assert recipe.sizes(True) == ((480, 800), 1333)
        recipe.max_iter = 200  # of which the first 100 or 10 warm up
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.005)
        schedule, rates = recipe.build_lr_scheduler(optimizer), []
        for _ in range(200):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step(), schedule.step()
        assert rates[0] < 1e-5
        assert rates[-1] < 0.001 * max(rates)


def test_same_schedule(pair):
    """Optimizer settings, and learning rates at every change of the schedule."""
    found = []
    for recipe in pair:
        layer = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
        optimizer = recipe.build_optimizer(layer)
        scheduler = recipe.build_lr_scheduler(optimizer)
        groups = [{name: optimizer.defaults[name] for name in ("momentum", "nesterov")}]
        for iteration in (0, 1, 250, 498, 499, 500, 58639, 58640, 80629, 80630, 87959):
            scheduler.last_epoch = iteration - 1
            scheduler.step()
            # Parameters with the same settings are in one group or in several.
            numbers = Counter()
            for group in optimizer.param_groups:
                numbers[group["lr"], group["weight_decay"]] += len(group["params"])
            groups.append(numbers)
        found.append(groups)
    assert found[0] == found[1]


@pytest.mark.parametrize("pair", DEEP, indirect=True)
def test_same_structure(pair):
    """Deep backbones below the heads of ResNet-50's: all layers, and which are trained."""
    found = []
    for recipe in pair:
        recipe.device = "meta"
        with torch.device("meta"):
            model = recipe.build_model()
        parameters = {k: (v.shape, v.requires_grad) for k, v in model.named_parameters()}
        found.append((str(model), parameters))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", DEEP)
def test_rest_of_deep_models(name):
    """It is that of the model with ResNet-50."""
    other = re.sub("[RX]_101(_64x4d)?", "R_50", name)
    deep, known = (LazyConfig.load(f"{ROOT}/configs/{x}.py").model for x in (name, other))
    for model in (deep, known):
        del model.backbone.bottom_up.stages
    assert OmegaConf.to_container(deep) == OmegaConf.to_container(known)


@pytest.mark.parametrize("pair", [x for x in PAIRS if x not in DEEP], indirect=True)
def test_same_model(pair):
    """The same weights and seed give bitwise equal losses, gradients and detections."""
    results, all_numbers, weights = [], [], None
    inputs = make_inputs(pair[0].needs_proposals, size=(64, 64))
    for recipe in pair:
        torch.manual_seed(1)
        model = recipe.build_model()
        for value in model.state_dict().values():
            # Activations of a model with random weights would explode.
            if value.is_floating_point() and value.dim() == 4:
                value.mul_(0.5)
        # Cascade R-CNN's heads are initialized in another order.
        weights = weights or copy.deepcopy(model.state_dict())
        model.load_state_dict(weights)
        # The numbers of boxes are compared; with fewer of them, the rest takes a third of the time.
        samplers = [x for x in model.modules() if hasattr(x, "batch_size_per_image")]
        numbers = [(x.batch_size_per_image, getattr(x, "post_nms_topk", 0)) for x in samplers]
        for part in samplers:
            part.batch_size_per_image, part.post_nms_topk = 64, {True: 100, False: 50}
        torch.manual_seed(2)
        with EventStorage():
            losses = model(copy.deepcopy(inputs))
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        # Everything is trained but stem and res2.
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert gradients.keys() == trained
        stages = {name.split(".")[2] for name in trained if "bottom_up" in name}
        assert stages == {"res3", "res4", "res5"}
        model.eval()
        for part in model.modules():
            if hasattr(part, "test_score_thresh"):
                part.test_score_thresh = 0.0
                part.test_topk_per_image = part.max_detections_per_image = 20
        with torch.no_grad():
            found = model(copy.deepcopy(inputs))[0]["instances"].get_fields()
        found = {name: getattr(value, "tensor", value) for name, value in found.items()}
        results.append((dict(model.state_dict()), losses, gradients, found))
        all_numbers.append(numbers)
    assert all_numbers[0] == all_numbers[1]
    for ours, theirs in zip(*results):
        assert list(ours) == list(theirs)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
            assert torch.isfinite(ours[name]).all(), name
    assert len(results[0][3]["scores"]) > 0
