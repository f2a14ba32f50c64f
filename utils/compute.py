"""Functions that choose the device on which networks run, and the number format of their arithmetic."""

import importlib.metadata
import logging
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from utils.console import is_main_process
from utils.distributed import read_local_rank
from utils.errors import UserError, describe_exception

logger = logging.getLogger(__name__)

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Compute(NamedTuple):
    """The device on which networks run, and the number format of their arithmetic."""

    device: torch.device
    precision: str  # fp32, tf32, bf16 or fp16

    def __str__(self) -> str:
        return f"{self.precision} on {self.device.type}"

    def images_to_float(self, images: Tensor) -> Tensor:
        """Convert uint8 images (B, 3, H, W) in 0..255 to float32 in [0, 1], on the device, in channels_last format."""
        x = images.to(self.device, non_blocking=True).to(torch.float32) / 255
        return x.contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """Return a context in which autocast is enabled for bf16 and fp16, and disabled for fp32 and tf32."""
        dtype = AUTOCAST_TYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def choose_device_and_precision(
    gpu: str | int | torch.device | None, precision: str, deterministic: bool | None, seed: int | None = None
) -> Compute:
    """Choose the device and the number format, and set PyTorch's global switches accordingly.

    Args:
        gpu: the device, as explained in `choose_device`.
        precision: auto, fp32, tf32, bf16 or fp16, where auto means tf32 on a GPU and fp32 on a CPU.
        deterministic: True for reproducible algorithms, False for the fastest algorithms, or None to keep PyTorch's
            present switches.
        seed: seed of PyTorch's random numbers, or None to keep the present state of PyTorch's generator.

    Raises:
        UserError: if the machine does not have the device, or if the device cannot use the number format.
    """
    device = choose_device(gpu)
    if seed is not None:
        torch.manual_seed(seed)
    if precision == "auto":
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision not in ("fp32", "tf32", *AUTOCAST_TYPES):
        raise UserError(f"precision must be auto, fp32, tf32, bf16 or fp16, got {precision}")
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs a GPU: use fp32 or bf16 on a CPU")
    if deterministic is not None:
        _set_deterministic(deterministic)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return Compute(device, precision)


def _set_deterministic(deterministic: bool) -> None:
    # The first call of torch.use_deterministic_algorithms takes 1.5 s, so a call that changes nothing is left out.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without this variable, cuBLAS is not reproducible
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic


def choose_device(gpu: str | int | torch.device | None) -> torch.device:
    """Choose the device, and make it PyTorch's current device if it is a GPU.

    Under torchrun, a process on a GPU uses the GPU with the number LOCAL_RANK, unless `gpu` is an int, a torch.device
    with an index, or a text such as "cuda:1".

    Args:
        gpu: None, the number of a GPU, "cpu", "cuda", "cuda:1", or a torch.device. None means the first GPU. On a
            machine without a GPU, None or a number means the CPU.

    Raises:
        UserError: if `gpu` does not describe a device, or if the machine does not have the device.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_number = isinstance(gpu, int) or (isinstance(gpu, str) and gpu.isdecimal())
    if not available and (gpu is None or is_number):
        if gpu is None:
            logger.info("this machine has no GPU: the CPU is used")
        elif is_main_process():
            logger.warning("warning: GPU %s is not available, because this machine has no GPU: the CPU is used", gpu)
        return torch.device("cpu")
    if gpu is None:
        device = torch.device("cuda")
    elif is_number:
        device = _device_from_name(f"cuda:{gpu}")
    else:
        device = _device_from_name(gpu)
    if device.type != "cuda":
        return device
    number = device.index or 0
    is_explicit = device.index is not None and not (isinstance(gpu, str) and gpu.isdecimal())
    if not is_explicit:
        own_number = read_local_rank()
        number = number if own_number is None else own_number
    if not 0 <= number < available:
        raise UserError(
            f"there is no GPU {number}: this machine has {_describe_gpu_numbers(available)}; choose another GPU, or cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _device_from_name(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        reason = describe_exception(error)
        raise UserError(f"expected a GPU number or cpu as the device, got {name!r} ({reason})") from None


def _describe_gpu_numbers(available: int) -> str:
    if available == 0:
        return "no GPU"
    return "GPU 0" if available == 1 else f"GPUs 0 to {available - 1}"


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect numerical results."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("torchvision", "numpy", "pillow"):
        found[name] = importlib.metadata.version(name)  # importing torchvision for its version would take seconds
    return found
