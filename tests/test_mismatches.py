"""RDN, VGG-19, detector, stage, scale and flags that do not belong together: one line with what was got and wanted."""

import numpy as np
import pytest
import torch
from PIL import Image

import test as program
import train_detector
import train_sr
from models import RDN, Checkpoint, DeepStemResNet, VGGStages, load_vgg, new_detector
from models.vgg import vgg_weights
from utils.run import run_program

TINY = {"num_features": 4, "growth_rate": 4, "num_blocks": 1, "num_layers": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """RDNs, detectors and VGG weights, and a folder of real and one of generated images."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.save(RDN(**TINY).state_dict(), root / "rdn.pth")
    torch.save(RDN(**TINY).state_dict(), root / "other_rdn.pth")
    torch.save(RDN(scale=2, **TINY).state_dict(), root / "rdn_x2.pth")
    torn = RDN(**TINY).state_dict()
    torn["sfe3.weight"] = torn.pop("sfe2.weight")
    torch.save(torn, root / "torn_rdn.pth")
    rdn = Checkpoint(torch.load(root / "rdn.pth"), "rdn.pth")
    for name, stage, arch, dilated in (
        ("pixel", 0, "resnet18", False), ("stage2", 2, "resnet18", False), ("dilated", 0, "resnet50", True),
    ):  # fmt: skip
        detector, config = new_detector(rdn, {"arch": arch, "stage": stage, "dilated": dilated}, "random")
        torch.save(train_detector.detector_state(detector, config), root / f"{name}.pth.tar")
    torch.save(torch.load(root / "pixel.pth.tar") | {"progress": {}}, root / "last.pth.tar")
    torch.save({f"features.{k}": v for k, v in VGGStages().features.state_dict().items()}, root / "other_vgg.pth")
    for kind in ("real", "fake"):
        (root / kind).mkdir()
        pixels = np.random.default_rng(len(kind)).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(root / kind / "a.png")
    return root


IMAGES = "--data-root-pos real --data-root-neg fake"
NEW = f"{IMAGES} --fixed-sr --no_dilation --arch resnet18 --vgg-weights random"
LOADED = f"{IMAGES} --fixed-sr --vgg-weights auto"
SR = "--train-file real --vgg-lambda 0 --patch-size 8"

# of train_detector.py and, where a detector is loaded (--init), of test.py (--resume)
DETECTORS = [
    # a file of another kind
    (f"{NEW} --sr-weights-file pixel.pth.tar", ["pixel.pth.tar", "sfe1"]),
    (f"{LOADED} --init rdn.pth", ["rdn.pth", "holds no detector"]),
    (f"{LOADED} --init pixel.pth.tar --sr-weights-file pixel.pth.tar", ["pixel.pth.tar", "sfe1"]),
    (f"{NEW} --idx-stages 2 --sr-weights-file rdn.pth --vgg-weights pixel.pth.tar", ["pixel.pth.tar", "vgg19"]),
    (f"{NEW} --sr-weights-file real/a.png", ["real/a.png", "no checkpoint"]),
    # keys
    (f"{NEW} --sr-weights-file torn_rdn.pth", ["1 missing: sfe2.weight", "1 unknown: sfe3.weight"]),
    # a flag against a file
    (f"{NEW} --sr-weights-file rdn.pth --sr-scale 2", ["--sr-scale", "2", "rdn.pth has 4"]),
    (f"{NEW} --sr-weights-file rdn.pth --sr-num-features 64", ["--sr-num-features", "64", "has 4"]),
    (f"{LOADED} --init pixel.pth.tar --sr-num-blocks 16", ["--sr-num-blocks", "16", "has 1"]),
    (f"{LOADED} --init pixel.pth.tar --idx-stages 2", ["--idx-stages", "pixel.pth.tar has 0"]),
    (f"{LOADED} --init stage2.pth.tar --idx-stages 0", ["--idx-stages", "stage2.pth.tar has 2"]),
    (f"{LOADED} --init pixel.pth.tar --arch resnet50", ["--arch", "pixel.pth.tar has resnet18"]),
    (f"{LOADED} --init dilated.pth.tar --no_dilation", ["--no_dilation", "dilated.pth.tar has True"]),
    (f"{LOADED} --init pixel.pth.tar --input-channel 64", ["--input-channel", "pixel.pth.tar has 3"]),
    # a flag against a flag
    (f"{NEW} --sr-weights-file rdn.pth --idx-stages 2 --input-channel 3", ["--input-channel 3", "stage 2", "128"]),
    (f"{IMAGES} --fixed-sr --arch resnet18 --sr-weights-file rdn.pth", ["resnet18", "--no_dilation"]),
    (f"{NEW} --sr-weights-file rdn.pth --mode-sr denoising", ["--mode-sr denoising", "--fixed-sr"]),
    (f"{LOADED} --resume last.pth.tar --init pixel.pth.tar", ["--resume", "--init"]),
    # a file against a file
    (f"{LOADED} --init pixel.pth.tar --sr-weights-file other_rdn.pth", ["trained with the RDN", "other_rdn.pth"]),
    (f"{LOADED} --init pixel.pth.tar --sr-weights-file rdn_x2.pth", ["trained with the RDN", "rdn_x2.pth"]),
    (f"{LOADED} --init stage2.pth.tar --vgg-weights other_vgg.pth", ["trained with the VGG-19", "other_vgg.pth"]),
]  # fmt: skip
RESYNTHESIZERS = [
    (f"{SR} --weights-file pixel.pth.tar", ["pixel.pth.tar", "sfe1"]),
    (f"{SR} --resume last.pth.tar", ["last.pth.tar", "sfe1"]),
    (f"{SR} --resume rdn.pth", ["rdn.pth", "--weights-file"]),
    (f"{SR} --weights-file rdn.pth --scale 2", ["scale 2", "rdn.pth has 4"]),
    (f"{SR} --weights-file torn_rdn.pth", ["1 missing: sfe2.weight", "1 unknown: sfe3.weight"]),
    (f"{SR} --patch-size 24", ["a.png", "64 x 64", "--patch-size"]),
]  # fmt: skip
CASES = [
    *((train_detector, flags, words) for flags, words in DETECTORS),
    *((train_sr, flags, words) for flags, words in RESYNTHESIZERS),
    *(
        (program, flags.replace("--init", "--resume").replace("--fixed-sr", ""), words)
        for flags, words in DETECTORS
        if "--init" in flags and "--resume" not in flags
    ),
]


@pytest.mark.parametrize(("main", "flags", "words"), CASES, ids=[f"{c[0].__name__}: {c[1]}" for c in CASES])
def test_what_does_not_belong_together_is_refused(files, tmp_path, monkeypatch, capfd, main, flags, words):
    monkeypatch.chdir(files)
    out = {train_sr: "--outputs-dir", train_detector: "--output-path", program: "--save_path"}[main]
    mistakes = (main.DataError, main.ModelError, main.CheckpointError)
    arguments = [*flags.split(), out, str(tmp_path / "out"), "--gpu", "cpu", "--workers", "0"]
    status = run_program(lambda: main.main(arguments), *mistakes)
    lines = capfd.readouterr().err.splitlines()
    assert status == 2 and lines[-1].startswith("error: "), lines
    assert [word for word in words if word not in lines[-1]] == [], lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_run_resumed_with_other_settings_says_which(files, tmp_path, monkeypatch, caplog):
    """Those that change the numbers; here from fp32 to fp16, whose scaler the saved state has nothing about."""
    monkeypatch.chdir(files)
    run = f"{NEW} --sr-weights-file rdn.pth --gpu cpu --workers 0 --resume auto --output-path {tmp_path} --batch-size 2"
    for epochs, precision in ((1, "fp32"), (2, "fp16")):
        flags = ["--epochs", str(epochs), "--precision", precision, "--save-minutes", str(epochs)]
        train_detector.main([*run.split(), *flags])
    said = [r.message for r in caplog.records if "when the run began" in r.message]
    assert [line.split()[1] for line in said] == ["epochs", "precision"]
    assert said[1] == "warning: precision was fp32 when the run began and is fp16 now"


# --- VGG-19's weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A torch hub without weights, on a machine without a network. Gives the file that would hold VGG-19's."""

    def refuse(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth"


def test_imagenet_weights_are_known_by_their_hash(hub):
    hub.parent.mkdir()
    torch.save(VGGStages().state_dict(), hub)  # the right name, the right shapes
    for source in ("imagenet", "auto"):
        with pytest.raises(train_detector.ModelError, match="is damaged: its SHA-256 does not start with dcbb9e9d"):
            vgg_weights(source)


def test_a_download_with_the_wrong_hash_is_refused(hub, monkeypatch):
    def download(url, to, hash_prefix, **_):
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0123")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(train_detector.ModelError, match='invalid hash value .expected "dcbb9e9d"'):
        vgg_weights("imagenet")


def test_without_a_network_random_weights_stand_in_for_training_only(hub, caplog):
    _, record = load_vgg("auto")
    assert record["source"] == "random" and caplog.text.count("RANDOM VGG-19 weights") == 1
    with pytest.raises(train_detector.ModelError, match="not to be downloaded .*--vgg-weights FILE"):
        load_vgg("auto", {"source": "imagenet"}, "released.pth.tar")
    assert load_vgg("auto", record, "mine.pth.tar")[1] == record
    assert not hub.exists()


def test_a_vgg_file_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"features.0.weight": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(train_detector.ModelError, match="cannot read VGG-19 weights from .*evil.pth"):
        vgg_weights(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


# --- batch normalisation and single images ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (32, 33), (1, 1), (64, 8)])
def test_what_can_be_trained_on_one_image_is_known(size):
    """Just where torch can."""
    classifier, x = DeepStemResNet("resnet18"), torch.rand(1, 3, *size)
    try:
        super(DeepStemResNet, classifier).forward(x)
    except ValueError as error:
        assert "more than 1 value per channel" in str(error) and max(size) <= 32
        with pytest.raises(train_detector.ModelError, match="batch of one image .*--batch-size"):
            classifier(x)
    else:
        assert max(size) > 32
        classifier(x)
    classifier.eval()(x)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--batch-size 1 --crop-size 32", True),
        ("--batch-size 1", False),
        ("--batch-size 2 --crop-size 32", False),
        ("--batch-size 1 --idx-stages 2", True),
    ],
)
def test_a_lone_small_image_is_refused_before_training(files, tmp_path, monkeypatch, flags, refused):
    monkeypatch.chdir(files)
    arguments = f"{NEW} --sr-weights-file rdn.pth --gpu cpu --workers 0 --epochs 1 --output-path {tmp_path}/out {flags}"
    if refused:
        with pytest.raises(
            train_detector.UsageError, match="2 images in batches of 1 .* leave one alone: .*--crop-size"
        ):
            train_detector.main(arguments.split())
        assert not (tmp_path / "out").exists()
    else:
        train_detector.main(arguments.split())
