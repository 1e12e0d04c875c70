"""Which frames, which crop, which flip: pure functions of (seed, epoch, key, repeat), the same for every loader and rank."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np

from clips.errors import InputError
from clips.mix import uniforms

from .colour import LOOK_DRAWS, Colour, Erasure, random_colour, random_erasure

CROP_TRIES = 10
DRAWS = 1 + 4 * CROP_TRIES  # one for the flip, then four a try: area, shape, place down and across


@dataclass(frozen=True)
class AugmentConfig:
    """Chance in training; evaluation uses the whole frame and the middle of each segment."""

    crop_scale: tuple[float, float] = (0.5, 1.0)
    """The crop's share of the frame's area. Below .5 crops cut off the joints: with .08 a third of them lose over half."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The crop's width over its height."""
    hflip: float | None = None
    """Chance of a left-right flip; default: 0.5, or 0 where a class name says left or right."""
    colour: float = 0.0
    """Brightness, contrast and saturation of a clip times up to 1 ± this, hue turned by up to a quarter of it; 0 is none, 0.4 is common."""
    strength: float = 0.0
    """RandAugment's strength, 0 (none) to 10: two changes of brightness, contrast, saturation, hue, solarize and posterize for each clip."""
    erasing: float = 0.0
    """Chance that a box of a clip, the same in all its frames, is painted over, and the joints in it with it."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"--crop-scale {low} {high}: expected 0 < low <= high <= 1.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise InputError(f"--crop-ratio {self.crop_ratio[0]} {self.crop_ratio[1]}: expected 0 < low <= high.")
        if self.hflip is not None and not 0 <= self.hflip <= 1:
            raise InputError(f"--hflip {self.hflip}: expected 0 … 1.")
        if not 0 <= self.colour <= 1:
            raise InputError(f"--colour {self.colour}: expected 0 (none) to 1.")
        if not 0 <= self.strength <= 10:
            raise InputError(f"--strength {self.strength}: expected 0 (none) to 10.")
        if not 0 <= self.erasing <= 1:
            raise InputError(f"--erasing {self.erasing}: expected 0 … 1.")


@dataclass(frozen=True)
class Box:
    """A crop in pixels of the stored frame."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class View:
    """What is taken from a clip and how it is painted, in this order: the same for all its frames, and for the keypoints as far as these have pixels."""

    box: Box
    flip: bool
    colour: Colour | None = None
    erasure: Erasure | None = None


def frames_uniform(num_frames: int, frames_valid: int, draws: np.ndarray | None) -> np.ndarray:
    """int64 (num_frames,), not descending: one frame of each of `num_frames` equal segments of the valid frames.

    With `draws` in [0, 1) (num_frames,) a random one, without the middle one: TSN's sampling (Wang et al. 2016), as in
    VideoMAE's and TimeSformer's Something-Something recipes. Where there are fewer valid frames than asked, a segment is
    shorter than a frame and takes the one that it ends in: each comes equally often or once more, those with one more are
    spread evenly, and the last is among them. So 39 frames become 40 by repeating the last.
    """
    if num_frames > frames_valid:
        return (np.arange(1, num_frames + 1) * frames_valid - 1) // num_frames
    borders = np.arange(num_frames + 1) * frames_valid // num_frames
    begin, length = borders[:-1], np.diff(borders)
    inside = length // 2 if draws is None else np.floor(draws * length).astype(np.int64)
    return begin + inside


def frames_consecutive(num_frames: int, frames_valid: int, place: float) -> np.ndarray:
    """int64 (num_frames,): frames one after another, `place` in [0, 1) of the way from the first possible window to the last."""
    if num_frames >= frames_valid:
        return frames_uniform(num_frames, frames_valid, None)
    return int(place * (frames_valid - num_frames + 1)) + np.arange(num_frames)


def choose_frames(sampling: str, num_frames: int, draws: np.ndarray | None, frames_valid: int) -> np.ndarray:
    """int64 (num_frames,): uniform, or one window, dense at the place of the first draw, centre in the middle; without draws all are in the middle."""
    if sampling == "uniform":
        return frames_uniform(num_frames, frames_valid, draws)
    return frames_consecutive(num_frames, frames_valid, float(draws[0]) if sampling == "dense" and draws is not None else 0.5)


def training_draws(num_frames: int, seed: int, epoch: int, key: str, repeat: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The clip's own chance: draws for frames (num_frames,) and for the view (DRAWS,)."""
    return uniforms(num_frames, "frames", seed, epoch, key, repeat), uniforms(DRAWS, "view", seed, epoch, key, repeat)


def random_view(height: int, width: int, draws: np.ndarray, config: AugmentConfig, hflip: float) -> View:
    """A random resized crop (area and aspect ratio drawn, as in Szegedy et al. 2015) and a flip with chance `hflip`."""
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    flip = bool(draws[0] < hflip)
    for area_draw, ratio_draw, down, across in draws[1:].reshape(CROP_TRIES, 4):
        area = height * width * (config.crop_scale[0] + area_draw * (config.crop_scale[1] - config.crop_scale[0]))
        ratio = math.exp(low + ratio_draw * (high - low))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            box = Box(int(down * (height - crop_height + 1)), int(across * (width - crop_width + 1)), crop_height, crop_width)
            return View(box, flip)
    return View(Box(0, 0, height, width), flip)


def painted(view: View, config: AugmentConfig, seed: int, epoch: int, key: str, repeat: int = 0) -> View:
    """The view with the clip's own chance of colours and of an erased box; the same one where there are none."""
    if not (config.colour or config.strength or config.erasing):
        return view
    draws = uniforms(LOOK_DRAWS, "look", seed, epoch, key, repeat)
    return replace(view, colour=random_colour(draws, config.colour, config.strength), erasure=random_erasure(draws, config.erasing))


def whole_view(height: int, width: int) -> View:
    """The whole frame: a centre crop of 224 of 320 keeps 71 % of the joints and cuts hands off."""
    return View(Box(0, 0, height, width), False)


def move_points(points: np.ndarray, view: View, stored: tuple[int, int], source: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """int64 (M, 3) of t, y, x after crop, resize, flip and erasure: the pixel that each point's centre falls into; those outside or erased are dropped.

    `points` (N, 3) are in `source` (height, width) coordinates, the view's box in `stored` ones, the result in `size` ones.
    In whole numbers of 1 / (2 source) stored pixels: with floats a centre on an edge fell to either side.
    """
    points = points.astype(np.int64)
    y = (2 * points[:, 1] + 1) * stored[0] - 2 * source[0] * view.box.top
    x = (2 * points[:, 2] + 1) * stored[1] - 2 * source[1] * view.box.left
    height, width = 2 * source[0] * view.box.height, 2 * source[1] * view.box.width
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    rows, columns = y[inside] * size[0] // height, x[inside] * size[1] // width
    columns = size[1] - 1 - columns if view.flip else columns
    moved = np.stack([points[inside, 0], rows, columns], axis=1)
    if view.erasure is None:
        return moved
    down, across = view.erasure.of(*size)
    erased = (rows >= down.start) & (rows < down.stop) & (columns >= across.start) & (columns < across.stop)
    return moved[~erased]


def hflip_chance(config: AugmentConfig, class_names: tuple[str, ...]) -> float:
    """As asked; by default 0.5, or 0 where mirroring would change a class."""
    if config.hflip is not None:
        return config.hflip
    sided = re.compile(r"(?:^|[^a-z])(left|right)(?:[^a-z]|$)", re.IGNORECASE)  # "wave_left", but not "upright"
    return 0.0 if any(sided.search(name) for name in class_names) else 0.5
