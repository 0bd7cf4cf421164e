# SPDX-License-Identifier: Apache-2.0
"""The config keys of Libra R-CNN, and recipes of trainings in either config language."""

from .checks import check_datasets, check_run, check_values
from .defaults import add_libra_config
from .ideas import BASELINE, DETECTRON2_RECIPE, DISABLED, VARIANTS
from .identity import RunIdentity, changed_values, describe, identify
from .length import set_length
from .reading import make_recipe, read_recipe
from .recipe import Recipe, SettingMissing

__all__ = [
    "BASELINE",
    "DETECTRON2_RECIPE",
    "DISABLED",
    "VARIANTS",
    "Recipe",
    "RunIdentity",
    "SettingMissing",
    "add_libra_config",
    "check_datasets",
    "check_run",
    "check_values",
    "describe",
    "changed_values",
    "identify",
    "make_recipe",
    "read_recipe",
    "set_length",
]
