"""Detectors outside: graphs give the detector's numbers, bundles its bits, and neither is taken for what it is not."""

import contextlib
import functools
import json

import numpy as np
import pytest
import torch
from files import mistake

from evaluation import load
from evaluation.metrics import format_table, summarize
from evaluation.score_table import read_table
from models.features import STAGE_CHANNELS, load_vgg
from models.rdn import RDN
from models.resnet import DeepStemResNet
from tools import export
from utils import checkpoints as checkpoint
from utils.checkpoints import fingerprint

onnxruntime = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors.torch")
on_cpu = functools.partial(load, device="cpu")
pytestmark = pytest.mark.usefixtures("small_classifier")


def written(path, stage=0, scale=4, temperature=1.7) -> str:
    """A detector's checkpoint, as train_detector.py writes it."""
    torch.manual_seed(stage)
    rdn = RDN(scale, num_features=8, growth_rate=4, num_blocks=1, num_layers=2)
    classifier = DeepStemResNet({0: 3, **STAGE_CHANNELS}[stage], "resnet18")
    content = {"arch": "resnet18", "state_dict": classifier.state_dict(), "sr_state_dict": rdn.state_dict()}
    content |= {"settings": {"images": "12 images, 0123", "real_roots": ["/home/me"]}, "progress": {}}
    content |= {"calibration": {"temperature": temperature, "t_real": 0.3}, "trained_on": torch.zeros(12, 2).long()}
    config = {"detector": {"arch": "resnet18", "stage": stage, "dilated": False}, "images": {"resize": 36}}
    config |= {"resynthesizer_fingerprint": fingerprint(rdn), "classifier_fingerprint": fingerprint(classifier)}
    checkpoint.save(content | {"config": config | {"vgg": load_vgg("random")[1] if stage else None}}, path)
    return str(path)


@pytest.fixture(scope="module")
def files(small_classifier, tmp_path_factory):
    """A folder with a detector as mine.pth.tar, mine.onnx and mine.safetensors."""
    folder = tmp_path_factory.mktemp("export")
    flags = f"--out {folder}/mine.onnx --bundle {folder}/mine.safetensors".split()
    export.main(["--resume", written(folder / "mine.pth.tar"), *flags])
    return folder


def images(*size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, np.uint8))


@pytest.mark.parametrize(("stage", "scale", "ending"), [(0, 4, "onnx"), (5, 3, "pt2")])
def test_a_graph_gives_the_detectors_numbers(files, tmp_path, stage, scale, ending):
    """Of pixels as ONNX, of features as what ONNX is made of: one takes as long as all other tests here."""
    path, graph = files / "mine.pth.tar", files / "mine.onnx"
    if stage:
        path, graph = written(tmp_path / "mine", stage, scale), tmp_path / f"new/mine.{ending}"
        export.main(["--resume", path, "--out", str(graph)])
    detector, (run, _) = on_cpu(path), export.open_graph(graph.read_bytes())
    for size in ((1, 3, 36, 36), (4, 3, 48, 72), (2, 3, 132, 552)):  # the last larger than tiles and strips
        logits, prob_fake = run(images(*size))
        wanted = detector.logits(images(*size)).double()
        assert logits == pytest.approx(wanted.numpy(), abs=1e-4) and np.ptp(logits) > 1e-2
        assert prob_fake == pytest.approx((wanted / 1.7).softmax(1)[:, 0].numpy(), abs=1e-5)


def test_a_graph_says_what_its_users_need(files):
    session = onnxruntime.InferenceSession(files / "mine.onnx")
    inputs = [(put.name, put.type, put.shape) for put in session.get_inputs()]
    assert inputs == [("image", "tensor(uint8)", ["batch", 3, "height", "width"])]
    logits, prob_fake = session.run(["logits", "prob_fake"], {"image": images(2, 3, 36, 40).numpy()})
    assert (logits.shape, prob_fake.shape) == ((2, 2), (2,))
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    known = {"scale": 4, "resize": 36, "crop_size": None, "temperature": 1.7, "t_real": 0.3, "t_fake": 0.5}
    assert facts.items() >= {"labels": ["fake", "real"], **known}.items()
    assert facts["detector"].items() >= checkpoint.load(files / "mine.pth.tar")["config"].items()


def test_a_graph_is_checked(files, tmp_path):
    def check(content, detector=f"{files}/mine.pth.tar"):
        (tmp_path / "a.onnx").write_bytes(content)
        export.main(["--resume", detector, "--check", f"{tmp_path}/a.onnx"])

    data, version = (files / "mine.onnx").read_bytes(), export.GRAPH.encode()
    weights = checkpoint.load(files / "mine.pth.tar")["state_dict"]["fc.weight"].numpy().tobytes()
    check(data)
    with mistake("a.onnx is not of this detector: temperature is 1.7, wanted 1.8"):
        check(data, written(tmp_path / "other.pth.tar", temperature=1.8))
    old, wrong = data.replace(version, version[:-1] + b"0"), data.replace(weights, bytes(len(weights)))
    for said, content in {"format is": old, "off the detector's": wrong, "no graph": data[:-9], "no": b""}.items():
        with mistake("a.onnx", said):
            check(content)


def test_a_bundle_gives_the_same_bits(files, tmp_path):
    mine, shared = (checkpoint.load(files / f"mine.{ending}") for ending in ("pth.tar", "safetensors"))
    assert shared.keys() == mine.keys() - {"settings", "progress"} | {"card"}
    assert all(fingerprint(shared[name]) == fingerprint(mine[name]) for name in ("state_dict", "sr_state_dict"))
    detectors = [on_cpu(files / f"mine.{ending}") for ending in ("pth.tar", "safetensors")]
    assert torch.equal(*(detector.logits(images(2, 3, 36, 36)) for detector in detectors))
    assert detectors[0].identity() == detectors[1].identity() and torch.equal(*(d.seen for d in detectors))
    assert "12 images" in shared["card"] and b"/home/me" not in (files / "mine.safetensors").read_bytes()
    checkpoint.save({**shared, "calibration": {"temperature": 3.0}}, tmp_path / "a.safetensors")  # tools.calibrate
    assert on_cpu(tmp_path / "a.safetensors").calibration == {"temperature": 3.0}


def test_a_bundle_of_released_files_names_its_vgg(tmp_path):
    content, x = checkpoint.load(written(tmp_path / "mine.pth.tar", stage=1)), images(1, 3, 36, 36)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "cls.pth.tar")
    torch.save({"state_dict": content["sr_state_dict"]}, tmp_path / "sr.pth.tar")
    torch.save({key: tensor + 0.01 for key, tensor in load_vgg("random")[0].state_dict().items()}, tmp_path / "vgg.pth")
    cls, sr, vgg, shared = (f"{tmp_path}/{name}" for name in ("cls.pth.tar", "sr.pth.tar", "vgg.pth", "a.safetensors"))
    files = f"--resume {cls} --sr-weights-file {sr} --vgg-weights {vgg} --bundle {shared}"
    export.main(["--no_dilation", *files.split()])
    released = on_cpu(cls, resynthesizer=sr, vgg_weights=vgg, options={"dilated": False})
    assert torch.equal(released.logits(x), on_cpu(shared, vgg_weights=vgg).logits(x))
    assert str(tmp_path) not in json.dumps(checkpoint.load(shared)["config"])
    with mistake("a.safetensors was trained with the VGG-19 weights"):
        on_cpu(shared, vgg_weights="random")


def test_a_card_has_the_results_of_this_detector(files, tmp_path):
    header = "path,label,generator,logit_fake,logit_real,prob_fake,prediction,error\n"
    (tmp_path / "p.csv").write_text(header + "a.png,real,,0,1,0.3,real,\nb.png,fake,,2,1,0.7,fake,\n")
    detector, metrics = on_cpu(files / "mine.pth.tar").identity(), summarize(read_table(tmp_path / "p.csv"))
    flags = f"--resume {files}/mine.pth.tar --bundle {tmp_path}/a.safetensors --scores {tmp_path}/p.json".split()
    changes = {"of another detector": {"detector": {"classifier": "0123"}}, "no metrics": {"metrics": None}}
    for said, change in (*changes.items(), ("", {})):
        (tmp_path / "p.json").write_text(json.dumps({"detector": detector, "metrics": metrics} | change))
        with mistake(said) if said else contextlib.nullcontext():
            export.main(flags)
    assert format_table(metrics) in checkpoint.load(tmp_path / "a.safetensors")["card"]


def test_bad_bundles(files, tmp_path, monkeypatch):
    whole, path, rng = (files / "mine.safetensors").read_bytes(), tmp_path / "bad.safetensors", np.random.default_rng(0)
    places = 3, 9, *rng.integers(0, len(whole), 30)  # in the header, too
    flipped = [whole[:place] + bytes([whole[place] ^ 1 << rng.integers(8)]) + whole[place + 1 :] for place in places]
    for content in (*flipped, whole[:-1], b"", (files / "mine.pth.tar").read_bytes(), safetensors.save({})):
        path.write_bytes(content)
        with mistake("bad.safetensors"):
            checkpoint.load(path)
    content = checkpoint.load(files / "mine.safetensors")
    for part in ("state_dict", "sr_state_dict"):
        changed = {key: tensor + 1 for key, tensor in content[part].items()}
        for parts in ({**content, part: changed}, {name: content[name] for name in content.keys() - {part}}):
            checkpoint.save(parts, path)
            with mistake("bad.safetensors"):
                on_cpu(path)
    monkeypatch.setattr(checkpoint, "BUNDLE", "version 2")
    with mistake("mine.safetensors is of the format", "version 1", "version 2"):
        checkpoint.load(files / "mine.safetensors")
