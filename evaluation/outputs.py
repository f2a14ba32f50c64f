"""Which files test.py writes, and which it may replace: its own earlier output and nothing else.

P.csv is recognised by its header, P.json by its entries, P.png and residual pictures by a text in the PNG file, and P.npy by
the P.json or the unfinished parts beside it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.lists import Item
from evaluation.detector import Examination
from evaluation.score_table import COLUMNS, SOFTWARE, residual_path
from evaluation.score_writer import find_parts, job_of_part
from utils.console import printable
from utils.errors import UserError

RECORD_KEYS = {"job", "detector", "metrics", "versions"}  # entries of every P.json


def path_without_suffix(save_path: str) -> Path:
    """Convert --save_path to the path P of P.csv, P.npy, P.json and P.png. "P.npy" and "P/" mean P, too.

    Raises:
        UserError: if it has no name.
    """
    name = save_path.rstrip("/").removesuffix(".npy")
    if os.path.basename(name) in ("", ".", ".."):
        raise UserError(f"--save_path {printable(save_path)} has no name: expected one such as {printable(name)}/scores")
    return Path(name)


def refuse_foreign_outputs(base: Path, pictures: Sequence[Path], inputs: Iterable[str | os.PathLike]) -> None:
    """Check that everything that test.py will write is new or its own earlier output.

    Args:
        base: the path P of P.csv, P.npy, P.json and P.png.
        pictures: paths of the residual pictures.
        inputs: files that are read. None of them is replaced, even if it is an earlier output.

    Raises:
        UserError: naming a file that would be lost.
    """
    require_possible_path(Path(f"{base}.json"))
    read_files = {file_identity(path) for path in inputs} - {None}
    parts = find_parts(Path(f"{base}.csv")).values()
    has_record = is_record(Path(f"{base}.json")) or any(is_part(part) for part in parts)
    refuse_foreign_file(Path(f"{base}.csv"), is_score_table, read_files)
    refuse_foreign_file(Path(f"{base}.json"), is_record, read_files)
    refuse_foreign_file(Path(f"{base}.npy"), lambda _: has_record, read_files)
    refuse_foreign_file(Path(f"{base}.png"), is_own_picture, read_files)
    for part in parts:
        refuse_foreign_file(part, is_part, read_files)
    for picture in pictures:
        refuse_foreign_file(picture, is_own_picture, read_files)


def refuse_foreign_file(path: Path, is_own: Callable[[Path], bool], read_files: set[tuple[int, int]]) -> None:
    """Raise a UserError if a file is there that is read by this run or is not recognised by `is_own`."""
    identity = file_identity(path)
    if identity is None and not os.path.islink(path):
        return
    name = printable(path)
    if identity in read_files:
        raise UserError(f"{name} is read by this run and would be replaced: choose another --save_path")
    if not path.is_file() or not is_own(path):
        raise UserError(
            f"{name} exists and is no earlier output of test.py, so it is not replaced: move it, or choose another"
            " --save_path or --save-residuals"
        )


def require_possible_path(path: Path) -> None:
    """Raise a UserError if there can be no file at this path, because its name is too long for example."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{printable(path)} cannot be written ({reason})") from None


def file_identity(path: str | os.PathLike) -> tuple[int, int] | None:
    """Return what tells a file from all others, whatever its names are; None if there is no file that can be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_part(path: Path) -> bool:
    """Return whether a file is a part of a score table."""
    return job_of_part(path) is not None


def is_score_table(path: Path) -> bool:
    """Return whether a file begins with the header of a score table."""
    header = ",".join(COLUMNS).encode()
    with path.open("rb") as file:
        return file.read(len(header)) == header


def is_record(path: Path) -> bool:
    """Return whether a file is the P.json of a score table."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= RECORD_KEYS


def is_own_picture(path: Path) -> bool:
    """Return whether a file is a PNG that this project wrote."""
    return picture_texts(path).get("Software") == SOFTWARE


def picture_texts(path: Path) -> dict:
    """Read the texts in the header of a PNG file; empty if it is none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(image.info)
    except Exception:  # Pillow raises anything for damaged files
        return {}


class ResidualPictures:
    """The residual pictures of one score table: one file per image, or none.

    Args:
        folder: where they are drawn; None draws none.
        items: the images.
    """

    def __init__(self, folder: str | os.PathLike | None, items: Sequence[Item]):
        self.paths = [residual_path(folder, item.path) for item in items] if folder else []
        self.job_digest = ""

    def set_job(self, job: Mapping) -> None:
        """Set the job of the scores, whose digest is written into each picture."""
        self.job_digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]

    def missing(self) -> np.ndarray | None:
        """Find the images whose picture is missing or was drawn for another job: (N,) bool; None if none are drawn."""
        if not self.paths:
            return None
        missing = np.ones(len(self.paths), bool)
        for i, path in enumerate(self.paths):
            texts = picture_texts(path)
            missing[i] = (texts.get("Software"), texts.get("Description")) != (SOFTWARE, self.job_digest)
        return missing

    def draw(self, index: int, examination: Examination) -> None:
        """Draw the picture of the image at `index` in the list: of all its crops, if it was scored in crops."""
        from evaluation.figures import residual_picture  # here, because importing it takes a second

        columns = examination.columns
        x = mosaic(examination.x, columns)  # (3, H, W)
        x_hat = mosaic(examination.x_hat, columns)  # (3, H, W)
        residual = mosaic(examination.residual.abs().mean(dim=1, keepdim=True), columns)[0]  # (H_l, W_l)
        crops = len(examination.x)
        title = "image" if crops == 1 else f"image: the {crops} crops that were scored"
        residual_picture(x, x_hat, residual, self.paths[index], title=title, description=self.job_digest)


def mosaic(crops: Tensor, columns: int) -> np.ndarray:
    """Put crops (K, C, h, w) side by side, `columns` in each row: (C, K / columns * h, columns * w)."""
    rows = crops.unflatten(0, (-1, columns))  # (rows, columns, C, h, w)
    picture = rows.permute(2, 0, 3, 1, 4)  # (C, rows, h, columns, w)
    return picture.flatten(3, 4).flatten(1, 2).numpy()
