"""Tests of tools.export, which converts a detector to an ONNX, torch.export or safetensors file.

A graph is an ONNX or torch.export file, and a bundle is one safetensors file with the weights of all networks.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from files import expect_user_error
from PIL import Image
from processes import ROOT
from torch import nn

from evaluation import load
from evaluation.metrics import compute_metrics_overall_and_per_generator, format_metrics
from evaluation.score_table import read_table
from models import build
from models.features import load_vgg
from models.rdn import RDN
from tools import export, graph
from train_detector import collect_weights_and_config
from utils import checkpoints
from utils.files import require_new_or_marked_file
from utils.options import create_train_detector_parser
from utils.random_streams import seeded_generator

onnxruntime = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("shrink_resnet18")

CALIBRATION = {"temperature": 1.7, "t_real": 0.3, "t_fake": 0.5}
NO_DILATION = {"dilated": False}


def write_rdn_weights(path, scale=4):
    """Write the weights of a small RDN in the file format of the release, and return the path of the weights."""
    torch.manual_seed(scale)
    rdn = RDN(scale, num_features=8, growth_rate=4, num_blocks=1, num_layers=2)
    torch.save(rdn.state_dict(), path)
    return str(path)


def write_detector(path, rdn=None, images=None, calibration=CALIBRATION, **options):
    """Write a detector in the checkpoint format of train_detector.py, and return its path."""
    torch.manual_seed(0)
    detector, config = build.create_detector(
        checkpoints.read_checkpoint_if_path_is_given(rdn), {"arch": "resnet18", **options}, "random"
    )
    for module in detector.modules():  # without random batch-norm weights, all images would have similar logits
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    content = collect_weights_and_config(detector, {**config, "images": images or {}}, torch.zeros(12, 2).long())
    content |= {"settings": {"images": "12 images, 0123", "real_roots": ["/home/me"]}, "progress": {}}
    checkpoints.save_checkpoint(content | {"calibration": calibration}, path)
    return str(path)


def random_images(*size):
    """Return a uint8 tensor of the given shape with random pixels."""
    return torch.from_numpy(seeded_generator(1).integers(0, 256, size, np.uint8))


def compute_logits_of_detector_network(detector, x):
    """Compute the logits (B, 2) of whole images x, uint8 (B, 3, H, W), with the PyTorch network of a detector."""
    with torch.inference_mode():
        return detector.network(x.float() / 255).numpy()


@pytest.fixture(scope="module")
def exported_detector_folder(shrink_resnet18, tmp_path_factory):
    """Return a folder with one detector in three formats: mine.pth.tar, mine.onnx and mine.safetensors."""
    folder = tmp_path_factory.mktemp("export")
    rdn = write_rdn_weights(folder / "rdn.pth")
    write_detector(folder / "mine.pth.tar", rdn, {"resize": 100}, **NO_DILATION)
    flags = f"--resume {folder}/mine.pth.tar --out {folder}/mine.onnx --bundle {folder}/mine.safetensors"
    export.main(flags.split())
    return folder


# --- graphs


def require_graph_gives_detector_outputs(path, detector, *sizes):
    """Require that a graph gives the logits and P(fake) of the detector for random images of shapes (B, 3, H, W)."""
    run, _ = graph.load_graph(path.read_bytes())
    for size in sizes:
        x = random_images(*size)
        logits, prob_fake = run(x)
        expected = compute_logits_of_detector_network(detector, x)
        assert logits == pytest.approx(expected, abs=1e-4)
        margin = (expected[:, 0] - expected[:, 1]) / CALIBRATION["temperature"]
        assert prob_fake == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-5)
        assert np.ptp(logits) > 1e-3


def test_an_onnx_graph_gives_the_logits_of_the_detector_at_several_image_sizes(exported_detector_folder):
    detector = load(exported_detector_folder / "mine.pth.tar", device="cpu")
    require_graph_gives_detector_outputs(
        exported_detector_folder / "mine.onnx", detector, (1, 3, 36, 36), (4, 3, 48, 72), (2, 3, 132, 552)
    )


def test_a_graph_with_vgg_features_gives_the_logits_of_the_detector(exported_detector_folder, tmp_path):
    rdn = write_rdn_weights(tmp_path / "rdn.pth", scale=3)
    path = write_detector(tmp_path / "mine.pth.tar", rdn, stage=5, **NO_DILATION)
    export.main(["--resume", path, "--vgg-weights", "random", "--out", f"{tmp_path}/new/mine.pt2"])
    detector = load(path, device="cpu", vgg_weights="random")
    require_graph_gives_detector_outputs(tmp_path / "new" / "mine.pt2", detector, (1, 3, 96, 96), (2, 3, 132, 552))


@pytest.fixture(scope="module")
def exported_crop_detector_folder(exported_detector_folder):
    """Return a folder with a detector on crops of 128 x 128 pixels: mine.pth.tar and detector.onnx."""
    folder = exported_detector_folder / "crops"
    folder.mkdir()
    path = write_detector(
        folder / "mine.pth.tar", str(exported_detector_folder / "rdn.pth"), {"crop_size": 128}, **NO_DILATION
    )
    export.main(["--resume", path, "--out", f"{folder}/detector.onnx"])
    return folder


def test_the_graph_of_a_detector_trained_on_crops_scores_single_crops(exported_crop_detector_folder):
    path = exported_crop_detector_folder / "detector.onnx"
    _, facts = graph.load_graph(path.read_bytes())
    assert (json.loads(facts["crops"]), json.loads(facts["crop_size"])) == (9, 128)
    detector = load(exported_crop_detector_folder / "mine.pth.tar", device="cpu")
    require_graph_gives_detector_outputs(path, detector, (1, 3, 128, 128), (3, 3, 64, 72))


def test_the_documented_mean_over_crops_equals_the_score_of_the_detector(exported_crop_detector_folder, monkeypatch):
    document = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "# mean over crops" in block
    ]
    monkeypatch.chdir(exported_crop_detector_folder)
    detector = load("mine.pth.tar", device="cpu")
    for index, (height, width) in enumerate([(150, 281), (128, 128), (130, 400)]):
        Image.fromarray(random_images(height, width, 3).numpy()).save(f"{index}.png")
        names = {}
        exec(code.replace("photo.jpg", f"{index}.png"), names)
        assert names["prob_fake"] == pytest.approx(detector.predict(f"{index}.png")[0], abs=1e-5)


def test_replacing_batch_norms_by_plain_batch_norms_does_not_change_the_logits(exported_detector_folder):
    """PyTorch 2.6 with onnxscript 0.7 cannot convert batch norms to ONNX, so tools.graph replaces each batch norm."""
    network = load(exported_detector_folder / "mine.pth.tar", device="cpu").network
    plain = graph.copy_network_with_plain_batch_norms(network)
    assert not [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    x = random_images(2, 3, 64, 96).float() / 255
    with torch.inference_mode():
        assert plain(x).numpy() == pytest.approx(network(x).numpy(), abs=1e-5)


class BlockMeansAndSquares(nn.Module):
    """A module that returns the means of blocks of 2 x 2 pixels, and the squares of the means."""

    channels, stride = 6, 2

    def forward(self, x):
        x = F.avg_pool2d(x, 2)
        return torch.cat([x, x.square()], dim=1)


class FixedSize(nn.Module):
    """A classifier that accepts only residuals of 32 x 32 values per channel."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels * 32 * 32, 2)

    def forward(self, residual):
        return self.linear(residual.flatten(1))


def test_the_exported_graph_of_a_detector_with_custom_features_gives_its_logits(tmp_path, monkeypatch):
    monkeypatch.setitem(build.FEATURES, "halves", BlockMeansAndSquares)
    path = write_detector(tmp_path / "mine.pth.tar", sr_arch="bicubic", features="halves", **NO_DILATION)
    export.main(["--resume", path, "--out", f"{tmp_path}/mine.pt2"])
    require_graph_gives_detector_outputs(
        tmp_path / "mine.pt2", load(path, device="cpu"), (2, 3, 64, 64), (1, 3, 96, 132)
    )


def test_a_classifier_that_accepts_one_image_size_is_exported_for_crops_of_that_size(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(build.FEATURES, "halves", BlockMeansAndSquares)
    monkeypatch.setitem(build.CLASSIFIERS, "fixed", FixedSize)
    options = {"sr_arch": "none", "features": "halves", "arch": "fixed"}
    path = write_detector(tmp_path / "mine.pth.tar", images={"crop_size": 64}, **options)
    with caplog.at_level("INFO"):
        export.main(["--resume", path, "--out", f"{tmp_path}/mine.pt2"])
    assert "accepts only images of 64 x 64 pixels" in caplog.text
    require_graph_gives_detector_outputs(tmp_path / "mine.pt2", load(path, device="cpu"), (2, 3, 64, 64))
    path = write_detector(tmp_path / "whole.pth.tar", **options)
    with expect_user_error("cannot export"):
        export.main(["--resume", path, "--out", f"{tmp_path}/whole.pt2"])
    assert not (tmp_path / "whole.pt2").exists()


def test_the_metadata_of_a_graph_contains_labels_image_settings_and_calibration(exported_detector_folder):
    session = onnxruntime.InferenceSession(exported_detector_folder / "mine.onnx")
    inputs = [(value.name, value.type, value.shape) for value in session.get_inputs()]
    assert inputs == [("image", "tensor(uint8)", ["batch", 3, "height", "width"])]
    logits, prob_fake = session.run(["logits", "prob_fake"], {"image": random_images(2, 3, 36, 40).numpy()})
    assert (logits.shape, prob_fake.shape) == ((2, 2), (2,))
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    expected = {"labels": ["fake", "real"], "scale": 4, "resize": 100, "crop_size": None, "crops": 1, **CALIBRATION}
    assert {name: facts[name] for name in expected} == expected
    config = checkpoints.read_checkpoint_content(exported_detector_folder / "mine.pth.tar")["config"]
    assert facts["detector"].items() >= config.items()
    assert b"/home/me" not in (exported_detector_folder / "mine.onnx").read_bytes()


def test_tools_export_with_check_refuses_a_graph_of_another_detector_or_version_and_a_damaged_graph(
    exported_detector_folder, tmp_path
):
    def write_and_check_onnx_graph(content, detector=exported_detector_folder / "mine.pth.tar"):
        (tmp_path / "a.onnx").write_bytes(content)
        export.main(["--resume", str(detector), "--check", f"{tmp_path}/a.onnx"])

    data = (exported_detector_folder / "mine.onnx").read_bytes()
    version = graph.FORMAT.encode()
    weight = (
        checkpoints.read_checkpoint_content(exported_detector_folder / "mine.pth.tar")["state_dict"]["fc.weight"]
        .numpy()
        .tobytes()
    )
    write_and_check_onnx_graph(data)
    other = {**CALIBRATION, "temperature": 1.8}
    other = write_detector(
        tmp_path / "other.pth.tar",
        str(exported_detector_folder / "rdn.pth"),
        {"resize": 100},
        other,
        **NO_DILATION,
    )
    with expect_user_error("a.onnx is not the graph of this detector: expected temperature = 1.8, got 1.7"):
        write_and_check_onnx_graph(data, other)
    for text, content in (
        ("expected format", data.replace(version, version[:-1] + b"0")),
        ("expected a difference", data.replace(weight, bytes(len(weight)))),
        ("damaged", data[:-9]),
        ("damaged", b""),
    ):
        with expect_user_error("a.onnx", text):
            write_and_check_onnx_graph(content)


# --- files that already exist


@pytest.mark.parametrize(("flag", "name"), [("--out", "a.onnx"), ("--out", "a.pt2"), ("--bundle", "a.safetensors")])
def test_an_output_path_with_a_file_of_the_user_is_refused_before_any_work(
    exported_detector_folder, tmp_path, flag, name
):
    (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "folder.onnx").mkdir()
    with expect_user_error(name, "not written by this program"):
        export.main(["--resume", "no such detector", flag, str(tmp_path / name)])
    assert (tmp_path / name).read_bytes() == b"mine"
    with expect_user_error("folder.onnx"):
        export.main(["--resume", "no such detector", "--out", str(tmp_path / "folder.onnx")])


def test_an_exported_file_is_replaced_and_a_symbolic_link_to_it_is_kept(exported_detector_folder, tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_bytes((exported_detector_folder / "mine.safetensors").read_bytes())
    (tmp_path / "link.safetensors").symlink_to(target.name)
    path = write_detector(tmp_path / "other.pth.tar", sr_arch="none", **NO_DILATION)
    export.main(["--resume", path, "--bundle", f"{tmp_path}/link.safetensors"])
    assert (tmp_path / "link.safetensors").is_symlink()
    assert checkpoints.read_checkpoint_content(target)["config"]["resynthesizer"]["name"] == "none"
    require_new_or_marked_file(exported_detector_folder / "mine.onnx", graph.MARK)


# --- bundles


def test_a_bundle_gives_bit_for_bit_the_logits_of_the_checkpoint(exported_detector_folder, tmp_path):
    mine = checkpoints.read_checkpoint_content(exported_detector_folder / "mine.pth.tar")
    shared = checkpoints.read_checkpoint_content(exported_detector_folder / "mine.safetensors")
    assert shared.keys() == mine.keys() - {"settings", "progress"} | {"card"}
    for name in ("state_dict", "sr_state_dict"):
        assert checkpoints.compute_fingerprint(shared[name]) == checkpoints.compute_fingerprint(mine[name])
    one, other = (
        load(exported_detector_folder / f"mine.{ending}", device="cpu") for ending in ("pth.tar", "safetensors")
    )
    assert torch.equal(one.logits(random_images(2, 3, 36, 36)), other.logits(random_images(2, 3, 36, 36)))
    assert one.describe_model() == other.describe_model()
    assert torch.equal(one.trained_on, other.trained_on)
    assert "12 images" in shared["card"]
    assert b"/home/me" not in (exported_detector_folder / "mine.safetensors").read_bytes()


def test_a_bundle_of_a_detector_of_the_authors_format_keeps_its_logits_and_refuses_other_vgg_weights(tmp_path):
    rdn = write_rdn_weights(tmp_path / "sr.pth.tar")
    content = checkpoints.read_checkpoint_content(
        write_detector(tmp_path / "mine.pth.tar", rdn, stage=1, **NO_DILATION)
    )
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "cls.pth.tar")
    other = {key: tensor + 0.01 for key, tensor in load_vgg("random")[0].state_dict().items()}
    torch.save(other, tmp_path / "vgg.pth")
    cls, vgg, shared = (f"{tmp_path}/{name}" for name in ("cls.pth.tar", "vgg.pth", "a.safetensors"))
    flags = f"--no_dilation --resume {cls} --sr-weights-file {rdn} --vgg-weights {vgg} --bundle {shared}"
    export.main(flags.split())
    released = load(cls, device="cpu", resynthesizer=rdn, vgg_weights=vgg, options=NO_DILATION)
    x = random_images(1, 3, 36, 36)
    assert torch.equal(released.logits(x), load(shared, device="cpu", vgg_weights=vgg).logits(x))
    assert str(tmp_path) not in json.dumps(checkpoints.read_checkpoint_content(shared)["config"])
    with expect_user_error("a.safetensors", "VGG"):
        load(shared, device="cpu", vgg_weights="random")


def make_detector_description_and_metrics(exported_detector_folder, tmp_path):
    """Return a dict that describes the detector mine.pth.tar, and a dict of metrics of two scored images."""
    header = "path,label,generator,logit_fake,logit_real,prob_fake,prediction,error\n"
    (tmp_path / "p.csv").write_text(header + "a.png,real,,0,1,0.3,real,\nb.png,fake,,2,1,0.7,fake,\n")
    detector = load(exported_detector_folder / "mine.pth.tar", device="cpu").describe_model()
    return detector, compute_metrics_overall_and_per_generator(read_table(tmp_path / "p.csv"))


def make_bundle_export_arguments_with_scores(exported_detector_folder, tmp_path):
    """Return a command line for tools.export with --bundle a.safetensors and --scores p.json."""
    detector = f"{exported_detector_folder}/mine.pth.tar"
    return ["--resume", detector, "--bundle", f"{tmp_path}/a.safetensors", "--scores", f"{tmp_path}/p.json"]


def test_equal_vgg_weights_from_different_files_give_equal_graph_metadata(exported_detector_folder):
    detector = load(exported_detector_folder / "mine.pth.tar", device="cpu")
    metadata = []
    for source in ("imagenet", "/home/me/vgg19.pth"):
        vgg = {"source": source, "fingerprint": "0123"}
        changed = dataclasses.replace(detector, config={**detector.config, "vgg": vgg, "auxiliary_vgg": vgg})
        metadata.append(graph.collect_graph_metadata(changed))
        copied = graph.describe_detector_without_folders(changed)
        assert copied["vgg"]["source"] == copied["auxiliary_vgg"]["source"] == Path(source).name
    assert metadata[0] == metadata[1]


def test_each_setting_in_the_model_card_is_an_option_of_train_detector_py():
    template = (Path(export.__file__).parent / "card.md").read_text()
    (names,) = re.findall(r"for name in \((.*?)\) if name in settings", template)
    options = vars(create_train_detector_parser().parse_args([])).keys() | {"images"}
    assert set(re.findall(r'"(\w+)"', names)) <= options


def test_the_model_card_of_a_bundle_shows_the_metrics_of_the_given_scores(exported_detector_folder, tmp_path):
    detector, metrics = make_detector_description_and_metrics(exported_detector_folder, tmp_path)
    (tmp_path / "p.json").write_text(json.dumps({"detector": detector, "metrics": metrics}))
    export.main(make_bundle_export_arguments_with_scores(exported_detector_folder, tmp_path))
    assert format_metrics(metrics) in checkpoints.read_checkpoint_content(tmp_path / "a.safetensors")["card"]


def test_no_bundle_is_written_with_scores_of_another_detector_or_without_metrics(exported_detector_folder, tmp_path):
    detector, metrics = make_detector_description_and_metrics(exported_detector_folder, tmp_path)
    for text, record in (
        ("another detector", {"detector": {"classifier_fingerprint": "0123"}, "metrics": metrics}),
        ("no metrics", {"detector": detector}),
    ):
        (tmp_path / "p.json").write_text(json.dumps(record))
        with expect_user_error(text):
            export.main(make_bundle_export_arguments_with_scores(exported_detector_folder, tmp_path))
        assert not (tmp_path / "a.safetensors").exists()


def test_damaged_and_edited_bundles_are_refused(exported_detector_folder, tmp_path, monkeypatch):
    whole, path, rng = (
        (exported_detector_folder / "mine.safetensors").read_bytes(),
        tmp_path / "bad.safetensors",
        seeded_generator(0),
    )
    contents = [whole[:-1], b"", (exported_detector_folder / "mine.pth.tar").read_bytes(), safetensors.save({})]
    for place in (3, 9, *rng.integers(0, len(whole), 20)):  # bytes 3 and 9 belong to the header of the file
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        contents.append(bytes(flipped))
    for content in contents:
        path.write_bytes(content)
        with expect_user_error("bad.safetensors"):
            checkpoints.read_checkpoint_content(path)
    content = checkpoints.read_checkpoint_content(exported_detector_folder / "mine.safetensors")
    for part in ("state_dict", "sr_state_dict"):
        changed = {key: tensor + 1 for key, tensor in content[part].items()}
        checkpoints.save_checkpoint({**content, part: changed}, path)
        with expect_user_error("bad.safetensors"):
            load(path, device="cpu")
    monkeypatch.setattr(checkpoints, "BUNDLE", "version 2")
    with expect_user_error("mine.safetensors", "version 1", "version 2"):
        checkpoints.read_checkpoint_content(exported_detector_folder / "mine.safetensors")


@pytest.mark.parametrize(
    "flags", ["", "--out a.txt", "--check a.txt", "--bundle a.pth", "--out a.onnx --scores p.json"]
)
def test_tools_export_reports_a_wrong_command_line_with_exit_status_2(exported_detector_folder, flags, capsys):
    command = ["--resume", f"{exported_detector_folder}/mine.pth.tar", *flags.split()]
    with pytest.raises(SystemExit) as caught:
        export.main(command)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_tools_export_with_check_refuses_a_graph_that_does_not_exist(exported_detector_folder):
    with expect_user_error("none.onnx"):
        export.main(["--resume", f"{exported_detector_folder}/mine.pth.tar", "--check", "none.onnx"])
