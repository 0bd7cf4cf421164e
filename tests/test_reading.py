# SPDX-License-Identifier: Apache-2.0
import builtins
import shutil
from pathlib import Path

import pytest
from conftest import DEMO_CONFIG, ROOT
from iopath.common.file_io import PathHandler

import detectron2
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.file_io import PathManager

from libra_d2.config import make_recipe, read_recipe
from libra_d2.config.reading import is_lazy_config
from libra_d2.engine import read_config
from libra_d2.errors import InputError
from libra_d2.model_zoo import find_config

LAZY = str(ROOT / "configs/Demo/libra_mask_rcnn_regnetx_FPN.py")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("SOLVER: {BASE_LR: null}", "", "^SOLVER.BASE_LR is null: set a value, such as 0"),
        ("SEED: 1\nSEED: 2", "", "a.yaml: SEED is set twice, the second time in line 2"),
        (
            "_BASE_: b.yaml",
            "SOLVER:\n  STEPS: (1,)\n  STEPS: (2,)",
            "b.yaml: SOLVER.STEPS is set twice, the second time in line 3",
        ),
        ("_BASE_: [c.yaml, b.yaml]", "S: 1\nS: 1", "b.yaml: S is set twice"),
        ("_BASE_: a.yaml", "", "a.yaml: its _BASE_ leads back to itself"),
        ("_BASE_: [b.yaml]", "_BASE_: ./a.yaml", "a.yaml: its _BASE_ leads back to itself"),
        (
            "_BASE_: ['http://host/a.yaml', x.yaml]",
            "",
            "a.yaml: its _BASE_, x.yaml, is not a file$",
        ),
        ("_BASE_: none.yaml", "", "a.yaml: its _BASE_, none.yaml, is not a file$"),
        ("_BASE_: {a: b}", "", "a.yaml: its _BASE_ must be the name of a file or a list of such$"),
        ("SOLVER: 5", "", "a.yaml: SOLVER is 5: it must be a section$"),
        ("MODEL: {LIBRA: [1]}", "", "a.yaml: MODEL.LIBRA is .1.: it must be a section$"),
        ("A: " + "[" * 1000, "", "a.yaml: maximum recursion depth exceeded"),
        ("MODEL: {LIBRA: {PBX: 1}}", "", "a.yaml: Non-existent config key: MODEL.LIBRA.PBX"),
        (
            "SOLVER: {MAX_ITRE: 1}",
            "",
            "a.yaml: SOLVER.MAX_ITRE: .*; did you mean SOLVER.MAX_ITER.$",
        ),
        ("MODEL: [", "", "a.yaml: while parsing"),
        ("- 1", "", "a.yaml: not a config: there are no keys in it"),
        ("", "", "a.yaml: not a config: there are no keys in it"),
        ("# nothing", "", "a.yaml: not a config: there are no keys in it"),
        ("_BASE_: b.yaml", "", "b.yaml: not a config: there are no keys in it"),
        ("SOLVER: {MAX_ITER: 4.5}", "", "a.yaml: SOLVER.MAX_ITER is 4.5: use a whole number$"),
        ("SOLVER: {BASE_LR: true}", "", "a.yaml: SOLVER.BASE_LR is True: use a number$"),
        ("OUTPUT_DIR: 5", "", "^[^ ]*a.yaml: OUTPUT_DIR is 5: use text, such as \"'5'\"$"),
    ],
)
def test_bad_yaml(a, b, message, tmp_path):
    (tmp_path / "a.yaml").write_text(a)
    (tmp_path / "b.yaml").write_text(b)
    (tmp_path / "c.yaml").write_text("SEED: 1")
    with pytest.raises(InputError, match=message) as error:
        read_config(str(tmp_path / "a.yaml"), [])
    assert "\n" not in str(error.value)


def test_good_yaml(tmp_path):
    """
    A base used twice, equal keys in two sections, numbers that YAML reads as text, whole numbers
    for others, which Detectron2 refuses.
    """
    text = "_BASE_: [b.yaml, c.yaml]\nSOLVER: {BASE_LR: 1e-3, WEIGHT_DECAY: 0}\n"
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("_BASE_: d.yaml\nMODEL: {FPN: {NORM: GN}}\n")
    (tmp_path / "c.yaml").write_text("_BASE_: d.yaml\nMODEL: {RESNETS: {NORM: BN}}\n")
    (tmp_path / "d.yaml").write_text("SEED: 5\nMODEL: {WEIGHTS: ''}\n")
    options = ["MODEL.LIBRA.TRAINER.EMA_DECAY", "0", "SOLVER.MOMENTUM", "0"]
    recipe = read_config(str(tmp_path / "a.yaml"), options)
    assert (recipe.learning_rate, recipe.seed) == (0.001, 5)
    assert type(recipe.config) is type(recipe.config.SOLVER) is CfgNode
    for value in (
        recipe.ema_decay,
        recipe.config.SOLVER.WEIGHT_DECAY,
        recipe.config.SOLVER.MOMENTUM,
    ):
        assert (type(value), value) == (float, 0)
    assert recipe.config.MODEL.FPN.NORM == "GN"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, ": a LazyConfig needs a model") for text in ("a = 1", "model = 3", "model = {}")),
        ("model = dict(_target_='no.thing')", "^model._target_ is 'no.thing', which cannot be ins"),
        # What its code raises, with the line.
        ("a = 1\n\nmodel = (", "config.py has syntax error! line 3: '\\(' was never closed"),
        ("\0", "config.py has syntax error! .*null bytes"),
        ("a = 1\na.b", ", line 2: AttributeError: 'int' object has no attribute 'b'"),
        ("def f():\n    1 / 0\n\nf()", ", line 4: ZeroDivisionError: division by zero"),
        ("{}['k']", ", line 1: KeyError: k"),
        (
            "import no_such_module",
            ", line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("raise SystemExit", ", line 1: SystemExit"),
        ("import sys\nsys.exit(0)", ", line 2: SystemExit: 0"),
        ("a = 1\nraise KeyboardInterrupt", ", line 2: KeyboardInterrupt"),
        ("from .base import model", "config.py: .*/base.py, line 3: AssertionError: a b"),
        ("from .broken import model", "broken.py has syntax error! line 2: "),
        ("from .none import model", "line 1: ImportError: .*(none.py has|Cannot import name none)"),
        (
            "from libra_d2.lazy import balance\nbalance({})",
            "balance\\(\\) takes the LazyConfig of a d",
        ),
    ],
)
def test_bad_lazy_config(text, message, tmp_path):
    """One line, whatever its code does; nothing stays behind."""
    (tmp_path / "config.py").write_text(text)
    (tmp_path / "base.py").write_text("\n\nassert False, 'a\\nb'")
    (tmp_path / "broken.py").write_text("a = 1\nb = )")
    imported = builtins.__import__
    with pytest.raises(InputError, match=message) as error:
        read_config(str(tmp_path / "config.py"), [])
    assert "\n" not in str(error.value)
    assert builtins.__import__ is imported


def test_name_in_messages(tmp_path):
    """The path, unless the user knows the file by another name."""
    path = tmp_path / "a.yaml"
    path.write_text("SEED: [")
    lazy = tmp_path / "a.py"
    lazy.write_text("1 / 0")
    for names in ([], ["theirs.yaml"]):
        for file, where in ((path, ": "), (lazy, ", line 1: Zero")):
            with pytest.raises(InputError, match=f"^{(names or [file])[0]}{where}"):
                read_recipe(str(file), [], *names)


@pytest.mark.parametrize(
    ("option", "setting", "value"),
    [
        ("train.speed.fold_norm=false", "fold_norm", False),
        ("train.speed.channels_last=never", "channels_last", "never"),
        ("train.test_time_augmentation.flip=false", "tta_flip", False),
        ("train.ema_decay=0.5", "ema_decay", 0.5),
        ("train.my_period=5", "ema_decay", 0.0),
        ("+train.ema_decay=0.5", "ema_decay", 0.5),
    ],
)
def test_sections_of_this_project(option, setting, value):
    """Settings of LazyConfigs whose sections Detectron2 does not have."""
    assert getattr(read_config(LAZY, [option]), setting) == value


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("", "MODEL.LIBRA.BFP.LEVEL 1", "LEVEL: there is no .* did you mean MODEL.*REFINE_LEVEL.$"),
        ("", "MODEL.LIBRA.TRAINER.EPOCH 1", "^command line: .* did you mean .*TRAINER.EPOCHS.$"),
        ("", "NO.KEY 1", "^command line: Non-existent key: NO"),
        ("", "SEED 1 OUTPUT_DIR=x", "^command line: OUTPUT_DIR=x: write .* as KEY VALUE$"),
        ("", "SEED 1 --train-json x", "--train-json: options like this come before all KEY"),
        ("", "MODEL.LIBRA.BFP.REFINE_LEVEL x", "^command line: .*REFINE_LEVEL"),
        ("", "SOLVER.BASE_LR -1", "^SOLVER.BASE_LR is -1.0: use a positive number"),
        ("", "MODEL.LIBRA.SPEED.WINOGRAD on", "SPEED.WINOGRAD is on: use True or False$"),
        ("", "MODEL.RPN.IN_FEATURES p2", r"is p2: use a list, such as \"\['res4'\]\"$"),
        ("", "DATASETS.TEST a", r"TEST is a: use a list, such as \"\('a', 'b'\)\"$"),
        ("", "SOLVER.STEPS 5", r"SOLVER.STEPS is 5: use a list, such as \"\(30000,\)\"$"),
        ("", "SOLVER 5", "^command line: SOLVER: it is a section; set one of the keys in it$"),
        ("", "SOLVER.BASE_LR fast", "^command line: SOLVER.BASE_LR is fast: use a number$"),
        (
            "",
            "MODEL.LIBRA.BFP.REFINE_LEVEL",
            "^command line: .*LEVEL: its value is missing$",
        ),
        ("none.yaml", "", "^'none.yaml' is neither a file nor a config of"),
        (LAZY, "SOLVER.MAX_ITER 10", "'SOLVER.MAX_ITER': write what is set in a .* as key=value"),
        (LAZY, "model.backbone.botom_up.freeze_at=2", "mean model.backbone.bottom_up.freeze_at.$"),
        (LAZY, "dataloder.train=0", "command line: dataloder.train: the LazyConfig has no such ke"),
        (LAZY, "dataloader.tran=0", "no such key; dataloader has train, test, evaluator$"),
        (LAZY, "train.speed.fold=0", "train.speed.fold: .*; did you mean train.speed.fold_norm.$"),
        (LAZY, "hyper=0", "^command line: hyper: the LazyConfig has no such key; it has "),
        (LAZY, "train.hyper.x=0", "train.hyper.x: the LazyConfig has no such key$"),
        (LAZY, "train.epochs=abc", "train.epochs is 'abc': use a number"),
        (LAZY, "train.max_itr=5", "^command line: train.max_itr: .* did you mean train.max_iter.$"),
        (LAZY, "train.max_iter=[1", r"^command line: train.max_iter=\[1: a bracket is not closed$"),
        (LAZY, "train.max_iter=1]", r"^command line: train.max_iter=1\]: .* input "),
        (
            LAZY,
            "~train.seed",
            "^command line: '~train.seed': keys can only be removed in the config file$",
        ),
        (
            LAZY,
            "model.backbone.in_features=a,b",
            r"a list needs brackets, 'model.*_features=\[a,b]', and",
        ),
    ],
)
def test_bad_options(config, options, message):
    with pytest.raises(InputError, match=message):
        read_config(config, options.split())


def test_keys_that_are_almost_settings(caplog):
    """In a file, and new ones: they may be the user's own. Other keys are not mentioned."""
    options = ["+train.max_itr=5", "+train.hyper=1", "+train.seeds=[1,2]"]
    read_config(LAZY, options).check_parts(False)
    for key, meant in (("max_itr", "max_iter"), ("seeds", "seed")):
        message = f"train.{key} is not a setting of libra_d2; did you mean train.{meant}?"
        assert message in caplog.messages
    assert "hyper" not in caplog.text


def test_old_config(tmp_path):
    """Detectron2 takes it for one of its first version: no key of that is suggested."""
    (tmp_path / "a.yaml").write_text("MODEL: {WEIGHT: x, WEIGHTS: y}")
    with pytest.raises(InputError, match="a.yaml: Non-existent config key: MODEL.WEIGHTS$"):
        read_config(str(tmp_path / "a.yaml"), [])


def test_unreadable_config(tmp_path, monkeypatch):
    """As which of the two languages it would be read is not known."""
    path = tmp_path / "a.yaml"
    path.touch()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match="a.yaml: .*Permission denied"):
        read_config(str(path), [])


def test_is_lazy_config(tmp_path):
    path = tmp_path / "config.yaml"
    LazyConfig.save(LazyConfig.load(LAZY), str(path))
    assert is_lazy_config(str(path))
    for text in ("MODEL:\n  MASK_ON: True\n", "model: [broken", "- model", "model: 1\nMODEL: {}"):
        path.write_text(text)
        assert not is_lazy_config(str(path))
    path.write_bytes(b"model: \xff")
    assert not is_lazy_config(str(path))
    (tmp_path / "config.yml").write_text("model: {}")
    assert is_lazy_config(str(tmp_path / "config.yml"))
    assert is_lazy_config("anything.py")
    assert not is_lazy_config("http://host/config.yaml")


def test_named_length(tmp_path):
    """A number of iterations on the command line takes precedence over epochs in the file."""
    path, epochs = tmp_path / "a.yaml", "MODEL.LIBRA.TRAINER.EPOCHS"
    path.write_text("MODEL: {LIBRA: {TRAINER: {EPOCHS: 3}}}")
    named = ["SOLVER.MAX_ITER", "5"]
    for options, expected in (([], 3), (named, 0), ([*named, epochs, "2"], 2)):
        assert read_config(str(path), options).epochs == expected


def test_added_keys():
    """What Hydra's "+" sets on the command line is named, too."""
    config = "COCO-Detection/libra_retinanet_R_50_FPN_1x.py"
    epochs = ["train.epochs=3.0"]
    assert read_config(config, epochs).epochs == 3
    recipe = read_config(config, ["+train.max_iter=5"])
    assert (recipe.epochs, "epochs" in recipe.config.train) == (0, False)
    assert read_config(config, [*epochs, "+train.max_iter=5"]).epochs == 3
    with pytest.raises(InputError, match="train.device is 'cuda'"):
        read_config(config, ["+train.device=cuda"])


@pytest.mark.parametrize(
    "path", ["a/b", "a(1)", "a,b=c", "x'y", "\\", "a\\\\'b\\'", "5", "null", "~", "$x y"]
)
def test_options_of_lazy_configs(path):
    """A value reaches the config whatever is in it."""
    config = "COCO-Detection/libra_retinanet_R_50_FPN_1x.py"
    options = read_config(config, []).options({"weights": path, "seed": 3})
    config = LazyConfig.apply_overrides(LazyConfig.load(find_config(config)), options)
    assert (config.train.init_checkpoint, config.train.seed) == (path, 3)


def test_base_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "b.yaml").write_text("SEED: 5")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.yaml").write_text("_BASE_: ~/b.yaml")
    assert read_config(str(tmp_path / "x/a.yaml"), []).seed == 5


def test_make_recipe():
    """The recipe wraps the config itself; a recipe is returned as it is."""
    for config in (str(DEMO_CONFIG), LAZY):
        recipe = read_config(config, [])
        assert make_recipe(recipe) is recipe
        assert make_recipe(recipe.config).config is recipe.config


@pytest.mark.parametrize("suffix", ["yaml", "py"])
def test_configs_of_detectron2(suffix):
    """The YAML file has an expression."""
    recipe = read_config(f"COCO-Detection/retinanet_R_50_FPN_1x.{suffix}", [])
    assert recipe.max_iter == 90000
    assert not recipe.has_ideas


class OwnHandler(PathHandler):
    """Maps own:// to the root of the file system."""

    def _get_supported_prefixes(self):
        return ["own://"]

    def _isfile(self, path, **kwargs):
        return True

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(path.replace("own:/", ""), mode)


def test_url(tmp_path):
    """Any URL that Detectron2's path manager knows works, without unsafe YAML."""
    PathManager.register_handler(OwnHandler(), allow_override=True)
    (tmp_path / "a.yaml").write_text("SEED: 5")
    assert read_config(f"own:/{tmp_path}/a.yaml", []).seed == 5
    (tmp_path / "a.yaml").write_text("SEED: !!python/object/apply:eval ['5']")
    with pytest.raises(InputError, match="could not determine a constructor"):
        read_config(f"own:/{tmp_path}/a.yaml", [])


def test_linked_configs(tmp_path, monkeypatch):
    """
    A Detectron2 built in its source folder links to its configs. By either path they may have
    expressions in YAML; copies elsewhere may not.
    """
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    configs = Path(detectron2.__path__[0]) / "model_zoo/configs"
    source, package = tmp_path / "source", tmp_path / "source/detectron2"
    for folder in ("configs", "configs-copy"):
        shutil.copytree(configs, source / folder)
    (package / "model_zoo").mkdir(parents=True)
    (package / "model_zoo/configs").symlink_to(source / "configs")
    (tmp_path / "linked").symlink_to(source)
    monkeypatch.setattr(detectron2, "__path__", [str(package), *detectron2.__path__])
    inside = f"detectron2/model_zoo/configs/{name}"
    for path in (name, source / inside, tmp_path / "linked/configs" / name):
        cfg = read_config(str(path), []).config
        assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == pytest.approx([32, 40.3, 50.8], abs=0.1)
    monkeypatch.chdir(source / "configs")
    for path in (source / "configs-copy" / name, f"../configs-copy/{name}"):
        with pytest.raises(InputError, match="could not determine a constructor for the tag"):
            read_config(str(path), [])
