"""The output files of test.py. An existing file is replaced only if test.py wrote it earlier.

The content of an array file P.npy does not show which program wrote the file, so test.py replaces P.npy only if test.py
also wrote P.json, or P.csv.N.part, a part of an unfinished score table.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.lists import Item
from evaluation.detector import Examination
from evaluation.score_table import COLUMNS, SOFTWARE, path_of_residual_picture
from evaluation.score_writer import find_partial_tables, read_settings_of_partial_table
from utils.console import make_printable
from utils.errors import UserError

# The JSON file that test.py writes beside a score table has all these keys
RECORD_KEYS = {
    "scoring_settings",
    "detector",
    "metrics",
    "versions",
}


def path_without_suffix(save_path: str) -> Path:
    """Convert --save_path to the path P of the files P.csv, P.npy, P.json and P.png.

    The values "P", "P.npy" and "P/" of --save_path all give the path P.

    Raises:
        UserError: if --save_path does not end in a file name, for example if it is "/" or "folder/..".
    """
    name = save_path.rstrip("/").removesuffix(".npy")
    if os.path.basename(name) in ("", ".", ".."):
        example = f"{make_printable(name)}/scores"
        raise UserError(
            f"--save_path {make_printable(save_path)} does not end in a file name: give a path such as {example}"
        )
    return Path(name)


def refuse_to_replace_files_of_other_programs(
    base: Path, pictures: Sequence[Path], read_files: set[tuple[int, int]]
) -> None:
    """Check that every file that test.py will write is a new file or an earlier output of test.py.

    Args:
        base: the path P, without suffix, of P.csv, P.npy, P.json and P.png.
        read_files: device number and inode number of each file that this run reads, from `device_and_inode`.

    Raises:
        UserError: if test.py would replace one of the inputs, or a file that test.py did not write.
    """
    refuse_path_that_cannot_exist(Path(f"{base}.json"))
    parts = find_partial_tables(Path(f"{base}.csv")).values()
    has_record = is_json_of_score_table(Path(f"{base}.json")) or any(is_unfinished_score_table(part) for part in parts)
    refuse_to_replace_file_of_other_program(Path(f"{base}.csv"), is_score_table, read_files)
    refuse_to_replace_file_of_other_program(Path(f"{base}.json"), is_json_of_score_table, read_files)
    refuse_to_replace_file_of_other_program(Path(f"{base}.npy"), lambda _: has_record, read_files)
    refuse_to_replace_file_of_other_program(Path(f"{base}.png"), is_picture_of_this_project, read_files)
    for part in parts:
        refuse_to_replace_file_of_other_program(part, is_unfinished_score_table, read_files)
    for picture in pictures:
        refuse_to_replace_file_of_other_program(picture, is_picture_of_this_project, read_files)


def refuse_to_replace_file_of_other_program(
    path: Path, is_own: Callable[[Path], bool], read_files: set[tuple[int, int]]
) -> None:
    """Raise a UserError if the file at `path` is one of `read_files`, or was not written by test.py (see `is_own`)."""
    identity = device_and_inode(path)
    if identity is None and not os.path.islink(path):
        return
    name = make_printable(path)
    if identity in read_files:
        raise UserError(f"{name} would be replaced, although this run reads it: choose another --save_path")
    if not path.is_file() or not is_own(path):
        raise UserError(
            f"{name} would be replaced, although it is not an earlier output of test.py: move the file, or choose"
            " another --save_path or --save-residuals"
        )


def refuse_path_that_cannot_exist(path: Path) -> None:
    """Raise a UserError if no file can exist at `path`, for example because the name is too long."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{make_printable(path)} cannot be written ({reason}): choose another --save_path") from None


def device_and_inode(path: str | os.PathLike) -> tuple[int, int] | None:
    """Return the device number and the inode number of a file, or None if the file cannot be found.

    All paths that lead to one file, such as hard links and symbolic links, give the same two numbers.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_unfinished_score_table(path: Path) -> bool:
    """Return whether a file is a partial table of an unfinished score table."""
    return read_settings_of_partial_table(path) is not None


def is_score_table(path: Path) -> bool:
    """Return whether a file begins with the header of a score table."""
    header = ",".join(COLUMNS).encode()
    with path.open("rb") as file:
        return file.read(len(header)) == header


def is_json_of_score_table(path: Path) -> bool:
    """Return whether a file is a JSON file that test.py wrote beside a score table."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= RECORD_KEYS


def is_picture_of_this_project(path: Path) -> bool:
    """Return whether a file is a PNG that this project wrote."""
    return read_png_texts(path).get("Software") == SOFTWARE


def read_png_texts(path: Path) -> dict:
    """Read the texts in the header of a PNG file. Returns {} if the file is not a readable PNG file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(image.info)
    except Exception:  # for damaged files, Pillow raises exceptions of any type
        return {}


class ResidualPictures:
    """The residual pictures that belong to one score table: one PNG file per image.

    Args:
        folder: folder of the pictures, or None if no pictures are drawn.
        items: the images, in the order of the score table.
    """

    def __init__(self, folder: str | os.PathLike | None, items: Sequence[Item]):
        self.paths = [path_of_residual_picture(folder, item.path) for item in items] if folder else []
        self.settings_digest = ""

    def store_hash_of_scoring_settings(self, settings: Mapping) -> None:
        """Store a hash of the scoring settings, which is written to the header of each picture."""
        self.settings_digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def find_images_without_current_picture(self) -> np.ndarray | None:
        """Find the images whose residual picture is missing, or was not drawn with the scoring settings of this run.

        Returns:
            A mask (N,) bool of the images whose residual picture must be drawn, or None if no pictures are drawn.
        """
        if not self.paths:
            return None
        missing = np.ones(len(self.paths), bool)
        for i, path in enumerate(self.paths):
            texts = read_png_texts(path)
            missing[i] = (texts.get("Software"), texts.get("Description")) != (SOFTWARE, self.settings_digest)
        return missing

    def draw_residual_picture_of_image(self, index: int, examination: Examination) -> None:
        """Draw the scored crops of an image, their re-synthesis and their residual into the PNG `self.paths[index]`."""
        from evaluation.figures import draw_residual_picture  # imported here: Matplotlib takes a second to import

        columns = examination.columns
        x = arrange_crops_in_grid(examination.x, columns)  # (3, H, W)
        x_hat = arrange_crops_in_grid(examination.x_hat, columns)  # (3, H, W)
        residual = arrange_crops_in_grid(examination.residual.abs().mean(dim=1, keepdim=True), columns)[0]  # (H_l, W_l)
        crops = len(examination.x)
        title = "image" if crops == 1 else f"image: the {crops} crops that were scored"
        draw_residual_picture(x, x_hat, residual, self.paths[index], title=title, description=self.settings_digest)


def arrange_crops_in_grid(crops: Tensor, columns: int) -> np.ndarray:
    """Join K crops (K, C, h, w) to one image (C, H, W), with `columns` crops in each row."""
    rows = crops.unflatten(0, (-1, columns))  # (rows, columns, C, h, w)
    picture = rows.permute(2, 0, 3, 1, 4)  # (C, rows, h, columns, w)
    return picture.flatten(3, 4).flatten(1, 2).numpy()
