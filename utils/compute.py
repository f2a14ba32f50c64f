"""The device and the number format that networks compute with."""

import logging
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from utils.console import is_main_process
from utils.errors import UserError

logger = logging.getLogger(__name__)



class Compute(NamedTuple):
    """The device networks run on, and the number format of their arithmetic."""

    device: torch.device
    precision: str

    def __str__(self) -> str:
        return f"{self.precision} on {self.device.type}"

    def input(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) of 0..255 -> float32 in [0, 1], on the device, channels-last."""
        x = images.to(self.device, non_blocking=True).to(torch.float32) / 255
        return x.contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """The context in which networks run."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def choose_compute(gpu: str | None, precision: str, deterministic: bool, seed: int | None = None) -> Compute:
    """The device for `--gpu`, and PyTorch set (for the whole process) to what precision, `deterministic` and seed ask for.

    auto: on CUDA TF32, as the release ran (PyTorch's default for convolutions), on a CPU float32. fp32 is float32 to
    the last bit. Unless `deterministic`, cuDNN measures which of its algorithms is the fastest for each shape.
    """
    device = choose_device(gpu)
    if seed is not None:
        torch.manual_seed(seed)
    if precision == "auto":
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type == "cpu":
        raise UserError("--precision tf32 is a format of GPUs: use fp32 or bf16 on a CPU")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # a call takes 1.5 s of imports
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no reproducible way
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return Compute(device, precision)


def choose_device(gpu: str | None) -> torch.device:
    """The device for `--gpu` ("cpu", a number, or None for the first GPU there is), made CUDA's current one.

    Raises:
        UserError: for a GPU this machine lacks although it has others, or a word that is neither.
    """
    if gpu not in (None, "cpu") and not gpu.isdecimal():
        raise UserError(f"--gpu {gpu}: a number or cpu was wanted")
    available = torch.cuda.device_count() if gpu != "cpu" and torch.cuda.is_available() else 0
    if not available:
        if gpu is None:
            logger.info("no GPU on this machine: using the CPU")
        elif gpu != "cpu" and is_main_process():
            logger.warning("warning: GPU %s was asked for and this machine has none: using the CPU", gpu)
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", gpu or 0))  # of several processes each has its own
    if number >= available:
        raise UserError(f"--gpu {number}: this machine has GPU 0..{available - 1}; choose one of these or cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on, for its records."""
    from importlib.metadata import version  # importing torchvision would take seconds

    own = {"python": sys.version.split()[0], "torch": torch.__version__}
    return own | {name: version(name) for name in ("torchvision", "numpy", "pillow")}
