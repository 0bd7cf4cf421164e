# SPDX-License-Identifier: Apache-2.0
"""Modules that take the place of Detectron2's in a model that is already built."""

import copy
from typing import Type

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["Replacement", "has_hooks", "has_tangent", "is_captured", "is_ordinary"]


def is_captured() -> bool:
    """Whether operations are being recorded, in a trace or a compiled graph."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def has_tangent(x: torch.Tensor) -> bool:
    """Whether derivatives with respect to ``x`` are being computed in forward mode."""
    return forward_ad.unpack_dual(x).tangent is not None


def is_ordinary(x: torch.Tensor) -> bool:
    """
    Whether operations on ``x`` are computed on the CPU, and neither recorded nor changed by
    functorch's transforms, forward-mode differentiation or a dispatch mode.
    """
    if is_captured() or type(x) is not torch.Tensor or x.device.type != "cpu" or has_tangent(x):
        return False
    return not (torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode())


def has_hooks(module: nn.Module) -> bool:
    """
    Whether somebody else sees or changes what a module gets or returns, or its gradients: by hooks,
    also those of all modules, or by a ``forward`` of this module alone.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    of_all = global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks
    of_all = (
        of_all or global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks
    )
    return bool(hooks or of_all) or "forward" in module.__dict__


class Replacement:
    """
    The first base of a class whose second one is a module of Detectron2, its parent. It computes
    the same numbers as the parent in another way, with the same attributes. What is recorded has to
    run without this package: scripts get a parent, and in traces and compiled graphs ``forward``
    does what the parent does (see :func:`is_captured`), unless all of its own operations are
    PyTorch's.
    """

    @classmethod
    def replace_in(cls, model: nn.Module) -> None:
        """Make every module in ``model`` that this class can replace one of it, in place."""
        for module in model.modules():
            if cls.can_replace(module):
                cls.replace(module)

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        """Those of the parent's class; others that are derived from it may do something else."""
        return type(module) is cls._parent()

    @classmethod
    def replace(cls, module: nn.Module) -> None:
        """Make ``module`` one of this class."""
        module.__class__ = cls

    @classmethod
    def _parent(cls) -> Type[nn.Module]:
        return cls.__mro__[cls.__mro__.index(Replacement) + 1]

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles instead. Detectron2 gives some modules this method."""
        parent = copy.copy(self)
        parent.__class__ = self._parent()
        parent._modules = dict(self._modules)  # PyTorch replaces some in it
        prepare = getattr(parent, "__prepare_scriptable__", None)
        return parent if prepare is None else prepare()
