"""Fill a network with fixed pseudo-random weights.

The code of the paper's authors computed the outputs in tests/golden/reference_outputs.npz with weights from this
module.
"""

import functools
import zlib

import numpy as np
import torch


@functools.cache  # drawing random weights is slow; the cached weights take about 0.5 GB of memory
def make_fixed_weight_from_parameter_name(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return pseudo-random values that depend only on the name and the shape of a parameter or buffer."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    legacy = np.random.RandomState  # noqa: NPY002 - the published rule names this generator
    n = legacy(zlib.crc32(("public/" + name).encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        n = n * np.float32(np.sqrt(1 / np.prod(shape[1:])))
    elif name.endswith("running_var"):
        n = 1 + np.float32(0.2) * np.abs(n)
    elif name.endswith(".weight"):
        n = 1 + np.float32(0.1) * n
    else:
        n = np.float32(0.05) * n
    return torch.from_numpy(n.astype(np.float32))


def load_fixed_pseudo_random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Load fixed pseudo-random weights into a module. Return the module in evaluation mode."""
    state = {k: make_fixed_weight_from_parameter_name(k, tuple(v.shape)) for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval()
