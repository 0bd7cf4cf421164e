# SPDX-License-Identifier: Apache-2.0
"""
A device that is none: tensors that say they are elsewhere, while their values stay on the CPU. It
finds operations that mix devices, and counts where a GPU would make the host wait.
"""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

ops = torch.ops.aten
DEVICE = torch.device("meta")  # a name for "elsewhere" that PyTorch has without a driver
# Copies from one device to another are what they are for; indices and scalars may be on the host.
_FREE = {
    *(ops.copy_.default, ops._to_copy.default, ops.index.Tensor, ops.index_put_.default),
    *(ops.index_put.default, ops._index_put_impl_.default),
}
# The size or the value of the result must reach the host.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


class _Elsewhere(torch.Tensor):
    """A tensor on the simulated device."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )

    def __init__(self, value):
        self.value = value

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the simulation")


class SimulatedDevice(TorchDispatchMode):
    """
    Inside, tensors and modules can be moved to :data:`DEVICE`. ``waits`` counts, by operator, the
    times that the host would wait. Mixing devices raises RuntimeError.
    """

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def move(self, module):
        """Move parameters and buffers there. Returns: ``module``."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = _Elsewhere(parameter.detach().clone())
                    part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = _Elsewhere(buffer.detach().clone())
        return module

    def __enter__(self):
        self._functions = _Functions(self)
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, _Elsewhere)]
        here = [x for x in tensors if not isinstance(x, _Elsewhere) and x.dim() > 0]
        if there and here and func not in _FREE:
            raise RuntimeError(f"{func} mixes devices")
        wanted = kwargs.get("device")
        self._count(func, args, there, wanted)

        def unwrap(x):
            return x.value if isinstance(x, _Elsewhere) else x

        inner = {**kwargs, "device": "cpu"} if _is_there(wanted) else kwargs
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, inner))
        name = func._schema.name.split("::")[1]
        if func is ops.copy_.default:
            stays = isinstance(args[0], _Elsewhere)
        else:
            stays = _is_there(wanted) or (bool(there) and wanted is None)
        if name == "_local_scalar_dense" or not stays:
            return result
        result = tree_map(lambda x: _Elsewhere(x) if isinstance(x, torch.Tensor) else x, result)
        if there and any(argument.alias_info for argument in func._schema.arguments):
            return return_and_correct_aliasing(func, args, kwargs, result)
        return result

    def _count(self, func, args, there, wanted):
        if not there:
            return
        name = func._schema.name.split("::")[1]
        to_host = func is ops._to_copy.default and wanted is not None and not _is_there(wanted)
        to_host |= func is ops.copy_.default and not isinstance(args[0], _Elsewhere)
        by_mask = func is ops.index.Tensor and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in _WAITING or func._schema.name == "torchvision::nms" or to_host or by_mask:
            self.waits["to the host" if to_host else name] += 1


class _Functions(TorchFunctionMode):
    """What PyTorch refuses for the device that lends its name, before it is dispatched."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_repeat = func in (torch.repeat_interleave, torch.Tensor.repeat_interleave)
        if is_repeat and isinstance(args[-1], _Elsewhere):
            self.device.waits["repeat_interleave"] += 1
            values = [x.value if isinstance(x, _Elsewhere) else x for x in args]
            return _Elsewhere(func(*values, **(kwargs or {})))
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            value = func(*args, **{**kwargs, "device": None})
            return value if isinstance(value, _Elsewhere) else _Elsewhere(value)
        if func is torch.Tensor.new_tensor and isinstance(args[0], _Elsewhere):
            return _Elsewhere(torch.tensor(args[1], dtype=args[0].dtype))
        return func(*args, **kwargs)


def _is_there(device):
    return device is not None and torch.device(device) == DEVICE
