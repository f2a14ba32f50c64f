"""Tests that each program keeps its tensors on one device, with a GPU that pretend_cuda.py simulates."""

import pytest
import torch
from PIL import Image
from pretend_cuda import PretendCuda, is_marked_as_cuda, mark_tensors_as_cuda_or_cpu, pretend_cuda
from trainings import make_arguments_of_train_detector, make_arguments_of_train_sr, run_training

import test as test_program
from evaluation import load
from utils.options import create_test_parser

pytestmark = pytest.mark.usefixtures("shrink_resnet18")

DETECTOR_MODES = """
--fixed-sr --no-cache
--fixed-sr
--fixed-sr --crop-size 32 --crops-per-image 2 --batch-size 2
--fixed-sr --optimizer adamw --schedule cosine --clip-norm 1
--fixed-sr --idx-stages 2
--mode-sr none --idx-stages 1
--mode-sr none --lw-sr 0
--mode-sr colorization
--mode-sr denoising --idx-stages 2 --lr 1e-6
"""


def replace_cpu_argument_by_gpu_number(arguments):
    """Replace the argument "cpu" by "0" in a command line, so that `--gpu cpu` becomes `--gpu 0`."""
    return ["0" if word == "cpu" else word for word in arguments]


@pytest.fixture(scope="module")
def detector_file(training_files, tmp_path_factory, shrink_resnet18):
    """Train a small detector with VGG-19 features on the CPU for one epoch, and return the path of its checkpoint."""
    folder = tmp_path_factory.mktemp("detector")
    run_training(make_arguments_of_train_detector(training_files, folder, "--fixed-sr --idx-stages 1 --epochs 1"))
    return folder / "last.pth.tar"


def test_pretend_cuda_raises_an_error_if_an_operation_combines_cpu_and_gpu_tensors():
    with PretendCuda():
        a = torch.zeros(2, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            a + torch.zeros(2)
        with pytest.raises(TypeError, match="numpy"):
            (a + 1).numpy()
        with pytest.raises(RuntimeError, match="indices"):
            torch.zeros(2)[a > 0]
        assert a.device.type == "cuda" and a.cpu().device.type == "cpu"
        assert is_marked_as_cuda(a * torch.tensor(2.0))


def test_pretend_cuda_keeps_weights_and_gradients_on_the_gpu_in_a_training_step():
    with PretendCuda():
        layer = torch.nn.Linear(2, 2).to("cuda")
        optimizer = torch.optim.Adam(layer.parameters())
        layer(mark_tensors_as_cuda_or_cpu(torch.ones(1, 2))).sum().backward()
        optimizer.step()
        assert layer.weight.device.type == layer.weight.grad.device.type == "cuda"


@pytest.mark.parametrize("mode", DETECTOR_MODES.strip().splitlines())
def test_train_detector_trains_and_validates_on_one_device(training_files, tmp_path, mode):
    with pretend_cuda():
        run_training(
            replace_cpu_argument_by_gpu_number(
                make_arguments_of_train_detector(training_files, tmp_path, f"{mode} VALIDATE --epochs 1")
            )
        )
        run_training(
            replace_cpu_argument_by_gpu_number(
                make_arguments_of_train_detector(training_files, tmp_path, f"{mode} VALIDATE --epochs 2 --resume auto")
            )
        )
    assert (tmp_path / "best.pth.tar").exists()


@pytest.mark.parametrize("mode", ["--vgg-lambda 0.2", "--vgg-lambda 0 --augment --completion --colorization"])
def test_train_sr_trains_and_evaluates_on_one_device(training_files, tmp_path, mode):
    with pretend_cuda():
        run_training(
            replace_cpu_argument_by_gpu_number(
                make_arguments_of_train_sr(training_files, tmp_path, f"{mode} --eval-file REAL --num-epochs 1")
            )
        )
        weights = tmp_path / "x2/best.pth"
        run_training(
            replace_cpu_argument_by_gpu_number(
                make_arguments_of_train_sr(
                    training_files, tmp_path, f"--evaluate --eval-file REAL --weights-file {weights}"
                )
            )
        )


@pytest.mark.parametrize(
    "flags",
    ["", "--tile 64", "--crop-size 32 --crops 4", "--save-residuals RESIDUALS", "--perturb jpeg=70 resize"],
)
def test_test_py_keeps_all_tensors_on_one_device(training_files, tmp_path, detector_file, flags):
    words = f"--gpu 0 --workers 0 --vgg-weights random --resume {detector_file} --save_path {tmp_path}/scores"
    words += f" --data-root-pos {training_files}/real --data-root-neg {training_files}/fake {flags}"
    args = create_test_parser().parse_args(words.replace("RESIDUALS", f"{tmp_path}/residuals").split())
    with pretend_cuda():
        assert test_program.main(args) in (0, None)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, "0", torch.device("cuda"), torch.device("cuda", 0), None])
def test_loading_a_detector_accepts_every_way_to_name_a_gpu(training_files, detector_file, device):
    path = str(training_files / "real/0.png")
    with pretend_cuda():
        detector = load(str(detector_file), device=device, vgg_weights="random")
        assert detector.predict([path, Image.open(path)]).shape == (2,)
        assert detector.residual(path)[0].device.type == "cpu"
