"""Simulate a GPU on a CPU, to find operations that combine tensors on different devices.

A tensor that a program moves to "cuda" gets a mark, the attribute `_on_cuda`, but stays in CPU memory. The simulation
does not check the operations of the backward pass.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ACROSS_DEVICES = {"copy_", "__set__", "__repr__", "__format__", "__deepcopy__", "_has_compatible_shallow_copy_type"}


def is_marked_as_cuda(value) -> bool:
    """Return whether a value is a tensor with the mark "on CUDA"."""
    return isinstance(value, Tensor) and getattr(value, "_on_cuda", False)


def mark_tensors_as_cuda_or_cpu(value, on_cuda: bool = True):
    """Set the attribute `_on_cuda` of every tensor in `value` to the argument `on_cuda`. Return `value`."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            leaf._on_cuda = on_cuda
    return value


def is_cuda_device(device) -> bool:
    """Return whether a device argument, such as "cuda:0", names a CUDA device."""
    return device is not None and torch.device(device).type == "cuda"


class PretendCuda(TorchFunctionMode):
    """A torch function mode that accepts "cuda" as a device, and marks each tensor that a real GPU would store."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return CUDA if is_marked_as_cuda(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return is_marked_as_cuda(args[0])
        if func == Tensor.data.__set__:
            func(*args)
            mark_tensors_as_cuda_or_cpu(args[0], is_marked_as_cuda(args[1]))
            return None
        if func in (Tensor.grad.__get__, Tensor.data.__get__):
            value = func(*args)
            return value if value is None else mark_tensors_as_cuda_or_cpu(value, is_marked_as_cuda(args[0]))
        if name in ("numpy", "__array__") and is_marked_as_cuda(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func is Tensor.cpu:
            return mark_tensors_as_cuda_or_cpu(args[0].clone(), False) if is_marked_as_cuda(args[0]) else args[0]
        if func is Tensor.to:
            return self.imitate_tensor_to_method(*args, **kwargs)
        self.raise_if_devices_differ(name, args, kwargs)
        created_on_cuda = is_cuda_device(kwargs.get("device"))
        if created_on_cuda:
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        sources = args[:1] if name == "__getitem__" else tree_leaves((args, kwargs))
        if created_on_cuda or any(is_marked_as_cuda(source) for source in sources):
            mark_tensors_as_cuda_or_cpu(result)
        return result

    @staticmethod
    def raise_if_devices_differ(name, args, kwargs):
        """Raise an error if an operation combines CUDA tensors with CPU tensors of one or more dimensions."""
        if name in ACROSS_DEVICES:
            return
        if name in ("__getitem__", "__setitem__"):
            if not is_marked_as_cuda(args[0]) and any(is_marked_as_cuda(index) for index in tree_leaves(args[1])):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            return
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_cuda = [tensor for tensor in tensors if is_marked_as_cuda(tensor)]
        on_cpu = [tensor for tensor in tensors if not is_marked_as_cuda(tensor) and tensor.dim() > 0]
        if on_cuda and on_cpu:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got cuda:0 and cpu")

    @staticmethod
    def imitate_tensor_to_method(tensor, *args, **kwargs):
        """Imitate `Tensor.to`, which moves a tensor to a device or converts the dtype of the tensor."""
        on_cuda = is_marked_as_cuda(tensor)
        kwargs.pop("non_blocking", None)
        remaining = []
        for value in (*args, kwargs.pop("device", None)):
            if isinstance(value, Tensor):
                on_cuda = is_marked_as_cuda(value)
                remaining.append(value.dtype)
            elif isinstance(value, str | torch.device):
                on_cuda = is_cuda_device(value)
            elif isinstance(value, torch.dtype):
                remaining.append(value)
        moved = tensor.to(*remaining, **kwargs) if remaining or kwargs else tensor
        if moved is tensor and on_cuda != is_marked_as_cuda(tensor):
            moved = tensor.detach().clone() if isinstance(tensor, torch.nn.Parameter) else tensor.clone()
        return mark_tensors_as_cuda_or_cpu(moved, on_cuda)


@contextlib.contextmanager
def pretend_cuda():
    """Make PyTorch report one GPU, and raise an error if an operation combines CPU and CUDA tensors."""
    with pytest.MonkeyPatch.context() as patch, PretendCuda():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        # Without this patch, DataLoader and the optimizers would call the CUDA driver, which may be missing
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        patch.setattr("torch.utils.data._utils.pin_memory.pin_memory", lambda data, device=None: data)
        yield
