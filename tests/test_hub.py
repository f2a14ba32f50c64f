"""Test that torch.hub loads a detector even if the calling program has packages named models, utils and data."""

import subprocess
import sys
import types
from pathlib import Path

from scorings import write_detector, write_noise_image

import hubconf

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
import torch
import models
from utils import mine

detector = torch.hub.load({root!r}, "detector", source="local", checkpoint="DETECTOR", device="cpu")
print(detector.verdict("a.png")[0])

import data
import models.mine
print(models.NAME, mine, data.NAME, models.mine.NAME, {root!r} in sys.path)
"""


def test_torch_hub_loads_a_detector_beside_other_packages_named_models_utils_and_data(tmp_path):
    for package in ("models", "utils", "data"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("NAME = 'mine'\nmine = 1\n")
    (tmp_path / "models" / "mine.py").write_text("NAME = 'mine, too'\n")
    write_detector(tmp_path / "DETECTOR")
    write_noise_image(str(tmp_path / "a.png"), 1)
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    verdict, rest = result.stdout.splitlines()
    assert verdict in ("real", "fake")
    assert rest == "mine 1 mine mine, too False"


def test_a_neighbouring_folder_with_a_longer_name_is_not_taken_for_this_checkout(monkeypatch):
    module = types.ModuleType("models")
    module.__file__ = f"{ROOT}2/models/__init__.py"
    monkeypatch.setitem(sys.modules, "models", module)
    assert not hubconf.is_project_already_imported()
    module.__file__ = str(ROOT / "models/__init__.py")
    assert hubconf.is_project_already_imported()
