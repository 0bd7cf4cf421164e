# SPDX-License-Identifier: Apache-2.0
from typing import Any

from omegaconf import DictConfig

from detectron2.utils.registry import locate

__all__ = ["target_of"]


def target_of(node: Any) -> Any:
    """What a part of a LazyConfig is made with, a class or function; None if it is no part."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return locate(target) if isinstance(target, str) else target
