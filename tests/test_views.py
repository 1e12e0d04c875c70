"""Views of evaluation against whole-number arithmetic and the published test recipe."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clips.clip import ClipSpec
from clips.errors import InputError
from loaders.plan import Plan
from loaders.sample import Box, frames_uniform, whole_view
from loaders.source import open_source
from loaders.stream import Loader
from loaders.views import Views, all_views, parse_views, spatial_boxes, temporal_offsets
from tests.making import write_home


@given(st.integers(1, 99), st.integers(1, 64), st.integers(1, 400))
def test_a_views_frame_is_the_exact_floor_of_its_place_in_the_segment(num_views: int, num_frames: int, frames_valid: int) -> None:
    borders = [segment * frames_valid // num_frames for segment in range(num_frames + 1)]
    for view in {0, num_views // 2, num_views - 1}:
        found = frames_uniform(num_frames, frames_valid, temporal_offsets(num_frames, view, num_views))
        if num_frames <= frames_valid:
            place = (Fraction(1, 2) + Fraction(view, num_views)) % 1
            expected = [begin + int(place * (end - begin)) for begin, end in pairwise(borders)]
            assert found.tolist() == expected
        else:
            assert found.tolist() == frames_uniform(num_frames, frames_valid, None).tolist()


@given(st.integers(1, 20), st.integers(1, 64), st.integers(1, 400))
def test_the_first_view_is_the_middle_that_evaluation_takes(num_views: int, num_frames: int, frames_valid: int) -> None:
    first = frames_uniform(num_frames, frames_valid, temporal_offsets(num_frames, 0, num_views))
    np.testing.assert_array_equal(first, frames_uniform(num_frames, frames_valid, None))


def test_two_views_take_the_middles_and_the_begins_of_the_segments() -> None:
    # VideoMAE's ssv2.py tests with int(tick / 2 + tick x) and int(tick x); 48 frames are 16 ticks of 3
    middles, begins = (frames_uniform(16, 48, temporal_offsets(16, view, 2)) for view in range(2))
    assert middles.tolist() == [int(1.5 + 3 * x) for x in range(16)]
    assert begins.tolist() == [3 * x for x in range(16)]


@given(st.integers(1, 12))
def test_as_many_views_as_a_segment_has_frames_take_each_frame_once(length: int) -> None:
    found = np.concatenate([frames_uniform(4, 4 * length, temporal_offsets(4, view, length)) for view in range(length)])
    assert sorted(found.tolist()) == list(range(4 * length))


def test_a_place_on_the_border_of_two_frames_takes_the_second() -> None:
    assert int(0.7 * 90) == 62  # in floats the product is just below
    assert frames_uniform(1, 90, temporal_offsets(1, 1, 5)).tolist() == [63]  # of five views the second lies at 7/10


def test_a_view_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="view 2 of 2"):
        temporal_offsets(4, 2, 2)


def test_three_crops_of_a_square_frame_lie_left_in_the_middle_and_right() -> None:
    assert spatial_boxes(320, 320, 3) == [Box(0, 0, 320, 288), Box(0, 16, 320, 288), Box(0, 32, 320, 288)]


def test_crops_lie_along_the_longer_side_and_one_is_the_whole_frame() -> None:
    assert spatial_boxes(400, 300, 3) == [Box(0, 0, 360, 300), Box(20, 0, 360, 300), Box(40, 0, 360, 300)]
    assert spatial_boxes(400, 300, 1) == [Box(0, 0, 400, 300)]
    assert spatial_boxes(300, 400, 2) == [Box(0, 0, 300, 360), Box(0, 40, 300, 360)]


@given(st.integers(1, 700), st.integers(1, 700), st.integers(2, 9))
def test_crops_keep_nine_tenths_stay_inside_cover_the_frame_and_mirror_each_other(height: int, width: int, count: int) -> None:
    boxes = spatial_boxes(height, width, count)
    assert len(boxes) == count
    covered = np.zeros((height, width), bool)
    for box in boxes:
        assert box.top >= 0 and box.left >= 0 and box.top + box.height <= height and box.left + box.width <= width
        assert 10 * box.height * box.width >= 9 * height * width
        covered[box.top : box.top + box.height, box.left : box.left + box.width] = True
    assert covered.all()
    ends = [(height - box.top - box.height) + (width - box.left - box.width) for box in reversed(boxes)]
    assert all(abs(end - (box.top + box.left)) <= 1 for end, box in zip(ends, boxes, strict=True))  # halves are rounded one way


def test_all_views_begin_with_the_middle_and_one_view_is_evaluation_as_ever() -> None:
    (draws, view), *others = all_views(Views(), 16, 320, 320)
    assert draws is None and view == whole_view(320, 320) and not others
    found = all_views(Views(2, 3), 16, 320, 320)
    assert len(found) == Views(2, 3).count == 6
    assert [draws is None for draws, _ in found] == [True, True, True, False, False, False]
    assert [view.box for _, view in found] == spatial_boxes(320, 320, 3) * 2
    assert not any(view.flip for _, view in found)
    second = found[3][0]
    assert second is not None and frames_uniform(16, 48, second).tolist() == [3 * x for x in range(16)]


def test_a_loader_gives_each_batch_once_in_each_view(tmp_path: Path) -> None:
    home = write_home(tmp_path, {"test": {"gesture": 3, "nongesture": 2}}, frames=16, height=40, width=40)
    source = open_source(home, "test")
    loader = Loader(source, Plan(5, 2, 2, seed=0), ClipSpec(4, 40, 36), torch.device("cpu"), 1)
    batches = [(batch.number, batch.video.numpy().copy()) for batch in loader.evaluation(Views(2, 3))]
    plain = [(batch.number, batch.video.numpy().copy()) for batch in loader.evaluation()]
    loader.close()
    assert [list(numbers) for numbers, _ in batches] == [[0, 1]] * 6 + [[2, 3]] * 6 + [[4]] * 6
    assert [list(numbers) for numbers, _ in plain] == [[0, 1], [2, 3], [4]]
    for place, (numbers, video) in enumerate(batches):
        frames = [[2, 6, 10, 14], [0, 4, 8, 12]][place % 6 // 3]
        left = [0, 2, 4][place % 3]
        for number, clip in zip(numbers, video, strict=True):
            whole = np.load(home / f"{source.facts[number].key}.npz")["video"]
            np.testing.assert_array_equal(clip, whole[frames, :, left : left + 36])  # 36 of 40 columns need no resizing


def test_views_are_spelled_times_and_anything_else_is_one_line() -> None:
    assert parse_views("2x3") == Views(2, 3) and str(parse_views("12x1")) == "12x1"
    for text in ("", "2", "2x", "0x3", "2x0", "2x3x1", "-1x3", "2×3", "axb", "100x1"):
        with pytest.raises(InputError, match=r"--views .*such as 1x1 or 2x3"):
            parse_views(text)
