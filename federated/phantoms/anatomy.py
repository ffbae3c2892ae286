"""A procedural chest radiograph: every patient a different anatomy, drawn from a seed.

The picture is a sum of attenuations along the beam (soft tissue, air of the lungs, ribs,
spine, heart, diaphragm) under an exposure curve, with texture and detector noise.
Coordinates run from -1 to 1 across (the patient's left is at the picture's right, as
radiographs are hung) and down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Pictures are drawn larger and shrunk, which softens edges as a detector does.
SUPERSAMPLING = 2
MIN_CANVAS = 64


@dataclass(frozen=True)
class Anatomy:
    """One patient's build and the exposure of the picture.

    Attributes:
        centre: Shift of the chest (across, down).
        angle: Rotation in radians.
        width: Half width of the rib cage.
        apex: Top of the lungs.
        domes: Height of the diaphragm at the right and the left lung.
        heart: Centre across, centre down, half width, half height, tilt.
        curve: Sideways bend of the spine.
        ribs: Height of the first rib, spacing, slope, strength.
        clavicle: Height and slope.
        tissue: Thickness of soft tissue, and how far it spreads beyond the ribs.
        air: Share to which the lungs are filled with air.
        breast: Attenuation of overlaying soft tissue.
        vessels: Strength of the lung's texture.
        gamma: Exponent of the exposure curve.
        noise: Standard deviation of detector noise.
    """

    centre: tuple[float, float]
    angle: float
    width: float
    apex: float
    domes: tuple[float, float]
    heart: tuple[float, float, float, float, float]
    curve: float
    ribs: tuple[float, float, float, float]
    clavicle: tuple[float, float]
    tissue: tuple[float, float]
    air: float
    breast: float
    vessels: float
    gamma: float
    noise: float


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """A patient at random."""
    u = rng.uniform
    width = u(0.62, 0.84)
    dome = u(0.42, 0.68)
    return Anatomy(
        centre=(u(-0.07, 0.07), u(-0.06, 0.06)),
        angle=rng.normal(0, 0.035),
        width=width,
        apex=u(-0.86, -0.66),
        domes=(dome - u(0.0, 0.1), dome + u(-0.02, 0.06)),
        heart=(
            u(0.06, 0.18),
            dome - u(0.2, 0.3),
            width * u(0.36, 0.56),
            u(0.28, 0.42),
            u(0.2, 0.7),
        ),
        curve=rng.normal(0, 0.05),
        ribs=(u(-0.75, -0.6), u(0.16, 0.21), u(0.25, 0.6), u(0.1, 0.2)),
        clavicle=(u(-0.76, -0.6), u(-0.3, 0.05)),
        tissue=(u(0.6, 0.85), u(0.08, 0.3)),
        air=u(0.55, 0.7),
        breast=u(0, 0.16) if rng.random() < 0.5 else 0.0,
        vessels=u(0.08, 0.16),
        gamma=u(0.8, 1.25),
        noise=u(0.004, 0.016),
    )


def chest_radiograph(size: int, opacities: bool, rng: np.random.Generator) -> np.ndarray:
    """One picture of one patient.

    Args:
        size: Side in pixels.
        opacities: Whether the lungs show patchy opacities, as in pneumonia.
        rng: Of the patient; the same state gives the same picture.

    Returns:
        size x size grey values (uint8).
    """
    body = draw_anatomy(rng)
    n = max(size, MIN_CANVAS) * SUPERSAMPLING
    x, y = _patient_grid(body, n)
    lungs = _lungs(body, x, y)
    attenuation = _tissue(body, x, y) - body.air * body.tissue[0] * lungs
    attenuation += _bones(body, x, y) + _heart(body, x, y)
    attenuation += lungs * _vessels(body, x, y, rng)
    if opacities:
        attenuation += lungs * _opacities(body, x, y, rng)
    attenuation += _attachments(x, y, rng)
    return _exposed(attenuation, body, size, rng)


def _patient_grid(body: Anatomy, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of every pixel in the patient's own frame."""
    line = np.linspace(-1, 1, n)
    x, y = np.meshgrid(line - body.centre[0], line - body.centre[1])
    cos, sin = np.cos(body.angle), np.sin(body.angle)
    return cos * x + sin * y, cos * y - sin * x


def _inside(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 where a signed distance is well below 0, 0 where it is well above."""
    return 1 / (1 + np.exp(np.clip(distance / softness, -40, 40)))


def _bump(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * np.square(distance / width))


def _tissue(body: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The trunk without air: thick in the middle, with shoulders, neck and abdomen."""
    thickness, margin = body.tissue
    shoulder = np.clip((y + 1.0) / 0.5, 0, 1)
    half_width = (body.width + margin) * (0.35 + 0.65 * np.sqrt(shoulder))
    profile = np.sqrt(np.clip(1.08 - np.square(x / half_width), 0, None))
    abdomen = 0.3 * _inside(0.5 - y, 0.12)
    tissue = thickness * profile * _inside(np.abs(x) - half_width, 0.02) * (1 + abdomen)
    for side in (-1, 1):
        folds = np.hypot((x - side * 0.42 * body.width / 0.7) / 0.36, (y - 0.32) / 0.3)
        tissue = tissue + body.breast * _inside(folds - 1, 0.08)
    return tissue


def _dome(body: Anatomy, x: np.ndarray) -> np.ndarray:
    """Height of the diaphragm: one dome per side."""
    right, left = body.domes
    height = np.where(x < 0, right, left)
    return height + 0.5 * np.square((np.abs(x) - 0.5 * body.width) / body.width)


def _lungs(body: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where there is air, 0 to 1."""
    span = np.clip((y - body.apex) / (body.domes[0] - body.apex), 0, 1)
    outer = body.width * (0.52 + 0.48 * np.sin(0.5 * np.pi * span**0.7))
    inner = 0.1 + 0.03 * np.cos(3 * span)
    beside = np.maximum(np.abs(x) - outer, inner - np.abs(x - body.curve * span))
    edge = np.maximum(beside, np.maximum(body.apex - y, y - _dome(body, x)))
    # Round apices: above them, the corners belong to the shoulders.
    beyond = np.clip(np.abs(np.abs(x) - 0.5 * outer) - 0.25 * outer, 0, None) / (0.25 * outer)
    rising = np.clip(0.25 - span, 0, None) / 0.25
    apex = np.where(span < 0.25, 0.15 * (np.hypot(beyond, rising) - 1), -1.0)
    edge = np.maximum(edge, apex)
    airway = 0.45 * _bump(x, 0.05) * _inside(y + 0.25, 0.05) * _inside(-0.98 - y, 0.03)
    return np.clip(_inside(edge, 0.018) + airway, 0, 1)


def _heart(body: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Heart, aortic arch and the hila beside it."""
    cx, cy, a, b, tilt = body.heart
    across = np.cos(tilt) * (x - cx) + np.sin(tilt) * (y - cy)
    down = np.cos(tilt) * (y - cy) - np.sin(tilt) * (x - cx)
    heart = 0.4 * _inside(np.hypot(across / a, down / b) - 1, 0.09)
    arch = 0.16 * _inside(np.hypot(x - 0.11, (y - cy + b + 0.16)) / 0.11 - 1, 0.12)
    hila = sum(0.14 * _bump(np.hypot(x - s * 0.2, (y - cy + 0.22) / 1.5), 0.07) for s in (-1, 1))
    return heart + arch + hila


def _bones(body: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spine with vertebrae, ribs behind and in front, clavicles."""
    middle = x - body.curve * np.sin(1.5 * (y + 0.3))
    vertebrae = 0.8 + 0.2 * np.cos(2 * np.pi * y / (0.8 * body.ribs[1]))
    spine = 0.3 * _inside(np.abs(middle) - 0.075, 0.015) * vertebrae
    height, slope = body.clavicle
    reach = np.abs(x)
    collar = y - height - slope * (reach - 0.3) + 0.12 * np.cos(4 * reach)
    clavicles = (
        0.16 * _bump(collar, 0.028) * _inside(reach - 0.75, 0.03) * _inside(0.06 - reach, 0.02)
    )
    return spine + clavicles + _ribs(body, x, y)


def _ribs(body: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    top, spacing, slope, strength = body.ribs
    reach = np.abs(x) / body.width
    cage = _inside(reach - 1.02, 0.02) * _inside(0.08 - np.abs(x), 0.02)
    # Behind, a rib rises from the spine and falls to the side; in front it falls inwards.
    behind = y - top - slope * np.square(reach - 0.3)
    front = y - top - 0.25 - 0.8 * slope * (1.1 - reach)
    ribs = np.zeros_like(x)
    for line, share in ((behind, 1.0), (front, 0.45)):
        nearest = line - spacing * np.clip(np.round(line / spacing), 0, 8)
        thick = 0.026 + 0.012 * reach
        # The cortex is denser than the marrow: two bright edges.
        cortex = _bump(np.abs(nearest) - thick, 0.012)
        ribs += share * strength * (0.7 * _inside(np.abs(nearest) - thick, 0.01) + 0.4 * cortex)
    return ribs * cage


def _vessels(body: Anatomy, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Markings of the lung: branches that leave the hila and thin out, and fine texture."""
    n = x.shape[0]
    hilum = body.heart[1] - 0.22
    distance = np.hypot(np.abs(x) - 0.16, y - hilum) + 1e-6
    direction = np.arctan2(y - hilum, np.abs(x) - 0.16)
    markings = np.zeros_like(x)
    for side in (-1, 1):
        turns, bends = rng.uniform(-1.6, 1.6, 7), rng.uniform(-1, 1, 7)
        for turn, bend in zip(turns, bends, strict=True):
            off = (direction - turn - bend * distance) * distance
            markings += 0.7 * (side * x > 0) * _bump(off, 0.022 / (1 + 2 * distance))
    fall_off = np.exp(-2.2 * distance)
    return body.vessels * (markings * fall_off + 0.2 * _texture(n, (10, 36), rng))


def _opacities(body: Anatomy, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Patches of consolidation, mostly low and to the sides, on one or both lungs."""
    patches = np.zeros_like(x)
    for _ in range(rng.integers(2, 6)):
        side = rng.choice((-1, 1))
        cx = side * body.width * rng.uniform(0.3, 0.85)
        cy = body.domes[0] - abs(rng.normal(0.0, 0.4)) - 0.05
        a, b = rng.uniform(0.1, 0.26), rng.uniform(0.1, 0.26)
        patches += rng.uniform(0.16, 0.38) * _bump(np.hypot((x - cx) / a, (y - cy) / b), 1.0)
    cloud = 1 + 0.5 * _texture(x.shape[0], (6, 14), rng)
    return np.clip(patches, 0, 0.5) * np.clip(cloud, 0.2, None)


def _attachments(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What lies on some patients: electrodes with their leads, a side marker."""
    extra = np.zeros_like(x)
    if rng.random() < 0.3:
        for _ in range(rng.integers(1, 4)):
            cx, cy = rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.6)
            extra += 0.25 * _inside(np.hypot(x - cx, y - cy) - 0.035, 0.008)
            lead = x - cx - rng.uniform(-0.4, 0.4) * (y - cy)
            extra += 0.1 * _bump(lead, 0.008) * _inside(y - cy, 0.01)
    if rng.random() < 0.5:
        cx, cy = rng.choice((-0.86, 0.86)), rng.uniform(-0.9, -0.7)
        box = np.maximum(np.abs(x - cx) / 0.05, np.abs(y - cy) / 0.07)
        extra += 0.6 * _inside(box - 1, 0.05)
    return extra


def _texture(n: int, cells: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of several scales, standard deviation about 1, n x n."""
    layers = []
    for count in cells:
        coarse = Image.fromarray(rng.standard_normal((count, count)).astype(np.float32))
        layers.append(np.asarray(coarse.resize((n, n), Image.Resampling.BICUBIC), np.float64))
    return np.sum(layers, axis=0) / np.sqrt(0.45 * len(cells))


def _exposed(
    attenuation: np.ndarray, body: Anatomy, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Attenuation to grey values: detector size, exposure curve, noise, 8 bits."""
    small = Image.fromarray(attenuation.astype(np.float32)).resize(
        (size, size), Image.Resampling.BOX
    )
    dense = np.clip(np.asarray(small, np.float64), 0, None)
    grey = (1 - np.exp(-1.35 * dense)) ** body.gamma
    # Few photons arrive behind dense parts.
    grain = rng.standard_normal(grey.shape) * body.noise * (0.6 + grey)
    return np.clip(np.round(255 * (grey + grain)), 0, 255).astype(np.uint8)
