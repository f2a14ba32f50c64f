"""torch.hub loads a detector in programs that have packages with the names of ours."""

import subprocess
import sys
from pathlib import Path

from scorings import write_detector, write_image

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


def test_torch_hub_works_beside_packages_of_the_same_names(tmp_path):
    for package in ("models", "utils", "data"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("NAME = 'mine'\nmine = 1\n")
    (tmp_path / "models" / "mine.py").write_text("NAME = 'mine, too'\n")
    write_detector(tmp_path / "DETECTOR")
    write_image(str(tmp_path / "a.png"), 1)
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    verdict, rest = result.stdout.splitlines()
    assert verdict in ("real", "fake")
    assert rest == "mine 1 mine mine, too False"
