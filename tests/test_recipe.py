# SPDX-License-Identifier: Apache-2.0
"""libra_d2.config: recipe, yaml_recipe and lazy_recipe, which say the same in two languages."""

import functools

import pytest
import torch
from conftest import demo_cfg
from omegaconf import OmegaConf
from test_lazy import FPN_MODELS, balanced

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import ProposalNetwork

from libra_d2.config import Recipe, SettingMissing, make_recipe
from libra_d2.config.recipe import Setting
from libra_d2.data.resize import OpenCVResizeShortestEdge
from libra_d2.errors import InputError

LANGUAGES = pytest.mark.parametrize("language", ["yaml", "lazy"])
_TTA, _PREDICTOR = "train.test_time_augmentation", "model.roi_heads.box_predictor"
_TRAIN, _TEST, _TRAINER = "dataloader.train", "dataloader.test", "MODEL.LIBRA.TRAINER"
_HEADS, _FILES = "MODEL.ROI_HEADS", "DATASETS.PROPOSAL_FILES"
_MATCHER = "model.roi_heads.proposal_matcher"
# Settings, their names in YAML configs and in LazyConfigs, and a value.
SETTINGS = [
    ("output_dir", "OUTPUT_DIR", "train.output_dir", "elsewhere"),
    ("seed", "SEED", "train.seed", 7),
    ("device", "MODEL.DEVICE", "train.device", "cuda:1"),
    ("weights", "MODEL.WEIGHTS", "train.init_checkpoint", "a.pth"),
    ("max_iter", "SOLVER.MAX_ITER", "train.max_iter", 11),
    ("learning_rate", "SOLVER.BASE_LR", "optimizer.lr", 0.125),
    ("batch_size", "SOLVER.IMS_PER_BATCH", f"{_TRAIN}.total_batch_size", 6),
    ("reference_world_size", "SOLVER.REFERENCE_WORLD_SIZE", None, 3),
    ("amp", "SOLVER.AMP.ENABLED", "train.amp.enabled", True),
    ("checkpoint_period", "SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period", 3),
    ("log_period", None, "train.log_period", 14),
    ("train_datasets", "DATASETS.TRAIN", f"{_TRAIN}.dataset.names", ("a", "b")),
    ("test_datasets", "DATASETS.TEST", f"{_TEST}.dataset.names", ("c",)),
    (
        "train_proposals",
        "DATASETS.PROPOSAL_FILES_TRAIN",
        f"{_TRAIN}.dataset.proposal_files",
        ("d",),
    ),
    ("test_proposals", f"{_FILES}_TEST", f"{_TEST}.dataset.proposal_files", ("f",)),
    ("num_workers", "DATALOADER.NUM_WORKERS", f"{_TRAIN}.num_workers", 5),
    ("image_format", "INPUT.FORMAT", f"{_TEST}.mapper.image_format", "L"),
    ("mask_format", "INPUT.MASK_FORMAT", f"{_TRAIN}.mapper.instance_mask_format", "bitmask"),
    ("eval_period", "TEST.EVAL_PERIOD", "train.eval_period", 2),
    ("num_pictures", "MODEL.LIBRA.NUM_PICTURES", "train.num_pictures", 1),
    ("precise_bn", "TEST.PRECISE_BN.ENABLED", None, True),
    ("precise_bn_iterations", "TEST.PRECISE_BN.NUM_ITER", None, 15),
    ("tta", "TEST.AUG.ENABLED", f"{_TTA}.enabled", True),
    ("tta_min_sizes", "TEST.AUG.MIN_SIZES", f"{_TTA}.min_sizes", (16, 24)),
    ("tta_max_size", "TEST.AUG.MAX_SIZE", f"{_TTA}.max_size", 99),
    ("tta_flip", "TEST.AUG.FLIP", f"{_TTA}.flip", False),
    ("max_checkpoints", f"{_TRAINER}.MAX_CHECKPOINTS", "train.checkpointer.max_to_keep", 12),
    *(
        (name, f"{_TRAINER}.{name.upper()}", f"train.{name}", value)
        for name, value in (
            *(("accumulation_steps", 2), ("ema_decay", 0.5), ("best_metric", "x")),
            *(("patience", 4), ("validation_loss", True)),
        )
    ),
]
R_CNN = [
    ("num_classes", "MODEL.ROI_HEADS.NUM_CLASSES", "model.roi_heads.num_classes", 13),
    ("score_threshold", f"{_HEADS}.SCORE_THRESH_TEST", f"{_PREDICTOR}.test_score_thresh", 0.25),
    ("nms_threshold", f"{_HEADS}.NMS_THRESH_TEST", f"{_PREDICTOR}.test_nms_thresh", 0.75),
    ("max_detections", "TEST.DETECTIONS_PER_IMAGE", f"{_PREDICTOR}.test_topk_per_image", 9),
    ("iou_thresholds", f"{_HEADS}.IOU_THRESHOLDS", f"{_MATCHER}.thresholds", (0.375,)),
    ("smooth_l1_beta", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", f"{_PREDICTOR}.smooth_l1_beta", 0.625),
    ("num_bins", "MODEL.LIBRA.SAMPLER.NUM_BINS", "model.roi_heads.proposal_sampler.num_bins", 8),
]
RETINANET = [
    ("num_classes", "MODEL.RETINANET.NUM_CLASSES", "model.num_classes", 13),
    ("score_threshold", "MODEL.RETINANET.SCORE_THRESH_TEST", "model.test_score_thresh", 0.25),
    ("nms_threshold", "MODEL.RETINANET.NMS_THRESH_TEST", "model.test_nms_thresh", 0.75),
    ("max_detections", "TEST.DETECTIONS_PER_IMAGE", "model.max_detections_per_image", 9),
    ("smooth_l1_beta", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "model.smooth_l1_beta", 0.625),
    ("normalizer", "MODEL.LIBRA.RETINANET.NORMALIZER", "model.normalizer", "none"),
]
for _settings, _place in ((R_CNN, _PREDICTOR), (RETINANET, "model")):
    for _name, _value in (("alpha", 0.3), ("beta", 0.7), ("gamma", 1.3), ("form", "reference")):
        _key = f"MODEL.LIBRA.BALANCED_L1.{_name.upper()}"
        _settings.append((_name, _key, f"{_place}.balanced_l1.{_name}", _value))
MODELS = {"mask_rcnn_fpn": R_CNN, "retinanet": RETINANET}


def lazy_config(name="mask_rcnn_fpn"):
    config = OmegaConf.create({}, flags={"allow_objects": True})
    config.model = balanced(name)
    config.dataloader = model_zoo.get_config("common/data/coco.py").dataloader
    config.optimizer = model_zoo.get_config("common/optim.py").SGD
    config.train = model_zoo.get_config("common/train.py").train
    return config


def make(language, name="mask_rcnn_fpn"):
    """The recipe of that model."""
    if language == "lazy":
        return make_recipe(lazy_config(name))
    is_retinanet = name == "retinanet"
    cfg = demo_cfg(MODEL__META_ARCHITECTURE="LibraRetinaNet") if is_retinanet else demo_cfg()
    cfg.MODEL.MASK_ON = name == "mask_rcnn_fpn"
    return make_recipe(cfg)


def section(config, name):
    """The part of a config with that name."""
    if OmegaConf.is_config(config):
        return OmegaConf.select(config, name)
    return functools.reduce(getattr, name.split("."), config)


@LANGUAGES
@pytest.mark.parametrize("model", MODELS)
def test_settings(language, model):
    """Each is read from the place that the user knows, written there, and named so."""
    recipe = make(language, model)
    rows = [(x[0], x[1] if language == "yaml" else x[2], x[3]) for x in SETTINGS + MODELS[model]]
    for name, own, value in rows:
        if own is None:
            assert not recipe.has(name)
            assert recipe.get(name, "default") == "default"
            with pytest.raises(SettingMissing, match=f"^{name}: the config lacks it"):
                getattr(recipe, name)
            continue
        assert recipe.has(name)
        assert recipe.name_of(name) == own
        assert getattr(recipe, name) != value
        setattr(recipe, name, value)
    for name, own, value in rows:  # none has taken the place of another
        if own is not None:
            for found in (section(recipe.config, own), recipe.get(name)):
                assert (tuple(found) if isinstance(value, tuple) else found) == value


def test_all_settings_are_here():
    named = {row[0] for row in SETTINGS + R_CNN + RETINANET}
    settings = {name for name, x in vars(Recipe).items() if isinstance(x, Setting)}
    assert settings == {*named, "interpolation"}


def test_several_places():
    """All of them are written that the config has, and none that its model does not read."""
    recipe = make("lazy", "cascade_rcnn")
    recipe.score_threshold, recipe.alpha = 0.4, 0.3
    predictors = recipe.config.model.roi_heads.box_predictors
    assert [p.test_score_thresh for p in predictors] == [0.4] * 3
    assert [p.balanced_l1.alpha for p in predictors] == [0.3] * 3
    assert recipe.name_of("alpha") == "model.roi_heads.box_predictors.0.balanced_l1.alpha"
    assert not {"test_score_thresh", "balanced_l1"} & set(recipe.config.model)
    assert recipe.iou_thresholds == (0.5,)
    recipe = make("yaml", "retinanet")  # whose test-time augmentation reads those of the ROI heads
    recipe.num_classes, recipe.nms_threshold = 7, 0.3
    for section in (recipe.config.MODEL.ROI_HEADS, recipe.config.MODEL.RETINANET):
        assert (section.NUM_CLASSES, section.NMS_THRESH_TEST) == (7, 0.3)


@pytest.mark.parametrize("name", FPN_MODELS)
def test_num_classes(name):
    """In every head that counts things, and nowhere else."""
    recipe = make("lazy", name)
    recipe.num_classes, recipe.device = 3, "cpu"
    weights = recipe.build_model().state_dict()
    counts = {v.shape[0] for key, v in weights.items() if key.endswith("cls_score.bias")}
    assert counts == ({27} if name == "retinanet" else {4})
    if recipe.has_masks:
        assert len(weights["roi_heads.mask_head.predictor.bias"]) == 3
    if name == "panoptic_fpn":
        assert len(weights["sem_seg_head.predictor.bias"]) == 54


def test_left_out():
    """Of a config with nothing but a model: defaults, which can be changed, and errors."""
    config = OmegaConf.create({}, flags={"allow_objects": True})
    config.model = balanced("retinanet")
    recipe = make_recipe(config)
    assert (recipe.patience, recipe.train_datasets, recipe.tta_flip) == (0, (), True)
    recipe.patience = 3
    assert recipe.config.train.patience == 3
    assert recipe.name_of("seed") == "train.seed"
    assert not recipe.has("max_iter")
    assert recipe.get("max_iter", 5) == 5
    for setting, name in (("max_iter", "train.max_iter"), ("learning_rate", "optimizer.lr")):
        with pytest.raises(SettingMissing, match=f"^{name}: the config lacks it; it has"):
            getattr(recipe, setting)
    for build, place in (
        (lambda: recipe.build_optimizer(torch.nn.Linear(1, 1)), "optimizer.params"),
        (lambda: recipe.build_lr_scheduler(None), "lr_multiplier"),
        (lambda: recipe.build_augmentations(False), "dataloader.test.mapper.augmentations"),
        (lambda: recipe.build_train_loader(0), "dataloader.train.mapper"),
    ):
        with pytest.raises(SettingMissing, match=f"^{place}: the LazyConfig lacks it"):
            build()


@LANGUAGES
def test_copy_and_freeze(language):
    """A copy can be changed, also of a frozen recipe, and changes nothing but itself."""
    recipe = make(language)
    recipe.seed = 3
    recipe.freeze()
    with pytest.raises(Exception, match="immutable|read-only"):
        recipe.seed = 5
    copy = recipe.copy()
    copy.seed = 5
    assert (copy.seed, recipe.seed) == (5, 3)


@LANGUAGES
def test_dump_and_options(language):
    recipe = make(language)
    recipe.seed = 8
    written = recipe.dump()
    assert ("SEED: 8\n" in written) == (language == "yaml")
    assert ("  seed: 8\n" in written) == (language == "lazy")
    expected = {"yaml": ["OUTPUT_DIR", "a", "SEED", "3"]}
    expected["lazy"] = ["train.output_dir=a", "train.seed=3"]
    assert recipe.options({"output_dir": "a", "seed": 3}) == expected[language]


@pytest.mark.parametrize(
    ("language", "model", "place"),
    [
        ("yaml", "mask_rcnn_fpn", "SOLVER.BASE_LR"),
        ("lazy", "mask_rcnn_fpn", "train.max_iter"),
        ("lazy", "mask_rcnn_fpn", "optimizer.lr"),
        ("lazy", "cascade_rcnn", "model.roi_heads.box_predictors.1.test_score_thresh"),
    ],
)
def test_nulls(language, model, place):
    """They are errors where there must be a value; Detectron2, too, takes some."""
    recipe = make(language, model)
    recipe.max_checkpoints = 0 if language == "yaml" else None
    recipe.check_nulls()
    assert recipe.max_checkpoints == 0
    parent, _, name = place.rpartition(".")
    section(recipe.config, parent)[name] = None
    with pytest.raises(InputError, match=f"^{place} is null: leave it out"):
        recipe.check_nulls()


@LANGUAGES
def test_what_the_model_is(language):
    recipe = make(language, "keypoint_rcnn_fpn")
    kinds = ("has_masks", "has_keypoints", "needs_proposals", "is_retinanet", "is_proposal_network")

    def kinds_of(recipe):
        return [name for name in kinds if getattr(recipe, name)]

    if language == "yaml":
        recipe.config.MODEL.KEYPOINT_ON = recipe.config.MODEL.LOAD_PROPOSALS = True
    else:
        recipe.config.model.proposal_generator = None
    assert kinds_of(recipe) == ["has_keypoints", "needs_proposals"]
    recipe = make(language)
    assert (kinds_of(recipe), recipe.architecture) == (["has_masks"], "GeneralizedRCNN")
    assert recipe.ddp_options["broadcast_buffers"] is False
    rpn = recipe.rpn_only()
    assert kinds_of(rpn)[-1] == "is_proposal_network"
    rpn.device = "cpu"
    model = rpn.build_model()
    assert type(model) is ProposalNetwork
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert parts == {"backbone", "proposal_generator"}
    assert kinds_of(recipe) == ["has_masks"]
    recipe = make(language, "retinanet")
    assert (kinds_of(recipe), recipe.architecture) == (["is_retinanet"], "LibraRetinaNet")
    assert make("lazy", "panoptic_fpn").architecture == "PanopticFPN"


@LANGUAGES
def test_sizes(language):
    """What images are resized to, and what resizes them."""
    recipe = make(language)
    assert recipe.interpolation == "pillow" or language == "yaml"
    names = ["INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN"]
    names += ["short_edge_length and max_size in dataloader.train.mapper.augmentations"]
    assert recipe.sizes_name(True) == names[language == "lazy"]
    if language == "yaml":
        recipe.config.INPUT.update(MIN_SIZE_TRAIN=(64, 80), MAX_SIZE_TRAIN=96)
        recipe.config.INPUT.update(MIN_SIZE_TEST=72, MAX_SIZE_TEST=88)
        recipe.interpolation = "opencv"
        assert recipe.config.MODEL.LIBRA.INPUT.INTERPOLATION == "opencv"
    else:
        train, test = recipe.config.dataloader.train.mapper, recipe.config.dataloader.test.mapper
        train.augmentations[0].update(short_edge_length=[64, 80], max_size=96)
        test.augmentations = [L(OpenCVResizeShortestEdge)(short_edge_length=72, max_size=88)]
    assert (recipe.sizes(True), recipe.sizes(False)) == (((64, 80), 96), ((72,), 88))
    assert recipe.interpolation == "opencv"
    if language == "lazy":
        test.augmentations = [L(OpenCVResizeShortestEdge)(short_edge_length=[64, 96])]
        assert recipe.sizes(False) == ((64,), 2**31 - 1)
        test.augmentations = []
        assert recipe.sizes(False) == ((), 0)


def test_scaled_to():
    """YAML configs say for how many processes they are."""
    recipe = make("yaml")
    recipe.reference_world_size, recipe.batch_size, recipe.learning_rate = 4, 8, 1.0
    recipe.max_iter = 10
    scaled = recipe.scaled_to(2)
    assert (scaled.batch_size, scaled.learning_rate, scaled.max_iter) == (4, 0.5, 20)
    assert recipe.batch_size == 8
    lazy = make("lazy")
    assert lazy.scaled_to(2) is lazy


def test_test_time_augmentation_of_lazy_configs():
    """What Detectron2's, which reads keys of YAML configs, is told."""
    recipe = make("lazy")
    recipe.device, recipe.num_classes, recipe.nms_threshold = "cpu", 3, 0.3
    recipe.tta_min_sizes, recipe.tta_max_size, recipe.tta_flip = (16, 24), 99, False
    recipe.max_detections, recipe.image_format = 9, "RGB"
    model = recipe.add_test_time_augmentation(recipe.build_model())
    cfg, mapper = model.cfg, model.tta_mapper
    assert (mapper.min_sizes, mapper.max_size, mapper.flip) == ((16, 24), 99, False)
    assert (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON, cfg.MODEL.LOAD_PROPOSALS) == (1, 0, 0)
    heads = cfg.MODEL.ROI_HEADS
    assert (heads.NUM_CLASSES, heads.NMS_THRESH_TEST) == (3, 0.3)
    assert (cfg.TEST.DETECTIONS_PER_IMAGE, cfg.INPUT.FORMAT) == (9, "RGB")


@pytest.mark.parametrize(
    ("language", "change", "message"),
    [
        ("yaml", "MODEL.LIBRA.BFP.REFINE_LEVEL 5", "^MODEL.LIBRA.BFP.REFINE_LEVEL is 5: the pyra"),
        ("yaml", "MODEL.LIBRA.SAMPLER.NUM_BINS 0", "^MODEL.LIBRA.SAMPLER.NUM_BINS is 0"),
        ("yaml", "MODEL.LIBRA.BALANCED_L1.BETA 0.", "^MODEL.LIBRA.BALANCED_L1.BETA is 0.0: use a"),
        ("yaml", "MODEL.LIBRA.RPN.NORMALIZER all", "^MODEL.LIBRA.RPN.NORMALIZER is 'all'"),
        ("yaml", "MODEL.LIBRA.SAMPLER.NAME X", "^MODEL.LIBRA.SAMPLER.NAME is 'X': use one of"),
        ("yaml", "MODEL.BACKBONE.NAME x", "^MODEL.BACKBONE.NAME is 'x': nothing has that name"),
        ("yaml", "MODEL.ROI_HEADS.NAME X", "^MODEL.ROI_HEADS.NAME is 'X': nothing has that name"),
        ("yaml", "MODEL.META_ARCHITECTURE X", "^MODEL.META_ARCHITECTURE is 'X': nothing has that"),
        ("yaml", "MODEL.RPN.IN_FEATURES ['p9']", "^MODEL.RPN.IN_FEATURES names 'p9', which MODEL."),
        ("lazy", "model.backbone.refine_level=9", "^refine_level is 9: the pyramid has 5 levels"),
        ("lazy", "model.backbone.refine=x", "^model: it cannot be built: .*argument 'refine'"),
        ("lazy", f"{_PREDICTOR}.box_reg_loss_type=l3", "is 'l3', but a .* knows smooth_l1, giou"),
    ],
)
def test_models_that_cannot_be_built(language, change, message):
    recipe = make(language)
    if language == "yaml":
        recipe.config.merge_from_list(change.split())
    else:
        place, _, value = change.partition("=")
        value = int(value) if value.isdigit() else value
        OmegaConf.update(recipe.config, place, value, force_add=True)
    with pytest.raises(InputError, match=message) as error:
        recipe.build_model()
    assert "\n" not in str(error.value)
