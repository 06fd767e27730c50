"""Captions of rendered scenes: one sentence that names the main object's class, its look and surroundings.

It holds the class's name ("ring with rising stripes") as it is, or with the stripes' color in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from data_prep.scenes.draw import Hsv, Scene

_HUES = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
_HUE_ENDS = (0.04, 0.11, 0.19, 0.44, 0.54, 0.72, 0.81, 0.95)  # where each ends; beyond the last it is red again
_SMALL, _LARGE = 0.44, 0.49  # square root of the main object's area, over the image's shorter side
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

_SENTENCES: tuple[Callable[[dict[str, str]], str], ...] = (
    lambda w: f"{_a(w['color'])} {w['class']} on {_a(w['background'])} background{w['clutter']}",
    lambda w: f"{_a(w['size'])} {w['color']} {w['class']}{w['clutter']}",
    lambda w: f"a picture of {_a(w['color'])} {w['class']} before {w['background']}",
    lambda w: f"{_a(w['class'])} in {w['color']}, {w['place']}{w['clutter']}",
    lambda w: f"{_a(w['size'])} {w['shape']} with {w['color']} {w['texture']} on {w['background']}",
    lambda w: f"there is {_a(w['class'])}, {w['color']} and {w['size']}, {w['place']}",
)


def class_name(shape: str, texture: str) -> str:
    """A class's name, as zero-shot prompts use it: "ring with rising stripes"."""
    return f"{shape} with {texture}"


def caption(scene: Scene, draw: np.random.Generator) -> str:
    """A sentence about the scene, one of several kinds."""
    main = scene.main
    height, width = scene.image.shape[:2]
    side = min(height, width)
    num_small = len(scene.objects) - 1
    extent = math.sqrt(main.mask.sum()) / side
    size = "small" if extent < _SMALL else "large" if extent > _LARGE else "middle-sized"
    things = "thing" if num_small == 1 else "things"
    words = {
        "class": class_name(main.shape, main.texture),
        "shape": main.shape,
        "texture": main.texture,
        "color": color_name(main.color),
        "background": color_name(scene.background),
        "size": size,
        "place": _place((main.center[0] - width / 2) / side, (main.center[1] - height / 2) / side),
        "clutter": f" and {_NUMBERS[num_small]} small {things}" if 0 < num_small < len(_NUMBERS) else "",
    }
    return _SENTENCES[int(draw.integers(len(_SENTENCES)))](words)


def color_name(color: Hsv) -> str:
    """A common English name: "gray", "dark green", "pink"."""
    hue, saturation, value = color
    dark = "dark " if value < 0.45 else ""
    if saturation < 0.18:
        return f"{dark}gray"
    names = [name for name, end in zip(_HUES, _HUE_ENDS, strict=True) if hue < end]
    return f"{dark}{names[0] if names else _HUES[0]}"


def _place(right: float, down: float) -> str:
    """Offsets from the image's centre, in its shorter side, as words."""
    if max(abs(right), abs(down)) < 0.06:
        return "in the middle"
    if abs(right) >= abs(down):
        return "on the right" if right > 0 else "on the left"
    return "at the bottom" if down > 0 else "at the top"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
