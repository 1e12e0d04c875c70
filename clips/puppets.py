"""A puppet that moves its hands before a blurred room: pictures for tests and demos, whose classes differ in motion alone.

Both hands travel along one and the same path in every class; a class is how fast each hand travels along it, and where a
hand starts on its path is uniform. So every single frame, and every single picture of joints, has the same distribution
in all classes: what one frame tells about the class, its reader has made up. No class depends on left against right.

Every number comes from a hash of what it stands for and every pixel from + − × ÷ √ and a table of sines, because neither
numpy's generators nor its sines promise the same bits everywhere. x and y are shares of the frame's width and height.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .clip import ClipSpec

Point = tuple[float, float]  # x, y
Colour = tuple[float, float, float]  # red, green, blue, 0 … 255

SINES = tuple(round(1024 * math.sin(2 * math.pi * i / 4096)) / 1024 for i in range(4096))
UPPER_ARM, FOREARM = 0.14, 0.16
# Nose, neck, hips, eyes and ears of a puppet of scale 1: x from its axis, y from the top.
STILL_JOINTS = ((0, 0.29), (0, 0.40), (0, 0.86), (-0.08, 0.86), (0.08, 0.86), (-0.025, 0.265), (0.025, 0.265), (-0.06, 0.275), (0.06, 0.275))


@dataclass(frozen=True)
class Take:
    """One clip to play: its source has the room and the clothes, the take the place, the path and where the hands start."""

    seed: int
    source: str
    window: int
    label: int
    frames_valid: int

    def unit(self, *what: object) -> float:
        return unit(self.seed, self.source, self.window, *what)


def perform(take: Take, num_classes: int, spec: ClipSpec) -> tuple[np.ndarray, np.ndarray]:
    """Video uint8 (T, H, W, 3) RGB and keypoints 0/1 uint8 (T, H, W) of one take; from `frames_valid` on all is zero."""
    margin_px = max(1, min(spec.height, spec.width) // 50)
    scene = room((take.seed, take.source), spec.height + 2 * margin_px, spec.width + 2 * margin_px)
    puppets = cast_puppets(take, hand_speeds(num_classes)[take.label])
    for puppet in puppets:
        puppet.paint_body(Canvas(scene, spec, margin_px, margin_px))
    video, keypoints = np.zeros(spec.video_shape, np.uint8), np.zeros(spec.mask_shape, np.uint8)
    for t in range(take.frames_valid):
        now = t / spec.frames
        left_px, top_px = (margin_px + round(margin_px * wave(take.unit("camera", axis) + 0.3 * now)) for axis in "xy")
        video[t] = scene[top_px : top_px + spec.height, left_px : left_px + spec.width]
        canvas = Canvas(video[t], spec, margin_px - left_px, margin_px - top_px)
        for puppet in puppets:
            puppet.paint_arms(canvas, now)
            for x, y in map(canvas.pixel, puppet.joints(now)):
                if 0 <= x < spec.width and 0 <= y < spec.height:
                    keypoints[t, int(y), int(x)] = 1
    return video, keypoints


def hand_speeds(num_classes: int) -> list[tuple[float, float]]:
    """For each class the cycles a clip of its two hands, in any order: still, both move, then one of them; then other speeds.

    At most six cycles a clip, so that sixteen frames of it still show which way a hand goes.
    """
    num_speeds = next(n for n in itertools.count(1) if n * (n + 1) // 2 >= num_classes)
    fastest = min(6.0, 2.5 * (num_speeds - 1))
    speeds = [fastest * i / max(1, num_speeds - 1) for i in range(num_speeds)]
    pairs = [(speed, speed) for speed in speeds] + list(itertools.combinations(speeds, 2))
    return pairs[:num_classes]


def cast_puppets(take: Take, speeds: tuple[float, float]) -> list[Puppet]:
    """Who is on stage, back to front: in a third of the sources somebody at the edge who sits still, and the one who acts."""
    clothes = (take.seed, take.source)
    puppets = []
    if unit(*clothes, "bystander") < 0.3:
        place = 0.10 if take.unit("edge") < 0.5 else 0.90
        puppets.append(Puppet(place, 0.6, unit(*clothes, "second shirt"), 1.0, (take.unit("b0"), take.unit("b1")), (0.0, 0.0)))
    starts = (take.unit("left hand"), take.unit("right hand"))
    swapped = speeds if take.unit("swap") < 0.5 else speeds[::-1]
    pace = tuple(speed * (0.85 + 0.3 * take.unit("pace", i)) + 0.12 * take.unit("drift", i) for i, speed in enumerate(swapped))
    acting = Puppet(0.42 + 0.16 * take.unit("place"), 0.85 + 0.25 * take.unit("scale"), unit(*clothes, "shirt"), 0.7 + 0.5 * take.unit("reach"), starts, pace)
    return [*puppets, acting]


@dataclass(frozen=True)
class Puppet:
    """A sitting figure: x of its axis, size, what it wears, how far its hands go, and where and how fast they are on their path."""

    place: float
    scale: float
    shirt: float  # 0 … 1: dark on light below a half, light on dark above
    reach: float
    starts: tuple[float, ...]  # left and right hand, in turns
    speeds: tuple[float, ...]  # left and right hand, in turns a clip

    def at(self, x: float, y: float) -> Point:
        return self.place + self.scale * x, 0.6 + self.scale * (y - 0.6)

    def arm(self, hand: int, now: float) -> tuple[Point, Point, Point]:
        """Shoulder, elbow and wrist at `now`, which is 0 … 1 over the clip."""
        side = 2 * hand - 1
        turn = self.starts[hand] + self.speeds[hand] * now
        upper = 0.08 + 0.06 * self.reach * wave(turn)  # from straight down, outwards, in turns
        fore = 0.30 + 0.14 * self.reach * wave(turn + 0.1)
        x, y = 0.12 * side, 0.43
        elbow = x + UPPER_ARM * side * wave(upper), y + UPPER_ARM * wave(upper + 0.25)
        wrist = elbow[0] + FOREARM * side * wave(fore), elbow[1] + FOREARM * wave(fore + 0.25)
        return self.at(x, y), self.at(*elbow), self.at(*wrist)

    def joints(self, now: float) -> list[Point]:
        """The fifteen joints that a sitting person shows."""
        return [*self.arm(0, now), *self.arm(1, now), *(self.at(x, y) for x, y in STILL_JOINTS)]

    def colours(self) -> tuple[Colour, Colour, Colour]:
        """Skin, shirt and sleeve; the sleeve stands out from the shirt and from the room, which is neither dark nor light."""
        light = 60 * self.shirt
        skin = (170.0 + light, 120.0 + light, 95.0 + light)
        if self.shirt < 0.5:
            return skin, (60.0 + light, 70.0, 110.0), (15.0, 20.0 + light, 25.0)
        return skin, (150.0, 100.0 + light, 120.0), (235.0, 235.0, 180.0 + light)

    def paint_body(self, canvas: Canvas) -> None:
        skin, shirt, _ = self.colours()
        canvas.limb(self.at(0, 0.56), self.at(0, 1.0), 0.11 * self.scale, shirt)
        canvas.limb(self.at(-0.09, 0.46), self.at(0.09, 0.46), 0.05 * self.scale, shirt)
        canvas.limb(self.at(0, 0.34), self.at(0, 0.40), 0.035 * self.scale, skin)
        canvas.limb(self.at(0, 0.26), self.at(0, 0.30), 0.065 * self.scale, skin)

    def paint_arms(self, canvas: Canvas, now: float) -> None:
        skin, _, sleeve = self.colours()
        for hand in (0, 1):
            shoulder, elbow, wrist = self.arm(hand, now)
            canvas.limb(shoulder, elbow, 0.033 * self.scale, sleeve)
            canvas.limb(elbow, wrist, 0.027 * self.scale, sleeve)
            canvas.limb(wrist, wrist, 0.040 * self.scale, skin)


@dataclass(frozen=True)
class Canvas:
    """A picture uint8 (h, w, 3) that shows the frame moved by some pixels: the camera sways."""

    picture: np.ndarray
    spec: ClipSpec
    left_px: int
    top_px: int

    def pixel(self, point: Point) -> Point:
        """Column and row, whole numbers in the middle of a pixel."""
        return math.floor(point[0] * self.spec.width) + self.left_px, math.floor(point[1] * self.spec.height) + self.top_px

    def limb(self, start: Point, end: Point, radius: float, colour: Colour) -> None:
        """A thick line with round ends and a soft edge; what lies outside the picture is cut off."""
        (x0, y0), (x1, y1) = self.pixel(start), self.pixel(end)
        radius_px = radius * min(self.spec.height, self.spec.width)
        rows = _span(y0, y1, radius_px, self.picture.shape[0])
        columns = _span(x0, x1, radius_px, self.picture.shape[1])
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(y0)
        x = np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(x0)
        dx, dy = x1 - x0, y1 - y0
        along = np.clip((x * dx + y * dy) / max(1.0, dx * dx + dy * dy), 0, 1)
        x, y = x - along * dx, y - along * dy
        cover = np.clip(radius_px + 0.5 - np.sqrt(x * x + y * y), 0, 1)[..., None]
        patch = self.picture[rows, columns]
        patch[:] = patch + cover * (np.asarray(colour, np.float32) - patch)


def _span(a: float, b: float, radius_px: float, size: int) -> slice:
    low, high = math.floor(min(a, b) - radius_px - 1), math.ceil(max(a, b) + radius_px + 2)
    return slice(min(size, max(0, low)), max(0, min(size, high)))


def room(source: tuple[object, ...], height: int, width: int) -> np.ndarray:
    """A blurred background uint8 (height, width, 3) with a fine grain, different for each source."""
    picture = np.zeros((height, width, 3), np.float32) + np.float32(125)
    for cells, contrast in ((3, 90), (8, 45), (24, 14)):
        picture += (blurred(noise((*source, "room", cells), (cells + 1, cells + 1, 3)), height, width) - np.float32(0.5)) * np.float32(contrast)
    grain = noise((*source, "grain"), (height, width, 1)) * np.float32(4)
    return (picture + grain).astype(np.uint8)


def blurred(lattice: np.ndarray, height: int, width: int) -> np.ndarray:
    """The lattice (n, n, 3) stretched to (height, width, 3), straight lines between its values."""
    for axis, size in ((0, height), (1, width)):
        place = np.arange(size, dtype=np.float32) * np.float32((lattice.shape[axis] - 1) / size)
        before = place.astype(np.int64)
        weight = (place - before).astype(np.float32).reshape(-1, *[1] * (2 - axis))
        lattice = lattice.take(before, axis) * (1 - weight) + lattice.take(before + 1, axis) * weight
    return lattice


def wave(turn: float) -> float:
    """The sine of that many turns, to a thousandth: the same everywhere."""
    return SINES[math.floor(turn * 4096) % 4096]


def unit(*what: object) -> float:
    """A number in [0, 1) that belongs to what it stands for."""
    return _bits(what) / 2**64


def noise(what: Sequence[object], shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [0, 1) of that shape: splitmix64 counted up from the hash of `what`."""
    z = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(_bits(tuple(what)))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)).reshape(shape)


def _bits(what: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little")
