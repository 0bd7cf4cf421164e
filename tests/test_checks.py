# SPDX-License-Identifier: Apache-2.0
import copy
import functools
import importlib.util
import re
from contextlib import nullcontext

import pytest
import torch
from conftest import DEMO_CONFIG, ROOT
from fvcore.common.param_scheduler import ConstantParamScheduler

from detectron2.config import LazyCall, LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from libra_d2.config import check_run, check_values
from libra_d2.engine import read_config
from libra_d2.errors import InputError

RETINANET = ROOT / "configs/Demo/libra_retinanet_R_18_FPN.yaml"
LAZY = ROOT / "configs/Demo/libra_mask_rcnn_regnetx_FPN.py"
LAZY_RETINANET = ROOT / "configs/COCO-Detection/libra_retinanet_R_50_FPN_1x.py"
LEAST, SIDE, CHOICE = "use a whole number, {} or more", "use 8 pixels or more", "use one of {}"
SIDES = "use a list of sizes, each of 8 pixels or more"
NORMS = ["", "BN", "FrozenBN", "GN", "SyncBN"]
SAMPLERS = [f"{x}TrainingSampler" for x in ("", "RandomSubset", "RepeatFactor", "Weighted")]
CROPS = ["relative_range", "relative", "absolute", "absolute_range"]
SPEED, TRAINER = "MODEL.LIBRA.SPEED", "MODEL.LIBRA.TRAINER"
FORMATS = ("auto", "always", "large", "inference", "never")
SAMPLING = "INPUT.MIN_SIZE_TRAIN_SAMPLING"


@pytest.fixture(scope="module", autouse=True)
def _executed_once():
    """Each LazyConfig is executed once, and copied afterwards, which takes a tenth of the time."""
    load = functools.lru_cache(None)(LazyConfig.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyConfig, "load", staticmethod(lambda *args: copy.deepcopy(load(*args))))
        yield


# Key, legal values, illegal ones (numbers on both sides of the boundary), and what to use.
RULES = [
    ("SOLVER.IMS_PER_BATCH", [1], [0, -4], LEAST.format(1)),
    ("SOLVER.MAX_ITER", [1], [0], LEAST.format(1)),
    (f"{SPEED}.CHANNELS_LAST", ["never"], ["on"], CHOICE.format(FORMATS)),
    (f"{SPEED}.AMP_DTYPE", ["float16"], ["half"], CHOICE.format(("auto", "float16", "bfloat16"))),
    ("SOLVER.CHECKPOINT_PERIOD", [1], [0], LEAST.format(1)),
    ("SOLVER.WARMUP_ITERS", [0], [-1], LEAST.format(0)),
    ("SOLVER.BASE_LR", [1e-9, 1e9], [0.0, -0.1, "1e999"], "use a positive number, such as 0.02"),
    ("SOLVER.REFERENCE_WORLD_SIZE", [0, 2], [-1], LEAST.format(0)),
    ("SOLVER.WARMUP_FACTOR", [0.0, 1.0], [-0.1, 1.5], "use a value in [0, 1]"),
    ("SOLVER.GAMMA", [0.1, 1.0], [0.0, "1e999"], "use a positive number, such as 0.1"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", [0.1], [0.0, -1.0], "use a positive number"),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", [0.5], [0.0], "use a positive number"),
    ("TEST.AUG.MAX_SIZE", [1], [0], LEAST.format(1)),
    ("MODEL.LIBRA.INPUT.CHECK_IMAGES", [-1, 0], [-2], "use a number of images, 0 for none or -1"),
    (f"{TRAINER}.EPOCHS", [0.0, 0.5, 1e4], [-1.0, 10000.5], "use a number of passes over the im"),
    ("SOLVER.MOMENTUM", [0.0, 0.999], [-0.1, 1.0], "use a value in [0, 1)"),
    ("SOLVER.WEIGHT_DECAY", [0.0, 10.0], [-1e-9, "1e999"], "use 0 or more"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ["value", "norm"], ["all"], CHOICE),
    ("DATALOADER.NUM_WORKERS", [0], [-1], LEAST.format(0)),
    ("DATALOADER.SAMPLER_TRAIN", SAMPLERS, ["Sampler"], CHOICE),
    ("INPUT.MIN_SIZE_TRAIN", [(8,), (8, 9)], [(), (-160,), (7,), (160, 7), (96, "x")], SIDES),
    ("TEST.AUG.MIN_SIZES", [(8,), (9, 8)], [(), (7,), (160, 7)], SIDES),
    ("INPUT.MAX_SIZE_TRAIN", [8], [7], SIDE),
    ("INPUT.MIN_SIZE_TEST", [0, 8], [7, 1, -8], f"{SIDE}, or 0 not to resize"),
    ("INPUT.MAX_SIZE_TEST", [8], [7, 0], SIDE),
    (SAMPLING, ["choice"], ["any"], "use one of ('choice', 'range')"),
    ("INPUT.RANDOM_FLIP", ["horizontal", "vertical", "none"], ["both"], CHOICE),
    ("INPUT.CROP.TYPE", CROPS, ["square"], CHOICE),
    ("INPUT.MASK_FORMAT", ["polygon", "bitmask"], ["rle"], CHOICE),
    ("INPUT.FORMAT", ["BGR", "RGB", "L", "YUV-BT.601"], ["HSV"], CHOICE),
    ("TEST.EVAL_PERIOD", [0], [-1], LEAST.format(0)),
    ("TEST.DETECTIONS_PER_IMAGE", [1], [0], LEAST.format(1)),
    ("SEED", [-1, 2**32 - 2**16 - 1], [-2, 2**32 - 2**16], "use a number below 2**32 - 2**16"),
    ("MODEL.RESNETS.DEPTH", [18, 34, 50, 101, 152], [19], CHOICE),
    *(
        (f"MODEL.{part}.NORM", NORMS, ["FooNorm"], f"use one of {', '.join(map(repr, NORMS))}")
        for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    ),
    (f"{TRAINER}.MAX_CHECKPOINTS", [0], [-1], LEAST.format(0)),
    (f"{TRAINER}.ACCUMULATION_STEPS", [1], [0], LEAST.format(1)),
    (f"{TRAINER}.PATIENCE", [0], [-1], LEAST.format(0)),
    (f"{TRAINER}.EMA_DECAY", [0.0, 0.9999], [-0.1, 1.0], "use a value in (0, 1), such as 0.9998"),
    ("MODEL.LIBRA.NUM_PICTURES", [0], [-1], LEAST.format(0)),
    ("MODEL.ROI_HEADS.NUM_CLASSES", [1], [0], LEAST.format(1)),
    ("MODEL.ROI_HEADS.NMS_THRESH_TEST", [0.0, 1.0], [1.1], "use a value in [0, 1]"),
    (
        "TEST.EXPECTED_RESULTS",
        [[], [["bbox", "AP", 38.5, 0.2]]],
        [
            *([["bbox", "AP", 38.5]], [["bbox", "AP", "high", 1]], [[["bbox"], "AP", 1, 1]], [3]),
            *([["bbox", 5, 1, 1]], [["bbox", "AP", 1, "x"]]),
        ],
        "use [[task, metric, value, tolerance], ...], such as [['bbox', 'AP', 38.5, 0.2]]",
    ),
    ("MODEL.LIBRA.INPUT.INTERPOLATION", ["pillow", "opencv"], ["cv2"], CHOICE),
]


def read(*opts, config=""):
    return read_config(str(config), [str(x) for x in opts])


@pytest.mark.parametrize(("key", "legal", "illegal", "rule"), RULES, ids=lambda x: str(x)[:40])
def test_values(key, legal, illegal, rule):
    """Both sides of each boundary; the message has the key, the value and what to use."""
    for value in legal:
        read(key, value)
    for value in illegal:
        shown = "inf" if value == "1e999" else repr(value)
        message = f"{key} is {shown}: {rule.format(tuple(legal))}"
        with pytest.raises(InputError, match=re.escape(message)):
            read(key, value)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.LR_SCHEDULER_NAME", "Warmup"], "SOLVER.LR_SCHEDULER_NAME 'Warmup' with SOLVER.S"),
        (["SOLVER.STEPS", "(600, 400)"], "SOLVER.STEPS (600, 400) cannot be used: "),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu': "),
        *(
            ([SAMPLING, "range", "INPUT.MIN_SIZE_TRAIN", x], f"is {x}: use two sizes")
            for x in ("(8,)", "(8, 9, 10)")
        ),
        ([f"{TRAINER}.BEST_METRIC", "bbox/AP"], f"{TRAINER}.BEST_METRIC needs evaluations: set "),
        ([f"{TRAINER}.PATIENCE", 1], f"{TRAINER}.PATIENCE needs evaluations: set TEST.EVAL_PERIOD"),
    ],
)
def test_combinations(opts, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(*opts)


def test_legal_combinations():
    evaluated = [f"{TRAINER}.PATIENCE", 1, f"{TRAINER}.BEST_METRIC", "x", "TEST.EVAL_PERIOD", 1]
    sizes = [SAMPLING, "range", "INPUT.MIN_SIZE_TRAIN", "(8, 9)"]
    read(*sizes, *evaluated, "SOLVER.STEPS", "(400, 600)")
    read(f"{TRAINER}.PATIENCE", 1, f"{TRAINER}.EPOCHS", 0.5)


NO_NAME = "which cannot be instantiated: Error loading 'no.thing'"
HEADS, MAPPER = "model.roi_heads", "dataloader.train.mapper"
PREDICTOR = f"{HEADS}.box_predictor"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("train.max_iter=4.5", "train.max_iter is 4.5: use a whole number, 1 or more"),
        ("train.max_iter=true", "train.max_iter is True: use a whole number, 1 or more"),
        ("train.check_images=0.5", "train.check_images is 0.5: use a number of images"),
        ("train.seed=1.5", "train.seed is 1.5: use a number below"),
        ("train.epochs=true", "train.epochs is True: use a number of passes"),
        ("train.device=[cpu]", "train.device is ('cpu',): "),
        ("train.device=xpu", "train.device is 'xpu', which PyTorch cannot use"),
        ("train.max_iter=null", "train.max_iter is null: leave it out, or give it a value"),
        ("train.output_dir=null", "train.output_dir is null: leave it out"),
        ("train.output_dir=5", "train.output_dir is 5: use a path"),
        ("train.output_dir='~/a'", "train.output_dir is '~/a': use a path without '~'"),
        ("train.init_checkpoint=5", "train.init_checkpoint is 5: use a path"),
        ("optimizer.lr=-1", "optimizer.lr is -1: use a positive number"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast': use a positive number"),
        ("train.patience=1", "train.patience needs evaluations: set train.eval_period to"),
        ("train.log_period=0", "train.log_period is 0: use a whole number, 1 or more"),
        ("train.best_metric=5", "train.best_metric is 5: use the name of a metric"),
        (f"{PREDICTOR}.test_topk_per_image=0", ".test_topk_per_image is 0: use a whole number, 1"),
        (f"{HEADS}.box_in_features=p2", f"{HEADS}.box_in_features is 'p2': use a list, such as"),
        ("train.test_time_augmentation.min_sizes=x", ".min_sizes is ('x',): use a list of sizes"),
        (
            "train.test_time_augmentation.max_size=0",
            ".max_size is 0: use a whole number, 1 or more",
        ),
        (f"{PREDICTOR}.test_score_thresh=x", ".test_score_thresh is 'x': use a value in"),
        ("lr_multiplier.scheduler.start_value=x", "lr_multiplier: it cannot be built: "),
        ("train.test_time_augmentation.enabled=True model.proposal_generator=null", "without RPN"),
        ("train.amp=true", "train.amp is True: it must be a section with train.amp.enabled"),
        ("train.amp=0.5", "train.amp is 0.5: it must be a section with train.amp.enabled"),
        ("train.checkpointer=x", "train.checkpointer is 'x': it must be a section with train.che"),
        (f"{MAPPER}.augmentations=5", f"{MAPPER}.augmentations is 5: use a list"),
        (f"{PREDICTOR}=5", f"{PREDICTOR} is 5: it must be a section"),
        ("dataloader.test.mapper.augmentations=5", "mapper.augmentations is 5: use a list"),
        # A circle of interpolations, of one, of two, through a part.
        ("train.max_iter=${train.max_iter}", "train.max_iter: Recursive interpolation detected"),
        (
            "optimizer.lr=${train.seed} train.seed=${optimizer.lr}",
            "train.seed: Recursive interpolation detected",
        ),
        ("model.backbone=${model.backbone}", "model.backbone: Recursive interpolation detected"),
        (f"{PREDICTOR}=${{model}}", f"{PREDICTOR}: Interpolation to parent node detected"),
        ("optimizer.lr=${nothing}", "optimizer.lr: Interpolation key 'nothing' not found"),
        ("optimizer.momentum=${nothing}", "optimizer.momentum: Interpolation key 'nothing' not"),
        # Parts that are missing, of another kind, or that nothing has the name of.
        ("optimizer=null", "optimizer: missing in the LazyConfig"),
        ("optimizer.params=null", "optimizer.params: missing in the LazyConfig"),
        ("optimizer.params=5", "optimizer.params: its _target_, a class or function, is missing"),
        ("lr_multiplier=null", "lr_multiplier: missing in the LazyConfig"),
        ("model=5", "model is 5: it must be a section with model."),
        ("dataloader.evaluator=5", "dataloader.evaluator is 5: it must be a section with"),
        (f"{MAPPER}._target_=null", f"{MAPPER}: its _target_, a class or function, is missing"),
        *(
            (f"{place}._target_=no.thing", f"{place}._target_ is 'no.thing', {NO_NAME}")
            for place in (
                *("model", "model.backbone", PREDICTOR, "optimizer", "optimizer.params"),
                *("lr_multiplier", "lr_multiplier.scheduler", "dataloader.train", MAPPER),
                *("dataloader.test", "dataloader.test.mapper", "dataloader.evaluator"),
            )
        ),
        *(
            (f"train.{name}=x", f"train.{name} is 'x': use True or False")
            for name in (
                *("speed.fold_norm", "speed.parallel_roi_align", "speed.winograd"),
                *("speed.lean_fpn", "speed.keep_freed_memory", "speed.compile_backbone"),
                *("amp.enabled", "validation_loss"),
                *("test_time_augmentation.enabled", "test_time_augmentation.flip"),
            )
        ),
        (f"{MAPPER}.augmentations.0._target_=no.thing", f"{MAPPER}.augmentations[0]._target_ is"),
        ("model._target_=torch.optim", "is 'torch.optim', which cannot be instantiated: it is not"),
        (
            "model._target_=5",
            "model._target_ is 5, which cannot be instantiated: it is not",
        ),
    ],
)
def test_values_of_lazy_configs(opts, message, datasets):
    """
    The same rules, with the names of LazyConfigs; and all that a training instantiates is there
    before it starts.
    """
    with pytest.raises(InputError, match=re.escape(message)) as error:
        check(*opts.split(), config=LAZY, test_datasets=("test_1",))
    assert "\n" not in str(error.value)
    assert "cannot be used" not in str(error.value)


def test_lazy_config(datasets):
    check(config=LAZY, test_datasets=("test_1",))


def test_undefined_end_of_a_schedule():
    """fvcore's constant one is not defined after the last iteration, where Detectron2 reads it."""
    recipe = read(config=LAZY)
    recipe.config.lr_multiplier = LazyCall(ConstantParamScheduler)(value=1.0)
    with pytest.raises(InputError, match="^lr_multiplier cannot be used: .*got 1.0"):
        check_values(recipe)


def test_parts_of_an_evaluation():
    """It needs no optimizer; parts of YAML models have to be registered."""
    evaluation = {"train": False, "resume": True}
    recipe = read("optimizer=null", "lr_multiplier=null", config=LAZY)
    recipe.check_parts(train=False)
    with pytest.raises(InputError, match="^optimizer: missing in the LazyConfig"):
        recipe.check_parts(train=True)
    read("lr_multiplier=null", config=LAZY).check_parts(train=False)
    read("dataloader.test=null", config=LAZY).check_parts(train=True)
    recipe = read("MODEL.ROI_HEADS.NAME", "Other", "DATASETS.TEST", ("test_none",))
    DatasetCatalog.register("test_none", list)
    with pytest.raises(InputError, match="MODEL.ROI_HEADS.NAME is 'Other': no component has this"):
        check_run(recipe, **evaluation)
    DatasetCatalog.remove("test_none")


def test_accumulation_without_moving_average():
    """A moving average of normalizers would be updated by each micro-batch."""
    parts, lazy_parts = f"{TRAINER}.ACCUMULATION_STEPS", "train.accumulation_steps"
    key, lazy_key = "MODEL.LIBRA.RETINANET.NORMALIZER", "model.normalizer"
    plain = "COCO-Detection/retinanet_R_50_FPN_1x.py"  # Detectron2's
    read(parts, 2, config=RETINANET)  # its normalizer is "batch"
    read(f"{lazy_parts}=2", config=LAZY_RETINANET)
    read(parts, 2, key, "moving_average", config=DEMO_CONFIG)
    read(key, "moving_average", config=RETINANET)
    for config, opts in (
        (RETINANET, [parts, 2, key, "moving_average"]),
        (RETINANET, [parts, 2, "MODEL.META_ARCHITECTURE", "RetinaNet"]),
        (plain, [f"{lazy_parts}=2"]),
        (LAZY_RETINANET, [f"{lazy_parts}=2", f"{lazy_key}=moving_average"]),
    ):
        names = (parts, key) if config == RETINANET else (lazy_parts, lazy_key)
        message = "{} needs a LibraRetinaNet with {} 'batch'".format(*names)
        with pytest.raises(InputError, match=f"^{message}$"):
            read(*opts, config=config)


@pytest.mark.parametrize("num_gpus", [0, 2])
@pytest.mark.parametrize(("option", "config"), [("MODEL.DEVICE ", ""), ("train.device=", LAZY)])
def test_device(num_gpus, option, config, monkeypatch):
    """A device on the command line must exist; Detectron2's default gives way to the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert ("cuda" if num_gpus else "cpu") == read(config=config).device
    with pytest.raises(InputError, match="is 'meta', which PyTorch cannot use"):
        read(*f"{option}meta".split(), config=config)
    for i, device in enumerate(["cuda", "cuda:1", "cuda:2"]):
        opts = f"{option}{device}".split()
        if i < num_gpus:
            assert device == read(*opts, config=config).device
        else:
            with pytest.raises(InputError, match=f"is '{device}': .* has {num_gpus} GPUs that"):
                read(*opts, config=config)


def test_opencv(monkeypatch):
    """OpenCV is required where it is used, before training starts."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == "cv2" else find(x))
    read()
    for name, value in (("NUM_PICTURES", 1), ("INPUT.INTERPOLATION", "opencv")):
        with pytest.raises(InputError, match=f"^MODEL.LIBRA.{name} is {value!r}, which needs"):
            read(f"MODEL.LIBRA.{name}", value)


def test_no_test_time_augmentation():
    read("TEST.AUG.ENABLED", True)
    for opts, what in (
        (["MODEL.LOAD_PROPOSALS", True], "a model without RPN"),
        (["MODEL.KEYPOINT_ON", True], "a model of keypoints"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "a ProposalNetwork"),
    ):
        with pytest.raises(InputError, match=f"^TEST.AUG.ENABLED: .* of {what}"):
            read("TEST.AUG.ENABLED", True, *opts)


# What is checked when a training or an evaluation starts.


@pytest.fixture
def datasets():
    """Three registered datasets: of 3 images, of 1 image, and of an unknown number of them."""
    for count in (3, 1, None):
        DatasetCatalog.register(f"test_{count}", list)
        metadata = {} if count is None else {"num_images": count}
        MetadataCatalog.get(f"test_{count}").set(evaluator_type="coco", **metadata)
    yield
    for count in (3, 1, None):
        DatasetCatalog.remove(f"test_{count}")
        MetadataCatalog.remove(f"test_{count}")


def check(*opts, config="", **settings):
    """Check the start of a training on one of these datasets, or on those in ``settings``."""
    recipe = read(*opts, config=config)
    settings = {"weights": "", "train_datasets": ("test_3",), "test_datasets": (), **settings}
    for name, value in settings.items():
        setattr(recipe, name, value)
    check_run(recipe, train=True, resume=False)


def test_keypoints(datasets):
    MetadataCatalog.get("test_3").set(json_file="own://a.json")
    check()
    with pytest.raises(InputError, match="'test_3' does not name its keypoints"):
        check("MODEL.KEYPOINT_ON", True)
    MetadataCatalog.get("test_3").set(keypoint_names=["nose"])
    check("MODEL.KEYPOINT_ON", True)


def test_unused_proposals(datasets, caplog):
    """They are for models without an RPN."""
    files = ["DATASETS.PROPOSAL_FILES_TEST", "('a.pkl',)"]
    for opts in ([], files, [*files, "MODEL.LOAD_PROPOSALS", True]):
        check(*opts)
    used = [x for x in caplog.messages if "PROPOSAL" in x]
    assert used == [f"{files[0]} is set, but this model reads no proposals from files"]


@pytest.mark.parametrize(
    ("counts", "warned"),
    [
        ([3, 1], {}),
        ([3], {"SOLVER.IMS_PER_BATCH is 4": 3}),
        ([1], {"SOLVER.IMS_PER_BATCH is 4": 1, "DATALOADER.NUM_WORKERS is 3": 1}),
        ([1, None], {}),
    ],
)
def test_few_images(counts, warned, datasets, caplog):
    """A warning of fewer images, in all datasets together, than a batch or the workers."""
    opts = ["SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 3]
    check(*opts, train_datasets=tuple(f"test_{n}" for n in counts))
    expected = [f"{what}, but there are only {n} images to train on" for what, n in warned.items()]
    assert [x for x in caplog.messages if "but there" in x] == expected


def test_places(datasets):
    """Weights are a file; validation data have to be there when a training starts."""
    with pytest.raises(InputError, match="'nowhere' is not a registered dataset"):
        check(test_datasets=("nowhere",))
    with pytest.raises(InputError, match="no such file"):
        check(weights=str(ROOT))
    check(weights=f"{__file__}?matching_heuristics=True")


@pytest.fixture
def classes():
    """Datasets whose names are the names of their classes, known from the start, or when loaded."""

    def load(name):
        MetadataCatalog.get(name).set(thing_classes=list("ba"))
        return []

    for name in ("ab", "ba", "abc", "voc"):
        DatasetCatalog.register(name, (lambda: load("ba")) if name == "ba" else list)
        kind = "pascal_voc" if name == "voc" else "coco"
        MetadataCatalog.get(name).set(evaluator_type=kind)
        if name != "ba":
            MetadataCatalog.get(name).set(thing_classes=list(name))
    yield
    for name in ("ab", "ba", "abc", "voc"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


TWO_CLASSES = f"{HEADS}.num_classes=2"
TWO = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.RETINANET.NUM_CLASSES", 2]
MASKS, EMA = ["MODEL.MASK_ON", True], [f"{TRAINER}.EMA_DECAY", 0.9]
KEYPOINTS = ["MODEL.KEYPOINT_ON", True]
PROPOSALS = ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]
DENSE = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME"]
DENSE += ["build_retinanet_resnet_fpn_backbone"]


@pytest.mark.parametrize(
    ("opts", "data", "reported", "others"),
    [
        (
            [],
            ["ab"],
            "bbox/AP bbox/APl bbox/AP-b",
            "bbox/APx segm/AP AP bbox_EMA/AP bbox/AP-c",
        ),
        (EMA, ["ab"], "bbox/AP75 bbox_EMA/AP bbox_EMA/AP-a", "bbox/AP_EMA bbox_TTA/AP"),
        (MASKS, ["ab"], "bbox/AP segm/APs segm/AP-a", "keypoints/AP box_proposals/AR@100"),
        (MASKS + EMA, ["ab"] * 2, "ab_EMA/segm/AP", "bbox/AP ab/bbox_EMA/AP ba/bbox/AP ab"),
        (KEYPOINTS, ["ab"], "bbox/APs keypoints/APm", "keypoints/APs segm/AP"),
        (DENSE + MASKS, ["ab"], "bbox/AP", "segm/AP"),
        (PROPOSALS, ["ab"], "box_proposals/AR@1000 box_proposals/ARs@100", "bbox/AP bbox/AP-a"),
        ([], ["test_1"], "bbox/AP", "bbox/AP-a"),  # which has no names of classes
        (["MODEL.ROI_HEADS.NUM_CLASSES", 3], ["voc"], "bbox/AP50", "bbox/APs bbox/AP-v"),
    ],
)
def test_metrics(opts, data, reported, others, classes, datasets):
    """The best model and early stopping look at what evaluations report."""
    key, every = f"{TRAINER}.BEST_METRIC", ["TEST.EVAL_PERIOD", 1]
    settings = {"test_datasets": tuple(data)}
    MetadataCatalog.get("test_3").set(keypoint_names=["nose"])
    for metric in reported.split():
        check(*TWO, *opts, *every, key, metric, **settings)
    for metric in others.split():
        with pytest.raises(InputError, match=f"^{key} is {metric!r}, which no evaluation reports"):
            check(*TWO, *opts, *every, key, metric, **settings)


def test_metrics_in_messages(classes, datasets):
    key, patience, every = f"{TRAINER}.BEST_METRIC", f"{TRAINER}.PATIENCE", ["TEST.EVAL_PERIOD", 1]
    known = ", ".join(f"bbox/{x}" for x in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    advice = f"which no evaluation reports: use one of {known}, AP-<class>$"
    with pytest.raises(InputError, match=f"^{key} is 'AP', {advice}"):
        check(*TWO, *every, key, "AP", test_datasets=("ab",))
    with pytest.raises(InputError, match=f"^TEST.EXPECTED_RESULTS names 'segm/AP', {advice}"):
        check(*TWO, "TEST.EXPECTED_RESULTS", [["segm", "AP", 1, 1]], test_datasets=("ab",))
    tta = ["TEST.AUG.ENABLED", True, "TEST.EXPECTED_RESULTS", [["bbox_TTA", "AP", 1, 1]]]
    check(*TWO, *tta, test_datasets=("ab",))
    for opts, who in (
        ([key, "bbox/AP"], f"{key} is 'bbox/AP'"),
        ([patience, 1], f"{key} is not set, and {patience} looks at 'bbox/AP'"),
    ):
        with pytest.raises(InputError, match=f"^{who}, which needs validation data: set DATA"):
            check(*TWO, *every, *opts)
        lazy = [x.replace(TRAINER, "train").lower() for x in (opts[0], who)]
        lazy[1] = lazy[1].replace("/ap", "/AP")
        with pytest.raises(InputError, match=f"^{lazy[1]}, which needs val.*dataloader.test.data"):
            check(f"{lazy[0]}={opts[1]}", "train.eval_period=1", config=LAZY)
    two = {"test_datasets": ("ab", "ab")}
    with pytest.raises(InputError, match="at 'bbox/AP', which no .* of ab/bbox/AP, ab/bbox/A"):
        check(*TWO, *every, patience, 1, **two)
    own = "dataloader.evaluator._target_=detectron2.evaluation.LVISEvaluator"
    opts = [own, "train.best_metric=own/metric", "train.eval_period=1", TWO_CLASSES]
    check(*opts, config=LAZY, test_datasets=("ab",))
    recipe = read(*TWO, *every, key, "AP")  # an evaluation has no best model
    recipe.test_datasets = ("ab",)
    check_run(recipe, train=False, resume=True)


def test_averaged_weights_in_expected_results(classes):
    """They are evaluated at the end of a training only."""
    opts = [*TWO, *EMA, "TEST.EXPECTED_RESULTS", [["bbox_EMA", "AP", 1, 1]]]
    check(*opts, train_datasets=("ab",), test_datasets=("ab",))
    recipe = read(*opts)
    recipe.test_datasets = ("ab",)
    with pytest.raises(InputError, match="names 'bbox_EMA/AP', which no"):
        check_run(recipe, train=False, resume=True)


def test_what_an_evaluation_does_not_need(datasets, classes, monkeypatch, caplog):
    """Names of keypoints, the classes of the training data, and a batch that can be shared."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    keypoints = [*KEYPOINTS, "SOLVER.IMS_PER_BATCH", 3]
    for opts, train, test in ((keypoints, "test_3", "test_1"), (TWO, "abc", "ab")):
        recipe = read(*opts)
        recipe.train_datasets, recipe.test_datasets = (train,), (test,)
        check_run(recipe, train=False, resume=True)
    assert "but there are" not in caplog.text


def test_own_evaluator_of_an_own_type(datasets):
    MetadataCatalog.remove("test_1")
    MetadataCatalog.get("test_1").set(evaluator_type="own")
    own = "dataloader.evaluator._target_=detectron2.evaluation.LVISEvaluator"
    check(own, config=LAZY, test_datasets=("test_1",))


def test_evaluators_that_do_not_fit(classes, datasets):
    with pytest.raises(InputError, match="'voc' is of type 'pascal_voc', whose evaluator c"):
        check(*PROPOSALS, test_datasets=("voc",))


@pytest.mark.parametrize(
    ("opts", "config", "data", "message"),
    [
        (TWO, "", "ab ab", ""),
        (["MODEL.RETINANET.NUM_CLASSES", 3, *TWO[:2]], "", "ab ab", ""),
        ([*DENSE, "MODEL.ROI_HEADS.NUM_CLASSES", 3, *TWO[2:]], "", "ab ab", ""),
        (PROPOSALS, "", "ab abc", ""),
        ([], "", "ab ab", "MODEL.ROI_HEADS.NUM_CLASSES is 80, but dataset 'ab' has 2 classes: use"),
        (DENSE, "", "ab ab", "MODEL.RETINANET.NUM_CLASSES is 80, but dataset 'ab' has 2"),
        (TWO, "", "ab abc", "MODEL.ROI_HEADS.NUM_CLASSES is 2, but dataset 'abc' has 3"),
        (TWO, "", "ab ba", "class 0 of dataset 'ab' is 'a', and of 'ba' it is 'b': use data with"),
        ([TWO_CLASSES], LAZY, "ab ab", ""),  # the others are interpolations
        ([f"{HEADS}.num_classes=3"], LAZY, "ab ab", f"{HEADS}.num_classes is 3, but dataset "),
        ([TWO_CLASSES, f"{PREDICTOR}.num_classes=3"], LAZY, "ab ab", f"2, but {PREDICTOR}.num_cla"),
        ([TWO_CLASSES, f"{PREDICTOR}.num_classes=1"], LAZY, "ab ab", f"2, but {PREDICTOR}.num_cla"),
        ([TWO_CLASSES, f"{HEADS}.mask_head.num_classes=1"], LAZY, "ab ab", ""),
        (
            *(["model._target_=torch.nn.Identity", "model.roi_heads=null"], LAZY, "ab abc"),
            "class 2 of dataset 'ab' is None, and of 'abc' it is 'c'",
        ),
        ([TWO_CLASSES, f"{HEADS}.mask_head.num_classes=3"], LAZY, "ab ab", "mask_head.num_classes"),
        (["model.head.num_classes=3"], LAZY_RETINANET, "ab ab", "80, but model.head.num_classes"),
    ],
)
def test_classes(opts, config, data, message, classes):
    """The heads have as many classes as the data, and all datasets have the same ones."""
    data = dict(zip(("train_datasets", "test_datasets"), [(name,) for name in data.split()]))
    if not message:
        check(*opts, config=config, **data)
        return
    with pytest.raises(InputError, match=re.escape(message)):
        check(*opts, config=config, **data)


IMAGES, MADE_FOR = "SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"
PARTS, LAZY_IMAGES = f"{TRAINER}.ACCUMULATION_STEPS", "dataloader.train.total_batch_size"


@pytest.mark.parametrize(
    ("opts", "config", "message"),
    [
        ([IMAGES, 6, MADE_FOR, 4], "", f"{IMAGES} is 6, which is not a multiple of {MADE_FOR}, 4"),
        ([IMAGES, 3], "", f"{IMAGES} is 3, which 2 processes cannot share: .*SOLVER.BASE_LR in pr"),
        ([IMAGES, 12, MADE_FOR, 4, PARTS, 2], "", f"{PARTS} is 2, which does not divide the 3 im"),
        (
            [f"{LAZY_IMAGES}=3"],
            LAZY,
            f"{LAZY_IMAGES} is 3, which 2 processes cannot share: .*optimizer.lr in proportion$",
        ),
        (["train.accumulation_steps=4"], LAZY, "train.accumulation_steps is 4, which does not div"),
    ],
)
def test_batch_size(opts, config, message, datasets, monkeypatch):
    """Two processes and micro-batches share the batch, after scaling."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match=f"^{message}"):
        check(*opts, config=config)


def test_batch_size_that_fits(datasets, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    check(IMAGES, 8, MADE_FOR, 4, PARTS, 2)
    check(f"{LAZY_IMAGES}=4", "train.accumulation_steps=2", config=LAZY)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_mixed_precision_on_the_cpu(datasets, monkeypatch, caplog, has_instructions):
    """float16 is refused; bfloat16 may be slow, and is said to be."""
    key = "MODEL.LIBRA.SPEED.AMP_DTYPE"
    on_cpu = ("SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu")
    with pytest.raises(InputError, match=f"^{key} is 'float16': on CPUs use 'bfloat16'$"):
        check(*on_cpu, key, "float16")
    name = "_is_mkldnn_bf16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: has_instructions)
    check(*on_cpu)
    warnings = [x for x in caplog.messages if x.startswith("SOLVER.AMP.ENABLED: this CPU has no")]
    assert bool(warnings) != has_instructions


def test_mixed_precision_on_a_gpu(datasets, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    options = ["SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cuda"]
    check(*options)
    with pytest.raises(InputError, match="'bfloat16', which this GPU cannot compute: use 'float"):
        check(*options, "MODEL.LIBRA.SPEED.AMP_DTYPE", "bfloat16")
