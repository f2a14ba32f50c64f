"""Detectors outside: graphs give the detector's numbers, bundles its bits, and neither is taken for what it is not."""

import json

import numpy as np
import pytest
import torch
from files import mistake

from models import RDN, STAGE_CHANNELS, DeepStemResNet, fingerprint, load, load_vgg, rdn_config
from utils import checkpoint, export
from utils.metrics import format_table, summarize
from utils.scores import read_table

onnxruntime = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("small_classifier")

CALIBRATION = {"temperature": 1.7, "t_real": 0.3, "t_fake": 0.8, "source": "held_out.csv"}


def written(path, stage=0, scale=4, **more) -> str:
    """A detector's checkpoint, as train_detector.py writes it."""
    torch.manual_seed(stage)
    rdn = RDN(scale, num_features=8, growth_rate=4, num_blocks=2, num_layers=2)
    classifier = DeepStemResNet("resnet18", STAGE_CHANNELS[stage])
    config = {
        "detector": {"arch": "resnet18", "stage": stage, "dilated": False},
        "resynthesizer": rdn_config(rdn.state_dict()),
        "resynthesizer_fingerprint": fingerprint(rdn),
        "classifier_fingerprint": fingerprint(classifier),
        "vgg": load_vgg("random")[1] if stage else None,
        "images": {"crop_size": None, "resize": 36},
    }
    weights = {"state_dict": classifier.state_dict(), "sr_state_dict": rdn.state_dict()}
    training = {"settings": {"images": "12 images, 0123", "real_roots": ["/home/me"]}, "progress": {}}
    about = {"arch": "resnet18", "config": config, "calibration": CALIBRATION, "trained_on": torch.zeros(12, 2).long()}
    checkpoint.save({**weights, **about, **training, **more}, path)
    return str(path)


@pytest.fixture(scope="module")
def files(small_classifier, tmp_path_factory):
    """A folder with a detector as mine.pth.tar, mine.onnx and mine.safetensors, and another.pth.tar."""
    folder = tmp_path_factory.mktemp("export")
    mine = written(folder / "mine.pth.tar")
    written(folder / "another.pth.tar", calibration={**CALIBRATION, "temperature": 1.8})
    export.main(["--resume", mine, "--out", f"{folder}/mine.onnx", "--bundle", f"{folder}/mine.safetensors"])
    return folder


def on_cpu(path, **options):
    return load(str(path), device="cpu", **options)


def images(batch, height, width):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), np.uint8))


@pytest.mark.parametrize(("stage", "scale", "ending"), [(0, 4, "onnx"), (5, 4, "onnx"), (2, 3, "pt2")])
def test_a_graph_gives_the_detectors_numbers(files, tmp_path, stage, scale, ending):
    path = files / "mine.onnx"
    if stage:
        path = tmp_path / f"new/mine.{ending}"
        export.main(["--resume", written(tmp_path / "mine.pth.tar", stage, scale), "--out", str(path)])
    detector = on_cpu(files / "mine.pth.tar" if stage == 0 else tmp_path / "mine.pth.tar")
    for size in ((1, 36, 36), (4, 48, 72), (2, 132, 276)):  # the last larger than tiles and strips
        x = images(*size)
        if ending == "onnx":
            logits, prob_fake = onnxruntime.InferenceSession(path).run(["logits", "prob_fake"], {"image": x.numpy()})
        else:
            module = torch.export.load(path).module(check_guards=False)
            logits, prob_fake = (output.detach().numpy() for output in module(x))
        wanted = detector.logits(x).double()
        assert logits == pytest.approx(wanted.numpy(), abs=1e-4) and np.ptp(logits) > 1e-2
        assert prob_fake == pytest.approx((wanted / 1.7).softmax(1)[:, 0].numpy(), abs=1e-5)


def test_a_graph_says_what_its_users_need(files):
    session = onnxruntime.InferenceSession(files / "mine.onnx")
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", 3, "height", "width"])
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    known = {"labels": ["fake", "real"], "scale": 4, "resize": 36, "crop_size": None, **CALIBRATION}
    assert all(facts[name] == value for name, value in known.items() if name != "source")
    network = on_cpu(files / "mine.pth.tar").network
    assert facts["detector"]["resynthesizer_fingerprint"] == fingerprint(network.resynthesizer)
    assert facts["detector"]["classifier_fingerprint"] == fingerprint(network.classifier)


def test_a_graph_is_checked(files, tmp_path):
    def check(graph, detector="mine.pth.tar"):
        export.main(["--resume", str(files / detector), "--check", str(graph)])

    check(files / "mine.onnx")
    with mistake("mine.onnx is not of", "temperature is 1.7, wanted 1.8"):
        check(files / "mine.onnx", "another.pth.tar")
    data, format_ = (files / "mine.onnx").read_bytes(), export.GRAPH.encode()
    weights = checkpoint.load(files / "mine.pth.tar")["state_dict"]["fc.weight"].numpy().tobytes()
    for content, said in (
        (data.replace(format_, format_[:-1] + b"0"), "format is"),
        (data.replace(weights, bytes(len(weights))), "off the numbers"),
        (data[: len(data) // 2], "no graph"),
        (b"", "no graph"),
    ):
        (tmp_path / "bad.onnx").write_bytes(content)
        with mistake("bad.onnx", said):
            check(tmp_path / "bad.onnx")


def test_a_bundle_gives_the_same_bits(files, tmp_path):
    mine, shared = (checkpoint.load(files / f"mine.{ending}") for ending in ("pth.tar", "safetensors"))
    assert shared.keys() == mine.keys() - {"settings", "progress"} | {"card"}
    for name in ("state_dict", "sr_state_dict"):
        assert shared[name].keys() == mine[name].keys()
        assert all(torch.equal(shared[name][key], tensor) for key, tensor in mine[name].items())
    assert torch.equal(shared["trained_on"], mine["trained_on"])
    detectors = [on_cpu(files / f"mine.{ending}") for ending in ("pth.tar", "safetensors")]
    assert torch.equal(*(detector.logits(images(2, 36, 36)) for detector in detectors))
    assert detectors[0].identity() == detectors[1].identity()
    content = (files / "mine.safetensors").read_bytes()
    assert b"12 images" in content and b"/home/me" not in content
    checkpoint.save({**shared, "calibration": {"temperature": 3.0}}, tmp_path / "a.safetensors")  # utils.calibrate
    assert on_cpu(tmp_path / "a.safetensors").calibration == {"temperature": 3.0}


def test_a_bundle_of_two_released_files_names_its_vgg(tmp_path):
    mine = written(tmp_path / "mine.pth.tar", stage=1)
    content, shared = checkpoint.load(mine), tmp_path / "new/a.safetensors"
    torch.save({"arch": "resnet18", "state_dict": content["state_dict"]}, tmp_path / "cls.pth.tar")
    torch.save({"state_dict": content["sr_state_dict"]}, tmp_path / "sr.pth.tar")
    vgg = {key: tensor + 0.01 for key, tensor in load_vgg("random")[0].state_dict().items()}
    torch.save(vgg, tmp_path / "vgg.pth")
    flags = f"--no_dilation --sr-weights-file {tmp_path}/sr.pth.tar --vgg-weights {tmp_path}/vgg.pth --bundle {shared}"
    export.main(["--resume", f"{tmp_path}/cls.pth.tar", *flags.split()])
    options = {"resynthesizer": f"{tmp_path}/sr.pth.tar", "vgg_weights": f"{tmp_path}/vgg.pth"}
    wanted = on_cpu(tmp_path / "cls.pth.tar", **options, options={"dilated": False}).logits(images(1, 36, 36))
    assert torch.equal(on_cpu(shared, vgg_weights=f"{tmp_path}/vgg.pth").logits(images(1, 36, 36)), wanted)
    assert str(tmp_path) not in json.dumps(checkpoint.load(shared)["config"])
    with mistake("a.safetensors was trained with the VGG-19 weights"):
        on_cpu(shared, vgg_weights="random")


def test_a_card_has_the_results_of_this_detector(files, tmp_path):
    header, detector = "path,label,generator,logit_fake,logit_real,prob_fake,prediction,error\n", files / "mine.pth.tar"
    (tmp_path / "p.csv").write_text(header + "a.png,real,,0,1,0.3,real,\nb.png,fake,,2,1,0.7,fake,\n")
    metrics = summarize(read_table(tmp_path / "p.csv"))
    record = {"detector": on_cpu(detector).identity(), "metrics": metrics, "trained_on": 3}
    arguments = ["--resume", str(detector), "--bundle", f"{tmp_path}/a.safetensors", "--scores", f"{tmp_path}/p.json"]
    (tmp_path / "p.json").write_text(json.dumps(record))
    export.main(arguments)
    card = checkpoint.load(tmp_path / "a.safetensors")["card"]
    assert format_table(metrics) in card and "trained on 3 of these" in card
    for change, said in (
        ({"detector": {"classifier": "0123"}}, "of another detector"),
        ({"metrics": None}, "no metrics"),
    ):
        (tmp_path / "p.json").write_text(json.dumps(record | change))
        with mistake(said):
            export.main(arguments)


def test_bad_bundles(files, tmp_path, monkeypatch):
    whole, path, rng = (files / "mine.safetensors").read_bytes(), tmp_path / "bad.safetensors", np.random.default_rng(0)
    flips = [(place, 1 << rng.integers(8)) for place in (3, 9, *rng.integers(0, len(whole), 30))]  # in the header, too
    contents = [whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :] for place, bit in flips]
    for content in (*contents, whole[:-1], b"", (files / "mine.pth.tar").read_bytes(), safetensors.save({})):
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


@pytest.mark.parametrize("flags", ["", "--bundle a.pth.tar", "--out"])
def test_mistakes_about_options(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main(["--resume", "a.pth.tar", *flags.split()])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
