"""The rule by which an evaluation clicks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.evaluate.promptable import Click, next_click


def disc(x: int, y: int, radius: float, side: int = 24) -> np.ndarray:
    rows, columns = np.indices((side, side))
    return np.asarray((columns - x) ** 2 + (rows - y) ** 2 <= radius**2)


def deepest(region: np.ndarray, clicked: set[tuple[int, int]]) -> tuple[float, tuple[int, int]]:
    """Depth and place of a region's deepest pixel that wasn't clicked, found by measuring every distance."""
    height, width = region.shape
    outside = [
        (x, y)
        for x, y in itertools.product(range(-1, width + 1), range(-1, height + 1))
        if not (0 <= x < width and 0 <= y < height and region[y, x])
    ]
    best, place = 0.0, (0, 0)
    for y, x in itertools.product(range(height), range(width)):
        if region[y, x] and (x, y) not in clicked:
            depth = min((x - a) ** 2 + (y - b) ** 2 for a, b in outside) ** 0.5
            if depth > best:
                best, place = depth, (x, y)
    return best, place


def test_the_first_click_is_in_the_middle_of_the_object() -> None:
    assert next_click(disc(9, 13, 6)) == Click(9, 13, foreground=True)


def test_the_next_click_goes_where_most_is_wrong_and_says_what_is() -> None:
    truth = disc(9, 12, 7)
    assert next_click(truth, truth & ~disc(9, 8, 3)) == Click(9, 8, foreground=True)
    assert next_click(truth, truth | disc(20, 20, 2)) == Click(20, 20, foreground=False)
    both = (truth & ~disc(9, 8, 3)) | disc(20, 4, 2)
    assert next_click(truth, both).foreground  # what was missed lies deeper than what was wrongly taken


@pytest.mark.parametrize("seed", range(8))
def test_clicks_are_where_measuring_every_distance_finds_them(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth, predicted = (disc(*draw.integers(2, 10, 2), draw.uniform(2, 5), side=12) for _ in range(2))
    noisy = predicted ^ (draw.uniform(size=truth.shape) < 0.05)
    clicked = [Click(*(int(n) for n in draw.integers(0, 12, 2)), foreground=True) for _ in range(4)]
    taken = {(click.x, click.y) for click in clicked}
    missed, wrongly = deepest(truth & ~noisy, taken), deepest(noisy & ~truth, taken)
    expected = Click(*wrongly[1], foreground=False) if wrongly[0] > missed[0] else Click(*missed[1], foreground=True)
    assert max(missed[0], wrongly[0]) > 0
    assert next_click(truth, noisy, clicked) == expected


def test_no_pixel_is_clicked_twice_however_deaf_the_model() -> None:
    truth, predicted = disc(9, 12, 5), disc(13, 12, 5)
    clicks: list[Click] = []
    for _ in range(9):
        clicks.append(next_click(truth, predicted, clicks))
    assert len({(click.x, click.y) for click in clicks}) == 9
    assert all(truth[click.y, click.x] == click.foreground for click in clicks)
    assert all(truth[click.y, click.x] != predicted[click.y, click.x] for click in clicks)


def test_where_nothing_else_is_wrong_the_middle_serves_again() -> None:
    truth = disc(9, 12, 5)
    middle = next_click(truth)
    assert next_click(truth, truth, [middle]) == middle
    one_wrong = truth.copy()
    one_wrong[0, 0] = True
    assert next_click(truth, one_wrong, [middle]) == Click(0, 0, foreground=False)
    assert next_click(truth, one_wrong, [middle, Click(0, 0, foreground=False)]) == middle
