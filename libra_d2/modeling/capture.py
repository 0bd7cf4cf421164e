# SPDX-License-Identifier: Apache-2.0
"""
How a module that replaces one of Detectron2's steps aside where operations are recorded: in traces,
compiled graphs and scripts, which are to contain the operations of the parent.
"""

import copy
from typing import Type

import torch
from torch import nn

__all__ = ["as_parent", "is_captured"]


def is_captured() -> bool:
    """Whether operations are being recorded, in a trace or a compiled graph."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def as_parent(module: nn.Module, parent_class: Type[nn.Module]) -> nn.Module:
    """
    A shallow copy of ``module`` of the class that its own is derived from: by ``partialmethod`` as
    ``__prepare_scriptable__``, what ``torch.jit.script`` compiles in place of ``module``. If the
    parent has such a method, its result.
    """
    parent = copy.copy(module)
    parent.__class__ = parent_class
    prepare = getattr(parent, "__prepare_scriptable__", None)
    return parent if prepare is None else prepare()
