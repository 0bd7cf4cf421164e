# SPDX-License-Identifier: Apache-2.0
"""The config keys of Libra R-CNN, and recipes of trainings in either config language."""

from .checks import check_datasets, check_run, check_values
from .defaults import add_libra_config
from .ideas import BASELINE, DETECTRON2_RECIPE, DISABLED, VARIANTS
from .reading import make_recipe, read_recipe
from .recipe import Recipe, SettingMissing

__all__ = [
    "BASELINE",
    "DETECTRON2_RECIPE",
    "DISABLED",
    "VARIANTS",
    "Recipe",
    "SettingMissing",
    "add_libra_config",
    "check_datasets",
    "check_run",
    "check_values",
    "make_recipe",
    "read_recipe",
]
