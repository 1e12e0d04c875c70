"""Crop, resize and flip on the device, against numpy; points that stay glued to their pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips.clip import ClipSpec
from convert.encode import stored_frames
from loaders.device import crop_resize_flip, lerp
from loaders.sample import Box, View, move_points, whole_view
from tests import by_hand

ROUNDED_ONCE, ROUNDED_TWICE = 0.501, 1.5  # of 255: the GPU's code in fp32, the CPU's rows and then columns in whole numbers
Resize = Callable[[torch.Tensor, Sequence[View], tuple[int, int]], torch.Tensor]
on_either = pytest.mark.parametrize("resized", [crop_resize_flip, lerp])  # the CPU's code and the GPU's, both on the CPU
often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape, np.uint8))


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int, at_least: int = 1) -> Box:
    tall, wide = draw(st.integers(at_least, height)), draw(st.integers(at_least, width))
    return Box(draw(st.integers(0, height - tall)), draw(st.integers(0, width - wide)), tall, wide)


def cut(video: np.ndarray, view: View) -> np.ndarray:
    box = view.box
    return video[:, box.top : box.top + box.height, box.left : box.left + box.width]


def farthest(found: torch.Tensor, video: torch.Tensor, views: Sequence[View], size: tuple[int, int]) -> float:
    """The largest difference between `found` and the clips cut, resized by numpy and mirrored, not rounded."""
    done = [by_hand.bilinear(cut(clip, view), size) for clip, view in zip(video.numpy(), views, strict=True)]
    expected = np.stack([clip[:, :, ::-1] if view.flip else clip for clip, view in zip(done, views, strict=True)])
    return float(np.abs(found.numpy() - expected).max())


@often
@given(st.integers(2, 48), st.integers(2, 48), st.integers(1, 40), st.integers(1, 40), st.data())
def test_each_clip_is_cut_resized_and_flipped_as_numpy_does_it(height: int, width: int, tall: int, wide: int, data: st.DataObject) -> None:
    views = [View(data.draw(boxes(height, width)), data.draw(st.booleans())) for _ in range(2)]
    video = noise(2, 2, height, width, 3)
    found = crop_resize_flip(video, views, (tall, wide))
    assert found.shape == (2, 2, tall, wide, 3) and found.dtype == torch.uint8 and found.is_contiguous()
    assert farthest(found, video, views, (tall, wide)) < ROUNDED_TWICE


@often
@given(st.integers(2, 48), st.integers(2, 48), st.integers(1, 40), st.integers(1, 40), st.data())
def test_what_a_gpu_does_is_within_one_of_numpy_and_of_the_cpu(height: int, width: int, tall: int, wide: int, data: st.DataObject) -> None:
    views = [View(data.draw(boxes(height, width)), data.draw(st.booleans())) for _ in range(2)]
    video = noise(2, 2, height, width, 3)
    found = lerp(video, views, (tall, wide))
    assert found.shape == (2, 2, tall, wide, 3) and found.dtype == torch.uint8 and found.is_contiguous()
    assert farthest(found, video, views, (tall, wide)) <= ROUNDED_ONCE
    assert (found.int() - crop_resize_flip(video, views, (tall, wide)).int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(224, 224), (112, 160), (320, 320), (336, 336)])
def test_a_frame_of_the_real_size_is_resized_as_numpy_does_it(size: tuple[int, int]) -> None:
    video = noise(1, 1, 320, 320, 3)
    for view in (whole_view(320, 320), View(Box(17, 31, 251, 289), True)):
        assert farthest(crop_resize_flip(video, [view], size), video, [view], size) < ROUNDED_TWICE
        assert farthest(lerp(video, [view], size), video, [view], size) <= ROUNDED_ONCE


@on_either
def test_a_whole_view_of_the_same_size_changes_nothing_and_is_a_copy(resized: Resize) -> None:
    video = noise(2, 3, 20, 24, 3)
    before = video.clone()
    found = resized(video, [whole_view(20, 24)] * 2, (20, 24))
    video.zero_()
    assert torch.equal(found, before)
    assert found.untyped_storage().data_ptr() != video.untyped_storage().data_ptr()


@on_either
@often
@given(box=boxes(20, 24), flip=st.booleans())
def test_a_crop_of_the_very_size_is_cut_out_exactly(resized: Resize, box: Box, flip: bool) -> None:
    video = noise(1, 2, 20, 24, 3)
    found = resized(video, [View(box, flip)], (box.height, box.width)).numpy()[0]
    expected = cut(video.numpy()[0], View(box, flip))
    np.testing.assert_array_equal(found, expected[:, :, ::-1] if flip else expected)


@on_either
def test_a_flip_mirrors_what_is_seen_without_it(resized: Resize) -> None:
    video, box = noise(1, 2, 20, 24, 3), Box(3, 2, 11, 17)
    plain, flipped = (resized(video, [View(box, flip)], (9, 13)) for flip in (False, True))
    assert torch.equal(plain.flip(3), flipped) and not torch.equal(plain, flipped)


@on_either
@pytest.mark.parametrize("size", [(5, 5), (11, 17), (40, 50)])
def test_nothing_outside_the_crop_shines_in(resized: Resize, size: tuple[int, int]) -> None:
    video = torch.full((1, 1, 20, 24, 3), 255, dtype=torch.uint8)
    box = Box(4, 5, 11, 17)
    video[:, :, box.top : box.top + box.height, box.left : box.left + box.width] = 0
    assert resized(video, [View(box, True)], size).max() == 0


@often
@given(st.integers(8, 30), st.integers(8, 30), st.booleans(), st.data())
def test_a_keypoint_stays_on_its_pixel(height: int, width: int, flip: bool, data: st.DataObject) -> None:
    """The only bright pixel is the keypoint; frames are made smaller by half at most, so that it is never skipped."""
    point = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    box = data.draw(boxes(height, width, at_least=4))
    size = (data.draw(st.integers(-(-box.height // 2), 50)), data.draw(st.integers(-(-box.width // 2), 50)))
    video = torch.zeros(1, 1, height, width, 3, dtype=torch.uint8)
    video[0, 0, point[0], point[1]] = 255
    assert_glued(video, point, View(box, flip), (height, width), size)


@often
@given(st.integers(20, 30), st.integers(20, 30), st.booleans(), st.data())
def test_a_keypoint_stays_on_its_pixel_in_frames_stored_smaller(height: int, width: int, flip: bool, data: st.DataObject) -> None:
    point = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    stored = ClipSpec(1, data.draw(st.integers(12, height - 1)), data.draw(st.integers(12, width - 1)))
    box = data.draw(boxes(stored.height, stored.width, at_least=8))
    size = (data.draw(st.integers(-(-box.height // 2), box.height)), data.draw(st.integers(-(-box.width // 2), box.width)))
    frame = np.zeros((1, height, width, 3), np.uint8)
    frame[0, point[0], point[1]] = 255
    assert_glued(torch.from_numpy(stored_frames(frame, stored))[None], point, View(box, flip), (height, width), size)


def assert_glued(video: torch.Tensor, point: tuple[int, int], view: View, source: tuple[int, int], size: tuple[int, int]) -> None:
    """The moved point lies within a pixel of the brightest one, where the crop holds it."""
    stored = (video.shape[2], video.shape[3])
    moved = move_points(np.array([[0, *point]]), view, stored, source, size)
    inside = all(
        begin * theirs <= (place + 0.5) * mine < (begin + length) * theirs
        for place, mine, theirs, begin, length in zip(point, stored, source, (view.box.top, view.box.left), (view.box.height, view.box.width), strict=True)
    )
    assert len(moved) == inside
    if inside:
        frame = crop_resize_flip(video, [view], size).numpy()[0, 0, :, :, 0]
        rows, columns = np.nonzero(frame == frame.max())
        assert frame.max() > 0
        assert np.maximum(np.abs(rows - moved[0, 1]), np.abs(columns - moved[0, 2])).min() <= 1


@pytest.mark.gpu
def test_a_gpu_gives_the_pixels_of_the_cpu() -> None:
    video = noise(3, 4, 320, 320, 3)
    views = [whole_view(320, 320), View(Box(17, 31, 251, 289), True), View(Box(0, 0, 224, 224), False)]
    on_gpu = crop_resize_flip(video.cuda(), views, (224, 224))
    assert on_gpu.is_cuda and on_gpu.is_contiguous() and on_gpu.dtype == torch.uint8
    assert (on_gpu.cpu().int() - crop_resize_flip(video, views, (224, 224)).int()).abs().max() <= 1
