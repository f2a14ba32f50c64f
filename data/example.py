"""Example images, so that a fresh clone has something honest to run on without anyone's faces.

    python -m data.example --out data/example --size 128 --train 128 --val 32 --test 64
    python -m data.example --out data/mine --from ~/photographs        fakes of one's own photographs

Writes OUT/{train,val,test}/{real,nearest,bilinear}/00000.png, the lists OUT/train.txt and OUT/val.txt of
the reals (for train_sr.py), OUT/README.txt and OUT/settings.json. A second call completes what is missing, or
returns at once.

Reals are random dead-leaves scenes: shapes that hide one another, sizes distributed as r^-3, which gives them
the edges, scale invariance and power spectrum of photographs. Restoration networks trained on nothing else
work on photographs. Texture, shading, light, lens blur and sensor noise are added.
    Lee, Mumford, Huang: Occlusion models for natural images. IJCV 2001.
    Achddou, Gousseau, Ladjal: Synthetic images as a regularity prior for image restoration. SSVM 2021.

Fakes are what the decoder of a generator leaves behind: OTHER scenes, passed through small autoencoders
trained here, one for each kind of up-sampling: `nearest` as in ProGAN, `bilinear` as in StyleGAN,
`transposed` as in DCGAN.
    Zhang, Karaman, Chang: Detecting and simulating artifacts in GAN fake images. WIFS 2019.
Where theirs has a discriminator, ours has the cheaper, seeded `local_energy`: detail must have the right
strength in every place, so that a fake is not just a blurred real; noise inputs (as in StyleGAN) let the
decoder invent it. It does not fully succeed in the last octave of the spectrum, least of all for `bilinear`.

What they are not: pictures from a generative model. No number measured on them says how well a detector does
on ProGAN, StyleGAN or anything found in the wild; they show that the programs work and what the method sees.
With --from, JPEG photographs keep their block grid in the reals but not in the fakes: prefer lossless ones,
or photographs made smaller.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from data.images import DataError, find_images, load_image

logger = logging.getLogger("data.example")

SPLITS = ("train", "val", "test")
KINDS = ("nearest", "bilinear", "transposed")  # order is part of the random keys: append only
REAL_FOLDER = "real"
FORMAT = 1  # of the images: raise it when the same settings no longer give the same pictures

# Scenes
SUPERSAMPLING = 2  # shapes are painted at twice the size and averaged: anti-aliased edges
SIZE_EXPONENT = -3.0  # p(r) ~ r^-3: the one exponent that makes the scene scale-invariant (Lee et al.)
SMALLEST_RADIUS = (1.0, 4.0)  # pixels, log-uniform: how far away the scene is
LENS_BLUR = (0.4, 0.7)  # standard deviation, pixels
LARGEST_RADIUS = 0.45  # of the image's side
COVERAGE = 4.0  # mean number of shapes over a pixel; e^-4 = 2 % of the pixels show the ground
OUTLINE_POINTS = 48  # divisible by 3, 4 and 6, so that polygons keep their corners
CORNERS = (0, 0, 0, 1, 1, 3, 4, 4, 6)  # equally likely; 0: ellipse, 1: blob, n: n-gon
# Photographs vary most in luminance, then from blue to yellow, then from red to green, nearly independently
# (Ruderman, Cronin, Chiao: Statistics of cone responses to natural images. JOSA A 1998).
OPPONENT_TO_RGB = np.array([[1, 1, 1], [1, 0.3, -1.1], [1, -0.9, 0.2]], dtype=np.float32)
PALETTE_COLOURS = 6

# Autoencoders
SOURCES = 96  # images they are trained on
SOURCE_SIZE = 128  # pixels; smaller for smaller --size
WIDTHS = (32,)  # encoder channels after each halving; AutoGAN halves twice: (32, 64), slower and softer
LAST_WIDTH = 24  # decoder channels at full size
NOISE_PLANES = 3
NOISE_STD = 0.5
PATCH = 48
BATCH = 16
LEARNING_RATE = 4e-3
DETAIL_WEIGHT = 1.0
ENERGY_FLOOR = 1 / 255  # detail weaker than one grey level does not count
MARGIN = 16  # pixels mirrored at each border and cut off again, so that fakes have no frame of zero padding

# Every random number comes from np.random.default_rng([seed, stream, index]): image i is the same whatever
# the counts, and autoencoders, reals and fakes of all splits come from different scenes.
ROLES = ("autoencoder", *(f"{split}/{label}" for split in SPLITS for label in ("real", "fake")))
STREAMS = {role: stream for stream, role in enumerate(ROLES)}


# ---- Scenes ------------------------------------------------------------------------------------------------


def draw_scene(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random dead-leaves scene. Returns (size, size, 3) uint8."""
    outlines, centres, radii = leaf_outlines(size, rng)
    shapes = paint(size, outlines, radii)  # (S, S) number of the shape seen there, S = SUPERSAMPLING * size
    x = colour_shapes(shapes, centres, radii, size, rng)  # (S, S, 3)
    x = x.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))  # (size, size, 3)
    return photograph(x, rng)


def leaf_outlines(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random shapes, from the back to the front: ellipses, blobs, triangles, rectangles, hexagons.

    A shape of radius r may lie anywhere that it touches the image, a square of side size + 2 r; its number
    per area must follow r^-3, so it is drawn with probability r^-3 (size + 2 r)^2.
    Returns outlines (n, OUTLINE_POINTS, 2), centres (n, 2), radii (n,), all in pixels, x before y.
    """
    smallest = math.exp(rng.uniform(*np.log(SMALLEST_RADIUS)))
    edges = np.geomspace(smallest, LARGEST_RADIUS * size, 257)
    grid = np.sqrt(edges[1:] * edges[:-1])
    density = grid**SIZE_EXPONENT * np.diff(edges)
    weights = density * (size + 2 * grid) ** 2
    count = round(COVERAGE * weights.sum() / (np.pi * (density * grid**2).sum()))
    radii = rng.choice(grid, count, p=weights / weights.sum())
    centres = rng.uniform(-radii[:, None], size + radii[:, None], (count, 2))

    angles = np.arange(OUTLINE_POINTS) * 2 * np.pi / OUTLINE_POINTS
    corners = rng.choice(CORNERS, count)
    reach = np.ones((count, OUTLINE_POINTS))  # distance of the outline from the centre, in radii
    for n in (3, 4, 6):
        reach[corners == n] = 1.2 * np.cos(np.pi / n) / np.cos(np.mod(angles, 2 * np.pi / n) - np.pi / n)
    blobs = int((corners == 1).sum())
    for wave in (2, 3, 5):
        phase, amplitude = rng.uniform(0, 2 * np.pi, (blobs, 1)), rng.uniform(0, 0.35 / wave, (blobs, 1))
        reach[corners == 1] += amplitude * np.cos(wave * angles + phase)

    stretch = np.exp(rng.uniform(0, 0.6, (count, 1)))
    turn = rng.uniform(0, 2 * np.pi, (count, 1))
    along = reach * np.cos(angles) * radii[:, None] * stretch
    across = reach * np.sin(angles) * radii[:, None] / stretch
    x = along * np.cos(turn) - across * np.sin(turn) + centres[:, :1]
    y = along * np.sin(turn) + across * np.cos(turn) + centres[:, 1:]
    return np.stack([x, y], axis=-1), centres, radii


def paint(size: int, outlines: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Which shape is seen where: (S, S) int32, S = SUPERSAMPLING * size; 0 is the ground, n the n-th one."""
    canvas = Image.new("I", (SUPERSAMPLING * size, SUPERSAMPLING * size), 0)
    draw = ImageDraw.Draw(canvas)
    steps = np.where(radii < 4, 4, np.where(radii < 16, 2, 1))  # small shapes need fewer points
    for number, (outline, step) in enumerate(zip(outlines * SUPERSAMPLING, steps, strict=True), start=1):
        draw.polygon(outline[::step].ravel().tolist(), fill=number)
    return np.array(canvas)


def colour_shapes(
    shapes: np.ndarray, centres: np.ndarray, radii: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Give each shape a colour, a slope of light, grain, perhaps stripes. Returns (S, S, 3), about 0..1."""
    side = shapes.shape[0]
    count = len(radii) + 1  # and the ground
    centres = np.vstack([[size / 2, size / 2], centres]).astype(np.float32) * SUPERSAMPLING
    radii = np.append(size, radii).astype(np.float32) * SUPERSAMPLING
    y, x = np.mgrid[:side, :side].astype(np.int32)

    fine, coarse = power_law_noise(side, 0.6, rng), power_law_noise(side, 1.2, rng)
    shift_x, shift_y = rng.integers(side, size=(2, count), dtype=np.int32)
    texture = np.stack([fine, coarse])[
        rng.integers(2, size=count)[shapes], (y + shift_y[shapes]) % side, (x + shift_x[shapes]) % side
    ]
    light = 1 + rng.uniform(0.01, 0.16, count).astype(np.float32)[shapes] * texture

    striped = rng.random(count) < 0.3
    strength = np.where(striped, rng.uniform(0.04, 0.2, count), 0).astype(np.float32)
    period = SUPERSAMPLING * np.exp(rng.uniform(np.log(3), np.log(16), count))  # 3 to 16 pixels
    direction = rng.uniform(0, 2 * np.pi, count)
    wave_x = (2 * np.pi / period * np.cos(direction)).astype(np.float32)
    wave_y = (2 * np.pi / period * np.sin(direction)).astype(np.float32)
    phase = wave_x[shapes] * x + wave_y[shapes] * y + coarse  # coarse bends the stripes
    light += strength[shapes] * np.sin(phase)

    slope_x, slope_y = rng.normal(0, 0.08, (2, count)).astype(np.float32) / np.maximum(radii, 8)
    light += (x - centres[shapes, 0]) * slope_x[shapes] + (y - centres[shapes, 1]) * slope_y[shapes]
    return palette(count, rng)[shapes] * light[..., None]


def power_law_noise(side: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Periodic noise with amplitude spectrum f^-exponent, standard deviation 1. Returns (side, side)."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * frequency**-exponent
    noise = np.fft.irfft2(spectrum, (side, side))
    return (noise / noise.std()).astype(np.float32)


def palette(count: int, rng: np.random.Generator) -> np.ndarray:
    """Colours near a few that the scene is made of. Returns (count, 3) float32 in [0, 1]."""
    # In opponent coordinates: luminance, blue-yellow, red-green
    mean = np.array([rng.uniform(0.3, 0.62), rng.normal(0, 0.03), rng.normal(0, 0.015)])
    anchors = mean + rng.normal(0, 1, (PALETTE_COLOURS, 3)) * [0.2, 0.06, 0.03]
    colours = anchors[rng.integers(PALETTE_COLOURS, size=count)]
    colours = colours + rng.normal(0, 1, (count, 3)) * [0.07, 0.025, 0.012]
    return np.clip(colours @ OPPONENT_TO_RGB, 0.02, 0.97).astype(np.float32)


def photograph(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, lens blur, shot and read noise, 8 bits. x: (H, W, 3). Returns uint8."""
    slope_y, slope_x = rng.normal(0, 0.08, 2)
    light = 1 + slope_y * np.linspace(-1, 1, x.shape[0])[:, None] + slope_x * np.linspace(-1, 1, x.shape[1])
    x = np.clip(lens_blur(x * light[..., None], sigma=rng.uniform(*LENS_BLUR)), 0, 1)
    shot, read = rng.uniform(0.0001, 0.0006), rng.uniform(0.3, 1.2) / 255  # variance shot * x + read^2
    x = x + np.sqrt(shot * x + read**2) * rng.standard_normal(x.shape)
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


def lens_blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, 5 taps, mirrored borders. x: (H, W, C)."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    taps /= taps.sum()
    height, width = x.shape[:2]
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    rows = sum(tap * padded[k : k + height] for k, tap in enumerate(taps))  # (H, W + 4, C)
    return sum(tap * rows[:, k : k + width] for k, tap in enumerate(taps))  # (H, W, C)


# ---- Autoencoders ------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Halve the image by strided convolution and decode it again, up-sampling as a generator does.

    Each decoder convolution also sees planes of fresh noise, as in StyleGAN: it invents what it cannot know.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        pairs = zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in pairs)
        self.middle = nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, padding=1)
        pairs = list(zip(WIDTHS[::-1], (*WIDTHS[-2::-1], LAST_WIDTH), strict=True))
        if kind == "transposed":
            layers = [nn.ConvTranspose2d(i + NOISE_PLANES, o, 4, stride=2, padding=1) for i, o in pairs]
        else:
            layers = [nn.Conv2d(i + NOISE_PLANES, o, 3, padding=1) for i, o in pairs]
        self.decoder = nn.ModuleList(layers)
        self.output = nn.Conv2d(LAST_WIDTH + NOISE_PLANES, 3, 3, padding=1)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x: (B, 3, H, W) in [0, 1], sides divisible by 4. Returns an imitation, same shape, about [0, 1]."""
        x = 2 * x - 1
        for layer in self.encoder:
            x = F.leaky_relu(layer(x), 0.2)  # halved
        x = F.leaky_relu(self.middle(x), 0.2)  # (B, WIDTHS[-1], H / 2, W / 2)
        for layer in self.decoder:
            x = F.leaky_relu(layer(self.upsample(with_noise(x, generator))), 0.2)  # doubled
        return (self.output(with_noise(x, generator)) + 1) / 2  # (B, 3, H, W)

    def upsample(self, x: Tensor) -> Tensor:
        if self.kind == "transposed":
            return x  # its convolutions up-sample by themselves
        return F.interpolate(x, scale_factor=2, mode=self.kind)


def with_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = NOISE_STD * torch.randn(x.shape[0], NOISE_PLANES, *x.shape[2:], generator=generator)
    return torch.cat([x, noise], dim=1)


def opponent(x: Tensor) -> Tensor:
    """Luminance, red - blue, purple - green of x: (B, 3, H, W): no colour is lost behind the luminance."""
    red, green, blue = x.unbind(dim=1)
    return torch.stack([(red + green + blue) / 3, red - blue, (red + blue) / 2 - green], dim=1)


def local_energy(x: Tensor, cell: int = 8) -> Tensor:
    """How strong the detail of x: (B, C, H, W) is in each cell and band: log RMS of five filters.

    Two pass half the spectrum, three only the last octave before the Nyquist frequency. The logarithm makes
    all bands count alike, though that octave holds little power: a decoder that leaves it empty only blurs.
    Returns (B, C * 5, about H / cell, W / cell).
    """
    smooth, slope, curve = x.new_tensor([[1, 2, 1], [-1, 1, 0], [-1, 2, -1]])
    pairs = ((smooth, slope), (slope, smooth), (smooth, curve), (curve, smooth), (curve, curve))
    filters = torch.stack([torch.outer(column, row) for column, row in pairs])  # (5, 3, 3)
    filters = filters / filters.flatten(1).norm(dim=1)[:, None, None]
    channels = x.shape[1]
    filters = filters[:, None].repeat(channels, 1, 1, 1)  # (C * 5, 1, 3, 3)
    detail = F.conv2d(x, filters, groups=channels)  # (B, C * 5, H - 2, W - 2)
    return (F.avg_pool2d(detail**2, cell) + ENERGY_FLOOR**2).log() / 2


def imitation_loss(x_fake: Tensor, x: Tensor) -> Tensor:
    """L1 on opponent channels, and on the local energy of luminance, colour and the three sensor channels."""
    opponent_fake, opponent_x = opponent(x_fake), opponent(x)
    pixels = 3 * F.l1_loss(opponent_fake, opponent_x)
    energy_fake = local_energy(torch.cat([x_fake, opponent_fake], dim=1))
    energy_x = local_energy(torch.cat([x, opponent_x], dim=1))
    return pixels + DETAIL_WEIGHT * F.l1_loss(energy_fake, energy_x)


def empty_autoencoder(kind: str) -> Autoencoder:
    """Without values: torch's own start would draw them from its global generator."""
    with torch.device("meta"):
        model = Autoencoder(kind)
    return model.to_empty(device="cpu")


def train_autoencoder(kind: str, images: np.ndarray, steps: int, seed: int) -> Autoencoder:
    """Train one autoencoder on random patches of images: (N, H, W, 3) uint8. Same arguments, same weights."""
    generator = torch_generator(seed, STREAMS["autoencoder"], KINDS.index(kind))
    model = empty_autoencoder(kind)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        else:
            nn.init.zeros_(parameter)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rng = np.random.default_rng([seed, STREAMS["autoencoder"], KINDS.index(kind), step])
        x = random_patches(images, rng)  # (BATCH, 3, PATCH, PATCH)
        x = x.contiguous(memory_format=torch.channels_last)
        loss = imitation_loss(model(x, generator), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def random_patches(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """BATCH random patches of images (N, H, W, 3) uint8. Returns (BATCH, 3, PATCH, PATCH) in [0, 1]."""
    count, height, width, _ = images.shape
    which = rng.integers(count, size=BATCH)
    top, left = rng.integers(height - PATCH + 1, size=BATCH), rng.integers(width - PATCH + 1, size=BATCH)
    patches = [images[n, t : t + PATCH, s : s + PATCH] for n, t, s in zip(which, top, left, strict=True)]
    return to_tensor(np.stack(patches))


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def torch_generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


@torch.inference_mode()
def imitate(model: Autoencoder, image: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """The fake of one image: (H, W, 3) uint8, sides divisible by 4. Returns the same shape, uint8."""
    x = F.pad(to_tensor(image[None]), (MARGIN,) * 4, mode="reflect")
    x = model(x, generator)[0, :, MARGIN:-MARGIN, MARGIN:-MARGIN]  # (3, H, W)
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


# ---- Where images come from --------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What decides the pictures; stored in OUT/settings.json."""

    size: int
    counts: dict[str, int]  # split -> images of each class
    kinds: tuple[str, ...]
    seed: int
    steps: int
    photographs: dict[str, list[str]] | None  # role -> files; None: scenes


def source_image(settings: Settings, role: str, index: int, size: int) -> np.ndarray:
    """Image `index` of a role, (size, size, 3) uint8: a new scene, or a crop of one of its photographs."""
    rng = np.random.default_rng([settings.seed, STREAMS[role], index])
    if settings.photographs is None:
        return draw_scene(size, rng)
    paths = settings.photographs[role]
    image = load_image(paths[index % len(paths)]).permute(1, 2, 0).numpy()  # (H, W, 3)
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def share_out_photographs(root: str, size: int, counts: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Give each role its own photographs under root: none is used for two.

    Raises: DataError if there are too few that can be read and are large enough.
    """
    paths = [path for path in find_images(root) if shorter_side(path) >= size]
    needs = {role: counts[role.split("/")[0]] for role in ROLES[1:] if counts[role.split("/")[0]] > 0}
    needs = {"autoencoder": SOURCES, **needs}
    if len(paths) < len(needs):
        raise DataError(
            f"{root}: {len(paths)} readable images of at least {size}x{size}, wanted at least {len(needs)} "
            f"(one each for {', '.join(needs)}; better hundreds): add images, or pass a smaller --size"
        )
    shares = dict.fromkeys(needs, 1)
    for _ in range(len(paths) - len(needs)):
        neediest = max(needs, key=lambda role: needs[role] / shares[role])
        shares[neediest] += 1
    shuffled = iter(np.random.default_rng(seed).permutation(paths).tolist())
    return {role: sorted(next(shuffled) for _ in range(share)) for role, share in shares.items()}


def shorter_side(path: str) -> int:
    """From the header alone; 0 for a file that is no image."""
    try:
        with Image.open(path) as image:
            return min(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        logger.warning("left out: %s: %s", path, error)
        return 0


# ---- Writing -----------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One source image and the files to make of it: the real itself, or its fakes of several kinds."""

    split: str
    index: int
    folders: tuple[str, ...]  # ("real",) or kinds


def image_path(out: str, split: str, folder: str, index: int) -> Path:
    return Path(out) / split / folder / f"{index:05d}.png"


def missing_tasks(settings: Settings, out: str) -> list[Task]:
    """What a complete folder has and this one has not."""
    tasks = []
    for split in SPLITS:
        for index in range(settings.counts[split]):
            for folders in ((REAL_FOLDER,), settings.kinds):
                missing = tuple(f for f in folders if not image_path(out, split, f, index).exists())
                if missing:
                    tasks.append(Task(split, index, missing))
    return tasks


def write_task(settings: Settings, out: str, task: Task) -> None:
    """Make and write the files of one task. Runs in a worker process."""
    if task.folders == (REAL_FOLDER,):
        image = source_image(settings, f"{task.split}/real", task.index, settings.size)
        write_png(image, image_path(out, task.split, REAL_FOLDER, task.index))
        return
    role = f"{task.split}/fake"
    image = source_image(settings, role, task.index, settings.size)
    for kind in task.folders:
        generator = torch_generator(settings.seed, STREAMS[role], KINDS.index(kind), task.index)
        fake = imitate(load_autoencoder(autoencoder_path(out, kind)), image, generator)
        write_png(fake, image_path(out, task.split, kind, task.index))


def write_png(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to; the file gets its own name when it is complete: no half file is taken for one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def autoencoder_path(out: str, kind: str) -> Path:
    return Path(out) / "autoencoders" / f"{kind}.pth"


@lru_cache
def load_autoencoder(path: Path) -> Autoencoder:
    model = empty_autoencoder(path.stem)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def write_autoencoder(settings: Settings, out: str, kind: str) -> str:
    """Train one autoencoder and store it. Runs in a worker process. Returns what to log."""
    start = time.monotonic()
    size = max(PATCH, min(SOURCE_SIZE, settings.size))
    images = np.stack([source_image(settings, "autoencoder", index, size) for index in range(SOURCES)])
    model = train_autoencoder(kind, images, settings.steps, settings.seed)
    path = autoencoder_path(out, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        torch.save(model.state_dict(), temporary)
    shown = images[:16]
    fakes = np.stack([imitate(model, image, torch_generator(settings.seed)) for image in shown])
    psnr = -10 * math.log10(np.square(fakes / 255 - shown / 255).mean())
    return f"{kind}: PSNR {psnr:.1f} dB after {settings.steps} steps, {time.monotonic() - start:.0f} s"


def start_worker() -> None:
    """One thread each: the same numbers on any number of cores. Ctrl-C is for the main process alone."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class InThisProcess(Executor):
    """--workers 1: no processes to start."""

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        finally:
            torch.set_num_threads(threads)
        return future


def make_executor(workers: int) -> Executor:
    if workers == 1:
        return InThisProcess()
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)


def make_images(settings: Settings, out: str, tasks: list[Task], workers: int) -> None:
    """Train the autoencoders that are still needed and make all images of tasks."""
    kinds = {kind for task in tasks for kind in task.folders} - {REAL_FOLDER}
    untrained = [k for k in settings.kinds if k in kinds and not autoencoder_path(out, k).exists()]
    executor = make_executor(workers)
    try:
        trainings = [executor.submit(write_autoencoder, settings, out, kind) for kind in untrained]
        reals = [executor.submit(write_task, settings, out, t) for t in tasks if t.folders == (REAL_FOLDER,)]
        for training in trainings:
            logger.info(training.result())
        fakes = [executor.submit(write_task, settings, out, t) for t in tasks if t.folders != (REAL_FOLDER,)]
        for future in tqdm([*reals, *fakes], desc="images", disable=None):
            future.result()
    finally:
        executor.shutdown(cancel_futures=True)


# ---- The folder --------------------------------------------------------------------------------------------


def open_folder(settings: Settings, out: str, force: bool) -> None:
    """Take OUT for these settings: a new or empty folder, or one begun with the same settings.

    Raises: DataError if it holds anything else.
    """
    folder, stored_path = Path(out), Path(out) / "settings.json"
    wanted = {"format": FORMAT, **settings._asdict(), "kinds": list(settings.kinds)}
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{out} is a file, wanted a folder: pass another --out")
    if stored_path.exists():
        stored = read_settings(stored_path)
        if stored == wanted:
            return
        differing = [key for key in wanted if stored.get(key) != wanted[key]]
        if not force:
            raise DataError(
                f"{out} holds example images made with another {', '.join(differing)}: pass another --out, "
                f"the settings in {stored_path}, or --force to replace them"
            )
        remove_images(out, stored)
    elif folder.exists() and any(folder.iterdir()):
        raise DataError(f"{out} holds files that are not example images: pass a new or empty folder as --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(stored_path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}; pass another --out") from error


def read_settings(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored, dict):
            return stored
    except (OSError, ValueError):
        pass
    raise DataError(f"{path} cannot be read as settings of example images: pass another --out")


def remove_images(out: str, stored: dict) -> None:
    """Remove what the stored settings made, and nothing else."""
    for split, count in stored.get("counts", {}).items():
        for folder in (REAL_FOLDER, *stored.get("kinds", ())):
            for index in range(count):
                image_path(out, split, folder, index).unlink(missing_ok=True)
    for kind in stored.get("kinds", ()):
        autoencoder_path(out, kind).unlink(missing_ok=True)


def write_texts(settings: Settings, out: str, command: str) -> None:
    """The lists of reals for train_sr.py, as paths from the working folder, and README.txt."""
    for split in ("train", "val"):
        if settings.counts[split] == 0:
            continue
        paths = [image_path(out, split, REAL_FOLDER, index) for index in range(settings.counts[split])]
        with written_whole(Path(out) / f"{split}.txt") as temporary:
            temporary.write_text("".join(f"{path}\n" for path in paths))
    if settings.photographs is None:
        reals = "Random dead-leaves scenes: shapes that hide one another, sizes distributed as r^-3."
        licence = "CC0 1.0: do with them what you like."
    else:
        reals = "Random crops of the photographs that were named by --from (settings.json says which)."
        licence = "That of the photographs."
    with written_whole(Path(out) / "README.txt") as temporary:
        temporary.write_text(
            f"""Example images, {settings.size}x{settings.size} pixels, seed {settings.seed}

real/       {reals}
others      Simulated artefacts of a generator's decoder, after Zhang, Karaman, Chang (WIFS 2019): other
            images like the reals, passed through a small autoencoder; the folder names its up-sampling.
They are not pictures from a generative model: scores on them say nothing about ProGAN or StyleGAN.
train.txt and val.txt list the reals, one path a line, from the folder where the command ran.

Command: {command}
Licence: {licence}
"""
        )


# ---- Command line ------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.example",
        description="Make example images: random scenes, and fakes by small autoencoders.",
    )
    parser.add_argument("--out", default="data/example", help="folder for the images (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=256, help="side in pixels, from 64, divisible by 4 (default: %(default)s)"
    )
    for split, count in (("train", 128), ("val", 32), ("test", 64)):
        parser.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help=f"images a class (default: {count})"
        )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=["nearest", "bilinear"],
        help="up-sampling of the fakes' decoders (default: nearest bilinear)",
    )
    parser.add_argument("--seed", type=int, default=123, help="of everything random (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, metavar="N", help="training of an autoencoder (default: 250)")
    parser.add_argument(
        "--from", dest="photographs", metavar="DIR", help="crops of these photographs, not random scenes"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, available_cores()), metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="replace images made with other settings")
    return parser


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def get_settings(args: argparse.Namespace) -> Settings:
    """Raises: DataError on values that make no images."""
    counts = {split: getattr(args, split) for split in SPLITS}
    if args.size < 64 or args.size % 4:
        raise DataError(f"--size {args.size}: wanted at least 64 and divisible by 4")
    if min(counts.values()) < 0 or not any(counts.values()):
        numbers = ", ".join(str(count) for count in counts.values())
        raise DataError(f"--train, --val, --test {numbers}: wanted no negative number and not only zeros")
    for name, least in (("seed", 0), ("steps", 1), ("workers", 1)):
        if getattr(args, name) < least:
            raise DataError(f"--{name} {getattr(args, name)}: wanted at least {least}")
    photographs = None
    if args.photographs is not None:
        photographs = share_out_photographs(os.path.abspath(args.photographs), args.size, counts, args.seed)
    kinds = tuple(kind for kind in KINDS if kind in args.kinds)
    return Settings(args.size, counts, kinds, args.seed, args.steps, photographs)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = get_parser().parse_args(argv)
    start = time.monotonic()
    try:
        settings = get_settings(args)
        open_folder(settings, args.out, args.force)
        tasks = missing_tasks(settings, args.out)
        if tasks:
            files = sum(len(task.folders) for task in tasks)
            logger.info("making %d images of %dx%d in %s", files, settings.size, settings.size, args.out)
            make_images(settings, args.out, tasks, args.workers)
        write_texts(settings, args.out, shlex.join(["python", "-m", "data.example", *argv]))
    except DataError as error:
        logger.error("error: %s", error)
        return 2
    except OSError as error:
        logger.error("error: %s: %s; the same command completes it", args.out, error)
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted: the same command completes %s", args.out)
        return 130
    if tasks:
        logger.info("complete: %s, %.0f s", args.out, time.monotonic() - start)
    else:
        logger.info("%s is complete already", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
