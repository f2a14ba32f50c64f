"""The scripts: what they choose and say, the flags they pass (METHOD of the release), and that they really run."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from files import touch
from golden_rule import fill
from PIL import Image

import test
import train_detector
import train_sr
from evaluation.score_table import read_table
from models import RDN, DeepStemResNet
from tools import example
from utils import options
from utils.errors import run_program

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "train_sr.py": (train_sr.main, options.train_sr_parser),
    "train_detector.py": (train_detector.main, options.train_detector_parser),
    "test.py": (test.main, options.test_parser),
}
RELEASED = ("./pretrained_models/pixel_pggan_celeba.pth.tar", "./pretrained_models/sr_vgg_epoch_last.pth")
STAGE5 = "./pretrained_models/stylegan_celeba_stage5_noising"
OWN_ENVIRONMENT = (
    "DATA_ROOT_POS", "DATA_ROOT_NEG", "SR_RESUME", "RESUME", "OUTPUT_PATH", "VGG_WEIGHTS", "NPROC", "EVAL",
)  # fmt: skip

# Stands in for Python: can import everything, makes example images of no content, records what it is called with.
STUB = """#!/usr/bin/env bash
case "$1 ${2:-}" in
    "-c "*) exit 0 ;;
    "-m tools.example") mkdir -p data/example/{train,test}/{real,nearest,bilinear}; touch data/example/settings.json
        touch data/example/{train,val}.txt ;;
    *) printf '%s\\n' "$@" > recorded ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path):
    """The programs and scripts without images, outputs and the rest, and Python's stand-in as ./python."""
    for pattern in ("*.py", "script/*.sh", "models/*.py", "data/*.py", "utils/*.py"):
        for file in ROOT.glob(pattern):
            target = tmp_path / "checkout" / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    executable(tmp_path / "checkout" / "python", STUB)
    return tmp_path / "checkout"


def bash(checkout: Path, script: str, *argv, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """`bash script/SCRIPT ARGV` with these environment variables."""
    inherited = {k: v for k, v in os.environ.items() if k not in OWN_ENVIRONMENT}
    return subprocess.run(
        ["bash", checkout / "script" / script, *map(str, argv)],
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHON": str(checkout / "python"), **environment},
        cwd=cwd or checkout, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def recorded(checkout: Path):
    """The options the program was started with, and the command itself."""
    command = (checkout / "recorded").read_text().splitlines()
    at = next(i for i, word in enumerate(command) if word in PROGRAMS)
    _, parser = PROGRAMS[command[at]]
    return parser().parse_args(command[at + 1 :]), command


# --- what they pass -----------------------------------------------------------------------------------------

REAL_TRAIN = {"real_roots": ["./data/CelebA"]}
PIXEL = {"arch": "resnet50", "dilated": False, "stage": 0, "in_channels": 3}
STAGE_5 = {"arch": "resnet50", "dilated": False, "stage": 5, "in_channels": 512}
SHAPE = {"scale": 4, "num_features": 64, "growth_rate": 64, "num_blocks": 16, "num_layers": 8}
FROZEN = {
    "lr": 1e-2, "classifier_grad_scale": 0.02, "epochs": 100, "batch_size": 10, "fixed_resynthesizer": True,
    "resynthesizer_file": RELEASED[1], "resume": None, **SHAPE,
}  # fmt: skip
FINETUNED = {
    "lr": 1e-6, "classifier_grad_scale": 1e-3, "auxiliary_weight": 1.0, "epochs": 100, "batch_size": 6,
    "fixed_resynthesizer": False,
}  # fmt: skip


def at(generator: str, path: str) -> dict:
    return {**REAL_TRAIN, "fake_roots": [f"./data/{generator}"], "output_path": path}


SETTINGS = {
    "train_super_resolution_celeba.sh": {
        **SHAPE, "lr": 1e-4, "lr_decay": 0.5, "lr_decay_epoch": 225, "batch_size": 12, "patch_size": 24,
        "num_epochs": 750, "num_save": 15, "workers": 8, "outputs_dir": "./output_hr", "seed": 123,
        "train_file": "data/celeba_example_train.txt", "eval_file": "data/celeba_example_val.txt",
    },
    "train_pixel_pggan.sh": {**PIXEL, **FROZEN, **at("CelebA_ProGAN", "./output_end2end/pixel_pggan")},
    "train_stage5_stylegan.sh": {**STAGE_5, **FROZEN, **at("CelebA_StyleGAN", "./output_end2end/stage5_stylegan")},
    "train_pixel_pggan_colorization.sh": {
        **PIXEL, **FINETUNED, **at("CelebA_ProGAN", "./output_end2end/pixel_pggan_colorization"),
        "auxiliary": "colorization", "init": RELEASED[0], "resynthesizer_file": RELEASED[1],
    },
    "train_stage5_stylegan_denoising.sh": {
        **STAGE_5, **FINETUNED, **at("CelebA_StyleGAN", "./output_end2end/stage5_stylegan_noising"),
        "auxiliary": "denoising", "init": f"{STAGE5}/cls.pth.tar", "resynthesizer_file": f"{STAGE5}/sr.pth.tar",
    },
    "test_pixel_celeba.sh": {
        **PIXEL, **REAL_TRAIN, "fake_roots": ["./data/CelebA_StyleGAN"], "batch_size": 1, "resume": RELEASED[0],
        "resynthesizer_file": RELEASED[1], "save_path": "./output/train_pggan_pixel_test_stylegan",
    },
    "test_stage5_celeba.sh": {
        **STAGE_5, **REAL_TRAIN, "fake_roots": ["./data/CelebA_ProGAN"], "batch_size": 1,
        "resume": f"{STAGE5}/cls.pth.tar", "resynthesizer_file": f"{STAGE5}/sr.pth.tar",
        "save_path": "./output/train_stylegan_stage5_noising_test_pggan",
    },
}  # fmt: skip


def released_layout(checkout: Path) -> None:
    touch(
        checkout, "data/CelebA/a.png", "data/CelebA_ProGAN/a.png", "data/CelebA_StyleGAN/a.png",
        "data/celeba_example_train.txt", "data/celeba_example_val.txt", *RELEASED, f"{STAGE5}/cls.pth.tar",
        f"{STAGE5}/sr.pth.tar", "output_end2end/pixel_pggan/best.pth.tar", "output_hr/x4/best.pth",
    )  # fmt: skip


@pytest.mark.parametrize("script", SETTINGS)
def test_settings_of_the_release(bare, script):
    """Where the seed's paths exist they are taken, one line said for each; the user's flags come last."""
    released_layout(bare)
    run = bash(bare, script, 0, "--seed", 123)
    assert run.returncode == 0, run.stderr
    args, command = recorded(bare)
    got = vars(args)
    assert {key: got[key] for key in SETTINGS[script]} == SETTINGS[script]
    assert args.gpu == "0" and command[-2:] == ["--seed", "123"]
    said = run.stderr.splitlines()
    assert all(line.startswith(f"[{script}] ") for line in said)
    options = "real_roots", "fake_roots", "resume", "init", "resynthesizer_file", "train_file", "eval_file"
    chosen = [path[0] if isinstance(path, list) else path for path in map(got.get, options) if path]
    assert sorted(line.rsplit(": ", 1)[1] for line in said) == sorted(chosen)
    for argv in [], ["gpu0"], ["--epochs", "1"]:
        run = bash(bare, script, *argv)
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
        assert f"usage: bash script/{script} GPU_ID" in run.stderr


def test_a_fresh_checkout(bare, tmp_path):
    """Example images are made once; then each script takes what the one before it wrote; from any folder."""
    rdn, own, sets = "output_hr/x4/last.pth", "output_end2end", "data/example"
    pixel, stage5 = f"{own}/pixel_pggan/last.pth.tar", f"{own}/stage5_stylegan/best.pth.tar"
    lists = {"train_file": f"{sets}/train.txt", "eval_file": f"{sets}/val.txt"}
    on_nearest = {"resynthesizer_file": f"./{rdn}", "fake_roots": [f"{sets}/train/nearest"]}
    for script, needs, by, wanted in (
        ("train_super_resolution_celeba", None, None, lists),
        ("train_pixel_pggan", rdn, "train_super_resolution_celeba", on_nearest),
        ("test_pixel_celeba", pixel, "train_pixel_pggan", {"resume": f"./{pixel}", "resynthesizer_file": None}),
        ("train_stage5_stylegan_denoising", stage5, "train_stage5_stylegan", {"init": f"./{stage5}"}),
        ("test_stage5_celeba", None, None, {"resume": f"./{stage5}", "fake_roots": [f"{sets}/test/nearest"]}),
    ):
        if needs:
            run = bash(bare, f"{script}.sh", "cpu", cwd=tmp_path)
            assert run.returncode == 2 and f"{by}.sh" in run.stderr.splitlines()[-1]
            touch(bare, needs)
        run = bash(bare, f"{script}.sh", "cpu", cwd=tmp_path)
        args, _ = recorded(bare)
        assert args.gpu == "cpu" and {key: getattr(args, key) for key in wanted} == wanted
        assert ("making example images" in run.stderr) == (wanted is lists)


def test_what_the_environment_says_goes_first(bare):
    released_layout(bare)
    mine = {"DATA_ROOT_POS": "my reals", "DATA_ROOT_NEG": "my fakes", "RESUME": "d.tar", "SR_RESUME": "r.pth",
            "OUTPUT_PATH": "my/out", "VGG_WEIGHTS": "my vgg.pth", "NPROC": "2"}  # fmt: skip
    run = bash(bare, "test_pixel_celeba.sh", 1, "--crop-size", 64, **mine)
    args, command = recorded(bare)
    assert (args.real_roots, args.fake_roots) == (["my reals"], ["my fakes"])
    assert (args.resume, args.resynthesizer_file, args.save_path) == ("d.tar", "r.pth", "my/out")
    assert (args.vgg_weights, args.crop_size) == ("my vgg.pth", 64)
    assert command[:3] == ["-m", "utils.launch", "2"]
    assert all(f"{value} (from {key})" in run.stderr for key, value in list(mine.items())[:4])


@pytest.mark.parametrize("named, other", [("DATA_ROOT_POS", "DATA_ROOT_NEG"), ("DATA_ROOT_NEG", "DATA_ROOT_POS")])
def test_half_of_a_pair_is_not_completed_by_example_images(bare, named, other):
    touch(bare, *RELEASED)
    for environment in {named: "mine"}, {}:  # in the second round there are images in its usual place
        run = bash(bare, "test_pixel_celeba.sh", 0, **environment)
        assert run.returncode == 2 and f"set {other}" in run.stderr.splitlines()[-1]
        assert not (bare / "recorded").exists() and not (bare / "data" / "example").exists()
        touch(bare, f"data/{'CelebA' if named == 'DATA_ROOT_POS' else 'CelebA_StyleGAN'}/a.png")


def test_a_python_that_lacks_packages(bare):
    """One that was named is not exchanged for another behind the user's back."""
    executable(bare / "python", "#!/usr/bin/env bash\nexit 1\n")
    run = bash(bare, "test_pixel_celeba.sh", 0)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "pip install -r requirements.txt" in run.stderr and not (bare / ".venv").exists()


# Stands in for a machine's python3, which has no packages: its venv is the stand-in above, once pip was called in it.
BARE_PYTHON = """#!/usr/bin/env bash
case "$1 ${{2:-}}" in
    "-c import sys"*) exit {too_old} ;;
    "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip") [[ {offline} == 0 ]] || exit 1; echo "$@" > pip; cp python new; mv new .venv/bin/python ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("too_old", "offline", "said"), [(0, 0, "installing"), (1, 0, "Python 3.10 or newer"), (0, 1, "pip failed on")]
)
def test_a_machine_with_nothing_but_python(bare, tmp_path, too_old, offline, said):
    """.venv is made and filled once; what is missing for that is said in one line."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "python3", BARE_PYTHON.format(too_old=too_old, offline=offline))
    released_layout(bare)
    machine = {"PYTHON": "", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    run = bash(bare, "test_pixel_celeba.sh", 0, **machine)
    assert said in run.stderr
    if too_old or offline:
        assert run.returncode == 2 and said in run.stderr.splitlines()[-1] and not (bare / "recorded").exists()
        return
    assert run.returncode == 0 and "-r requirements.txt" in (bare / "pip").read_text()
    (bare / "pip").unlink()
    again = bash(bare, "test_pixel_celeba.sh", 0, **machine)
    assert again.returncode == 0 and "installing" not in again.stderr and not (bare / "pip").exists()


# --- that they run ------------------------------------------------------------------------------------------


def run_recorded(checkout: Path) -> int:
    """Run what a script has started Python's stand-in with, in this process (which has torch imported already)."""
    args, command = recorded(checkout)
    return run_program(partial(PROGRAMS[command[0]][0], args))


def test_the_test_script_gives_the_released_logits(bare, monkeypatch):
    """No flag but the GPU's: the script's own, with the released files where the release has them."""
    released_layout(bare)
    golden = np.load(ROOT / "tests" / "golden" / "reference_outputs.npz")
    torch.save({"arch": "resnet50", "state_dict": fill(DeepStemResNet(in_channels=3)).state_dict()}, bare / RELEASED[0])
    torch.save(fill(RDN()).state_dict(), bare / RELEASED[1])
    for folder, pixels in zip(("CelebA", "CelebA_StyleGAN"), golden["image"], strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(bare / "data" / folder / "a.png")
    assert bash(bare, "test_pixel_celeba.sh", "cpu", "-j", 0).returncode == 0
    monkeypatch.chdir(bare)
    assert run_recorded(bare) == 0
    got = np.load("output/train_pggan_pixel_test_stylegan.npy")
    assert np.abs(got - golden["logits_pixel_dil0"]).max() <= 1e-4


def test_the_scripts_one_after_the_other(bare, tmp_path, monkeypatch, capfd):
    """Train RDN, train a detector on it, test that; tiny, but all of it real."""
    monkeypatch.chdir(bare)
    example.main("--size 64 --train 8 --val 4 --test 4 --steps 5 --workers 1 --out data/example".split())
    shape = "--num-features 8 --growth-rate 8 --num-blocks 1 --num-layers 2"
    for script, flags, written in (
        ("train_super_resolution_celeba", f"{shape} --num-epochs 1 --patch-size 8", "output_hr/x4/last.pth"),
        ("train_pixel_pggan", f"{shape} --arch resnet18 --epochs 1 -b 8", "output_end2end/pixel_pggan/last.pth.tar"),
        ("test_pixel_celeba", "--arch resnet18", "output/train_pggan_pixel_test_stylegan.csv"),
    ):
        run = bash(bare, f"{script}.sh", "cpu", *flags.split(), "-j", 0, cwd=tmp_path, VGG_WEIGHTS="random")
        assert run.returncode == 0 and "making example images" not in run.stderr
        capfd.readouterr()
        assert run_recorded(bare) == 0 and Path(written).exists()
    table = read_table(written)
    assert table.is_real.sum() == table.is_fake.sum() == 4 and table.scored.all()
    assert "AUROC" in capfd.readouterr().out
