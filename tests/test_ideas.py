# SPDX-License-Identifier: Apache-2.0
import pytest
from conftest import DEMO_CONFIG, load_cfg

from detectron2 import model_zoo as detectron2_zoo

from libra_d2 import model_zoo
from libra_d2.config import BASELINE, DETECTRON2_RECIPE, VARIANTS, make_recipe

LOSSES = ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE")
# What turns each idea off: keys and values, and the options of a LazyConfig.
SAMPLING, PYRAMID, L1 = (
    [x for name in ("NEGATIVES", "POSITIVES") for x in (f"MODEL.LIBRA.SAMPLER.{name}", "random")],
    ["MODEL.LIBRA.BFP.ENABLED", False],
    [LOSSES[0], "smooth_l1", LOSSES[1], "smooth_l1"],
)
SAMPLER = "model.roi_heads.proposal_sampler"
LAZY = {
    "MODEL.LIBRA.SAMPLER.NEGATIVES": f"{SAMPLER}.negatives=random",
    "MODEL.LIBRA.SAMPLER.POSITIVES": f"{SAMPLER}.positives=random",
    "MODEL.LIBRA.SAMPLER.MODE": f"{SAMPLER}.mode=reference",
    "MODEL.LIBRA.BFP.ENABLED": "model.backbone.balanced=False",
    LOSSES[0]: "model.roi_heads.box_predictor.box_reg_loss_type=smooth_l1",
}


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("baseline", [*SAMPLING, *PYRAMID, *L1]),
        ("sampling", [*PYRAMID, *L1]),
        ("feature_pyramid", [*SAMPLING, *L1]),
        ("balanced_l1", [*PYRAMID, *SAMPLING]),
        ("all", []),
        ("all_reference", ["MODEL.LIBRA.SAMPLER.MODE", "reference"]),
    ],
)
def test_variants(variant, options):
    """Options that disable the other ideas, in both config languages."""
    assert len(VARIANTS) == 6
    disabled, bins = VARIANTS[variant], variant == "all_reference"
    found = make_recipe(load_cfg(DEMO_CONFIG)).variant_options(disabled, reference_bins=bins)
    assert sorted(zip(*[iter(found)] * 2)) == sorted(zip(options[::2], map(str, options[1::2])))
    config = model_zoo.get_config("COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.py")
    lazy = [LAZY[key] for key in options[::2] if key in LAZY]
    assert sorted(make_recipe(config).variant_options(disabled, bins)) == sorted(lazy)


def test_baseline():
    """All ideas disabled; Detectron2's recipe, key by key."""
    assert [*BASELINE] == [*SAMPLING, *PYRAMID, *L1]
    cfg = load_cfg(DEMO_CONFIG)
    cfg.merge_from_list([*BASELINE, *DETECTRON2_RECIPE])
    both = {"LOW_QUALITY_IOU": -1.0, "PADDING_ANCHORS": True}
    assert {**both, "MAX_NEG_PER_POS": -1, "NORMALIZER": "batch_size"} == cfg.MODEL.LIBRA.RPN
    retinanet = {"NORMALIZER": "moving_average", "P7_RELU": True, "CLIP_BOXES": False}
    assert {**both, **retinanet} == cfg.MODEL.LIBRA.RETINANET


def test_has_ideas():
    """By the names of parts, or their classes; mmdetection's RPN is none of the ideas."""
    for key in ("META_ARCHITECTURE", "BACKBONE.NAME", "ROI_HEADS.NAME", "PROPOSAL_GENERATOR.NAME"):
        cfg = load_cfg(DEMO_CONFIG)
        cfg.merge_from_list(["MODEL.BACKBONE.NAME", "a", "MODEL.ROI_HEADS.NAME", "b"])
        assert not make_recipe(cfg).has_ideas
        cfg.merge_from_list([f"MODEL.{key}", "LibraX"])
        assert make_recipe(cfg).has_ideas == (key != "PROPOSAL_GENERATOR.NAME")
    name = "COCO-Detection/{}retinanet_R_50_FPN_1x.py"
    assert make_recipe(model_zoo.get_config(name.format("libra_"))).has_ideas is True
    assert make_recipe(detectron2_zoo.get_config(name.format(""))).has_ideas is False
