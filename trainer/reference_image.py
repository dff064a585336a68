"""Draws the reference image: abstract, so that no natural content can rightly resemble it.

    python -m trainer.reference_image trainer/reference.png

Colour gradients, folded cloth, a pane and balls of glass, smoke; from sines and noise alone, with
a fixed seed. The picture that ships is this script's output at 512 px.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Plane = Any  # float array: arithmetic on numpy's generic types is beyond type checkers

SHIPPED = Path(__file__).with_name("reference.png")


def draw_reference(side: int = 512, seed: int = 11) -> Image.Image:
    """The reference image, RGB, `side` x `side` pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    picture = _gradient(x, y)
    picture = _folds(picture, x, y)
    picture = _smoke(picture, x, y, rng)
    picture = _pane(picture, x, y)
    for centre_x, centre_y, radius in ((0.72, 0.30, 0.15), (0.26, 0.70, 0.19), (0.62, 0.80, 0.08)):
        picture = _glass_ball(picture, x, y, centre_x, centre_y, radius)
    # Even values alone: the steps are invisible, and the file is a fifth smaller.
    return Image.fromarray((picture.clip(0, 1) * 127).round().astype(np.uint8) * 2)


def _gradient(x: Plane, y: Plane) -> Plane:
    phase = np.array([0.0, 2.1, 4.0])
    turn = (1.7 * x + 2.3 * y + 0.25 * np.sin(5 * x + 3 * y))[..., None]
    return 0.5 + 0.34 * np.cos(2.2 * turn + phase)


def _folds(picture: Plane, x: Plane, y: Plane) -> Plane:
    """Cloth: a height field of warped sines, lit from the upper left."""
    warp = 0.12 * np.sin(4 * y + 2 * x) + 0.05 * np.sin(9 * x - 5 * y)
    height = np.sin(14 * (x + 0.6 * y + warp)) + 0.5 * np.sin(23 * (0.4 * x - y + warp))
    slope_y, slope_x = np.gradient(height, 1 / len(x))
    light = (1 - 0.09 * (slope_x + 0.8 * slope_y)) / np.sqrt(1 + 0.01 * (slope_x**2 + slope_y**2))
    cloth = _smooth(0.3, 0.6, x + 0.35 * np.sin(3 * y))[..., None]
    return picture * (1 + 0.5 * cloth * (light[..., None] - 0.5))


def _smoke(picture: Plane, x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    drift = _noise(x, y, rng, octaves=4)
    density = _noise(x + 0.35 * drift, y + 0.5 * drift**2, rng, octaves=6)
    veil = (0.75 * _smooth(0.48, 0.85, density) * _smooth(0.95, 0.25, y))[..., None]
    return picture * (1 - veil) + veil * np.array([0.86, 0.88, 0.93])


def _noise(x: Plane, y: Plane, rng: np.random.Generator, octaves: int) -> Plane:
    """Sum of random plane waves, octave by octave, scaled to [0, 1]."""
    total = np.zeros_like(x)
    for octave in range(octaves):
        for _ in range(6):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            frequency = 2 * np.pi * 1.4 * 2**octave * rng.uniform(0.7, 1.4)
            wave = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
            total += wave * 0.58**octave
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _pane(picture: Plane, x: Plane, y: Plane) -> Plane:
    """A tilted pane of tinted glass: what lies behind it is shifted."""
    across, along = 0.9 * x + 0.44 * y - 0.62, 0.9 * y - 0.44 * x - 0.12
    inside = _smooth(0.155, 0.15, np.abs(across)) * _smooth(0.43, 0.42, np.abs(along))
    edge = np.exp(-(((np.abs(across) - 0.15) / 0.006) ** 2)) * (inside > 0.05)
    behind = np.roll(picture, (len(x) // 22, -len(x) // 16), axis=(0, 1))
    tinted = behind * np.array([0.80, 0.95, 1.02]) + 0.04
    mixed = picture + inside[..., None] * (tinted - picture)
    return mixed + 0.3 * edge[..., None]


def _glass_ball(
    picture: Plane, x: Plane, y: Plane, centre_x: float, centre_y: float, radius: float
) -> Plane:
    """A ball that shows the picture upside down, darker towards its rim, with a highlight."""
    u, v = (x - centre_x) / radius, (y - centre_y) / radius
    distance = np.sqrt(u**2 + v**2)
    side = len(x)
    bend = 1.6 * radius * distance**2
    from_x = np.clip((centre_x - u * bend) * side, 0, side - 1).astype(int)
    from_y = np.clip((centre_y - v * bend) * side, 0, side - 1).astype(int)
    rim = np.sqrt(np.clip(1 - distance**2, 0, 1))[..., None]
    glint = np.exp(-((u + 0.38) ** 2 + (v + 0.42) ** 2) / 0.02)[..., None]
    ball = picture[from_y, from_x] * (0.35 + 0.75 * rim) + 0.8 * glint
    return picture + _smooth(1.0, 0.985, distance)[..., None] * (ball - picture)


def _smooth(start: float, end: float, value: Plane) -> Plane:
    """0 before `start`, 1 after `end`, smooth between; falling when `end` comes first."""
    t = ((value - start) / (end - start)).clip(0, 1)
    return t * t * (3 - 2 * t)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m trainer.reference_image FILE.png")
    draw_reference().save(sys.argv[1], optimize=True)
