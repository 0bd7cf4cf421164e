# SPDX-License-Identifier: Apache-2.0
"""Libra R-CNN in LazyConfigs."""

from .balance import balance, turn_off
from .target import target_of
from .view import LazyView, is_lazy_config, lazy_names, view

__all__ = ["LazyView", "balance", "is_lazy_config", "lazy_names", "target_of", "turn_off", "view"]
