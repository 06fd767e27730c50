"""What the prompts of training promise, for any masks and any random numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models.sam.prompts import ABSENT, BACKGROUND, FOREGROUND, LOWER_RIGHT, NOT_A_POINT, UPPER_LEFT
from pipeline.models.sam.sampling import correction, first_prompts, noisy_boxes, pauses, pixel_of

SIZE = (7, 9)
cases = settings(max_examples=60, deadline=None)


def masks(seed: int, num: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    share = torch.rand(num, 1, 1, generator=draw)
    return torch.rand(num, *SIZE, generator=draw) < share


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def at(region: Tensor, points: Tensor) -> Tensor:
    column, row = points.long().unbind(1)
    return region[torch.arange(len(region)), row, column]


@cases
@given(st.integers(0, 10**6))
def test_a_drawn_pixel_lies_in_its_region(seed: int) -> None:
    region = masks(seed)
    there = region.flatten(1).any(1)
    assert at(region, pixel_of(region, numbers(seed, 5)))[there].all()


def test_every_pixel_of_a_region_is_drawn_alike_often() -> None:
    region = masks(3, 1)
    count = int(region.sum())
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = pixel_of(region.expand(count, -1, -1), draws)
    assert sorted(map(tuple, drawn.long().flip(1).tolist())) == [tuple(p) for p in region[0].nonzero().tolist()]


@cases
@given(st.integers(0, 10**6))
def test_corrections_lie_where_the_prediction_is_wrong_and_have_the_right_sign(seed: int) -> None:
    predicted, truth = masks(seed), masks(seed + 1)
    valid = torch.ones_like(truth)
    valid[:, :, 6:] = False
    wrong = (predicted ^ truth) & valid
    point, label = correction(predicted, truth, valid, numbers(seed, 5), torch.zeros(5, dtype=torch.bool))
    some = wrong.flatten(1).any(1)
    assert at(wrong, point)[some].all()
    assert torch.equal(label == FOREGROUND, at(truth, point))
    assert torch.equal(label == BACKGROUND, ~at(truth, point))
    assert at(valid, point).all()


def test_where_nothing_is_wrong_any_pixel_serves_with_its_own_label() -> None:
    truth = masks(1)
    valid = torch.zeros_like(truth)
    valid[:, 2:4] = True
    point, label = correction(truth, truth, valid, numbers(0, 5), torch.zeros(5, dtype=torch.bool))
    assert at(valid, point).all()
    assert torch.equal(label == FOREGROUND, at(truth, point))


def test_who_pauses_gets_no_point() -> None:
    pause = torch.tensor([True, False, True, False, False])
    _, label = correction(masks(1), masks(2), torch.ones(5, *SIZE, dtype=torch.bool), numbers(0, 5), pause)
    assert torch.equal(label == ABSENT, pause)


@cases
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 10))
def test_of_all_rounds_exactly_so_many_bring_a_point_and_the_last_never_does(
    seed: int, repeats: int, clicks: int
) -> None:
    paused = pauses(numbers(seed, 6, clicks + repeats - 1), repeats)
    assert paused.shape == (6, clicks + repeats)
    assert ((~paused).sum(1) == clicks).all()
    assert paused[:, -1].all() == (repeats > 0)


def test_the_round_without_a_point_may_be_any_but_the_last() -> None:
    paused = pauses(numbers(4, 400, 9), 2)
    assert paused.shape == (400, 10)
    assert paused[:, :-1].any(0).all()


@cases
@given(st.integers(0, 10**6), st.floats(0, 0.5), st.floats(0, 30))
def test_box_noise_stays_within_its_bound_and_the_image(seed: int, share: float, most: float) -> None:
    corner = numbers(seed, 8, 2) * 50
    boxes = torch.cat([corner, corner + 1 + numbers(seed + 2, 8, 2) * 40], dim=1)
    moved = noisy_boxes(boxes, numbers(seed + 1, 8, 4), share=share, most=most, size=(80, 70))
    inside = torch.minimum(boxes, torch.tensor([70.0, 80.0] * 2, dtype=torch.float64))
    assert ((moved - inside).abs() <= most + 1e-9).all()
    assert (moved >= 0).all()
    assert (moved[:, ::2] <= 70).all()
    assert (moved[:, 1::2] <= 80).all()
    assert (moved[:, 2:] >= moved[:, :2]).all()


def test_box_noise_has_the_deviation_that_was_asked_for() -> None:
    boxes = torch.tensor([[400.0, 400, 600, 500]]).double().expand(4000, 4)
    moved = noisy_boxes(boxes, numbers(9, 4000, 4), share=0.05, most=1000, size=(1024, 1024))
    deviation = (moved - boxes).std(0)
    torch.testing.assert_close(deviation, torch.tensor([10.0, 5, 10, 5]).double(), rtol=0.05, atol=0)
    capped = noisy_boxes(boxes, numbers(9, 4000, 4), share=0.5, most=20, size=(1024, 1024)) - boxes
    assert capped.abs().max() == 20


def test_first_prompts_are_a_point_or_a_box() -> None:
    points, boxes = torch.tensor([[3.0, 4], [5, 6]]), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    places, labels = first_prompts(points, boxes, torch.tensor([True, False]))
    assert labels.tolist() == [[FOREGROUND, NOT_A_POINT], [UPPER_LEFT, LOWER_RIGHT]]
    assert places.tolist() == [[[3, 4], [0, 0]], [[5, 6], [7, 8]]]
