"""Tests that checkpoints are written completely and read safely, and that unsuitable checkpoints are refused."""

import copy
import os
import pickle
import resource

import pytest
import torch
from files import expect_user_error, random_rgb_pixels, save_image
from trainings import TINY, make_arguments_of_train_detector, read_checkpoint_content, run_training

import test as tester
import train_detector
import train_sr
from models.build import (
    choose_classifier_arguments_from_options,
    choose_classifier_config,
    choose_features_config,
    create_network,
    create_resynthesizer,
)
from models.features import VGG19, load_vgg
from models.rdn import RDN
from models.released import extract_state_dict
from models.resnet import DeepStemResNet
from utils import checkpoints, options
from utils.checkpoints import Checkpoint, Fields, compute_fingerprint, load_weights
from utils.errors import run_program

pytestmark = pytest.mark.usefixtures("shrink_resnet18")

PROGRAMS = {  # name of the program -> (main function, function that returns the parser, flag for the output path)
    "train_sr": (train_sr.main, options.create_train_sr_parser, "--outputs-dir"),
    "train_detector": (train_detector.main, options.create_train_detector_parser, "--output-path"),
    "test": (tester.main, options.create_test_parser, "--save_path"),
}


def run_program_for_status_and_last_line(program, flags, capfd):
    """Run a program in this process, and return the exit status and the last line on stderr."""
    main, parser, _ = PROGRAMS[program]
    args = parser().parse_args([*flags.split(), "--gpu", "cpu", "--workers", "0"])
    code = run_program(lambda: main(args))
    return code, (capfd.readouterr().err.splitlines() or [""])[-1]


def error_line_of_program(program, flags, capfd):
    """Require that a program refuses its flags with exit status 2, and return the program's error line."""
    code, line = run_program_for_status_and_last_line(program, flags, capfd)
    assert code == 2 and line.startswith("error: "), line
    return line


# --- writing and reading ------------------------------------------------------------------------------------


def test_a_loaded_checkpoint_equals_the_saved_checkpoint(tmp_path):
    state = {"state_dict": {"a": torch.arange(3.0)}, "progress": {"epoch": 3, "best": None, "sums": {"loss": 0.5}}}
    checkpoints.save_checkpoint(state, tmp_path / "last.pth")
    loaded = checkpoints.read_checkpoint_content(tmp_path / "last.pth")
    assert loaded["progress"] == state["progress"]
    assert torch.equal(loaded["state_dict"]["a"], torch.arange(3.0))
    assert os.listdir(tmp_path) == ["last.pth"]


def test_checkpoints_in_the_format_of_early_pytorch_versions_are_loaded(tmp_path):
    """The checkpoints that the authors of the paper published have the file format of early PyTorch versions."""
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.read_checkpoint_content(tmp_path / "old.pth.tar")["a"], torch.ones(2))


def test_saving_a_checkpoint_into_a_missing_folder_raises_a_user_error(tmp_path):
    with expect_user_error("cannot write", "last.pth"):
        checkpoints.save_checkpoint({}, tmp_path / "nowhere" / "last.pth")


@pytest.fixture
def limit_file_size():
    """Make writing fail for every file that grows beyond 10 kB, to imitate a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_failed_save_on_a_full_disk_keeps_the_previous_checkpoint(tmp_path, limit_file_size):
    path = tmp_path / "last.pth"
    checkpoints.save_checkpoint({"a": torch.zeros(2)}, path)
    before = path.read_bytes()
    with expect_user_error("cannot write", "last.pth", "File too large"):
        checkpoints.save_checkpoint({"a": torch.ones(10_000)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pth"]


def test_an_interrupted_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoints.save_checkpoint({"a": torch.zeros(2)}, path)
    before = path.read_bytes()

    def raise_interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint({"a": torch.ones(10_000)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pth"]


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_that_runs_code_when_unpickled_is_refused(tmp_path, capfd, writer):
    path, folder = tmp_path / "evil.pth.tar", tmp_path / "made"
    content = {"state_dict": {"a": torch.zeros(1)}, "x": Malicious(folder)}
    torch.save(content, path) if writer == "torch" else path.write_bytes(pickle.dumps(content))
    with expect_user_error("evil.pth.tar", *(["refused"] if writer == "torch" else [])):
        checkpoints.read_checkpoint_content(path)
    image, other = (save_image(tmp_path / f"{seed}.png", random_rgb_pixels(64, 64, seed)) for seed in (0, 1))
    (tmp_path / "list.txt").write_text(image)
    (tmp_path / "list.csv").write_text(f"path,label\n{image},real\n{other},fake\n")
    for program, flags in (
        ("test", f"--input {image} --resume"),
        ("train_sr", f"--train-file {tmp_path}/list.txt --weights-file"),
        ("train_detector", f"--csv {tmp_path}/list.csv --sr-weights-file"),
    ):
        assert "evil.pth.tar" in error_line_of_program(program, f"{flags} {path}", capfd)
    assert not folder.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert folder.exists()  # without protection, loading the checkpoint runs code that makes this folder


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_the_error_for_a_truncated_checkpoint_says_that_it_is_truncated(tmp_path, fraction, legacy):
    path = tmp_path / "last.pth"
    torch.save({"state_dict": RDN(**TINY).state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with expect_user_error("truncated", f"{path.stat().st_size} bytes"):
        checkpoints.read_checkpoint_content(path)


@pytest.mark.parametrize(("name", "word"), [(".", "folder"), ("absent.pth", "absent.pth"), ("list.pth", "list")])
def test_a_folder_a_missing_path_and_a_saved_list_are_refused_as_checkpoints(tmp_path, name, word):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with expect_user_error(word):
        checkpoints.read_checkpoint_content(tmp_path / name)


# --- values -------------------------------------------------------------------------------------------------

VALUES = {
    "count": 3,
    "rate": 0.5,
    "name": "rdn",
    "on": True,
    "nothing": None,
    "part": {"scale": 4},
    "args": {"depth": 2},
}


def test_config_values_of_the_expected_type_are_returned():
    fields = Fields(VALUES, "some.pth", "config")
    assert fields.get_integer_field("count", 1, 3) == 3
    assert (
        fields.get_number_field("rate", 0, 1) == 0.5
        and fields.get_number_field("count") == 3
        and fields.get_positive_number_field("rate") == 0.5
    )
    assert fields.get_text_field("name", ["rdn", "none"]) == "rdn"
    assert fields.get_nested_fields("part").get_integer_field("scale") == 4 and fields.get_dict_of_keyword_arguments(
        "args"
    ) == {"depth": 2}
    assert (
        fields.has_value_other_than_none("count")
        and not fields.has_value_other_than_none("nothing")
        and not fields.has_value_other_than_none("absent")
    )


def test_a_missing_config_value_gives_the_default_or_an_error_without_a_default():
    fields = Fields(VALUES, "some.pth", "config")
    for key in ("nothing", "absent"):
        assert fields.get_integer_field(key, default=7) == 7 and fields.get_number_field(key, default=None) is None
        assert fields.get_nested_fields(key).values == {} and fields.get_dict_of_keyword_arguments(key) == {}
        with expect_user_error("some.pth", f"config.{key}", "missing"):
            fields.get_integer_field(key)
    assert Fields(None, "some.pth").get_text_field("name", default="rdn") == "rdn"


@pytest.mark.parametrize(
    ("method", "value", "limits"),
    [
        ("get_integer_field", "3", ()), ("get_integer_field", 3.0, ()), ("get_integer_field", True, ()), ("get_integer_field", -1, ()),
        ("get_integer_field", 9, (1, 8)),
        ("get_number_field", "3", ()), ("get_number_field", True, ()), ("get_number_field", float("nan"), ()), ("get_number_field", float("inf"), ()),
        ("get_number_field", 1.5, (0, 1)), ("get_number_field", torch.ones(1), ()), ("get_positive_number_field", 0, ()),
        ("get_positive_number_field", -1.0, ()),
        ("get_text_field", 3, ()), ("get_text_field", "other", (["rdn"],)), ("get_text_field", b"rdn", ()),
        ("get_nested_fields", [1], ()), ("get_nested_fields", "x", ()),
        ("get_dict_of_keyword_arguments", {3: 4}, ()), ("get_dict_of_keyword_arguments", {"a b": 1}, ()),
    ],
)  # fmt: skip
def test_a_config_value_of_a_wrong_type_or_range_is_refused_in_one_line(method, value, limits):
    fields = Fields({"key": value}, "some.pth", "config")
    with expect_user_error("some.pth", "config.key", "must"):
        getattr(fields, method)("key", *limits)


def test_a_config_that_is_not_a_dictionary_is_refused_in_one_line():
    with expect_user_error("some.pth", "config", "dictionary", "list"):
        Fields([1], "some.pth", "config")


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_are_loaded_from_a_bare_state_dict_and_from_a_checkpoint(prefix, wrapped):
    source, target = RDN(**TINY), RDN(**TINY)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    content = {"state_dict": state, "epoch": 3} if wrapped else state
    load_weights(target, extract_state_dict(content, "file"), "file")
    assert compute_fingerprint(target) == compute_fingerprint(source)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": [1]}, {"state_dict": 3}, {"a": 1, "b": 2}])
def test_a_checkpoint_without_weights_is_refused(content):
    with expect_user_error("some.pth"):
        extract_state_dict(content, "some.pth")


def test_load_weights_names_weights_that_do_not_fit_and_loads_nothing():
    model = RDN(**TINY)
    before = compute_fingerprint(model)
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    del state["sfe1.weight"]
    state |= {"classifier.fc": torch.zeros(1), "sfe2.weight": torch.zeros(5, 4, 3, 3)}
    with expect_user_error(
        "some.pth", "1 missing: sfe1.weight", "1 unknown: classifier.fc", "(5, 4, 3, 3)", "(4, 4, 3, 3)"
    ):
        load_weights(model, state, "some.pth")
    assert compute_fingerprint(model) == before


def test_a_fingerprint_depends_only_on_the_names_types_shapes_and_values_of_weights():
    model = RDN(**TINY)
    before = compute_fingerprint(model)
    assert len(before) == 16 and compute_fingerprint(model.state_dict()) == before
    assert compute_fingerprint(model.to(memory_format=torch.channels_last)) == before
    assert compute_fingerprint(copy.deepcopy(model).double()) != before
    with torch.no_grad():
        model.output.bias[0] += 1e-7
    assert compute_fingerprint(model) != before
    assert compute_fingerprint({"a": torch.zeros(2, 3)}) != compute_fingerprint({"a": torch.zeros(3, 2)})
    assert compute_fingerprint({"a": torch.zeros(2)}) != compute_fingerprint({"b": torch.zeros(2)})


def test_the_classifier_lists_its_parameters_in_the_order_of_torchvision():
    """The optimizer state in a checkpoint identifies a parameter only by its position in the list of parameters."""
    from torchvision.models import resnet50

    ours = [name for name, _ in DeepStemResNet(3).named_parameters() if name.startswith("layer")]
    theirs = [name for name, _ in resnet50().named_parameters() if name.startswith("layer")]
    assert ours == theirs


# --- VGG-19 -------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_vgg_cache_path(tmp_path, monkeypatch):
    """Give torch.hub an empty folder, and make all network connections fail.

    Returns the path at which torch.hub would store downloaded VGG-19 weights.
    """

    def raise_network_error(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", raise_network_error)
    monkeypatch.setattr("socket.getaddrinfo", raise_network_error)
    return tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth"


def test_vgg_weights_whose_hash_is_wrong_are_refused(empty_vgg_cache_path, monkeypatch):
    def raise_wrong_hash_error(url, to, hash_prefix, **_):
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0123")')

    with monkeypatch.context() as patch, expect_user_error("invalid hash value", "dcbb9e9d"):
        patch.setattr(torch.hub, "download_url_to_file", raise_wrong_hash_error)
        load_vgg("imagenet")
    empty_vgg_cache_path.parent.mkdir(exist_ok=True)
    # The VGG-19 file has the correct name and weight shapes, but random weights
    torch.save(VGG19().state_dict(), empty_vgg_cache_path)
    for source in ("imagenet", "auto"):
        with expect_user_error("damaged", "dcbb9e9d"):
            load_vgg(source)


def test_without_internet_random_vgg_weights_are_used_only_for_training_from_scratch(empty_vgg_cache_path, caplog):
    _, record = load_vgg("auto")
    assert record["source"] == "random" and caplog.text.count("RANDOM VGG-19 weights") == 1
    with expect_user_error("--vgg-weights"):
        load_vgg("auto", {"source": "imagenet"}, "released.pth.tar")
    assert load_vgg("auto", record, "mine.pth.tar")[1] == record
    assert not empty_vgg_cache_path.exists()


# --- files and flags that must match ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_with_mismatched_weights(tmp_path_factory, shrink_resnet18):
    """Return a folder with images, detectors, and weights files that partly do not fit the detectors."""
    root = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    for name, model in (("rdn", RDN(**TINY)), ("other_rdn", RDN(**TINY)), ("rdn_x2", RDN(scale=2, **TINY))):
        torch.save(model.state_dict(), root / f"{name}.pth")
    renamed = RDN(**TINY).state_dict()
    renamed["sfe3.weight"] = renamed.pop("sfe2.weight")
    torch.save(renamed, root / "renamed_rdn.pth")
    for kind in ("real", "fake"):
        (root / kind).mkdir()
        save_image(root / kind / "a.png", random_rgb_pixels(64, 64, len(kind)))
    for name, flags in (("pixel", ""), ("stage2", "--idx-stages 2 --crop-size 64"), ("dilated", "--arch resnet50")):
        arguments = make_arguments_of_train_detector(root, root / name, f"--fixed-sr --epochs 1 --batch-size 2 {flags}")
        if name == "dilated":
            arguments.remove("--no_dilation")
        run_training(arguments)
        os.link(root / name / "last.pth.tar", root / f"{name}.pth.tar")
    other = {f"features.{key}": value for key, value in VGG19().features.state_dict().items()}
    torch.save(other, root / "other_vgg.pth")
    return root


IMAGES = "--data-root-pos real --data-root-neg fake"
NEW = f"{IMAGES} --fixed-sr --no_dilation --arch resnet18 --vgg-weights random"
LOADED = f"{IMAGES} --fixed-sr --vgg-weights auto"
SR = "--train-file real --vgg-lambda 0 --patch-size 8"
CASES = [
    (f"{NEW} --sr-weights-file pixel.pth.tar", ["pixel.pth.tar", "is a checkpoint of a detector"]),
    (f"{LOADED} --init rdn.pth", ["rdn.pth"]),
    (f"{NEW} --idx-stages 2 --sr-weights-file rdn.pth --vgg-weights pixel.pth.tar", ["pixel.pth.tar", "vgg19"]),
    (f"{NEW} --sr-weights-file real/a.png", ["real/a.png", "no checkpoint"]),
    (f"{NEW} --sr-weights-file renamed_rdn.pth", ["1 missing: sfe2.weight", "1 unknown: sfe3.weight"]),
    (f"{SR} --resume pixel.pth.tar", ["pixel.pth.tar", "is a checkpoint of a detector"]),
    (f"{NEW} --sr-weights-file rdn.pth --sr-scale 2", ["--sr-scale 2", "rdn.pth", "4"]),
    (f"{LOADED} --init pixel.pth.tar --sr-num-blocks 16", ["num_blocks", "16", "1"]),
    (f"{LOADED} --init pixel.pth.tar --idx-stages 2", ["--idx-stages 2", "pixel.pth.tar"]),
    (f"{LOADED} --init pixel.pth.tar --arch resnet50", ["--arch resnet50", "pixel.pth.tar", "resnet18"]),
    (f"{LOADED} --init dilated.pth.tar --no_dilation", ["--no_dilation", "dilated.pth.tar"]),
    (f"{LOADED} --init pixel.pth.tar --input-channel 64", ["--input-channel", "64", "3"]),
    (f"{SR} --weights-file rdn.pth --scale 2", ["scale 2", "rdn.pth", "4"]),
    (f"{SR} --patch-size 24", ["a.png", "64 x 64", "--patch-size"]),
    (f"{NEW} --sr-weights-file rdn.pth --idx-stages 2 --input-channel 3", ["--input-channel", "128", "3"]),
    (f"{LOADED} --init pixel.pth.tar --sr-weights-file other_rdn.pth", ["--sr-weights-file", "other_rdn.pth"]),
    (f"{LOADED} --init pixel.pth.tar --sr-weights-file rdn_x2.pth", ["--sr-weights-file", "rdn_x2.pth"]),
    (f"{LOADED} --init stage2.pth.tar --vgg-weights other_vgg.pth", ["VGG-19", "other_vgg.pth"]),
]


@pytest.mark.parametrize(("flags", "words"), CASES, ids=[flags for flags, _ in CASES])
def test_programs_refuse_unsuitable_weights_files_and_contradictory_flags(
    folder_with_mismatched_weights, tmp_path, monkeypatch, capfd, flags, words
):
    """test.py --resume must refuse the same checkpoints and flags as train_detector.py --init."""
    monkeypatch.chdir(folder_with_mismatched_weights)
    calls = {"train_sr" if flags.startswith(SR) else "train_detector": flags}
    if "--init" in flags:
        calls["test"] = flags.replace("--init", "--resume").replace("--fixed-sr", "")
    for program, its_flags in calls.items():
        line = error_line_of_program(program, f"{its_flags} {PROGRAMS[program][2]} {tmp_path}/out", capfd)
        assert [word for word in words if word not in line] == [], line
        assert not (tmp_path / "out").exists()


def test_a_flag_may_repeat_a_default_value_that_the_checkpoint_does_not_contain():
    """The scripts of the release pass `--sr-num-blocks 16`, although RDN has 16 blocks by default."""
    config = {
        "resynthesizer": {"name": "rdn", "scale": 4, "args": {}},
        "features": {"name": "vgg19", "args": {}},
        "classifier": {"name": "spectrum", "args": {}},
    }
    source = Checkpoint({"state_dict": RDN().state_dict(), "config": config}, "best.pth")
    sizes = {"num_features": 64, "growth_rate": 64, "num_blocks": 16, "num_layers": 8}
    assert create_resynthesizer(source, sizes)[1] == {"name": "rdn", "scale": 4, "args": sizes}
    with expect_user_error("num_blocks=20", "num_blocks=16"):
        create_resynthesizer(source, {**sizes, "num_blocks": 20})
    assert choose_features_config(source, {}, {"stage": 5}) == config["features"]
    with expect_user_error("--idx-stages 4"):
        choose_features_config(source, {}, {"stage": 4})
    arguments = {"arch_args": {"dropout": 0.5}}
    assert choose_classifier_config(source, {}, arguments) == config["classifier"]


def test_a_resnet_that_is_dilated_although_no_option_says_so_gives_a_warning(caplog):
    assert choose_classifier_arguments_from_options("resnet50", {}, "x") == {"dilated": True}
    assert "DILATED" in caplog.text
    caplog.clear()
    for options_of_user in ({"dilated": False}, {"arch_args": {"dilated": False}}):
        arguments = choose_classifier_arguments_from_options("resnet50", options_of_user, "x")
        assert arguments == {"dilated": False} and not caplog.text
    assert choose_classifier_arguments_from_options("resnet50", {"arch_args": {"dilated": True}}, "x")["dilated"]
    assert not caplog.text


def test_a_programming_error_in_an_added_network_keeps_its_traceback():
    def make_network():
        return torch.nn.Conv2D(3, 4, 1)  # an intended error: the correct name is torch.nn.Conv2d

    with pytest.raises(AttributeError, match="Conv2D"):
        create_network("classifier", {"mine": make_network}, "mine")


def test_a_detector_with_one_flipped_bit_in_its_weights_is_refused_as_damaged(
    folder_with_mismatched_weights, tmp_path, capfd
):
    state = read_checkpoint_content(folder_with_mismatched_weights / "pixel.pth.tar")
    state["state_dict"]["fc.weight"].view(torch.int32)[0, 0] ^= 1 << 10
    torch.save(state, tmp_path / "flipped.pth.tar")
    line = error_line_of_program(
        "test", f"--resume {tmp_path}/flipped.pth.tar --input {folder_with_mismatched_weights}/real", capfd
    )
    assert "classifier" in line and "damaged" in line


def test_a_resumed_run_is_refused_if_its_vgg_weights_have_changed(folder_with_mismatched_weights, tmp_path):
    flags = "--mode-sr denoising --batch-size 2 --resume auto --epochs"
    run_training(make_arguments_of_train_detector(folder_with_mismatched_weights, tmp_path / "out", f"{flags} 1"))
    with expect_user_error("--vgg-weights"):
        run_training(
            make_arguments_of_train_detector(
                folder_with_mismatched_weights,
                tmp_path / "out",
                f"{flags} 2 --vgg-weights {folder_with_mismatched_weights}/other_vgg.pth",
            )
        )


def test_the_config_of_a_detector_names_its_features_classifier_and_resynthesizer(folder_with_mismatched_weights):
    config = read_checkpoint_content(folder_with_mismatched_weights / "stage2.pth.tar")["config"]
    assert config["features"] == {"name": "vgg19", "args": {"stage": 2}}
    assert config["classifier"] == {"name": "resnet18", "args": {"dilated": False}}
    assert config["resynthesizer"] == {"name": "rdn", "scale": 4, "args": TINY}
    assert config["resynthesizer_fingerprint"] == compute_fingerprint(
        read_checkpoint_content(folder_with_mismatched_weights / "rdn.pth")
    )
    assert config["images"]["crop_size"] == 64
    assert (
        read_checkpoint_content(folder_with_mismatched_weights / "dilated.pth.tar")["config"]["classifier"]["args"][
            "dilated"
        ]
        is True
    )
