"""Drawing of rendered scenes: textured shapes over lit, patterned backgrounds.

Only additions, products, square roots and comparisons touch pixels (patterns are triangle waves, turned by angles
whose sine and cosine are scalars), so that a scene is the same on every machine.

Legend: H W pixels, X horizontal and Y vertical coordinates, downwards, in a unit the function names.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, UInt8

Plane: TypeAlias = Float32[np.ndarray, "h w"]
Color: TypeAlias = Float32[np.ndarray, "3"]  # red, green, blue in [0, 1]
Hsv: TypeAlias = tuple[float, float, float]  # hue, saturation, value in [0, 1]

_NUM_TRIES = 8  # places tried for a small object before it is left out
_MAX_TILT = 0.3  # radians, of shapes
_PART_MIDDLE = 0.7  # of an object's greatest depth: parts are centred no nearer to its edge
_PART_RADIUS = (0.6, 0.9)  # of the depth where they are centred, so that they lie within the object
_MIN_PART = 0.08  # of the image's shorter side: the smallest radius of a part
_MAX_PATTERN_TILT = 0.25  # radians, of textures; well below the 45 degrees between two kinds of stripes


class SceneObject(NamedTuple):
    """One object and the pixels of it that can be seen."""

    shape: str
    texture: str
    color: Hsv  # of its bright tone
    center: tuple[float, float]  # x, y in pixels
    radius: float  # pixels
    mask: Bool[np.ndarray, "h w"]


class Scene(NamedTuple):
    """A rendered image and what is in it; the main object stands last."""

    image: UInt8[np.ndarray, "h w 3"]
    objects: tuple[SceneObject, ...]
    background: Hsv  # the first of its two colors
    part: SceneObject | None = None  # of the main object, whose mask holds it, too

    @property
    def main(self) -> SceneObject:
        """The object the scene is labelled with."""
        return self.objects[-1]


def _triangle_wave(x: Plane) -> Plane:
    """Period 1, from -1 to 1."""
    wave: Plane = 4 * np.abs(x - np.floor(x) - 0.5) - 1
    return wave


def _disc(x: Plane, y: Plane) -> Plane:
    inside: Plane = 1 - np.sqrt(x * x + y * y)
    return inside


def _ring(x: Plane, y: Plane) -> Plane:
    inside: Plane = 0.27 - np.abs(np.sqrt(x * x + y * y) - 0.73)
    return inside


def _triangle(x: Plane, y: Plane) -> Plane:
    """Equilateral, standing on its tip."""
    down = y + 0.12
    sides = [down * math.sin(a) + x * math.cos(a) for a in _thirds()]
    return 0.52 - np.maximum(np.maximum(sides[0], sides[1]), sides[2])


def _thirds() -> Iterator[float]:
    """Directions of a triangle's sides: up, and 120 degrees to both sides of it."""
    return (-math.pi / 2 + 2 * math.pi * i / 3 for i in range(3))


def _crescent(x: Plane, y: Plane) -> Plane:
    """A disc without another one to the right."""
    shifted = x - 0.45
    inside: Plane = np.minimum(_disc(x, y), np.sqrt(shifted * shifted + y * y) - 0.75)
    return inside


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "crescent": _crescent,
}
"""Signed distances from the edge, positive inside, of shapes that fit the unit circle; x and y in radii."""

_AREAS = {"disc": math.pi, "ring": 2.475, "triangle": 1.404, "crescent": 1.593}
"""In squared radii: main objects of all shapes cover equally much, so that size tells nothing about the class."""


_HALF_ROOT = math.sqrt(0.5)

TEXTURES: dict[str, Callable[[Plane, Plane, tuple[float, float]], Plane]] = {
    "horizontal stripes": lambda x, y, phase: _triangle_wave(y + phase[0]),
    "vertical stripes": lambda x, y, phase: _triangle_wave(x + phase[0]),
    "rising stripes": lambda x, y, phase: _triangle_wave((x + y) * _HALF_ROOT + phase[0]),
    "falling stripes": lambda x, y, phase: _triangle_wave((x - y) * _HALF_ROOT + phase[0]),
    "diamonds": lambda x, y, phase: _triangle_wave(x + phase[0]) + _triangle_wave(y + phase[1]) - 0.35,
}
"""Patterns, positive where the bright color is; x and y in periods. Mirroring swaps rising and falling stripes."""


class Canvas:
    """An image being drawn, and its pixels' coordinates."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.side = min(height, width)
        self.x = np.broadcast_to(np.arange(width, dtype=np.float32), (height, width))
        self.y = np.broadcast_to(np.arange(height, dtype=np.float32)[:, None], (height, width))
        self.pixels: Float32[np.ndarray, "h w 3"] = np.zeros((height, width, 3), np.float32)

    def turned(self, angle: float, center: tuple[float, float], unit: float) -> tuple[Plane, Plane]:
        """Coordinates about `center` (pixels) in axes turned by `angle`, in units of `unit` pixels."""
        cos, sin = math.cos(angle) / unit, math.sin(angle) / unit
        x, y = self.x - center[0], self.y - center[1]
        return x * cos + y * sin, y * cos - x * sin

    def ramp(self, angle: float) -> Plane:
        """From about -0.5 to 0.5 across the image, along `angle`."""
        return self.turned(angle, (self.width / 2, self.height / 2), self.side)[0]


def draw_scene(
    draw: np.random.Generator,
    shape: str,
    texture: str,
    *,
    height: int,
    width: int,
    max_clutter: int,
    with_part: bool = False,
) -> Scene:
    """Render one scene around a main object of the given class; everything else is drawn at random.

    The main object lies within the centred square that an evaluation's centre crop keeps, in front of all else.

    Args:
        draw: source of randomness.
        shape: a name in `SHAPES`.
        texture: a name in `TEXTURES`.
        height: of the image, pixels.
        width: of the image, pixels.
        max_clutter: at most so many small objects beside the main one.
        with_part: whether the main object bears another one in its middle, as a shirt bears an emblem, if it is wide
            enough there.
    """
    canvas = Canvas(height, width)
    background = _draw_background(canvas, draw)
    radius = draw.uniform(0.4, 0.53) / math.sqrt(_AREAS[shape]) * canvas.side
    reach = canvas.side / 2 - radius
    center = (width / 2 + draw.uniform(-reach, reach), height / 2 + draw.uniform(-reach, reach))
    main = _outline(canvas, draw, shape, center, radius)
    objects: list[SceneObject] = []
    for outline in _clutter(canvas, draw, int(draw.integers(max_clutter + 1)), main.mask):
        period = _small_period(draw, outline.radius)
        objects.append(_paint(canvas, draw, outline, str(draw.choice(list(TEXTURES))), period))
    objects.append(_paint(canvas, draw, main, texture, draw.uniform(0.17, 0.28) * canvas.side))
    part = _part(canvas, draw, main) if with_part else None
    _light(canvas, draw)
    image = (np.clip(canvas.pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(image, tuple(objects), background, part)


class _Outline(NamedTuple):
    """Where an object is going to be."""

    shape: str
    center: tuple[float, float]
    radius: float
    depth: Plane  # pixels from its edge, positive inside
    coverage: Plane  # share of every pixel that it covers
    mask: Bool[np.ndarray, "h w"]


def _color(hue: float, saturation: float, value: float) -> Color:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def _draw_background(canvas: Canvas, draw: np.random.Generator) -> Hsv:
    """A gradient between two dull colors, under a faint pattern; returns the first color."""
    colors = [(draw.uniform(), draw.uniform(0.0, 0.5), draw.uniform(0.25, 0.75)) for _ in range(2)]
    first, second = (_color(*color) for color in colors)
    along = np.clip(canvas.ramp(draw.uniform(0, 2 * math.pi)) + 0.5, 0, 1)
    canvas.pixels[:] = first + (second - first) * along[..., None]
    pattern = TEXTURES[str(draw.choice(list(TEXTURES)))]
    period = draw.uniform(0.12, 0.4) * canvas.side
    wave = pattern(*canvas.turned(draw.uniform(0, math.pi), (0, 0), period), _phase(draw))
    tint = 0.04 * draw.uniform(0.3, 1) * draw.uniform(-1, 1, 3).astype(np.float32)
    canvas.pixels += np.clip(wave * 2, -1, 1)[..., None] * tint
    return colors[0]


def _phase(draw: np.random.Generator) -> tuple[float, float]:
    return draw.uniform(), draw.uniform()


def _outline(
    canvas: Canvas, draw: np.random.Generator, shape: str, center: tuple[float, float], radius: float
) -> _Outline:
    x, y = canvas.turned(draw.uniform(-_MAX_TILT, _MAX_TILT), center, radius)
    depth = SHAPES[shape](x, y) * radius
    coverage = np.clip(depth + 0.5, 0, 1)
    return _Outline(shape, center, radius, depth, coverage, coverage >= 0.5)


def _clutter(
    canvas: Canvas, draw: np.random.Generator, count: int, taken: Bool[np.ndarray, "h w"]
) -> Iterator[_Outline]:
    """Up to `count` small objects, each where it hides nothing and nothing hides it."""
    taken = taken.copy()
    for _ in range(count):
        for _ in range(_NUM_TRIES):
            shape = str(draw.choice(list(SHAPES)))
            radius = draw.uniform(0.06, 0.1) * canvas.side
            center = (draw.uniform(radius, canvas.width - radius), draw.uniform(radius, canvas.height - radius))
            top, left = (max(0, int(c - radius - 1)) for c in (center[1], center[0]))
            bottom, right = (int(c + radius + 2) for c in (center[1], center[0]))
            if not taken[top:bottom, left:right].any():
                taken[top:bottom, left:right] = True
                yield _outline(canvas, draw, shape, center, radius)
                break


def _part(canvas: Canvas, draw: np.random.Generator, whole: _Outline) -> SceneObject | None:
    """Lay a part over the middle of an object, well inside of it; None where the object is too thin for one."""
    shape = str(draw.choice(list(SHAPES)))
    y, x = np.nonzero(whole.depth >= _PART_MIDDLE * whole.depth.max())
    place = int(draw.integers(len(x)))
    radius = draw.uniform(*_PART_RADIUS) * float(whole.depth[y[place], x[place]])
    if radius < _MIN_PART * canvas.side:
        return None
    outline = _outline(canvas, draw, shape, (float(x[place]), float(y[place])), radius)
    return _paint(canvas, draw, outline, str(draw.choice(list(TEXTURES))), _small_period(draw, radius))


def _small_period(draw: np.random.Generator, radius: float) -> float:
    """Of the texture of a small object of that radius; both in pixels."""
    return draw.uniform(0.5, 0.8) * radius


def _paint(canvas: Canvas, draw: np.random.Generator, outline: _Outline, texture: str, period: float) -> SceneObject:
    """Lay the object over the canvas, in a bright and a dark tone of one hue; `period` of the texture in pixels."""
    bright = (draw.uniform(), draw.uniform(0.35, 1), draw.uniform(0.8, 1))
    light = _color(*bright)
    dark = light * draw.uniform(0.15, 0.4)
    x, y = canvas.turned(draw.uniform(-_MAX_PATTERN_TILT, _MAX_PATTERN_TILT), outline.center, period)
    wave = TEXTURES[texture](x, y, _phase(draw))
    # A wave rises by 4 per period: this makes the edge between the tones about a pixel wide.
    share = np.clip(wave * (period / 4) + 0.5, 0, 1)
    tones = dark + (light - dark) * share[..., None]
    canvas.pixels += outline.coverage[..., None] * (tones - canvas.pixels)
    return SceneObject(outline.shape, texture, bright, outline.center, outline.radius, outline.mask)


def _light(canvas: Canvas, draw: np.random.Generator) -> None:
    """Light from one side, of any strength, and a little sensor noise."""
    slope = draw.uniform(0, 0.35) * canvas.ramp(draw.uniform(0, 2 * math.pi))
    canvas.pixels *= (1 + slope)[..., None] * (draw.uniform(0.75, 1.15))
    canvas.pixels += 0.004 * draw.standard_normal(canvas.pixels.shape, np.float32)
