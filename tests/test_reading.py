# SPDX-License-Identifier: Apache-2.0
import pytest
from conftest import DEMO_CONFIG, ROOT
from iopath.common.file_io import PathHandler

from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager

from libra_d2.config import make_recipe, read_recipe
from libra_d2.config.reading import is_lazy_config
from libra_d2.engine import read_config
from libra_d2.errors import InputError

LAZY = str(ROOT / "configs/Demo/libra_mask_rcnn_regnetx_FPN.py")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("SOLVER: {BASE_LR: null}", "", "^SOLVER.BASE_LR is null: leave it out for its default, 0"),
        ("SEED: 1\nSEED: 2", "", "a.yaml: SEED is there twice, once more in line 2"),
        (
            "_BASE_: b.yaml",
            "SOLVER:\n  STEPS: (1,)\n  STEPS: (2,)",
            "b.yaml: SOLVER.STEPS is there twice, once more in line 3",
        ),
        ("_BASE_: [c.yaml, b.yaml]", "S: 1\nS: 1", "b.yaml: S is there twice"),
        ("_BASE_: a.yaml", "", "a.yaml: its _BASE_ leads back to itself"),
        ("_BASE_: [b.yaml]", "_BASE_: ./a.yaml", "a.yaml: its _BASE_ leads back to itself"),
        ("_BASE_: none.yaml", "", "a.yaml: .*none.yaml"),
        ("MODEL: {LIBRA: {BPF: 1}}", "", "a.yaml: Non-existent config key: MODEL.LIBRA.BPF"),
        ("MODEL: [", "", "a.yaml: while parsing"),
        ("- 1", "", "a.yaml: "),
        ("", "", "a.yaml: "),
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
    """A base used twice, equal keys in two sections, numbers that YAML reads as text."""
    (tmp_path / "a.yaml").write_text("_BASE_: [b.yaml, c.yaml]\nSOLVER: {BASE_LR: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("_BASE_: d.yaml\nMODEL: {FPN: {NORM: GN}}\n")
    (tmp_path / "c.yaml").write_text("_BASE_: d.yaml\nMODEL: {RESNETS: {NORM: BN}}\n")
    (tmp_path / "d.yaml").write_text("SEED: 5\nMODEL: {WEIGHTS: ''}\n")
    recipe = read_config(str(tmp_path / "a.yaml"), [])
    assert (recipe.learning_rate, recipe.seed) == (0.001, 5)
    assert recipe.config.MODEL.FPN.NORM == "GN"


def test_not_a_lazy_config(tmp_path):
    for text in ("a = 1\n", "model = 3\n", "model = dict(a=1)\n"):
        (tmp_path / "config.py").write_text(text)
        with pytest.raises(InputError, match="config.py: a LazyConfig needs a model"):
            read_config(str(tmp_path / "config.py"), [])
    (tmp_path / "config.py").write_text("model = dict(\n")
    with pytest.raises(InputError, match="^[^\n]*config.py[^\n]*$"):
        read_config(str(tmp_path / "config.py"), [])


def test_name_in_messages(tmp_path):
    """The path, unless the user knows the file by another name."""
    path = tmp_path / "a.yaml"
    path.write_text("SEED: [")
    for names in ([], ["theirs.yaml"]):
        with pytest.raises(InputError, match=f"^{(names or [path])[0]}: "):
            read_recipe(str(path), [], *names)


@pytest.mark.parametrize(
    ("option", "setting", "value"),
    [
        ("train.speed.fold_norm=false", "fold_norm", False),
        ("train.speed.channels_last=never", "channels_last", "never"),
        ("train.test_time_augmentation.flip=false", "tta_flip", False),
        ("train.ema_decay=0.5", "ema_decay", 0.5),
    ],
)
def test_sections_of_this_project(option, setting, value):
    """Settings of LazyConfigs whose sections Detectron2 does not have."""
    assert getattr(read_config(LAZY, [option]), setting) == value


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("", "MODEL.LIBRA.BFP.LEVEL 1", "^command line: .*MODEL.LIBRA.BFP.LEVEL"),
        ("", "MODEL.LIBRA.BFP.REFINE_LEVEL x", "^command line: .*REFINE_LEVEL"),
        ("", "MODEL.LIBRA.BFP.REFINE_LEVEL", "^command line: .*odd length"),
        ("none.yaml", "", "^'none.yaml' is neither a file nor a config of"),
        (LAZY, "SOLVER.MAX_ITER 10", "'SOLVER.MAX_ITER': write what is set in a .* as key=value"),
        (LAZY, "model.backbone.botom_up.freeze_at=2", "botom_up.freeze_at: the .* no such key$"),
        (LAZY, "dataloder.train=0", "command line: dataloder.train: the LazyConfig has no such ke"),
        (LAZY, "dataloader.tran=0", "no such key; dataloader has train, test, evaluator$"),
        (
            LAZY,
            "train.speed.fold=0",
            "train.speed.fold: the LazyConfig has no such key",
        ),
        (LAZY, "train.max_iter=[1", "command line: "),
    ],
)
def test_bad_options(config, options, message):
    with pytest.raises(InputError, match=message):
        read_config(config, options.split())


def test_is_lazy_config(tmp_path):
    path = tmp_path / "config.yaml"
    LazyConfig.save(LazyConfig.load(LAZY), str(path))
    assert is_lazy_config(str(path))
    for text in ("MODEL:\n  MASK_ON: True\n", "model: [broken", "- model"):
        path.write_text(text)
        assert not is_lazy_config(str(path))
    assert is_lazy_config("anything.py")
    assert not is_lazy_config("http://host/config.yaml")


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
