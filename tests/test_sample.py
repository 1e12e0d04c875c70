"""Which frames, which crop, which flip, and where points go: by hand, by fractions and by counting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips.errors import InputError
from clips.format import ClipFacts
from loaders.colour import LOOK_DRAWS
from loaders.sample import (
    DRAWS,
    AugmentConfig,
    Box,
    View,
    choose_frames,
    frames_uniform,
    hflip_chance,
    move_points,
    painted,
    random_view,
    training_draws,
    whole_view,
)
from loaders.source import fraction
from tests import by_hand

often = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
draws_below_one = st.floats(0, 1, exclude_max=True)
NUM_VIEWS = 2000


@pytest.mark.parametrize(
    ("num_frames", "frames_valid", "expected"),
    [
        (16, 39, [1, 3, 5, 8, 10, 13, 15, 18, 20, 22, 25, 27, 30, 32, 35, 37]),
        (8, 39, [2, 6, 11, 16, 21, 26, 31, 36]),
        (4, 4, [0, 1, 2, 3]),
        (1, 39, [19]),
        (1, 1, [0]),
        (39, 39, list(range(39))),
        (40, 39, [*range(39), 38]),
        (8, 3, [0, 0, 1, 1, 1, 2, 2, 2]),
        (8, 4, [0, 0, 1, 1, 2, 2, 3, 3]),
        (9, 4, [0, 0, 1, 1, 2, 2, 3, 3, 3]),
        (10, 8, [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]),
        (4, 1, [0, 0, 0, 0]),
    ],
)
def test_evaluation_takes_the_middle_of_each_segment_and_repeats_in_order_where_there_are_few(num_frames: int, frames_valid: int, expected: list[int]) -> None:
    chosen = frames_uniform(num_frames, frames_valid, None)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == expected


@often
@given(st.integers(1, 64), st.integers(1, 64), st.data())
def test_chosen_frames_are_valid_in_order_and_one_of_each_segment(num_frames: int, frames_valid: int, data: st.DataObject) -> None:
    draws = data.draw(st.none() | st.lists(draws_below_one, min_size=num_frames, max_size=num_frames))
    chosen = frames_uniform(num_frames, frames_valid, None if draws is None else np.array(draws)).tolist()
    if num_frames <= frames_valid:
        assert chosen == by_hand.frames(num_frames, frames_valid, draws)
    assert chosen == sorted(chosen) and chosen[0] >= 0 and chosen[-1] < frames_valid
    if num_frames >= frames_valid:
        assert set(chosen) == set(range(frames_valid))
    else:
        assert len(set(chosen)) == num_frames
    for place, frame in enumerate(chosen):
        assert place * frames_valid / num_frames - 1 < frame < max(place + 1, (place + 1) * frames_valid / num_frames)


@often
@given(st.integers(1, 64), st.integers(1, 64))
def test_too_few_frames_are_repeated_evenly_and_the_last_first_of_all(frames_valid: int, more: int) -> None:
    num_frames = frames_valid + more
    chosen = frames_uniform(num_frames, frames_valid, None).tolist()
    assert chosen == frames_uniform(num_frames, frames_valid, np.full(num_frames, 0.9)).tolist()
    stretches = [(frame * num_frames // frames_valid, (frame + 1) * num_frames // frames_valid) for frame in range(frames_valid)]
    assert chosen == [frame for frame, (begin, end) in enumerate(stretches) for _ in range(begin, end)]
    times = np.bincount(chosen)
    assert set(times) <= {num_frames // frames_valid, num_frames // frames_valid + 1}
    assert times[-1] == -(-num_frames // frames_valid)


@pytest.mark.parametrize(("draw", "expected"), [(0.0, [0, 4, 9, 14, 19, 24, 29, 34]), (1 - 2**-53, [3, 8, 13, 18, 23, 28, 33, 38])])
def test_the_smallest_and_largest_draws_take_a_segments_first_and_last_frame(draw: float, expected: list[int]) -> None:
    assert frames_uniform(8, 39, np.full(8, draw)).tolist() == expected


def test_every_frame_of_a_segment_is_taken_equally_often() -> None:
    chosen = np.stack([frames_uniform(4, 20, training_draws(4, 0, epoch, "train/a/1")[0]) for epoch in range(NUM_VIEWS)])
    counts = np.bincount(chosen.reshape(-1), minlength=20)
    assert np.abs(counts - NUM_VIEWS / 5).max() < 4.5 * np.sqrt(NUM_VIEWS * 0.2 * 0.8)


def test_draws_belong_to_seed_epoch_key_and_repeat() -> None:
    one = np.concatenate(training_draws(16, 3, 5, "train/a/1"))
    assert one.shape == (16 + DRAWS,) and (one >= 0).all() and (one < 1).all()
    assert one.tolist() == by_hand.uniforms(16, "frames", 3, 5, "train/a/1", 0) + by_hand.uniforms(DRAWS, "view", 3, 5, "train/a/1", 0)
    for other in ((4, 5, "train/a/1", 0), (3, 6, "train/a/1", 0), (3, 5, "train/a/2", 0), (3, 5, "train/a/1", 1)):
        assert not set(one) & set(np.concatenate(training_draws(16, *other)))


def test_paint_has_draws_of_its_own_so_that_crops_stay_where_they_were() -> None:
    chance = (3, 5, "train/a/1", 0)
    view = random_view(24, 32, training_draws(1, *chance)[1], AugmentConfig(), 0.5)
    found = painted(view, AugmentConfig(colour=0.4, erasing=1), *chance)
    assert (found.box, found.flip) == (view.box, view.flip) and found.colour and found.erasure
    draws = by_hand.uniforms(LOOK_DRAWS, "look", *chance)
    assert found.erasure.fill == tuple(int(256 * draw) for draw in draws[-3:])
    for other in ((4, 5, "train/a/1", 0), (3, 6, "train/a/1", 0), (3, 5, "train/a/2", 0), (3, 5, "train/a/1", 1)):
        assert painted(view, AugmentConfig(colour=0.4, erasing=1), *other).erasure != found.erasure
    assert found == painted(view, AugmentConfig(colour=0.4, erasing=1), *chance)


def drawn_views(height: int, width: int, config: AugmentConfig, hflip: float = 0.5) -> list[View]:
    return [random_view(height, width, training_draws(1, 0, epoch, "k")[1], config, hflip) for epoch in range(NUM_VIEWS)]


@pytest.mark.parametrize(
    ("height", "width", "largest", "narrowest"),
    [(320, 320, 1.0, 3 / 4), (240, 427, 320 / 427, 0.5 * 427 / 240)],  # in a wide frame 4:3 fills at most, half of the area is at least as wide
)
def test_crops_keep_to_the_asked_area_and_ratio_and_lie_inside_the_frame(height: int, width: int, largest: float, narrowest: float) -> None:
    views = drawn_views(height, width, AugmentConfig())
    boxes = np.array([(view.box.top, view.box.left, view.box.height, view.box.width) for view in views])
    top, left, tall, wide = boxes.T
    assert (boxes >= 0).all() and (top + tall <= height).all() and (left + wide <= width).all()
    drawn = (tall < height) | (wide < width)  # the others are the whole frame: no try fitted
    shares, ratios = (tall * wide / (height * width))[drawn], (wide / tall)[drawn]
    rounding = 1 / min(height, width)  # half a pixel on each side
    assert 0.5 - rounding < shares.min() < 0.52 and largest - 0.05 < shares.max() < largest + rounding
    assert narrowest * (1 - 2 * rounding) < ratios.min() < narrowest + 0.03 and 1.28 < ratios.max() < (4 / 3) * (1 + 2 * rounding)
    assert drawn.mean() > 0.8


def test_crops_of_one_size_fall_everywhere_equally_often_down_and_across() -> None:
    views = drawn_views(32, 32, AugmentConfig(crop_scale=(0.5625, 0.5625), crop_ratio=(1, 1)))
    assert {(view.box.height, view.box.width) for view in views} == {(24, 24)}
    top, left = np.array([(view.box.top, view.box.left) for view in views]).T
    for place in (top, left):
        assert np.abs(np.bincount(place, minlength=9) - NUM_VIEWS / 9).max() < 4.5 * np.sqrt(NUM_VIEWS / 9)
    assert abs(np.corrcoef(top, left)[0, 1]) < 4.5 / np.sqrt(NUM_VIEWS)


@pytest.mark.parametrize("hflip", [0.0, 0.2, 0.5, 1.0])
def test_as_many_clips_are_flipped_as_asked(hflip: float) -> None:
    flipped = sum(view.flip for view in drawn_views(32, 32, AugmentConfig(), hflip))
    assert abs(flipped - hflip * NUM_VIEWS) <= 4.5 * np.sqrt(NUM_VIEWS * hflip * (1 - hflip))


@often
@given(st.integers(8, 400), st.integers(8, 400), st.integers(0, 10**6), st.sampled_from([(0.5, 1.0), (0.08, 1.0), (0.25, 0.25), (1.0, 1.0)]))
def test_a_view_is_the_one_worked_out_by_hand(height: int, width: int, epoch: int, scale: tuple[float, float]) -> None:
    draws = training_draws(1, 0, epoch, "k")[1]
    found = random_view(height, width, draws, AugmentConfig(crop_scale=scale), 0.5)
    expected = by_hand.view(height, width, draws.tolist(), scale, (3 / 4, 4 / 3), 0.5)
    assert (found.box.top, found.box.left, found.box.height, found.box.width, found.flip) == expected


def test_a_crop_that_never_fits_becomes_the_whole_frame() -> None:
    draws = training_draws(1, 0, 0, "k")[1]
    found = random_view(20, 20, draws, AugmentConfig(crop_scale=(1, 1), crop_ratio=(2, 2)), 0.0)
    assert found == whole_view(20, 20) == View(Box(0, 0, 20, 20), False)


@pytest.mark.parametrize(
    ("asked", "classes", "expected"),
    [
        (None, ("nongesture", "gesture"), 0.5),
        (None, ("point_Left", "rest"), 0.0),
        (None, ("rest", "swipe-RIGHT"), 0.0),
        (0.3, ("point_left", "rest"), 0.3),
        (0.0, ("nongesture", "gesture"), 0.0),
    ],
)
def test_flips_are_off_where_a_class_says_left_or_right_unless_asked_for(asked: float | None, classes: tuple[str, ...], expected: float) -> None:
    assert hflip_chance(AugmentConfig(hflip=asked), classes) == expected


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (dict(crop_scale=(0.0, 1.0)), "--crop-scale"),
        (dict(crop_scale=(0.5, 1.1)), "--crop-scale"),
        (dict(crop_scale=(0.9, 0.5)), "--crop-scale"),
        (dict(crop_ratio=(0.0, 1.0)), "--crop-ratio"),
        (dict(crop_ratio=(2.0, 1.0)), "--crop-ratio"),
        (dict(hflip=1.5), "--hflip"),
        (dict(hflip=-0.1), "--hflip"),
    ],
)
def test_augmentation_out_of_range_is_an_error_that_names_the_flag(config: dict, flag: str) -> None:
    with pytest.raises(InputError, match=flag):
        AugmentConfig(**config)


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], View, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Points, view, and the (height, width) of the stored frame, of the source and of the result."""
    source = draw(st.integers(4, 60)), draw(st.integers(4, 60))
    stored = draw(st.just(source) | st.tuples(st.integers(2, source[0]), st.integers(2, source[1])))
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    top, left = draw(st.integers(0, stored[0] - 1)), draw(st.integers(0, stored[1] - 1))
    box = Box(top, left, draw(st.integers(1, stored[0] - top)), draw(st.integers(1, stored[1] - left)))
    point = st.tuples(st.integers(0, 1), st.integers(0, source[0] - 1), st.integers(0, source[1] - 1))
    return draw(st.lists(point, max_size=8)), View(box, draw(st.booleans())), stored, source, size


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves())
def test_points_are_drawn_where_the_pixel_that_covers_them_is(
    move: tuple[list[tuple[int, int, int]], View, tuple[int, int], tuple[int, int], tuple[int, int]],
) -> None:
    points, view, stored, source, size = move
    assert_drawn(points, view, stored, source, size)


@pytest.mark.parametrize(("source", "stored", "point"), [(180, 104, 22), (180, 104, 157), (100, 56, 12)])
def test_a_point_whose_centre_lies_just_on_an_edge_belongs_to_the_pixel_after_it(source: int, stored: int, point: int) -> None:
    """Sizes where (point + .5) * (stored / source) misses a whole number by one bit of a float."""
    edge = (2 * point + 1) * stored // (2 * source)
    for box in (Box(0, 0, edge, stored), Box(edge, 0, stored - edge, stored), Box(0, 0, stored, stored)):
        assert_drawn([(0, point, 0)], View(box, False), (stored, stored), (source, source), (box.height, box.width))


def assert_drawn(points: Sequence[tuple[int, int, int]], view: View, stored: tuple[int, int], source: tuple[int, int], size: tuple[int, int]) -> None:
    moved = move_points(np.array(points, np.int64).reshape(-1, 3), view, stored, source, size)
    assert moved.dtype == np.int64 and moved.shape[1] == 3
    drawn = np.zeros((2, *size), np.uint8)
    drawn[moved[:, 0], moved[:, 1], moved[:, 2]] = 1
    box = view.box
    np.testing.assert_array_equal(drawn, by_hand.mask(points, (box.top, box.left, box.height, box.width), view.flip, stored, source, (2, *size)))


def test_a_view_of_the_whole_frame_leaves_points_where_they_are_and_a_flip_mirrors_them() -> None:
    points = np.array([[0, 0, 0], [1, 4, 6], [2, 3, 1]], np.uint16)
    whole = whole_view(5, 7)
    assert move_points(points, whole, (5, 7), (5, 7), (5, 7)).tolist() == points.tolist()
    assert move_points(points, View(whole.box, True), (5, 7), (5, 7), (5, 7)).tolist() == [[0, 0, 6], [1, 4, 0], [2, 3, 5]]


def facts_of(counts: Sequence[int], prefix: str = "") -> list[ClipFacts]:
    """`counts[label]` clips of each class, sorted by key."""
    return [ClipFacts(f"train/{label}/{prefix}{number:04d}", label, "s", None, None, None, 8) for label, count in enumerate(counts) for number in range(count)]


class_counts = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@often
@given(class_counts, st.integers(1, 100))
def test_a_fraction_holds_its_share_of_each_class_rounded_up(counts: list[int], percent: int) -> None:
    facts = facts_of(counts)
    chosen = fraction(facts, percent / 100)
    assert chosen == sorted(set(chosen))
    for label, count in enumerate(counts):
        assert sum(facts[number].label == label for number in chosen) == -(-count * percent // 100)


def test_a_hundredth_more_is_not_rounded_up_to_one_clip_too_many() -> None:
    facts = facts_of([100])
    assert [len(fraction(facts, percent / 100)) for percent in range(1, 101)] == list(range(1, 101))


@often
@given(class_counts, st.floats(0.01, 1), st.floats(0.01, 1))
def test_fractions_are_nested(counts: list[int], one: float, other: float) -> None:
    facts = facts_of(counts)
    smaller, larger = sorted((one, other))
    assert set(fraction(facts, smaller)) <= set(fraction(facts, larger))


@often
@given(class_counts, class_counts, st.floats(0.01, 1))
def test_added_clips_never_bring_in_an_old_clip_before_one_that_was_chosen(counts: list[int], added: list[int], share: float) -> None:
    """The old clips of a larger data set's fraction are among those of the smaller one's, or all of those and more: they keep their order."""
    old, new = facts_of(counts), sorted(facts_of(counts) + facts_of(added, "x"), key=lambda fact: fact.key)
    before = {old[number].key for number in fraction(old, share)}
    after = {new[number].key for number in fraction(new, share)} & {fact.key for fact in old}
    for label in range(len(counts)):
        mine, theirs = ({key for key in keys if key.startswith(f"train/{label}/")} for keys in (before, after))
        assert mine <= theirs or theirs <= mine
        if label >= len(added):
            assert mine == theirs


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_a_fraction_outside_0_to_1_is_an_error(share: float) -> None:
    with pytest.raises(InputError, match="--fraction"):
        fraction(facts_of([3]), share)


def test_the_whole_is_every_clip() -> None:
    assert fraction(facts_of([5, 1]), 1.0) == list(range(6))


def test_dense_frames_are_a_window_anywhere_and_centre_ones_in_the_middle() -> None:
    draws = np.array([0.0, 0.9, 0.9])
    assert choose_frames("dense", 3, draws, 10).tolist() == [0, 1, 2]
    assert choose_frames("dense", 3, np.array([0.999, 0, 0]), 10).tolist() == [7, 8, 9]
    assert choose_frames("centre", 3, draws, 10).tolist() == choose_frames("dense", 3, None, 10).tolist() == [4, 5, 6]
    assert {int(choose_frames("dense", 3, np.array([draw]), 10)[0]) for draw in np.linspace(0, 0.999, 100)} == set(range(8))
    assert choose_frames("dense", 4, draws, 3).tolist() == choose_frames("uniform", 4, draws, 3).tolist() == [0, 1, 2, 2]
    assert choose_frames("uniform", 3, draws, 9).tolist() == frames_uniform(3, 9, draws).tolist()
