"""Fixtures that several test files use."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the small networks of the tests are no faster with more threads

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from processes import SMALL  # noqa: E402
from scorings import write_detector, write_noise_images  # noqa: E402
from trainings import SIDE, TINY  # noqa: E402

from models.rdn import RDN  # noqa: E402
from models.resnet import LAYOUTS  # noqa: E402

torch.set_num_threads(1)  # OMP_NUM_THREADS has no effect if PyTorch was imported before this file


@pytest.fixture(scope="module")
def shrink_resnet18():
    """Replace resnet18 in the test process by a smaller network with half as many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS, "resnet18", SMALL["resnet18"])
        yield


@pytest.fixture(scope="session")
def write_real_and_fake_images():
    """Return a function that writes images of random pixels into root/real, and of 4 x 4 squares into root/fake."""

    def write_real_and_fake_folders(root, count, side):
        rng = np.random.default_rng(0)
        for kind, cell in (("real", 1), ("fake", 4)):
            (root / kind).mkdir()
            for i in range(count):
                pixels = rng.integers(0, 256, (side // cell, side // cell, 3), dtype=np.uint8)
                Image.fromarray(pixels.repeat(cell, 0).repeat(cell, 1)).save(root / kind / f"{i}.png")
        return root

    return write_real_and_fake_folders


@pytest.fixture(scope="session")
def training_files(tmp_path_factory, write_real_and_fake_images):
    """Return a folder with five images in real/, five images in fake/, and the weights of a tiny RDN in rdn.pth."""
    root = write_real_and_fake_images(tmp_path_factory.mktemp("files"), 5, SIDE)
    torch.manual_seed(0)
    torch.save(RDN(**TINY).state_dict(), root / "rdn.pth")
    return root


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory, shrink_resnet18):
    """Return the path of a checkpoint of a small detector that classifies pixel residuals."""
    return write_detector(tmp_path_factory.mktemp("tiny") / "tiny.pth.tar")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Return a folder with nine images of two sizes."""
    return write_noise_images(tmp_path_factory.mktemp("some"))
