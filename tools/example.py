"""Example images, so that a fresh clone has something honest to run on without anyone's faces.

    python -m tools.example --out data/example --size 128 --train 128 --val 32 --test 64
    python -m tools.example --out data/mine --from ~/photographs        fakes of one's own photographs

Writes OUT/{train,val,test}/{real,nearest,bilinear}/00000.png, train.txt and val.txt (the reals, for train_sr.py),
README.txt and settings.json; the folder is there once all of it is made. Reals are random dead-leaves scenes: shapes that
hide one another, sizes distributed as r^-3, which gives them the edges, scale invariance and spectrum of photographs
(Lee, Mumford, Huang, IJCV 2001; Achddou, Gousseau, Ladjal, SSVM 2021). Fakes are what a generator's decoder leaves
behind: OTHER scenes, passed through small autoencoders: `nearest` up-samples as ProGAN, `bilinear` as StyleGAN (Zhang,
Karaman, Chang: Detecting and simulating artifacts in GAN fake images, WIFS 2019). Where theirs has a discriminator,
ours has `imitation_loss`, and noise inputs let it invent detail; it does not fully succeed in the last octave of the
spectrum. They are not pictures from a generative model: no number measured on them says how well a detector does in
the wild. With --from, JPEG photographs keep their block grid in the reals but not in the fakes. Licence of the scenes:
CC0 1.0, do with them what you like.
"""

import json
import logging
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from data.images import SizePolicy, check_headers, load_image
from data.lists import find_images
from utils import options
from utils.console import progress
from utils.errors import UserError, run_program
from utils.files import make_folder, write_json
from utils.random_streams import seeded_generator

logger = logging.getLogger("tools.example")

SPLITS = ("train", "val", "test")
KINDS = ("nearest", "bilinear")  # order is part of the random keys: append only
FORMAT = 2  # of the images: raise it when the same settings no longer give the same pictures

# Scenes; lengths in pixels
SUPERSAMPLING = 2  # shapes are painted at twice the size and averaged: anti-aliased edges
SIZE_EXPONENT = -3.0  # p(r) ~ r^-3: the one exponent that makes the scene scale-invariant (Lee et al.)
SMALLEST_RADIUS, LARGEST_RADIUS = (1.0, 4.0), 0.45  # log-uniform: how far away the scene is; of the image's side
LENS_BLUR = (0.4, 0.7)  # standard deviation
COVERAGE = 4.0  # mean number of shapes over a pixel; e^-4 = 2 % of the pixels show the ground
OUTLINE_POINTS = 48  # divisible by 3, 4 and 6, so that polygons keep their corners
CORNERS = (0, 0, 0, 1, 1, 3, 4, 4, 6)  # equally likely; 0: ellipse, 1: blob, n: n-gon
# From luminance, blue-yellow, red-green, which vary nearly independently (Ruderman, Cronin, Chiao, JOSA A 1998)
OPPONENT_TO_RGB = np.array([[1, 1, 1], [1, 0.3, -1.1], [1, -0.9, 0.2]])

SOURCES, SOURCE_SIZE = 96, 128  # images they are trained on, and their side; smaller for smaller --size
WIDTH, LAST_WIDTH = 29, 21  # channels at half and at full size; with the noise 32 and 24, which compute fast
NOISE_PLANES, NOISE_STD = 3, 0.5
PATCH, BATCH, LEARNING_RATE = 48, 16, 4e-3
ENERGY_FLOOR = 1 / 255  # detail weaker than one grey level does not count
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, 0, -1], [0.5, -1, 0.5]])  # luminance, red - blue, purple - green
MARGIN = 8  # mirrored at each border and cut off again: as far as the networks' zero padding reaches

# Part of the random keys: image i is the same whatever the counts, and autoencoders, reals and fakes of all splits come
# from different scenes.
ROLES = ("autoencoder", *(f"{split}/{label}" for split in SPLITS for label in ("real", "fake")))


def draw_scene(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random dead-leaves scene. Returns (size, size, 3) uint8."""
    outlines, centres, radii = leaf_outlines(size, rng)
    canvas = Image.new("I", (SUPERSAMPLING * size, SUPERSAMPLING * size), 0)  # 0: the ground, n: the n-th shape
    draw = ImageDraw.Draw(canvas)
    steps = np.where(radii < 4, 4, np.where(radii < 16, 2, 1))  # small shapes need fewer points
    for number, (outline, step) in enumerate(zip(outlines * SUPERSAMPLING, steps, strict=True), start=1):
        draw.polygon(outline[::step].ravel().tolist(), fill=number)
    x = colour_shapes(np.array(canvas), centres, radii, rng)  # (S, S, 3), S = SUPERSAMPLING * size
    x = sum(x[i::SUPERSAMPLING, j::SUPERSAMPLING] for i, j in np.ndindex(SUPERSAMPLING, SUPERSAMPLING))
    return photograph(x / SUPERSAMPLING**2, rng)


def leaf_outlines(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random shapes, from the back to the front: ellipses, blobs, triangles, rectangles, hexagons.

    A shape may lie anywhere that it touches the image, a square of side size + 2 r; its number per area follows r^-3.
    Returns outlines (n, OUTLINE_POINTS, 2), centres (n, 2), radii (n,), all in pixels, x before y.
    """
    edges = np.geomspace(np.exp(rng.uniform(*np.log(SMALLEST_RADIUS))), LARGEST_RADIUS * size, 257)
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
    stretch, turn = np.exp(rng.uniform(0, 0.6, (count, 1))), rng.uniform(0, 2 * np.pi, (count, 1))
    along = reach * np.cos(angles) * radii[:, None] * stretch
    across = reach * np.sin(angles) * radii[:, None] / stretch
    x = along * np.cos(turn) - across * np.sin(turn) + centres[:, :1]
    y = along * np.sin(turn) + across * np.cos(turn) + centres[:, 1:]
    return np.stack([x, y], axis=-1), centres, radii


def colour_shapes(shapes: np.ndarray, centres: np.ndarray, radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give each shape a colour, a slope of light, grain, perhaps stripes. shapes: (S, S) -> (S, S, 3), about 0..1."""
    side, count = len(shapes), len(radii) + 1  # and the ground
    centres = np.vstack([[side / 2, side / 2], centres * SUPERSAMPLING]).astype(np.float32)
    radii = np.append(side, radii * SUPERSAMPLING).astype(np.float32)
    y, x = np.mgrid[:side, :side].astype(np.int32)
    noise, which = power_law_noise(side, (0.6, 1.2), rng), rng.integers(2, size=count)  # fine, coarse
    shift_x, shift_y = rng.integers(side, size=(2, count), dtype=np.int32)
    texture = noise[which[shapes], (y + shift_y[shapes]) % side, (x + shift_x[shapes]) % side]
    light = 1 + rng.uniform(0.01, 0.16, count).astype(np.float32)[shapes] * texture
    strength = (rng.uniform(0.04, 0.2, count) * (rng.random(count) < 0.3)).astype(np.float32)  # 30 % have stripes
    period = SUPERSAMPLING * np.exp(rng.uniform(np.log(3), np.log(16), count))  # 3 to 16 pixels
    direction = rng.uniform(0, 2 * np.pi, count)
    wave_x, wave_y = (2 * np.pi / period * (np.cos(direction), np.sin(direction))).astype(np.float32)
    phase = wave_x[shapes] * x + wave_y[shapes] * y + noise[1]  # which bends the stripes
    light += strength[shapes] * np.sin(phase)
    slope_x, slope_y = rng.normal(0, 0.08, (2, count)).astype(np.float32) / np.maximum(radii, 8)
    light += (x - centres[shapes, 0]) * slope_x[shapes] + (y - centres[shapes, 1]) * slope_y[shapes]
    # Colours near six that the scene is made of, in opponent coordinates
    mean = rng.uniform(0.3, 0.62), rng.normal(0, 0.03), rng.normal(0, 0.015)
    palette = mean + rng.normal(0, 1, (6, 3)) * [0.2, 0.06, 0.03]
    colours = rng.choice(palette, count) + rng.normal(0, 1, (count, 3)) * [0.07, 0.025, 0.012]
    return np.clip(colours @ OPPONENT_TO_RGB, 0.02, 0.97).astype(np.float32)[shapes] * light[..., None]


def power_law_noise(side: int, exponents: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Periodic noise with amplitude spectra f^-exponent, standard deviation 1. Returns (n, side, side) float32."""
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side))
    frequency[0, 0] = torch.inf
    white = torch.from_numpy(rng.standard_normal((len(exponents), side, side), dtype=np.float32))
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * torch.stack([frequency**-e for e in exponents]), s=(side, side))
    return (noise / noise.std((1, 2), keepdim=True)).numpy()


def photograph(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, lens blur, shot and read noise, 8 bits. x: (H, W, 3) float32. Returns uint8."""
    slope_y, slope_x = rng.normal(0, 0.08, 2)
    light = 1 + slope_y * np.linspace(-1, 1, x.shape[0])[:, None] + slope_x * np.linspace(-1, 1, x.shape[1])
    x = torch.from_numpy(x * light[..., None].astype(np.float32)).permute(2, 0, 1)  # (3, H, W)
    x = gaussian_blur(x, [5, 5], [rng.uniform(*LENS_BLUR)]).clamp(0, 1).permute(1, 2, 0).numpy()
    shot, read = rng.uniform(0.0001, 0.0006), rng.uniform(0.3, 1.2) / 255  # variance shot * x + read^2
    x = x + np.sqrt(shot * x + read**2) * rng.standard_normal(x.shape, dtype=np.float32)
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


class Autoencoder(nn.Module):
    """Halve the image and decode it again as a generator does, from fresh noise, too, as in StyleGAN."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.encoder = nn.Conv2d(3, WIDTH, 4, stride=2, padding=1)
        self.middle = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.decoder = nn.Conv2d(WIDTH + NOISE_PLANES, LAST_WIDTH, 3, padding=1)
        self.output = nn.Conv2d(LAST_WIDTH + NOISE_PLANES, 3, 3, padding=1)

    def forward(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """x: (B, 3, H, W) in [0, 1], sides even. Returns an imitation, same shape, about [0, 1]."""
        x = F.leaky_relu(self.encoder(2 * x - 1), 0.2)  # (B, WIDTH, H / 2, W / 2)
        x = F.leaky_relu(self.middle(x), 0.2)
        x = F.interpolate(with_noise(x, rng), scale_factor=2, mode=self.kind)  # (B, WIDTH + NOISE_PLANES, H, W)
        x = F.leaky_relu(self.decoder(x), 0.2)  # (B, LAST_WIDTH, H, W)
        return (self.output(with_noise(x, rng)) + 1) / 2  # (B, 3, H, W)


def with_noise(x: Tensor, rng: np.random.Generator) -> Tensor:
    noise = rng.standard_normal((x.shape[0], *x.shape[2:], NOISE_PLANES), dtype=np.float32)
    return torch.cat([x, NOISE_STD * torch.from_numpy(noise).permute(0, 3, 1, 2)], dim=1)  # channels-last, as x is


def imitation_loss(x_fake: Tensor, x: Tensor) -> Tensor:
    """L1 on opponent channels, and on the log RMS of detail, most of the last octave, in cells of 8 x 8."""
    smooth, slope, curve = torch.tensor([[1.0, 2, 1], [-1, 1, 0], [-1, 2, -1]])
    pairs = (smooth, slope), (slope, smooth), (smooth, curve), (curve, smooth), (curve, curve)
    filters = torch.stack([torch.outer(a / a.norm(), b / b.norm()) for a, b in pairs])  # (5, 3, 3)
    filters = torch.einsum("ci,fhw->cfihw", torch.cat([torch.eye(3), OPPONENT]), filters).flatten(0, 1)  # (30, 3, 3, 3)
    detail = [(F.avg_pool2d(F.conv2d(image, filters) ** 2, 8) + ENERGY_FLOOR**2).log() / 2 for image in (x_fake, x)]
    return 3 * (OPPONENT @ (x_fake - x).transpose(0, 1).flatten(1)).abs().mean() + F.l1_loss(*detail)


def train_autoencoder(kind: str, images: np.ndarray, steps: int, seed: int) -> dict[str, np.ndarray]:
    """The weights of an autoencoder trained on random patches of images: (N, H, W, 3) uint8."""
    rng = seeded_generator(seed, ROLES.index("autoencoder"), 0, 1 + KINDS.index(kind))
    model = Autoencoder(kind).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for weight in model.parameters():
            bound = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0  # PyTorch's own; biases 0
            weight.copy_(torch.from_numpy(rng.uniform(-bound, bound, weight.shape)))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        places = rng.integers(0, np.array(images.shape[:3]) - (0, PATCH - 1, PATCH - 1), (BATCH, 3))
        x = to_tensor(np.stack([images[n, i : i + PATCH, j : j + PATCH] for n, i, j in places]))  # (B, 3, PATCH, PATCH)
        optimizer.zero_grad()
        imitation_loss(model(x, rng), x).backward()
        optimizer.step()
        schedule.step()
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1], channels-last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def imitate(kind: str, weights: dict[str, np.ndarray], image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The fake of one image: (H, W, 3) uint8, sides even. Returns the same shape, uint8."""
    model = Autoencoder(kind).to(memory_format=torch.channels_last)
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    x = model(F.pad(to_tensor(image[None]), (MARGIN,) * 4, mode="reflect"), rng)
    x = x[0, :, MARGIN:-MARGIN, MARGIN:-MARGIN]  # (3, H, W)
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


class Settings(NamedTuple):
    """What decides the pictures; stored in OUT/settings.json."""

    size: int
    counts: dict[str, int]  # split -> images of each class
    seed: int
    steps: int
    photographs: dict[str, list[str]] | None = None  # role -> files; None: scenes

    def generator(self, role: str, index: int, use: int) -> np.random.Generator:
        """use: 0 for the source image, 1, 2 for the noise of each kind. Every random number comes from such a one."""
        return seeded_generator(self.seed, ROLES.index(role), index, use)

    def source(self, role: str, index: int, size: int) -> np.ndarray:
        """Image `index` of a role, (size, size, 3) uint8: a new scene, or a crop of one of its photographs."""
        rng = self.generator(role, index, 0)
        if self.photographs is None:
            return draw_scene(size, rng)
        paths = self.photographs[role]
        image = load_image(paths[index % len(paths)])  # (3, H, W)
        top, left = (int(rng.integers(side - size + 1)) for side in image.shape[1:])
        return image[:, top : top + size, left : left + size].permute(1, 2, 0).numpy().copy()


def share_out_photographs(root: str, size: int, counts: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Give each role its own photographs under root, as many as its images ask for: none is used for two.

    Raises:
        UserError: if there are too few.
    """
    paths = find_images(os.path.abspath(root))
    headers = check_headers(paths, SizePolicy(scale=1))
    fit = [p for p, h in zip(paths, headers, strict=True) if not h.problem and min(h.size) >= size]
    needs = {"autoencoder": SOURCES} | {role: n for role in ROLES[1:] if (n := counts[role.split("/")[0]])}
    if len(fit) < len(needs):
        text = f"{root}: {len(fit)} readable images of at least {size}x{size}, wanted at least {len(needs)}"
        raise UserError(f"{text} (one each for {', '.join(needs)}): add images, or pass a smaller --size")
    shares = {role: [] for role in needs}
    for path in seeded_generator(seed, len(ROLES)).permutation(fit).tolist():
        shares[max(needs, key=lambda role: needs[role] / (len(shares[role]) or 1e-9))].append(path)
    return shares


def write_images(job: tuple[str, str, int], weights: dict[str, dict], settings: Settings, out: Path) -> None:
    """job: split, "real" or "fake", and which image. Writes SPLIT/real/INDEX.png, or its fakes SPLIT/KIND/INDEX.png."""
    split, label, index = job
    role = f"{split}/{label}"
    images = {"real": settings.source(role, index, settings.size)}
    if label == "fake":
        source = images.pop("real")
        for use, kind in enumerate(KINDS, start=1):
            images[kind] = imitate(kind, weights[kind], source, settings.generator(role, index, use))
    for name, image in images.items():
        Image.fromarray(image).save(out / split / name / f"{index:05d}.png", compress_level=1)


def start_worker() -> None:
    """One thread each: the same numbers on any number of cores. Ctrl-C is for the main process, which ends them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_images(settings: Settings, out: Path, workers: int) -> None:
    """Train the autoencoders, then make all images."""
    jobs = [(split, label, i) for split, n in settings.counts.items() for label in ("real", "fake") for i in range(n)]
    for split in {split for split, _, _ in jobs}:
        for name in ("real", *KINDS):
            (out / split / name).mkdir(parents=True)
    with ProcessPoolExecutor(workers, get_context("fork"), start_worker) as pool:  # forked ones have PyTorch already
        try:
            source = partial(settings.source, "autoencoder", size=min(SOURCE_SIZE, settings.size))
            images = np.stack(list(pool.map(source, range(SOURCES))))
            train = partial(train_autoencoder, images=images, steps=settings.steps, seed=settings.seed)
            weights = dict(zip(KINDS, pool.map(train, KINDS), strict=True))
            write = partial(write_images, weights=weights, settings=settings, out=out)
            list(progress(pool.map(write, jobs), "images", len(jobs)))
        except BaseException:  # a signal among them; leaving would wait for what the workers are doing
            for worker in active_children():
                worker.terminate()
            raise


def write_lists(settings: Settings, out: Path, listed: Path) -> None:
    """The lists of reals for train_sr.py, as paths from the working folder to `listed`."""
    for split in ("train", "val"):
        if n := settings.counts[split]:
            lines = "".join(f"{listed / split / 'real'}/{index:05d}.png\n" for index in range(n))
            (out / f"{split}.txt").write_text(lines)


def main(argv: list[str] | None = None) -> int:
    parser = options.Parser("python -m tools.example", __doc__.split("\n\n")[0])
    images = options.Group(parser, "images")
    images.add("--out", "folder to be made", Path, Path("data/example"), metavar="DIR")
    images.add("--from", "crops of these photographs, not scenes", dest="photographs", metavar="DIR")
    images.add("--size", "side of the images in pixels, divisible by 4", options.number(int, 64), 256)
    for split, n in zip(SPLITS, (128, 32, 64), strict=True):
        images.add(f"--{split}", "images a class", options.count, n)
    images.add("--seed", "of everything random", options.count, 123)
    images.add("--steps", "training of an autoencoder", options.at_least_one, 250)
    workers = min(8, os.cpu_count() or 1)
    images.add("--workers", "processes, whose number changes no image", options.at_least_one, workers)
    images.dropped("--force", takes=0)
    images.dropped("--kinds", takes="+")
    args = parser.parse_args(argv)
    counts, photographs = {split: getattr(args, split) for split in SPLITS}, None
    if args.size % 4 or not any(counts.values()):
        raise UserError(f"--size {args.size}, images {counts}: a multiple of 4 and some images were wanted")
    if args.photographs:
        photographs = share_out_photographs(args.photographs, args.size, counts, args.seed)
    settings = Settings(args.size, counts, args.seed, args.steps, photographs)
    about, wanted = args.out / "settings.json", {"format": FORMAT, **settings._asdict()}
    found = json.loads(about.read_text()) if about.exists() else {}
    if {key: found.get(key) for key in wanted} == wanted:
        logger.info("complete: %s", args.out)
        return 0
    if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir())):
        raise UserError(f"{args.out} holds something else than images of {wanted}: pass another --out, or remove it")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the workers end, too
    logger.info("making images of %dx%d in %s", args.size, args.size, args.out)
    with TemporaryDirectory(prefix=".example", dir=make_folder(args.out.absolute().parent)) as folder:
        unfinished = Path(folder, "images")
        make_images(settings, unfinished, args.workers)
        write_lists(settings, unfinished, args.out)
        (unfinished / "README.txt").write_text(__doc__)
        write_json(unfinished / about.name, wanted)
        unfinished.replace(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
