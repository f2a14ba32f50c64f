"""Draw scenes: random images of overlapping shapes (dead leaves model).

Images of overlapping shapes resemble photographs in their edges, scale invariance and spectrum (Lee, Mumford, Huang,
IJCV 2001; Achddou, Gousseau, Ladjal, SSVM 2021).
"""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import gaussian_blur

SUPERSAMPLING = 2  # images are drawn at twice their size and then averaged over 2 x 2 pixels, which smooths the edges
SMALLEST_RADIUS = (1.0, 4.0)  # range of the smallest shape radius in pixels
LARGEST_RADIUS = 0.45  # largest shape radius, as a fraction of the image side
COVERAGE = 4.0  # sum of pi * radius^2 over all shapes, divided by the image area
POINTS = 24  # number of points per outline; a multiple of each number in CORNERS
CORNERS = (3, 4, 6, 24, 24)  # numbers of corners of a shape; 24 corners are nearly an ellipse
LENS_BLUR = (0.4, 1.2)  # the standard deviation of the lens blur is drawn from this range, in pixels
# Luminance, blue-yellow and red-green vary nearly independently in photographs (Ruderman, Cronin, Chiao, JOSA A 1998)
OPPONENT_TO_RGB = np.array([[1, 1, 1], [1, 0.3, -1.1], [1, -0.9, 0.2]])


def draw_scene(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a random image of overlapping shapes.

    Args:
        size: height and width of the image in pixels.
    Returns:
        The RGB image, uint8 (size, size, 3).
    """
    side = SUPERSAMPLING * size
    shapes, count = draw_polygons_filled_with_their_numbers(side, rng)  # (side, side)
    x = give_shapes_random_colours_and_textures(shapes, count, rng)  # (side, side, 3)
    x = x.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean(axis=(1, 3))  # (size, size, 3)
    return simulate_lighting_lens_and_noise(x, rng)


def draw_polygons_filled_with_their_numbers(side: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Paint random polygons over one another.

    Returns:
        The index of the visible shape at each pixel (0 for the background), (side, side), and the number of shapes.
    """
    low, high = np.log(SMALLEST_RADIUS)
    smallest = SUPERSAMPLING * np.exp(rng.uniform(low, high))
    largest = LARGEST_RADIUS * side
    mean_square = 2 * np.log(largest / smallest) / (smallest**-2 - largest**-2)  # mean of r^2
    count = round(COVERAGE * side**2 / (np.pi * mean_square))
    # Draw radii with the density r^-3 by inverse transform sampling
    radii = (largest**-2 + rng.random((count, 1)) * (smallest**-2 - largest**-2)) ** -0.5  # (count, 1)
    centres = rng.uniform(-0.1 * side, 1.1 * side, (count, 2))
    corners = rng.choice(CORNERS, (count, 1))
    stretches = np.exp(rng.uniform(0, 0.6, (count, 1)))
    turns = rng.uniform(0, 2 * np.pi, (count, 1))

    # Each polygon outline has POINTS points, so the outline of a triangle contains each corner eight times
    angles = np.floor(np.arange(POINTS) * corners / POINTS) * 2 * np.pi / corners  # (count, POINTS)
    along = radii * stretches * np.cos(angles)
    across = radii / stretches * np.sin(angles)
    x = centres[:, :1] + along * np.cos(turns) - across * np.sin(turns)
    y = centres[:, 1:] + along * np.sin(turns) + across * np.cos(turns)
    outlines = np.stack([x, y], axis=-1).reshape(count, 2 * POINTS)  # the coordinates x and y of the points alternate

    canvas = Image.new("I", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    for number, outline in enumerate(outlines.tolist(), start=1):
        draw.polygon(outline, fill=number)
    return np.array(canvas), count


def give_shapes_random_colours_and_textures(shapes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Give each shape a random colour and texture.

    Args:
        shapes: index of the visible shape at each pixel (0 for the background), (S, S).
    Returns:
        The RGB image, float32 (S, S, 3), with values of about 0 to 1.
    """
    luminance = rng.uniform(0.3, 0.6) + rng.normal(0, 0.2, count + 1)
    blue_yellow = rng.normal(0, 0.06, count + 1)
    red_green = rng.normal(0, 0.03, count + 1)
    colours = np.stack([luminance, blue_yellow, red_green], axis=1) @ OPPONENT_TO_RGB  # (count + 1, 3)
    colours = np.clip(colours, 0.02, 0.97).astype(np.float32)
    strengths = rng.uniform(-0.16, 0.16, count + 1).astype(np.float32)
    texture = draw_fractal_noise(len(shapes), rng)  # (S, S)
    light = 1 + strengths[shapes] * texture  # (S, S)
    return colours[shapes] * light[..., None]  # (S, S, 3)


def draw_fractal_noise(side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw noise with the amplitude spectrum 1 / frequency.

    Returns:
        The noise, float32 (side, side), with mean 0 and standard deviation 1.
    """
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side))
    frequency[0, 0] = 1  # avoids a division by zero
    white = torch.from_numpy(rng.standard_normal((side, side), dtype=np.float32))
    spectrum = torch.fft.rfft2(white) / frequency
    spectrum[0, 0] = 0
    noise = torch.fft.irfft2(spectrum, s=(side, side))
    return (noise / noise.std()).numpy()


def simulate_lighting_lens_and_noise(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Simulate light from one side, the blur of a lens, and the noise of a camera sensor.

    Args:
        x: RGB image, float32 (H, W, 3), with values of about 0 to 1.
    Returns:
        The RGB image, uint8 (H, W, 3).
    """
    slope_y, slope_x = rng.normal(0, 0.08, 2)
    light = 1 + slope_y * np.linspace(-1, 1, x.shape[0])[:, None] + slope_x * np.linspace(-1, 1, x.shape[1])  # (H, W)
    lit = torch.from_numpy(x * light[..., None].astype(np.float32)).permute(2, 0, 1)  # (3, H, W)
    blurred = gaussian_blur(lit, [5, 5], [rng.uniform(*LENS_BLUR)]).clamp(0, 1)
    x = blurred.permute(1, 2, 0).numpy()  # (H, W, 3)
    shot, read = rng.uniform(0.0001, 0.0006), rng.uniform(0.3, 1.2) / 255
    deviation = np.sqrt(shot * x + read**2)  # standard deviation of the sum of shot noise and read noise
    x = x + deviation * rng.standard_normal(x.shape, dtype=np.float32)
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)
