"""Tests of the shell scripts in the folder script/: flags, input files, and installation of Python packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from files import write_empty_files
from golden_rule import load_fixed_pseudo_random_weights
from PIL import Image

from evaluation.score_table import read_table
from models.rdn import RDN
from models.resnet import DeepStemResNet
from utils import options

ROOT = Path(__file__).resolve().parent.parent
PARSERS = {
    "train_sr.py": options.create_train_sr_parser,
    "train_detector.py": options.create_train_detector_parser,
    "test.py": options.create_test_parser,
}
PIXEL_DETECTOR = "./pretrained_models/pixel_pggan_celeba.pth.tar"
RDN_FILE = "./pretrained_models/sr_vgg_epoch_last.pth"
STAGE5_DETECTOR = "./pretrained_models/stylegan_celeba_stage5_noising/cls.pth.tar"
STAGE5_RDN = "./pretrained_models/stylegan_celeba_stage5_noising/sr.pth.tar"
VARIABLES = (
    "DATA_ROOT_POS",
    "DATA_ROOT_NEG",
    "SR_RESUME",
    "RESUME",
    "OUTPUT_PATH",
    "VGG_WEIGHTS",
    "NPROC",
    "EVAL",
    "CLASSIFIER",
)

# STUB is a shell script that replaces Python, and writes its command line to the file `recorded`.
# In place of tools/example.py, STUB makes empty folders and files with the names that tools/example.py uses.
STUB = """#!/usr/bin/env bash
here=$(dirname "$0")
case "$1" in
    -c) exit 0 ;;
    */tools/example.py)
        mkdir -p "$3"/{train,test}/{real,nearest,bilinear}
        touch "$3"/{settings.json,train.txt,val.txt}
        ;;
    *)
        printf '%s\\n' "$@" > "$here/recorded"
        pwd > "$here/folder"
        ;;
esac
"""


# TRAINING_STUB replaces Python, but only for programs that train, test or use a detector. It writes their command lines to
# the file `recorded`. Other programs are run by the real Python.
TRAINING_STUB = f"""#!/usr/bin/env bash
case "$1" in
    */train_sr.py | */train_detector.py | */test.py | */tools/calibrate.py | */tools/report.py)
        echo "$@" >> "$(dirname "$0")/recorded"
        ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def write_executable(path: Path, text: str) -> None:
    """Write an executable file."""
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def project_copy(tmp_path):
    """Return a folder with the project's programs and packages, and with the shell script STUB as the file `python`."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for package in ("script", "models", "data", "utils", "evaluation", "tools"):
        for file in (ROOT / package).iterdir():
            if file.is_file():
                (folder / package).mkdir(exist_ok=True)
                shutil.copy(file, folder / package)
    shutil.rmtree(folder / "data" / "example", ignore_errors=True)
    write_executable(folder / "python", STUB)
    return folder


def run_script(checkout: Path, script: str, *arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run `bash script/SCRIPT ARGUMENTS` with additional environment variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    defaults = {"OMP_NUM_THREADS": "1", "PYTHON": str(checkout / "python")}
    return subprocess.run(
        ["bash", checkout / "script" / script, *[str(argument) for argument in arguments]],
        env={**inherited, **defaults, **environment},
        cwd=cwd or checkout,
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_command_recorded_by_python_stub(checkout: Path) -> list[str]:
    """Return the words of the command line that the script STUB has written to the file `recorded`."""
    return (checkout / "recorded").read_text().splitlines()


def parse_options_recorded_by_python_stub(checkout: Path) -> dict:
    """Return the options that a shell script has passed to a Python program."""
    words = read_command_recorded_by_python_stub(checkout)
    position = 0
    while Path(words[position]).name not in PARSERS:
        position += 1
    parser = PARSERS[Path(words[position]).name]()
    return vars(parser.parse_args(words[position + 1 :]))


# --- flags of the release -----------------------------------------------------------------------------------

RDN_SHAPE = {"scale": 4, "num_features": 64, "growth_rate": 64, "num_blocks": 16, "num_layers": 8}
PIXELS = {"arch": "resnet50", "dilated": False, "stage": 0, "in_channels": 3, "real_roots": ["./data/CelebA"]}
STAGE_5 = {"arch": "resnet50", "dilated": False, "stage": 5, "in_channels": 512, "real_roots": ["./data/CelebA"]}
FROZEN = {
    **RDN_SHAPE,
    "lr": 1e-2,
    "classifier_rate_factor": 0.02,
    "epochs": 100,
    "batch_size": 10,
    "fixed_resynthesizer": True,
    "resynthesizer_file": RDN_FILE,
    "resume": None,
}
FINE_TUNED = {
    "lr": 1e-6,
    "classifier_rate_factor": 1e-3,
    "auxiliary_weight": 1.0,
    "epochs": 100,
    "batch_size": 6,
    "fixed_resynthesizer": False,
}
SETTINGS = {
    "train_super_resolution_celeba.sh": {
        **RDN_SHAPE,
        "lr": 1e-4,
        "lr_decay": 0.5,
        "lr_decay_epoch": 225,
        "batch_size": 12,
        "patch_size": 24,
        "num_epochs": 750,
        "num_save": 15,
        "workers": 8,
        "outputs_dir": "./output_hr",
        "train_file": "./data/celeba_example_train.txt",
        "eval_file": "./data/celeba_example_val.txt",
    },
    "train_pixel_pggan.sh": {
        **PIXELS,
        **FROZEN,
        "fake_roots": ["./data/CelebA_ProGAN"],
        "output_path": "./output_end2end/pixel_pggan",
    },
    "train_stage5_stylegan.sh": {
        **STAGE_5,
        **FROZEN,
        "fake_roots": ["./data/CelebA_StyleGAN"],
        "output_path": "./output_end2end/stage5_stylegan",
    },
    "train_pixel_pggan_colorization.sh": {
        **PIXELS,
        **FINE_TUNED,
        "fake_roots": ["./data/CelebA_ProGAN"],
        "output_path": "./output_end2end/pixel_pggan_colorization",
        "auxiliary": "colorization",
        "init": PIXEL_DETECTOR,
        "resynthesizer_file": RDN_FILE,
    },
    "train_stage5_stylegan_denoising.sh": {
        **STAGE_5,
        **FINE_TUNED,
        "fake_roots": ["./data/CelebA_StyleGAN"],
        "output_path": "./output_end2end/stage5_stylegan_noising",
        "auxiliary": "denoising",
        "init": STAGE5_DETECTOR,
        "resynthesizer_file": STAGE5_RDN,
    },
    "test_pixel_celeba.sh": {
        **PIXELS,
        "fake_roots": ["./data/CelebA_StyleGAN"],
        "batch_size": 1,
        "resume": PIXEL_DETECTOR,
        "resynthesizer_file": RDN_FILE,
        "save_path": "./output/train_pggan_pixel_test_stylegan",
    },
    "test_stage5_celeba.sh": {
        **STAGE_5,
        "fake_roots": ["./data/CelebA_ProGAN"],
        "batch_size": 1,
        "resume": STAGE5_DETECTOR,
        "resynthesizer_file": STAGE5_RDN,
        "save_path": "./output/train_stylegan_stage5_noising_test_pggan",
    },
}
INPUTS = ("real_roots", "fake_roots", "resume", "init", "resynthesizer_file", "train_file", "eval_file")


def write_empty_files_at_the_paths_of_the_authors_scripts(checkout: Path) -> None:
    """Write empty files at the paths from which the scripts read images, lists and weights by default."""
    write_empty_files(
        checkout,
        "data/CelebA/a.png",
        "data/CelebA_ProGAN/a.png",
        "data/CelebA_StyleGAN/a.png",
        "data/celeba_example_train.txt",
        "data/celeba_example_val.txt",
        PIXEL_DETECTOR,
        RDN_FILE,
        STAGE5_DETECTOR,
        STAGE5_RDN,
        "output_end2end/pixel_pggan/best.pth.tar",
        "output_hr/x4/best.pth",
    )


@pytest.mark.parametrize("script", SETTINGS)
def test_each_script_passes_the_flags_of_the_authors_script(project_copy, script):
    write_empty_files_at_the_paths_of_the_authors_scripts(project_copy)
    assert run_script(project_copy, script, 0, "--seed", 123).returncode == 0
    options_of_run = parse_options_recorded_by_python_stub(project_copy)
    for name, value in SETTINGS[script].items():
        assert options_of_run[name] == value, name
    assert options_of_run["gpu"] == "0"
    assert read_command_recorded_by_python_stub(project_copy)[-2:] == [
        "--seed",
        "123",
    ]  # the flags of the user come last, to override the flags in the script


@pytest.mark.parametrize("script", SETTINGS)
def test_each_script_prints_one_line_per_input_file_or_folder(project_copy, script):
    write_empty_files_at_the_paths_of_the_authors_scripts(project_copy)
    lines = run_script(project_copy, script, 0).stderr.splitlines()
    options_of_run = parse_options_recorded_by_python_stub(project_copy)
    expected = []
    for name in INPUTS:
        value = options_of_run.get(name)
        if value:
            expected.append(value[0] if isinstance(value, list) else value)
    assert all(line.startswith(f"[{script}] ") for line in lines)
    assert sorted(line.rsplit(": ", 1)[1] for line in lines) == sorted(expected)


@pytest.mark.parametrize("script", SETTINGS)
@pytest.mark.parametrize("arguments", [[], ["gpu0"], ["--epochs", "1"]])
def test_each_script_is_refused_without_a_gpu_number_or_cpu_as_first_argument(project_copy, script, arguments):
    result = run_script(project_copy, script, *arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"usage: bash script/{script} GPU_ID" in result.stderr


# --- choice of inputs ---------------------------------------------------------------------------------------


def test_a_script_without_images_makes_example_images_once(project_copy):
    first = run_script(project_copy, "train_super_resolution_celeba.sh", "cpu")
    assert first.stderr.count("making example images") == 1
    assert parse_options_recorded_by_python_stub(project_copy)["train_file"] == "./data/example/train.txt"
    assert parse_options_recorded_by_python_stub(project_copy)["eval_file"] == "./data/example/val.txt"
    second = run_script(project_copy, "train_super_resolution_celeba.sh", "cpu")
    assert "making example images" not in second.stderr


CHAIN = [  # (script, input file of the script, earlier script that writes this file, options that the script passes)
    (
        "train_pixel_pggan.sh",
        "output_hr/x4/last.pth",
        "train_super_resolution_celeba.sh",
        {"resynthesizer_file": "./output_hr/x4/last.pth", "fake_roots": ["./data/example/train/nearest"]},
    ),
    (
        "test_pixel_celeba.sh",
        "output_end2end/pixel_pggan/last.pth.tar",
        "train_pixel_pggan.sh",
        {"resume": "./output_end2end/pixel_pggan/last.pth.tar", "resynthesizer_file": None},
    ),
    (
        "train_stage5_stylegan_denoising.sh",
        "output_end2end/stage5_stylegan/best.pth.tar",
        "train_stage5_stylegan.sh",
        {"init": "./output_end2end/stage5_stylegan/best.pth.tar", "fake_roots": ["./data/example/train/bilinear"]},
    ),
    (
        "test_stage5_celeba.sh",
        "output_end2end/stage5_stylegan/last.pth.tar",
        "train_stage5_stylegan.sh",
        {"resume": "./output_end2end/stage5_stylegan/last.pth.tar", "fake_roots": ["./data/example/test/nearest"]},
    ),
]


@pytest.mark.parametrize(("script", "needed", "earlier_script", "expected"), CHAIN)
def test_a_script_uses_the_output_of_an_earlier_script_and_names_the_script_if_it_is_missing(
    project_copy, script, needed, earlier_script, expected
):
    missing = run_script(project_copy, script, "cpu")
    assert missing.returncode == 2
    assert earlier_script in missing.stderr.splitlines()[-1]
    write_empty_files(project_copy, needed)
    assert run_script(project_copy, script, "cpu").returncode == 0
    options_of_run = parse_options_recorded_by_python_stub(project_copy)
    for name, value in expected.items():
        assert options_of_run[name] == value, name


def test_environment_variables_override_the_default_inputs_of_a_script(project_copy):
    write_empty_files_at_the_paths_of_the_authors_scripts(project_copy)
    environment = {
        "DATA_ROOT_POS": "my reals",
        "DATA_ROOT_NEG": "my fakes",
        "RESUME": "detector.tar",
        "SR_RESUME": "rdn.pth",
    }
    result = run_script(
        project_copy,
        "test_pixel_celeba.sh",
        1,
        OUTPUT_PATH="my/out",
        VGG_WEIGHTS="my vgg.pth",
        **environment,
    )
    options_of_run = parse_options_recorded_by_python_stub(project_copy)
    assert options_of_run["real_roots"] == ["my reals"]
    assert options_of_run["fake_roots"] == ["my fakes"]
    assert options_of_run["resume"] == "detector.tar"
    assert options_of_run["resynthesizer_file"] == "rdn.pth"
    assert options_of_run["save_path"] == "my/out"
    assert options_of_run["vgg_weights"] == "my vgg.pth"
    for name, value in environment.items():
        assert f"{value} (from {name})" in result.stderr


def test_the_variable_nproc_makes_a_script_start_torchrun(project_copy):
    write_empty_files_at_the_paths_of_the_authors_scripts(project_copy)
    run_script(project_copy, "test_pixel_celeba.sh", 0, NPROC="2")
    words = read_command_recorded_by_python_stub(project_copy)
    assert words[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert words[5] == "./test.py"


def test_a_script_called_from_another_folder_reads_paths_of_the_user_relative_to_that_folder(project_copy, tmp_path):
    write_empty_files_at_the_paths_of_the_authors_scripts(project_copy)
    write_empty_files(tmp_path, "elsewhere/reals/a.png")
    result = run_script(
        project_copy,
        "train_pixel_pggan.sh",
        0,
        "--val-root-pos",
        "reals",
        cwd=tmp_path / "elsewhere",
        DATA_ROOT_POS="reals",
    )
    assert result.returncode == 0
    assert Path((project_copy / "folder").read_text().strip()) == tmp_path / "elsewhere"
    options_of_run = parse_options_recorded_by_python_stub(project_copy)
    assert options_of_run["real_roots"] == ["reals"]
    assert options_of_run["val_real_roots"] == ["reals"]
    assert options_of_run["fake_roots"] == [f"{project_copy}/data/CelebA_ProGAN"]
    assert options_of_run["output_path"] == f"{project_copy}/output_end2end/pixel_pggan"


@pytest.mark.parametrize(("given", "missing"), [("DATA_ROOT_POS", "DATA_ROOT_NEG"), ("DATA_ROOT_NEG", "DATA_ROOT_POS")])
def test_a_script_refuses_one_image_variable_without_the_other_and_makes_no_example_images(
    project_copy, given, missing
):
    write_empty_files(project_copy, PIXEL_DETECTOR, RDN_FILE)
    result = run_script(project_copy, "test_pixel_celeba.sh", 0, **{given: "mine"})
    assert result.returncode == 2
    assert f"set {missing}" in result.stderr.splitlines()[-1]
    assert not (project_copy / "data" / "example").exists()


@pytest.mark.parametrize(("stored", "missing"), [("CelebA", "DATA_ROOT_NEG"), ("CelebA_StyleGAN", "DATA_ROOT_POS")])
def test_a_script_refuses_one_image_folder_without_the_other_and_makes_no_example_images(project_copy, stored, missing):
    write_empty_files(project_copy, PIXEL_DETECTOR, RDN_FILE, f"data/{stored}/a.png")
    result = run_script(project_copy, "test_pixel_celeba.sh", 0)
    assert result.returncode == 2
    assert f"set {missing}" in result.stderr.splitlines()[-1]
    assert not (project_copy / "data" / "example").exists()


@pytest.mark.parametrize(
    ("numbered", "last", "starts"),
    [(None, None, True), (None, 0, True), (1, None, True), (1, 0, True), (1, 1, False), (1, 2, False)],
)
def test_a_training_of_a_script_is_finished_only_if_last_pth_tar_is_not_older_than_the_last_numbered_checkpoint(
    tmp_path, numbered, last, starts
):
    """`numbered` and `last` are the modification times of 0002.pth.tar and last.pth.tar, or None without the file."""
    for name, time in (("0002.pth.tar", numbered), ("last.pth.tar", last)):
        if time is not None:
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (time, time))
    command = f"source '{ROOT}/script/common.sh'; PYTHON=echo gpu=cpu; train_once '{tmp_path}/0002.pth.tar' PROGRAM"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ("PROGRAM --gpu cpu --resume auto" in done.stdout) == starts


# --- installation -------------------------------------------------------------------------------------------


def test_a_script_installs_nothing_if_the_user_has_chosen_a_python(project_copy):
    write_executable(project_copy / "python", "#!/usr/bin/env bash\nexit 1\n")
    result = run_script(project_copy, "test_pixel_celeba.sh", 0)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "requirements.txt" in result.stderr
    assert not (project_copy / ".venv").exists()


# BARE_PYTHON is a shell script that imitates a python3 without installed packages.
# In a new environment, `-m pip` overwrites the copy of BARE_PYTHON with the script STUB.
BARE_PYTHON = """#!/usr/bin/env bash
case "$1 ${{2:-}}" in
    "-c import sys"*) exit {too_old} ;;
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") [[ {offline} == 0 ]] || exit 1; echo "$@" > {checkout}/pip; cp {checkout}/python new; mv new "$0" ;;
    *) exit 1 ;;
esac
"""


def run_script_without_installed_python_packages(checkout, tmp_path, too_old=0, offline=0):
    """Run test_pixel_celeba.sh with the script BARE_PYTHON in place of python3."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    text = BARE_PYTHON.format(too_old=too_old, offline=offline, checkout=checkout)
    write_executable(tmp_path / "bin" / "python3", text)
    write_empty_files_at_the_paths_of_the_authors_scripts(checkout)
    return run_script(checkout, "test_pixel_celeba.sh", 0, PYTHON="", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")


def test_a_script_installs_missing_packages_once(project_copy, tmp_path):
    first = run_script_without_installed_python_packages(project_copy, tmp_path)
    assert first.returncode == 0
    assert "installing" in first.stderr
    assert "requirements.txt" in (project_copy / "pip").read_text()
    (project_copy / "pip").unlink()
    second = run_script_without_installed_python_packages(project_copy, tmp_path)
    assert second.returncode == 0
    assert "installing" not in second.stderr
    assert not (project_copy / "pip").exists()


def test_a_script_refuses_a_python_that_is_too_old(project_copy, tmp_path):
    result = run_script_without_installed_python_packages(project_copy, tmp_path, too_old=1)
    assert result.returncode == 2
    assert "Python 3.10 or newer" in result.stderr.splitlines()[-1]


def test_a_script_reports_a_failed_installation_in_its_last_line(project_copy, tmp_path):
    result = run_script_without_installed_python_packages(project_copy, tmp_path, offline=1)
    assert result.returncode == 2
    assert "pip failed on" in result.stderr.splitlines()[-1]


# --- with the real Python -----------------------------------------------------------------------------------


def write_images_of_random_squares(folder: Path, count: int, cell: int) -> None:
    """Write images of 64 x 64 pixels that consist of randomly coloured squares of `cell` x `cell` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(cell)
    for i in range(count):
        pixels = rng.integers(0, 256, (64 // cell, 64 // cell, 3), dtype=np.uint8)
        Image.fromarray(pixels.repeat(cell, 0).repeat(cell, 1)).save(folder / f"{i}.png")


def test_the_test_script_gives_the_logits_of_the_authors_network(project_copy):
    golden = np.load(ROOT / "tests" / "golden" / "reference_outputs.npz")
    (project_copy / "pretrained_models").mkdir()
    classifier = load_fixed_pseudo_random_weights(DeepStemResNet(3)).state_dict()
    torch.save({"arch": "resnet50", "state_dict": classifier}, project_copy / PIXEL_DETECTOR)
    torch.save(load_fixed_pseudo_random_weights(RDN()).state_dict(), project_copy / RDN_FILE)
    for folder, pixels in zip(("CelebA", "CelebA_StyleGAN"), golden["image"], strict=True):
        (project_copy / "data" / folder).mkdir(parents=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(project_copy / "data" / folder / "a.png")
    result = run_script(project_copy, "test_pixel_celeba.sh", "cpu", "-j", 0, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    logits = np.load(project_copy / "output/train_pggan_pixel_test_stylegan.npy")
    np.testing.assert_allclose(logits, golden["logits_pixel_dil0"], rtol=0, atol=1e-4)


def test_three_scripts_train_rdn_train_a_detector_and_test_the_detector(project_copy):
    write_images_of_random_squares(project_copy / "data/CelebA", 4, cell=1)
    write_images_of_random_squares(project_copy / "data/CelebA_ProGAN", 4, cell=4)
    write_images_of_random_squares(project_copy / "data/CelebA_StyleGAN", 4, cell=2)
    tiny_rdn = ["--num-features", 8, "--growth-rate", 8, "--num-blocks", 1, "--num-layers", 2]
    common = {"PYTHON": sys.executable, "VGG_WEIGHTS": "random"}
    steps = [
        ("train_super_resolution_celeba.sh", [*tiny_rdn, "--num-epochs", 1, "--patch-size", 8, "--batch-size", 2]),
        ("train_pixel_pggan.sh", [f"--sr-{str(word)[2:]}" if str(word)[:2] == "--" else word for word in tiny_rdn]),
        ("test_pixel_celeba.sh", ["--arch", "resnet18"]),
    ]
    steps[1][1].extend(["--arch", "resnet18", "--epochs", 1, "--batch-size", 4])
    for script, flags in steps:
        result = run_script(project_copy, script, "cpu", *flags, "-j", 0, **common)
        assert result.returncode == 0, result.stderr
        assert "making example images" not in result.stderr
    table = read_table(project_copy / "output/train_pggan_pixel_test_stylegan.csv")
    assert table.is_real.sum() == 4
    assert table.is_fake.sum() == 4
    assert table.has_score.all()
    assert "AUROC" in result.stdout


def test_the_test_script_gives_equal_logits_with_one_and_two_processes(project_copy):
    write_images_of_random_squares(project_copy / "data/CelebA", 3, cell=1)
    write_images_of_random_squares(project_copy / "data/CelebA_StyleGAN", 3, cell=2)
    (project_copy / "pretrained_models").mkdir()
    torch.manual_seed(0)
    classifier = DeepStemResNet(3, "resnet18").state_dict()
    torch.save({"arch": "resnet18", "state_dict": classifier}, project_copy / PIXEL_DETECTOR)
    torch.save(RDN(num_features=4, growth_rate=4, num_blocks=1, num_layers=2).state_dict(), project_copy / RDN_FILE)
    flags = ["--arch", "resnet18", "-j", 0]
    for name, environment in (("one", {}), ("two", {"NPROC": "2"})):
        environment = {**environment, "PYTHON": sys.executable, "OUTPUT_PATH": name}
        result = run_script(project_copy, "test_pixel_celeba.sh", "cpu", *flags, **environment)
        assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(project_copy / "one.npy"), np.load(project_copy / "two.npy"))


# --- train_folders.sh ---------------------------------------------------------------------------------------


@pytest.fixture
def folders_with_pictures(tmp_path):
    """Return a folder with 12 real and 12 fake pictures in the folders "real" and "fake"."""
    rng = np.random.default_rng(0)
    for name in ("real", "fake"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    "pictures, variables, classifier",
    [
        (24, {}, "spectrum"),
        (600, {}, "resnet18"),
        (600, {"CLASSIFIER": "spectrum"}, "spectrum"),
    ],
)
def test_train_folders_chooses_the_classifier_by_the_number_of_pictures_or_as_the_user_says(
    project_copy, folders_with_pictures, tmp_path, pictures, variables, classifier
):
    write_executable(project_copy / "python", TRAINING_STUB)
    out = tmp_path / "out"
    if pictures != 24:
        out.mkdir()
        (out / "picture_count.txt").write_text(str(pictures))  # as if an earlier call had counted so many pictures
    folders = [folders_with_pictures / "real", folders_with_pictures / "fake"]
    run = run_script(project_copy, "train_folders.sh", *folders, "--seed", "5", OUT=str(out), **variables)
    assert run.returncode == 0, run.stderr
    commands = (project_copy / "recorded").read_text().splitlines()
    programs = [Path(command.split()[0]).name for command in commands]
    assert programs == ["train_sr.py", "train_detector.py", "test.py", "calibrate.py", "test.py", "report.py"]
    words = commands[1].split()
    assert words[words.index("--arch") + 1] == classifier and words[-2:] == ["--seed", "5"]
    training, held_out = ((out / name).read_text() for name in ("train.csv", "held_out.csv"))
    assert ("copies" in training) == ("copies" in held_out) == (classifier == "spectrum")
    assert ("--residual signed" in commands[1]) == (classifier == "spectrum")


def test_train_folders_refuses_an_unknown_classifier(project_copy, folders_with_pictures, tmp_path):
    write_executable(project_copy / "python", TRAINING_STUB)
    folders = [folders_with_pictures / "real", folders_with_pictures / "fake"]
    run = run_script(project_copy, "train_folders.sh", *folders, OUT=str(tmp_path / "out"), CLASSIFIER="vit")
    assert run.returncode == 2 and "CLASSIFIER must be spectrum or resnet18, got vit" in run.stderr
    assert not (project_copy / "recorded").exists()
