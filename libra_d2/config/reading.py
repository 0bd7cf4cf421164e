# SPDX-License-Identifier: Apache-2.0
"""Reading of config files of either language, with command line options."""

import builtins
import os
import re
import traceback
from contextlib import contextmanager
from typing import Any, Iterator, Mapping, Sequence, Set, Union

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

import detectron2
from detectron2.config import CfgNode, LazyConfig, get_cfg

from ..errors import InputError, one_line
from ..utils.leaves import did_you_mean, leaves
from .checks import check_values
from .defaults import add_libra_config
from .lazy_recipe import PLACES, LazyRecipe
from .recipe import Recipe
from .yaml_recipe import YamlRecipe

__all__ = ["detectron2_configs", "is_lazy_config", "make_recipe", "read_recipe"]

# What yacs says of a value whose type is not that of the default.
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(\w+)'> .* with values \((.*?) vs\. (.*)\) for config key: (\S+)"
)
# Values that YAML files take, and shells and the command line.
_EXAMPLES = {
    "bool": "True or False",
    "float": "a number",
    "int": "a whole number",
    "list": "a list, such as \"['a', 'b']\"",
    "str": "text, such as \"'5'\"",
    "tuple": "a list, such as \"('a', 'b')\"",
}


def _advice(wanted: str, default: str) -> str:
    is_filled_list = wanted in ("list", "tuple") and len(default) > 2
    return f'a list, such as "{default}"' if is_filled_list else _EXAMPLES.get(wanted, wanted)


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turn what Detectron2's config reader raises into an InputError that names ``source``."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # it raises many kinds
        message = one_line(e)
        if found := _MISMATCH.fullmatch(message):
            wanted, default, value, key = found.groups()
            message = f"{key} is {value}: use {_advice(wanted, default)}"
        raise InputError(f"{source}: {message}") from e


@contextmanager
def _executing(path: str, name: str) -> Iterator[None]:
    """
    Turn whatever the code of a LazyConfig raises, an exit or an interrupt included, into an
    InputError with ``name``, the user's for the file, and the line, if need be of another file.
    """
    imported = builtins.__import__
    try:
        yield
    except InputError:
        raise
    except BaseException as e:
        where, kind, message = name, type(e).__name__, one_line(e)
        message = kind if message == kind else f"{kind}: {message}"
        frames = [x for x in traceback.extract_tb(e.__traceback__) if x.name == "<module>"]
        cause = e.__cause__
        if isinstance(cause, SyntaxError):  # Detectron2 names the file, and Python may the line
            line = f"line {cause.lineno}: " if cause.lineno else ""
            message = f"{one_line(e)} {line}{cause.msg}"
        elif frames:  # the last one is the module that was being executed
            file, line = frames[-1].filename, frames[-1].lineno
            where += f", line {line}" if file == path else f": {file}, line {line}"
        raise InputError(f"{where}: {message}") from e
    finally:
        # Detectron2 0.6 does not undo this when a config fails.
        builtins.__import__ = imported


def detectron2_configs() -> str:
    """The config folder of detectron2.model_zoo, whose import would need setuptools."""
    return os.path.join(os.path.abspath(detectron2.__path__[0]), "model_zoo", "configs", "")


def make_recipe(config: Union[CfgNode, DictConfig, Recipe]) -> Recipe:
    """
    Wrap a ``CfgNode`` with the keys of :func:`libra_d2.add_libra_config`, or a LazyConfig, which
    the recipe reads and writes. A recipe is returned as it is.
    """
    if isinstance(config, Recipe):
        return config
    return LazyRecipe(config) if isinstance(config, DictConfig) else YamlRecipe(config)


def read_recipe(path: str, options: Sequence[str], name: str = "") -> Recipe:
    """
    Read a config file and command line options, and check the values. Without a GPU, the default
    device becomes the CPU.

    Args:
        path: of the file, or its URL; "" for Detectron2's defaults.
        options: ``KEY VALUE`` pairs; ``key=value`` for a LazyConfig.
        name: the user's name for the file, for messages.

    Raises:
        InputError: if it is not a config, a key is unknown, or a value is illegal or of a wrong
            type.
    """
    name = name or path
    if is_lazy_config(path):
        with _reading(name):
            recipe: Recipe = LazyRecipe(_read_lazy(path, options, name))
    else:
        recipe = YamlRecipe(_read_yaml(path, options, name))
    named = {str(option).lstrip("+").split("=")[0] for option in options}
    if recipe.device == "cuda" and recipe.name_of("device") not in named:
        recipe.device = "cuda" if torch.cuda.is_available() else "cpu"
    is_in_iterations = recipe.name_of("max_iter") in named
    if is_in_iterations and recipe.name_of("epochs") not in named and recipe.epochs:
        recipe.epochs = 0.0
    check_values(recipe)
    return recipe


def is_lazy_config(path: str) -> bool:
    """Whether a file is a LazyConfig: Python, or YAML that ``LazyConfig.save`` has written."""
    if path.endswith(".py"):
        return True
    if "://" in path or not path.endswith((".yaml", ".yml")) or not os.path.isfile(path):
        return False
    try:
        with open(path, encoding="utf-8") as f:
            tree = yaml.compose(f, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError):
        return False  # as which it is read, with a message
    keys = [key.value for key, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
    return "model" in keys and "MODEL" not in keys


class _Config(CfgNode):
    """A config that takes 0 for 0.0, which ``CfgNode`` refuses, and suggests similar keys."""

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        _make_floats(cfg_other, self)
        # Detectron2 takes a file with an unknown key for one of an old version, with other keys.
        known = dict(leaves(self)) if self.VERSION == get_cfg().VERSION else {}
        for key, _ in leaves(cfg_other):
            if hint := _hint(key, known):
                raise ValueError(f"{key}: there is no such key{hint}")
        super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list: Sequence[str]) -> None:
        defaults, options = dict(leaves(self)), list(cfg_list)
        _check_options(options, defaults)
        for i, (key, value) in enumerate(zip(options[::2], options[1::2])):
            if isinstance(defaults.get(key), float) and re.fullmatch(r"[+-]?\d+", str(value)):
                options[2 * i + 1] = f"{value}.0"
        super().merge_from_list(options)


def _is_section(key: str, known: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{key}.") for name in known)


def _hint(key: str, known: Mapping[str, Any]) -> str:
    """Which key is meant if ``key`` is neither a key nor a section; "" if none is similar."""
    return "" if key in known or _is_section(key, known) else did_you_mean(key, known)


def _check_options(options: Sequence[str], defaults: Mapping[str, Any]) -> None:
    """Raises: InputError: if these are no KEY VALUE pairs, or a key looks like a known one."""
    for key in options[::2]:
        problem = ""
        if _is_section(key, defaults):
            problem = "it is a section; set one of the keys in it"
        elif key.startswith("--"):
            problem = "options like this come before all KEY VALUE pairs"
        elif "=" in key:
            problem = "write what is set in a YAML config as KEY VALUE"
        elif hint := _hint(key, defaults):
            problem = f"there is no such key{hint}"
        elif key == options[-1] and len(options) % 2:
            problem = "its value is missing"
        if problem:
            raise InputError(f"command line: {key}: {problem}")


def _make_floats(given: CfgNode, config: CfgNode, prefix: str = "") -> None:
    """
    Convert the whole numbers among given values whose place in a config has a float.

    Raises:
        ValueError: if a value is in the place of a section.
    """
    for key, value in given.items():
        if isinstance(config.get(key), dict):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key} is {value!r}: it must be a section")
            _make_floats(value, config[key], f"{prefix}{key}.")
        elif type(value) is int and isinstance(config.get(key), float):
            given[key] = float(value)


def _read_yaml(path: str, options: Sequence[str], name: str) -> CfgNode:
    defaults = get_cfg()
    add_libra_config(defaults)
    cfg = _Config(defaults)
    if path:
        with _reading(name):
            if "://" not in path:
                _check_yaml(path)
            # Detectron2's RetinaNets have an expression in their YAML. Where it is installed from a
            # checkout, the folder is a symbolic link.
            folder = detectron2_configs()
            linked = os.path.join(os.path.realpath(folder), "")
            is_detectron2s = os.path.abspath(path).startswith(folder)
            is_detectron2s |= os.path.realpath(path).startswith(linked)
            cfg.merge_from_file(path, allow_unsafe=is_detectron2s)
    with _reading("command line"):
        cfg.merge_from_list(options)
    return CfgNode(cfg)


def _check_yaml(path: str, seen: Set[str] = frozenset()) -> None:
    """Raise InputError for duplicate keys and circular bases in a YAML file and its bases."""
    if path in seen:
        raise InputError(f"{path}: its _BASE_ leads back to itself")
    with open(path, encoding="utf-8") as f:
        tree = yaml.compose(f, Loader=yaml.SafeLoader)
    if not isinstance(tree, yaml.MappingNode):
        raise InputError(f"{path}: not a config: there are no keys in it")

    def check(node: yaml.Node, prefix: str) -> None:
        keys: Set[str] = set()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = f"{prefix}{key.value}"
            if name in keys:
                line = key.start_mark.line + 1
                raise InputError(f"{path}: {name} is set twice, the second time in line {line}")
            keys.add(name)
            check(value, f"{name}.")

    check(tree, "")
    for key, value in tree.value:
        if key.value == "_BASE_":
            bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for base in bases:
                if not isinstance(base, yaml.ScalarNode):
                    raise InputError(
                        f"{path}: its _BASE_ must be the name of a file or a list of such"
                    )
                if "://" in base.value:
                    continue
                base_path = os.path.join(os.path.dirname(path), os.path.expanduser(base.value))
                if not os.path.isfile(base_path):
                    raise InputError(f"{path}: its _BASE_, {base.value}, is not a file")
                _check_yaml(os.path.normpath(base_path), {*seen, path})


def _read_lazy(path: str, overrides: Sequence[str], name: str) -> DictConfig:
    """Read a LazyConfig. The code of a Python file is executed."""
    with _executing(path, name):
        lazy = LazyConfig.load(path)
    if not isinstance(lazy.get("model"), DictConfig) or "_target_" not in lazy.model:
        raise InputError(f"{name}: a LazyConfig needs a model")
    for override in overrides:
        _check_override(lazy, override)
        try:
            lazy = LazyConfig.apply_overrides(lazy, [override])
        except Exception as e:  # the parser raises many kinds
            is_open = any(override.count(a) > override.count(b) for a, b in ("[]", "()", "{}"))
            problem = "a bracket is not closed" if is_open else one_line(e)
            raise InputError(f"command line: {override}: {problem}") from e
    return lazy


def _check_override(lazy: DictConfig, override: str) -> None:
    """Raise InputError for what is not key=value, and for a key that nothing would read."""
    key, equals, value = override.partition("=")
    problem = ""
    if key.startswith("~"):
        problem = "keys can only be removed in the config file"
    elif not equals:
        problem = "write what is set in a LazyConfig as key=value, such as train.max_iter=100"
    elif re.fullmatch(r"""[^[({'"$\\]+,.*""", value):
        problem = f"a list needs brackets, '{key}=[{value}]', and text with a comma needs quotes"
    if problem:
        raise InputError(f"command line: {override!r}: {problem}")
    if key.startswith("+"):  # which says that the key is new
        return
    missing = object()
    if OmegaConf.select(lazy, key, default=missing, throw_on_missing=False) is not missing:
        return
    parent = key.rpartition(".")[0]
    node: Any = OmegaConf.select(lazy, parent) if parent else lazy
    keys = list(map(str, node)) if isinstance(node, DictConfig) else []
    # Arguments of classes may be missing in a config, and so may options of the training and
    # sections that Detectron2 does not have, such as train.speed.
    if "_target_" in keys or key in PLACES:
        return
    is_open = key.startswith("train.") and bool(keys)
    known = sorted({*PLACES, *dict(leaves(OmegaConf.to_container(lazy)))})
    hint = did_you_mean(key, known, cutoff=0.9 if is_open else 0.8)
    if is_open and not hint:
        return
    if keys and not hint:
        hint = f"; {parent or 'it'} has {', '.join(keys)}"
    raise InputError(f"command line: {key}: the LazyConfig has no such key{hint}")
