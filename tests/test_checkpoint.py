"""Checkpoint files: whole or not at all, read without running anything; and what does not belong together is refused."""

import os
import pickle
import resource

import pytest
import torch
from files import mistake, random_rgb, save
from trainings import TINY, detector_arguments, read, train

import test as tester
import train_detector
import train_sr
from models.features import VGG19, load_vgg
from models.rdn import RDN
from models.released import state_dict_of
from models.resnet import DeepStemResNet
from utils import checkpoints as checkpoints
from utils import options
from utils.checkpoints import fingerprint, load_weights
from utils.errors import run_program

pytestmark = pytest.mark.usefixtures("small_classifier")

PROGRAMS = {  # with the flag that says where they write
    "train_sr": (train_sr.main, options.train_sr_parser, "--outputs-dir"),
    "train_detector": (train_detector.main, options.train_detector_parser, "--output-path"),
    "test": (tester.main, options.test_parser, "--save_path"),
}


def refusal(program, flags, capfd):
    """The one line by which a program ends."""
    main, parser, _ = PROGRAMS[program]
    args = parser().parse_args([*flags.split(), "--gpu", "cpu", "--workers", "0"])
    code, line = run_program(lambda: main(args)), capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and line.startswith("error: "), line
    return line


def test_what_is_saved_is_loaded(tmp_path):
    state = {"state_dict": {"a": torch.arange(3.0)}, "progress": {"epoch": 3, "best": None, "sums": {"loss": 0.5}}}
    checkpoints.save(state, tmp_path / "last.pth")
    loaded = checkpoints.load(tmp_path / "last.pth")
    assert loaded["progress"] == state["progress"] and torch.equal(loaded["state_dict"]["a"], torch.arange(3.0))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.load(tmp_path / "old.pth.tar")["a"], torch.ones(2))
    with mistake("cannot write"):
        checkpoints.save({}, tmp_path / "nowhere" / "last.pth")


@pytest.mark.parametrize("failure", ["disk full", "interrupt"])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.pth"
    checkpoints.save({"a": torch.zeros(2)}, path)
    before, (_, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def interrupt(_):
        raise KeyboardInterrupt

    if failure == "disk full":  # the kernel itself refuses, in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    else:
        monkeypatch.setattr(os, "fsync", interrupt)
    try:
        with mistake("last.pth") if failure == "disk full" else pytest.raises(KeyboardInterrupt):
            checkpoints.save({"a": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pth"]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, capfd, writer):
    """By `load`, and by the programs wherever they take a file."""
    path, target = tmp_path / "evil.pth.tar", tmp_path / "ran"
    content = {"state_dict": {"a": torch.zeros(1)}, "x": Malicious(target)}
    torch.save(content, path) if writer == "torch" else path.write_bytes(pickle.dumps(content))
    with mistake("evil.pth.tar", *(["refused"] if writer == "torch" else [])):
        checkpoints.load(path)
    (tmp_path / "list.txt").write_text(__file__)
    (tmp_path / "table.csv").write_text(f"path,label\n{__file__},real\n")
    for program, flags in (
        ("test", f"--input {__file__} --resume"),
        ("train_sr", f"--train-file {tmp_path}/list.txt --weights-file"),
        ("train_detector", f"--csv {tmp_path}/table.csv --sr-weights-file"),
    ):
        assert "evil.pth.tar" in refusal(program, f"{flags} {path}", capfd)
    assert not target.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # it would have run


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_said_to_be_one(tmp_path, share, legacy):
    path = tmp_path / "last.pth"
    torch.save({"state_dict": RDN(**TINY).state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with mistake("truncated", f"{path.stat().st_size} bytes"):
        checkpoints.load(path)


@pytest.mark.parametrize(("name", "word"), [(".", "folder"), ("absent.pth", "absent.pth"), ("list.pth", "list")])
def test_other_things_than_checkpoints(tmp_path, name, word):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with mistake(word):
        checkpoints.load(tmp_path / name)


# --- state dicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_are_found_in_any_wrapping(prefix, wrapped):
    source, target = RDN(**TINY), RDN(**TINY)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    load_weights(target, state_dict_of({"state_dict": state, "epoch": 3} if wrapped else state, "file"), "file")
    assert fingerprint(target) == fingerprint(source)
    for content in ({}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": [1]}, {"a": 1, "b": 2}):
        with mistake("some.pth"):
            state_dict_of(content, "some.pth")


def test_misfits_are_named_and_nothing_is_loaded():
    model = RDN(**TINY)
    before = fingerprint(model)
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    del state["sfe1.weight"]
    state |= {"classifier.fc": torch.zeros(1), "sfe2.weight": torch.zeros(5, 4, 3, 3)}
    with mistake("some.pth", "1 missing: sfe1.weight", "1 unknown: classifier.fc", "(5, 4, 3, 3)", "(4, 4, 3, 3)"):
        load_weights(model, state, "some.pth")
    assert fingerprint(model) == before == fingerprint(model.to(memory_format=torch.channels_last))
    with torch.no_grad():
        model.output.bias[0] += 1e-7
    assert fingerprint(model) != before and len(before) == 16
    assert fingerprint(torch.nn.Linear(2, 3)) != fingerprint(torch.nn.Linear(3, 2))


def test_parameters_keep_their_order():
    """By which the optimizer states in earlier checkpoints know them."""
    from torchvision.models import resnet50

    ours, theirs = (
        [k for k, _ in m.named_parameters() if k.startswith("layer")] for m in (DeepStemResNet(3), resnet50())
    )
    assert ours == theirs


# --- VGG-19's weights ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A torch hub without weights, on a machine without a network. Gives the file that would hold VGG-19's."""

    def refuse(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth"


def test_imagenet_weights_are_known_by_their_hash(hub, monkeypatch):
    def download(url, to, hash_prefix, **_):
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0123")')

    with monkeypatch.context() as patch, mistake("invalid hash value", "dcbb9e9d"):
        patch.setattr(torch.hub, "download_url_to_file", download)
        load_vgg("imagenet")
    hub.parent.mkdir(exist_ok=True)
    torch.save(VGG19().state_dict(), hub)  # the right name, the right shapes
    for source in ("imagenet", "auto"):
        with mistake("damaged", "dcbb9e9d"):
            load_vgg(source)


def test_without_a_network_random_weights_stand_in_for_training_only(hub, caplog):
    _, record = load_vgg("auto")
    assert record["source"] == "random" and caplog.text.count("RANDOM VGG-19 weights") == 1
    with mistake("--vgg-weights"):
        load_vgg("auto", {"source": "imagenet"}, "released.pth.tar")
    assert load_vgg("auto", record, "mine.pth.tar")[1] == record and not hub.exists()


# --- what does not belong together --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, small_classifier):
    """RDNs, detectors and VGG weights, and a folder of real and one of generated images."""
    root = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    for name, model in (("rdn", RDN(**TINY)), ("other_rdn", RDN(**TINY)), ("rdn_x2", RDN(scale=2, **TINY))):
        torch.save(model.state_dict(), root / f"{name}.pth")
    torn = RDN(**TINY).state_dict()
    torn["sfe3.weight"] = torn.pop("sfe2.weight")
    torch.save(torn, root / "torn_rdn.pth")
    for kind in ("real", "fake"):
        (root / kind).mkdir()
        save(root / kind / "a.png", random_rgb(64, 64, len(kind)))
    for name, flags in (("pixel", ""), ("stage2", "--idx-stages 2 --crop-size 64"), ("dilated", "--arch resnet50")):
        arguments = detector_arguments(root, root / name, f"--fixed-sr --epochs 1 --batch-size 2 {flags}")
        train([a for a in arguments if name != "dilated" or a != "--no_dilation"])
        os.link(root / name / "last.pth.tar", root / f"{name}.pth.tar")
    torch.save({f"features.{k}": v for k, v in VGG19().features.state_dict().items()}, root / "other_vgg.pth")
    return root


IMAGES = "--data-root-pos real --data-root-neg fake"
NEW = f"{IMAGES} --fixed-sr --no_dilation --arch resnet18 --vgg-weights random"
LOADED = f"{IMAGES} --fixed-sr --vgg-weights auto"
SR = "--train-file real --vgg-lambda 0 --patch-size 8"
CASES = [
    # a file of another kind
    (f"{NEW} --sr-weights-file pixel.pth.tar", ["pixel.pth.tar", "sfe1"]),
    (f"{LOADED} --init rdn.pth", ["rdn.pth", "no detector"]),
    (f"{NEW} --idx-stages 2 --sr-weights-file rdn.pth --vgg-weights pixel.pth.tar", ["pixel.pth.tar", "vgg19"]),
    (f"{NEW} --sr-weights-file real/a.png", ["real/a.png", "no checkpoint"]),
    (f"{NEW} --sr-weights-file torn_rdn.pth", ["1 missing: sfe2.weight", "1 unknown: sfe3.weight"]),
    (f"{SR} --resume pixel.pth.tar", ["pixel.pth.tar", "sfe1"]),
    # a flag against a file
    (f"{NEW} --sr-weights-file rdn.pth --sr-scale 2", ["--sr-scale", "2", "rdn.pth has 4"]),
    (f"{LOADED} --init pixel.pth.tar --sr-num-blocks 16", ["--sr-num-blocks", "16", "has 1"]),
    (f"{LOADED} --init pixel.pth.tar --idx-stages 2", ["--idx-stages", "pixel.pth.tar has 0"]),
    (f"{LOADED} --init pixel.pth.tar --arch resnet50", ["--arch", "pixel.pth.tar has resnet18"]),
    (f"{LOADED} --init dilated.pth.tar --no_dilation", ["--no_dilation", "dilated.pth.tar has True"]),
    (f"{LOADED} --init pixel.pth.tar --input-channel 64", ["--input-channel", "pixel.pth.tar has 3"]),
    (f"{SR} --weights-file rdn.pth --scale 2", ["scale 2", "rdn.pth has 4"]),
    (f"{SR} --patch-size 24", ["a.png", "64 x 64", "--patch-size"]),
    # a flag against a flag
    (f"{NEW} --sr-weights-file rdn.pth --idx-stages 2 --input-channel 3", ["--input-channel 3", "stage 2", "128"]),
    (f"{IMAGES} --fixed-sr --arch resnet18 --sr-weights-file rdn.pth", ["resnet18", "--no_dilation"]),
    # a file against a file
    (f"{LOADED} --init pixel.pth.tar --sr-weights-file other_rdn.pth", ["trained with the RDN", "other_rdn.pth"]),
    (f"{LOADED} --init pixel.pth.tar --sr-weights-file rdn_x2.pth", ["trained with the RDN", "rdn_x2.pth"]),
    (f"{LOADED} --init stage2.pth.tar --vgg-weights other_vgg.pth", ["trained with the VGG-19", "other_vgg.pth"]),
]


@pytest.mark.parametrize(("flags", "words"), CASES, ids=[flags for flags, _ in CASES])
def test_what_does_not_belong_together_is_refused(mixture, tmp_path, monkeypatch, capfd, flags, words):
    """By the trainers and, where a detector is loaded (--init), by test.py (--resume)."""
    monkeypatch.chdir(mixture)
    started = {"train_sr" if flags.startswith(SR) else "train_detector": flags}
    if "--init" in flags:
        started["test"] = flags.replace("--init", "--resume").replace("--fixed-sr", "")
    for program, its_flags in started.items():
        line = refusal(program, f"{its_flags} {PROGRAMS[program][2]} {tmp_path}/out", capfd)
        assert [word for word in words if word not in line] == [] and not (tmp_path / "out").exists(), line


def test_the_auxiliary_vgg_of_a_resumed_run_must_be_the_same(mixture, tmp_path):
    flags = "--mode-sr denoising --batch-size 2 --resume auto --epochs"
    arguments = detector_arguments(mixture, tmp_path / "out", flags)
    train([*arguments, "1"])
    with mistake("--vgg-weights"):
        train([*arguments, "2", "--vgg-weights", str(mixture / "other_vgg.pth")])


def test_the_config_of_a_detector_says_what_it_is(mixture):
    for name, stage, arch, dilated in (("stage2", 2, "resnet18", False), ("dilated", 0, "resnet50", True)):
        config = read(mixture / f"{name}.pth.tar")["config"]
        assert config["detector"] == {"arch": arch, "stage": stage, "dilated": dilated}
        assert config["resynthesizer"] == {"scale": 4, **TINY}
        assert config["resynthesizer_fingerprint"] == fingerprint(read(mixture / "rdn.pth"))
        assert (config["images"]["crop_size"] or 64) == 64
