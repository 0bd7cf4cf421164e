# SPDX-License-Identifier: Apache-2.0
"""Convolutions that compute the batch norm behind them with their own weights."""

import copy
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm

from .batch_norm import AffineBatchNorm2d

__all__ = ["FoldedConv2d", "fold_norms"]


class FoldedConv2d(Conv2d):
    """
    :class:`Conv2d` whose ``norm`` is folded into weight and bias where its statistics are fixed:
    frozen batch norms always, others in evaluation mode. A batch norm of fixed statistics
    multiplies each channel by a scale and adds a shift, so that it is cheaper to multiply the
    weights than the much larger features, in training, too.

    Parameters, gradients and checkpoint keys are those of the parent. What needs no gradient is
    folded once, and again when a tensor it was made of has changed or ``train``, ``eval`` or ``to``
    is called; only a write to the ``.data`` of a tensor between two inferences goes unnoticed. A
    norm with a hook of its own is called.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (N, C, H, W). Returns: what :class:`Conv2d` does, but for rounding."""
        norm = self.norm
        if norm is None or not _can_be_folded(norm):
            return super().forward(x)
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var, self.bias)
        scale, shift = self._keep("norm", tensors, self._fold_norm)
        weight = self._keep("weight", (self.weight, scale), self._fold_weight)
        x = self._conv_forward(x, weight, shift)
        return x if self.activation is None else self.activation(x)

    def _fold_norm(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        conv_bias: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Scale (C,) and shift (C,), that of the convolution's bias included."""
        scale = weight * (running_var + self.norm.eps).rsqrt()
        mean = running_mean if conv_bias is None else running_mean - conv_bias
        return scale, bias - mean * scale

    def _fold_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return weight * scale[:, None, None, None]

    def _keep(
        self, name: str, tensors: Tuple[Optional[torch.Tensor], ...], function: Callable
    ) -> Any:
        """``function(*tensors)``, which is computed again if a tensor has changed."""
        used = [x for x in tensors if x is not None]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(*tensors)
        has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in used)
        if has_gradient or any(x.is_inference() for x in used):
            return function(*tensors)
        kept = self.__dict__.setdefault("_kept", {})
        versions = [(id(x), x._version) for x in used]
        if name not in kept or kept[name][0] != versions:
            # Training cannot use tensors that were made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                kept[name] = (versions, used, function(*tensors))
        return kept[name][2]

    def train(self, mode: bool = True) -> "FoldedConv2d":
        self.__dict__.pop("_kept", None)
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FoldedConv2d":
        self.__dict__.pop("_kept", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> Dict[str, Any]:
        return {name: x for name, x in super().__getstate__().items() if name != "_kept"}

    def __prepare_scriptable__(self) -> nn.Module:
        plain = copy.copy(self)
        plain.__class__ = Conv2d
        return plain


# Those of classes derived from them may do something else.
_FORWARDS = {
    x.forward
    for x in (
        FrozenBatchNorm2d,
        AffineBatchNorm2d,
        _BatchNorm,
        nn.SyncBatchNorm,
        NaiveSyncBatchNorm,
    )
}


def _can_be_folded(norm: nn.Module) -> bool:
    if type(norm).forward not in _FORWARDS or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    if norm._backward_hooks or norm._backward_pre_hooks:
        return False
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return norm.affine and norm.track_running_stats and not norm.training


def fold_norms(module: nn.Module) -> None:
    """Make every :class:`Conv2d` with a norm in ``module`` a :class:`FoldedConv2d`, in place."""
    for child in module.modules():
        if type(child) is Conv2d and child.norm is not None:
            child.__class__ = FoldedConv2d
