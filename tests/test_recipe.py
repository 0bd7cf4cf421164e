# SPDX-License-Identifier: Apache-2.0
"""libra_d2.config: recipe, yaml_recipe and lazy_recipe, which say the same in two languages."""

import builtins
import functools

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import demo_cfg
from omegaconf import OmegaConf
from PIL import Image
from test_lazy import FPN_MODELS, balanced

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import ProposalNetwork

import libra_d2.config.recipe
from libra_d2.config import Recipe, SettingMissing, add_libra_config, make_recipe
from libra_d2.config.recipe import Setting
from libra_d2.data import LibraDatasetMapper
from libra_d2.data.proposals import write_proposals
from libra_d2.data.resize import OpenCVResizeShortestEdge
from libra_d2.errors import InputError
from libra_d2.evaluation import TASKS

LANGUAGES = pytest.mark.parametrize("language", ["yaml", "lazy"])
# Settings, their names in YAML configs and in LazyConfigs, and a value.
SETTINGS = """
output_dir            OUTPUT_DIR                    train.output_dir                     elsewhere
seed                  SEED                          train.seed                           7
device                MODEL.DEVICE                  train.device                         cuda:1
weights               MODEL.WEIGHTS                 train.init_checkpoint                a.pth
max_iter              SOLVER.MAX_ITER               train.max_iter                       11
learning_rate         SOLVER.BASE_LR                optimizer.lr                         0.125
batch_size            SOLVER.IMS_PER_BATCH          dataloader.train.total_batch_size    6
reference_world_size  SOLVER.REFERENCE_WORLD_SIZE   None                                 3
amp                   SOLVER.AMP.ENABLED            train.amp.enabled                    true
checkpoint_period     SOLVER.CHECKPOINT_PERIOD      train.checkpointer.period            3
log_period            None                          train.log_period                     14
train_datasets        DATASETS.TRAIN                dataloader.train.dataset.names       [a,b]
test_datasets         DATASETS.TEST                 dataloader.test.dataset.names        [c]
train_proposals       DATASETS.PROPOSAL_FILES_TRAIN dataloader.train.dataset.proposal_files [d]
test_proposals        DATASETS.PROPOSAL_FILES_TEST  dataloader.test.dataset.proposal_files [f]
num_workers           DATALOADER.NUM_WORKERS        dataloader.train.num_workers         5
image_format          INPUT.FORMAT                  dataloader.test.mapper.image_format  L
mask_format           INPUT.MASK_FORMAT dataloader.train.mapper.instance_mask_format     bitmask
check_images          MODEL.LIBRA.INPUT.CHECK_IMAGES train.check_images              9
eval_period           TEST.EVAL_PERIOD              train.eval_period                    2
num_pictures          MODEL.LIBRA.NUM_PICTURES      train.num_pictures                   1
precise_bn            TEST.PRECISE_BN.ENABLED       None                                 true
precise_bn_iterations TEST.PRECISE_BN.NUM_ITER      None                                 15
tta                   TEST.AUG.ENABLED              train.test_time_augmentation.enabled true
tta_min_sizes         TEST.AUG.MIN_SIZES            train.test_time_augmentation.min_sizes [16,24]
tta_max_size          TEST.AUG.MAX_SIZE             train.test_time_augmentation.max_size 99
tta_flip              TEST.AUG.FLIP                 train.test_time_augmentation.flip    false
max_checkpoints       MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS    train.checkpointer.max_to_keep 12
accumulation_steps    MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS train.accumulation_steps    2
ema_decay             MODEL.LIBRA.TRAINER.EMA_DECAY          train.ema_decay             0.5
best_metric           MODEL.LIBRA.TRAINER.BEST_METRIC        train.best_metric           x
patience              MODEL.LIBRA.TRAINER.PATIENCE           train.patience              4
epochs                MODEL.LIBRA.TRAINER.EPOCHS             train.epochs                2.5
validation_loss       MODEL.LIBRA.TRAINER.VALIDATION_LOSS    train.validation_loss       true
channels_last MODEL.LIBRA.SPEED.CHANNELS_LAST train.speed.channels_last never
fold_norm MODEL.LIBRA.SPEED.FOLD_NORM train.speed.fold_norm false
parallel_roi_align MODEL.LIBRA.SPEED.PARALLEL_ROI_ALIGN train.speed.parallel_roi_align false
winograd MODEL.LIBRA.SPEED.WINOGRAD train.speed.winograd false
lean_fpn MODEL.LIBRA.SPEED.LEAN_FPN train.speed.lean_fpn false
keep_freed_memory MODEL.LIBRA.SPEED.KEEP_FREED_MEMORY train.speed.keep_freed_memory true
amp_dtype MODEL.LIBRA.SPEED.AMP_DTYPE train.speed.amp_dtype bfloat16
compile_backbone MODEL.LIBRA.SPEED.COMPILE_BACKBONE train.speed.compile_backbone true
"""
R_CNN = """
num_classes     MODEL.ROI_HEADS.NUM_CLASSES       model.roi_heads.num_classes                 13
score_threshold MODEL.ROI_HEADS.SCORE_THRESH_TEST {}.test_score_thresh                        .25
nms_threshold   MODEL.ROI_HEADS.NMS_THRESH_TEST   {}.test_nms_thresh                          .75
max_detections  TEST.DETECTIONS_PER_IMAGE         {}.test_topk_per_image                      9
iou_thresholds  MODEL.ROI_HEADS.IOU_THRESHOLDS    model.roi_heads.proposal_matcher.thresholds [.375]
smooth_l1_beta  MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA {}.smooth_l1_beta                           .625
num_bins        MODEL.LIBRA.SAMPLER.NUM_BINS      model.roi_heads.proposal_sampler.num_bins   8
"""
RETINANET = """
num_classes     MODEL.RETINANET.NUM_CLASSES         model.num_classes              13
score_threshold MODEL.RETINANET.SCORE_THRESH_TEST   model.test_score_thresh        .25
nms_threshold   MODEL.RETINANET.NMS_THRESH_TEST     model.test_nms_thresh          .75
max_detections  TEST.DETECTIONS_PER_IMAGE           model.max_detections_per_image 9
smooth_l1_beta  MODEL.RETINANET.SMOOTH_L1_LOSS_BETA model.smooth_l1_beta           .625
normalizer      MODEL.LIBRA.RETINANET.NORMALIZER    model.normalizer               none
"""
BALANCED_L1 = """
alpha MODEL.LIBRA.BALANCED_L1.ALPHA {}.balanced_l1.alpha .3
gamma MODEL.LIBRA.BALANCED_L1.GAMMA {}.balanced_l1.gamma 1.3
beta  MODEL.LIBRA.BALANCED_L1.BETA  {}.balanced_l1.beta  .7
form  MODEL.LIBRA.BALANCED_L1.FORM  {}.balanced_l1.form  reference
"""
R_CNN = (R_CNN + BALANCED_L1).replace("{}", "model.roi_heads.box_predictor")
RETINANET = RETINANET + BALANCED_L1.replace("{}", "model")
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
    """Each setting is read, written and named by its place in the user's config."""
    recipe = make(language, model)
    rows = []
    for line in (SETTINGS + MODELS[model]).split("\n"):
        if line:
            name, *names, text = line.split()
            value = yaml.safe_load(text)
            value = tuple(value) if isinstance(value, list) else value
            rows.append((name, names[language == "lazy"], value))
    for name, own, value in rows:
        if own == "None":
            assert not recipe.has(name)
            assert recipe.get(name, "default") == "default"
            with pytest.raises(SettingMissing, match=f"^{name}: the config lacks it"):
                getattr(recipe, name)
            continue
        assert recipe.has(name)
        assert recipe.name_of(name) == own
        assert getattr(recipe, name) != value
        setattr(recipe, name, value)
    for name, own, value in rows:  # no setting has overwritten another
        if own != "None":
            for found in (section(recipe.config, own), recipe.get(name)):
                assert (tuple(found) if isinstance(value, tuple) else found) == value


def test_all_settings_are_here():
    named = {line.split()[0] for line in (SETTINGS + R_CNN + RETINANET).split("\n") if line}
    settings = {name for name, x in vars(Recipe).items() if isinstance(x, Setting)}
    by_class = {"interpolation", "architecture", "needs_proposals", "has_masks", "has_keypoints"}
    assert settings == named | by_class


def test_defaults():
    """What a LazyConfig does not say is as YAML configs have it."""
    cfg = get_cfg()
    add_libra_config(cfg)
    lazy = [x for x in vars(Recipe).values() if isinstance(x, Setting) and x.has_default]
    values = {x: section(cfg, x.yaml[0]) for x in lazy if x.yaml}
    values = {x: tuple(v) if isinstance(v, list) else v for x, v in values.items()}
    unlike = {x.yaml[0]: x.default for x, value in values.items() if x.default != value}
    assert unlike == {"DATALOADER.NUM_WORKERS": 0}


def test_model_of_another_kind():
    """A model that is none of Detectron2's needs no proposals."""
    recipe = make("lazy")
    assert not recipe.needs_proposals
    recipe.config.model.pop("proposal_generator")
    assert recipe.needs_proposals
    recipe.config.model = L(torch.nn.Linear)(in_features=1, out_features=1)
    assert not recipe.needs_proposals


@LANGUAGES
@pytest.mark.parametrize(
    ("device", "amp", "dtype", "channels_last", "expected"),
    [
        ("cpu", False, "bfloat16", "auto", (torch.float32, "always")),
        ("cpu", True, "auto", "auto", (torch.bfloat16, "always")),
        ("cpu", False, "auto", "never", (torch.float32, "never")),
        ("cuda:1", False, "auto", "auto", (torch.float32, "never")),
        ("cuda:1", False, "auto", "always", (torch.float32, "always")),
        ("cuda", True, "auto", "auto", (torch.float16, "always")),
        ("cuda", True, "bfloat16", "inference", (torch.bfloat16, "inference")),
    ],
)
def test_speed(language, device, amp, dtype, channels_last, expected, monkeypatch):
    """What "auto" means for a device, and with mixed precision."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    recipe = make(language, "mask_rcnn_fpn")
    recipe.device, recipe.amp, recipe.amp_dtype = device, amp, dtype
    recipe.channels_last = channels_last
    assert (recipe.precision, recipe._choose_channels_last(torch.nn.Module())) == expected
    with recipe.autocast():
        assert torch.is_autocast_enabled("cpu") == (amp and device == "cpu")
        if amp:
            assert torch.get_autocast_dtype(recipe.device_type) == expected[0]


@LANGUAGES
def test_channels_last_in_training(language, monkeypatch):
    """On a CPU with AVX2, where Winograd's algorithm is on and nothing is compiled."""
    chosen = []
    monkeypatch.setattr(
        libra_d2.config.recipe, "choose_channels_last", lambda *args: chosen.append(args)
    )
    recipe, model = make(language, "mask_rcnn_fpn"), torch.nn.Module()
    recipe.device = "cpu"
    for recipe.winograd, recipe.compile_backbone in ((True, False), (True, True), (False, False)):
        recipe._choose_channels_last(model)
    assert chosen == [(model, "cpu", False, winograd) for winograd in (True, False, False)]


@LANGUAGES
def test_levers(language, monkeypatch):
    """A built model gets each that is on, and no other."""
    given, kept, recipe, model = [], [], make(language), torch.nn.Linear(1, 1)
    module = libra_d2.config.recipe
    monkeypatch.setattr(module, "accelerate", lambda x, **kwargs: given.append((x, kwargs)))
    monkeypatch.setattr(module, "keep_freed_memory", lambda: kept.append(1))
    monkeypatch.setattr(type(recipe), "_build_model", lambda self: model)
    recipe.device, recipe.channels_last = "cpu", "large"
    names = ("fold_norm", "parallel_roi_align", "winograd", "lean_fpn", "compile_backbone")
    for on in ("", *names, "keep_freed_memory"):
        for name in (*names, "keep_freed_memory"):
            setattr(recipe, name, name == on)
        recipe.build_model()
        levers = {name: name == on for name in names}
        assert given.pop() == (model, {"channels_last": "large", **levers})
        assert len(kept) == (on == "keep_freed_memory")


@LANGUAGES
def test_device_of_the_model(language):
    recipe = make(language).rpn_only()
    recipe.device = "meta"
    assert {x.device.type for x in recipe._build_model().parameters()} == {"meta"}


def test_several_places():
    """All places that the config has are written, and none that its model does not read."""
    recipe = make("lazy", "cascade_rcnn")
    recipe.score_threshold, recipe.alpha = 0.4, 0.3
    predictors = recipe.config.model.roi_heads.box_predictors
    assert [p.test_score_thresh for p in predictors] == [0.4] * 3
    assert [p.balanced_l1.alpha for p in predictors] == [0.3] * 3
    assert recipe.name_of("alpha") == "model.roi_heads.box_predictors.0.balanced_l1.alpha"
    assert not {"test_score_thresh", "balanced_l1"} & set(recipe.config.model)
    assert recipe.iou_thresholds == (0.5,)
    recipe.config.model.roi_heads.proposal_matchers[0].thresholds = [0.4]
    assert recipe.iou_thresholds == (0.4,)
    recipe = make("yaml", "retinanet")  # whose test-time augmentation reads those of the ROI heads
    recipe.num_classes, recipe.nms_threshold = 7, 0.3
    for section in (recipe.config.MODEL.ROI_HEADS, recipe.config.MODEL.RETINANET):
        assert (section.NUM_CLASSES, section.NMS_THRESH_TEST) == (7, 0.3)


@pytest.mark.parametrize("name", FPN_MODELS)
def test_num_classes(name):
    """In every head of things, and nowhere else."""
    recipe = make("lazy", name)
    recipe.num_classes, recipe.device = 3, "cpu"
    weights = recipe.build_model().state_dict()
    counts = {v.shape[0] for key, v in weights.items() if key.endswith("cls_score.bias")}
    assert counts == ({27} if name == "retinanet" else {4})
    if recipe.has_masks:
        assert len(weights["roi_heads.mask_head.predictor.bias"]) == 3
    if name == "panoptic_fpn":
        assert len(weights["sem_seg_head.predictor.bias"]) == 54


def test_class_counts():
    """Where the heads have them; masks of any class and interpolations stay what they are."""
    recipe = make("lazy", "cascade_rcnn")
    heads = recipe.config.model.roi_heads
    mask_head, predictors = heads.mask_head, heads.box_predictors
    heads.num_classes = heads.pop("num_classes")  # the last in the config, the first to be named
    parts = ["", *(f".box_predictors.{i}" for i in range(3)), ".mask_head"]
    *places, of_masks = [f"model.roi_heads{part}.num_classes" for part in parts]
    assert recipe.class_counts == dict.fromkeys([*places, of_masks], 80)
    assert next(iter(recipe.class_counts)) == places[0]
    mask_head.num_classes, predictors[1].num_classes = 1, "${...num_classes}"
    recipe.num_classes = 3
    assert recipe.class_counts == dict.fromkeys(places, 3)
    assert mask_head.num_classes == 1
    assert OmegaConf.is_interpolation(predictors[1], "num_classes")
    for part in (heads, *predictors):
        part.num_classes = 1
    recipe.num_classes = 4
    assert recipe.class_counts == dict.fromkeys([*places, of_masks], 4)
    names = ["model.num_classes", "model.head.num_classes"]
    assert make("lazy", "retinanet").class_counts == dict.fromkeys(names, 80)
    assert make("yaml").class_counts == {"MODEL.ROI_HEADS.NUM_CLASSES": 4}
    assert make("yaml", "retinanet").class_counts == {"MODEL.RETINANET.NUM_CLASSES": 80}
    assert make("lazy").rpn_only().class_counts == make("yaml").rpn_only().class_counts == {}


@LANGUAGES
def test_tasks(language):
    """What the model can be evaluated in."""
    assert make(language).tasks == ("bbox", "segm")
    assert make(language, "retinanet").tasks == ("bbox",)
    assert make(language).rpn_only().tasks == ("box_proposals",)
    recipe = make(language, "keypoint_rcnn_fpn")
    if language == "yaml":
        recipe.config.MODEL.KEYPOINT_ON = True
    assert recipe.tasks == ("bbox", "keypoints")
    if language == "yaml":
        recipe.config.MODEL.META_ARCHITECTURE = "none"
    else:
        recipe.config.model._target_ = "torch.nn.Identity"
    assert recipe.tasks == TASKS


@pytest.mark.parametrize(
    ("expected", "passes"),
    [
        ([["bbox", "AP", 30, 1]], True),
        ([["bbox", "AP", 30, 1], ["bbox_EMA", "AP", 40, 1]], True),
        ([["one/bbox", "AP50", 50, 1]], True),
        ([["bbox", "AP", 32, 1]], False),
        ([["bbox", "AP", 30, 1], ["segm", "AP", 30, 1]], False),  # as after an early end
        ([["bbox", "AP75", 30, 1]], False),
    ],
)
def test_verify(expected, passes):
    """Expected results of one dataset or several; those that are missing are not as expected."""
    recipe = make("yaml")
    recipe.config.TEST.EXPECTED_RESULTS = expected
    results = {"bbox": {"AP": 30.5, "AP75": float("nan")}, "bbox_EMA": {"AP": 40}}
    results["one"] = {"bbox": {"AP50": 50}}
    if passes:
        recipe.verify(results)
        return
    with pytest.raises(SystemExit, match="1"):
        recipe.verify(results)


@pytest.mark.parametrize(
    ("place", "value", "message", "build"),
    [
        ("optimizer", {"momentumm": 1}, "SGD {}; did you mean momentum?", "build_optimizer"),
        (
            *("lr_multiplier.scheduler", {"x": 1}),
            *("MultiStepParamScheduler {}", "build_lr_scheduler"),
        ),
        (
            *("dataloader.train.mapper", {"is_trainn": 1}),
            *("DatasetMapper {}; did you mean is_train?", "build_mapper"),
        ),
        (
            *("dataloader.test", {"num_workerss": 1}),
            *("build_detection_test_loader {}; did you mean num_workers?", "build_test_loader"),
        ),
        ("model.roi_heads", {"num_clases": 1}, "{}; did you mean num_classes?", "build_model"),
        ("model.backbone", {"freeze": 1}, "build_balanced_backbone {}", "build_model"),
        ("model", {"freeze": 1, "backbone": {"freeze": 1}}, "model", "build_model"),
        ("optimizer", {"momentum": -1}, "optimizer", "build_optimizer"),
        ("lr_multiplier.scheduler", {"values": [1.0]}, "lr_multiplier", "build_lr_scheduler"),
        (
            *("dataloader.train.mapper.augmentations", [L(int)(x="a")]),
            *("dataloader.train.mapper.augmentations", "build_augmentations"),
        ),
    ],
)
def test_bad_arguments(place, value, message, build, monkeypatch):
    """What a class does not take is said in one line, with the place."""
    recipe = make("lazy")
    recipe.config.lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
    dataset = "coco_2017_val"
    monkeypatch.setitem(DatasetCatalog.data, dataset, lambda: [{"annotations": []}])
    arguments = {"build_model": (), "build_test_loader": (dataset,), "build_lr_scheduler": (None,)}
    arguments["build_optimizer"] = (torch.nn.Linear(1, 1),)
    OmegaConf.update(recipe.config, place, value)
    with pytest.raises(InputError) as error:
        getattr(recipe, build)(*arguments.get(build, (True,)))
    found = str(error.value)
    if "{}" in message:
        assert found.startswith(f"{place}.{next(iter(value))}: ")
        assert found.endswith(message.format("has no such argument"))
    else:
        assert found.startswith(f"{message}: it cannot be built: ")
    assert ".py, line " not in found


def own_dataset(names):
    return {"second": names}[names] + 1


def own_error(kind):
    raise getattr(builtins, kind)


def outer(names):
    return own_dataset(names)


LINE = own_dataset.__code__.co_firstlineno + 1
KINDS = ("AssertionError", "AttributeError", "ImportError", "OSError", "RuntimeError")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (L(own_dataset)(names="first"), "there is no 'first'.*test_recipe.py, line"),
        (L(own_dataset)(names="second"), "can only concatenate str.*test_recipe.py, line"),
        (L(outer)(names="first"), rf".*test_recipe.py, line {LINE}\)$"),
        *((L(own_error)(kind=x), rf"{x} \(") for x in (*KINDS, "TypeError", "ValueError")),
    ],
)
def test_errors_in_own_code(part, message):
    """In one line, with the innermost place in the code; without a message, by their type."""
    recipe = make("lazy")
    recipe.config.dataloader.test.dataset = part
    with pytest.raises(InputError, match=f"^dataloader.test: it cannot be built: {message}"):
        recipe._arguments("dataloader.test")


def test_parts_of_a_training():
    """A length, which an evaluation does not need; the model of the optimizer is filled in."""
    recipe = make("lazy")
    recipe.config.lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
    recipe.config.optimizer.params.model = "???"
    recipe.check_parts(True)
    recipe.config.train.pop("max_iter")
    recipe.check_parts(False)
    with pytest.raises(SettingMissing, match="^train.max_iter: the config lacks it"):
        recipe.check_parts(True)
    recipe.config.model.backbone.x, recipe.config.train.y = "${train}", "${model.backbone}"
    with pytest.raises(InputError, match="it is a part of itself"):
        recipe.check_parts(False)


def test_left_out():
    """A config of nothing but a model has defaults, and errors where there is no default."""
    config = OmegaConf.create({}, flags={"allow_objects": True})
    config.model = balanced("retinanet")
    recipe = make_recipe(config)
    assert (recipe.patience, recipe.train_datasets, recipe.tta_flip) == (0, (), True)
    assert (recipe.checkpoint_period, recipe.log_period, recipe.max_detections) == (5000, 20, 100)
    recipe.patience = 3
    assert recipe.config.train.patience == 3
    assert recipe.image_format == "BGR"
    recipe.num_workers = 3
    assert "dataloader" not in recipe.config
    assert not recipe.has_own_evaluator
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
        with pytest.raises(SettingMissing, match=f"^{place}: missing in the LazyConfig"):
            build()


@pytest.mark.parametrize(
    ("language", "line", "options"),
    [
        ("yaml", "\nSEED: 8\n", "OUTPUT_DIR a SEED 3"),
        ("lazy", "  seed: 8\n", "train.output_dir='a' train.seed=3"),
    ],
)
def test_copy_freeze_and_dump(language, line, options):
    """A copy of a frozen recipe can be changed independently."""
    recipe = make(language)
    recipe.seed = 3
    recipe.freeze()
    with pytest.raises(Exception, match="immutable|read-only"):
        recipe.seed = 5
    assert recipe.dump()
    copy = recipe.copy()
    copy.seed = 8
    assert (copy.seed, recipe.seed) == (8, 3)
    assert line in copy.dump()
    assert recipe.options({"output_dir": "a", "seed": 3}) == options.split()


def test_nulls_of_yaml_configs():
    """Errors where the default is a value; nulls of Detectron2's own defaults are legal."""
    recipe = make("yaml")
    recipe.check_keys()
    recipe.config.SOLVER.STEPS = None
    with pytest.raises(InputError, match="^SOLVER.STEPS is null: set a value, such as "):
        recipe.check_keys()


def test_nulls_of_lazy_configs():
    """Errors where there must be a value; Detectron2 accepts null for max_to_keep."""
    recipe = make("lazy", "cascade_rcnn")
    recipe.max_checkpoints = recipe.weights = None
    recipe.check_keys()
    assert (recipe.max_checkpoints, recipe.weights) == (0, "")
    recipe.config.model.roi_heads.box_predictors[1].test_score_thresh = None
    place = "model.roi_heads.box_predictors.1.test_score_thresh"
    with pytest.raises(InputError, match=f"^{place} is null: leave it out"):
        recipe.check_keys()
    recipe.config.model.roi_heads.box_predictors[1] = True
    with pytest.raises(InputError, match=r"box_predictors.1 is True: it must be a section with "):
        recipe.check_keys()


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
    defaults = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    assert recipe.ddp_options.items() >= defaults.items()
    if language == "lazy":
        recipe.config.train.ddp = {"find_unused_parameters": True, "broadcast_buffers": True}
        own = {"find_unused_parameters": True, "broadcast_buffers": True}
        assert recipe.ddp_options == {**defaults, **own}
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
@pytest.mark.parametrize("is_train", [True, False])
def test_mapper(language, is_train):
    """Evaluations neither flip images nor read annotations."""
    mapper = make(language).build_mapper(is_train)
    assert mapper.is_train == is_train
    assert any(isinstance(x, T.RandomFlip) for x in mapper.augmentations.augs) == is_train
    assert type(mapper) is LibraDatasetMapper


class OwnMapper(DatasetMapper):
    pass


class NoName:
    """An evaluator that does not ask for the name of the dataset."""


def test_own_parts():
    """A LazyConfig's own mapper and evaluator are used as they are."""
    recipe = make("lazy")
    recipe.config.dataloader.train.mapper._target_ = OwnMapper
    assert type(recipe.build_mapper(True)) is OwnMapper
    recipe.config.dataloader.evaluator = L(NoName)()
    (evaluator,) = recipe.build_evaluator("x", "")._evaluators
    assert type(evaluator) is NoName


@LANGUAGES
def test_loaders(language, tmp_path):
    """Both get images from the recipe's mapper, here with OpenCV's resizing."""
    pixels = np.random.default_rng(0).integers(256, size=(50, 60, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    box = {"bbox": [9, 9, 30, 30], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    box["segmentation"] = [[9, 9, 39, 9, 39, 39]]
    record = {"file_name": str(tmp_path / "a.png"), "height": 50, "width": 60, "image_id": 1}
    name = f"recipe_loaders_{language}"
    DatasetCatalog.register(name, lambda: [{**record, "annotations": [box]}])
    recipe = make(language)
    recipe.train_datasets = recipe.test_datasets = (name,)
    recipe.batch_size, recipe.num_workers = 1, 0
    if language == "yaml":
        recipe.config.INPUT.update(MIN_SIZE_TRAIN=(35,), MIN_SIZE_TEST=35, RANDOM_FLIP="none")
        recipe.interpolation = "opencv"
    else:
        loaders = recipe.config.dataloader
        resize = L(OpenCVResizeShortestEdge)(short_edge_length=35, sample_style="choice")
        loaders.train.mapper.augmentations = loaders.test.mapper.augmentations = [resize]
        loaders.test.num_workers = 0
    expected = cv2.resize(pixels, (42, 35), interpolation=cv2.INTER_LINEAR)
    if recipe.image_format == "RGB":
        expected = expected[:, :, ::-1]
    training = recipe.build_train_loader(7)
    assert training.state_dict()["seed"] == 7
    for loader in (training, recipe.build_test_loader(name)):
        (found,) = next(iter(loader))
        assert np.array_equal(found["image"].permute(1, 2, 0).numpy(), expected)


@LANGUAGES
def test_sizes(language):
    """Sizes and interpolation of images."""
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
        train.augmentations = [L(OpenCVResizeShortestEdge)(short_edge_length=64)]
        assert recipe.interpolation == "opencv"


def test_scaled_to():
    """YAML configs may have a reference number of processes."""
    recipe = make("yaml")
    recipe.reference_world_size, recipe.batch_size, recipe.learning_rate = 4, 8, 1.0
    recipe.max_iter = 10
    scaled = recipe.scaled_to(2)
    assert (scaled.batch_size, scaled.learning_rate, scaled.max_iter) == (4, 0.5, 20)
    assert recipe.batch_size == 8
    lazy = make("lazy")
    assert lazy.scaled_to(2) is lazy


def test_test_time_augmentation_of_lazy_configs():
    """Detectron2's test-time augmentation gets the keys that it reads."""
    recipe = make("lazy")
    recipe.device, recipe.num_classes, recipe.nms_threshold = "cpu", 3, 0.3
    recipe.tta_min_sizes, recipe.tta_max_size, recipe.tta_flip = (16, 24), 99, False
    recipe.max_detections = 9
    test_mapper = recipe.config.dataloader.test.mapper
    test_mapper.augmentations = [L(OpenCVResizeShortestEdge)(short_edge_length=64)]
    model = recipe.add_test_time_augmentation(recipe.build_model())
    assert model.tta_mapper.opencv
    cfg, mapper = model.cfg, model.tta_mapper
    assert (mapper.min_sizes, mapper.max_size, mapper.flip) == ((16, 24), 99, False)
    assert (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON, cfg.MODEL.LOAD_PROPOSALS) == (1, 0, 0)
    heads = cfg.MODEL.ROI_HEADS
    assert (heads.NUM_CLASSES, heads.NMS_THRESH_TEST) == (3, 0.3)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 9
    recipe = make("lazy", "retinanet")
    recipe.device, recipe.num_classes, recipe.nms_threshold = "cpu", 3, 0.3
    heads = recipe.add_test_time_augmentation(recipe.build_model()).cfg.MODEL.ROI_HEADS
    assert (heads.NUM_CLASSES, heads.NMS_THRESH_TEST) == (3, 0.3)


@LANGUAGES
def test_proposals_of_several_datasets(language, tmp_path):
    """Each dataset has its own, in evaluations and for validation losses, of the same images."""
    Image.effect_noise((60, 50), 90).save(tmp_path / "a.png")
    box = {"bbox": [9, 9, 30, 30], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    record = {"file_name": str(tmp_path / "a.png"), "height": 50, "width": 60}
    record["annotations"] = [box]
    recipe = make(language, "retinanet" if language == "yaml" else "mask_rcnn_fpn")
    if language == "yaml":
        recipe.needs_proposals = True
    else:
        recipe.config.model.proposal_generator = None
        for split in ("train", "test"):
            recipe.config.dataloader[split].mapper.precomputed_proposal_topk = 9
    recipe.num_workers = 0
    recipe.test_datasets = names = ("recipe_first", "recipe_second")
    recipe.test_proposals = [str(tmp_path / name) for name in names]
    for number, (name, path) in enumerate(zip(names, recipe.test_proposals), 1):
        DatasetCatalog.register(name, lambda i=number: [{**record, "image_id": i}])
        boxes, logits = np.tile([5.0, 5, 30, 30], (number, 1)), np.zeros(number)
        write_proposals(path, [number], [boxes], [logits])
    for number, name in enumerate(names, 1):
        loaders = (recipe.build_test_loader(name), recipe.build_validation_loader(name))
        tested, validated = (image for loader in loaders for (image,) in loader)
        assert len(tested["proposals"]) == len(validated["proposals"]) == number
        assert torch.equal(tested["image"], validated["image"])
        DatasetCatalog.remove(name)
    message = "(?i)^.*proposal_files.*: there is no file for dataset 'other'"
    with pytest.raises(InputError, match=message):
        recipe.proposals_of("other")


def test_evaluator(monkeypatch):
    monkeypatch.setattr(libra_d2.config.recipe, "build_evaluator", lambda *args: args)
    recipe = make("yaml")
    recipe.max_detections = 300
    assert recipe.build_evaluator("a", "b") == ("a", "b", 300)


@pytest.mark.parametrize(
    ("filter_empty", "keypoint_on", "least", "expected"),
    [(False, False, 1, 4), (True, False, 1, 3), (True, True, 1, 2), (False, True, 2, 1)],
)
def test_images_to_train_on(filter_empty, keypoint_on, least, expected):
    """Images without objects, or with too few keypoints for a model of them, are left out."""
    box = {"bbox": [9, 9, 30, 30], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    keypoints = [{**box, "keypoints": [1, 2, 2, 3, 4, v]} for v in (0, 1)]
    objects = [[], [box], keypoints[:1], keypoints[1:]]
    record = {"file_name": "none.png", "height": 50, "width": 60}
    dataset = [{**record, "image_id": i, "annotations": x} for i, x in enumerate(objects)]
    DatasetCatalog.register("recipe_images", lambda: dataset)
    MetadataCatalog.get("recipe_images").set(keypoint_names=["a", "b"], keypoint_flip_map=[])
    recipe = make("yaml")
    recipe.train_datasets, recipe.batch_size = ("recipe_images",), 1
    recipe.train_proposals = ("none.pkl",)  # which an RPN does not read
    recipe.config.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
    recipe.config.MODEL.KEYPOINT_ON = keypoint_on
    recipe.config.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = least
    found = recipe.build_train_loader(0).num_images
    DatasetCatalog.remove("recipe_images")
    MetadataCatalog.remove("recipe_images")
    assert found == expected
