"""A puppet that moves its hands before a blurred room: pictures for tests and demos, whose classes differ in motion alone.

Both hands travel up and down one and the same path in every class; a class is when they do so, and where on the path they
start is uniform. So every single frame, and every single picture of joints, has the same distribution in all classes: what
one frame tells about the class, its reader has made up. No class depends on left against right.

Every number comes from a hash of what it stands for and every pixel from + − × ÷ √ and a table of sines, because neither
numpy's generators nor its sines promise the same bits everywhere. x and y are shares of the frame's width and height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .clip import ClipSpec
from .mix import hash64, uniforms

Point = tuple[float, float]  # x, y
Colour = tuple[float, float, float]  # red, green, blue, 0 … 255

SINES = tuple(round(1024 * math.sin(2 * math.pi * i / 4096)) / 1024 for i in range(4096))
UPPER_ARM, FOREARM = 0.14, 0.16
CYCLES = 5.0  # a hand's mean turns in a clip of all motion
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

    def unit(self, *what: int | str) -> float:
        return unit(self.seed, self.source, self.window, *what)


def perform(take: Take, num_classes: int, spec: ClipSpec) -> tuple[np.ndarray, np.ndarray]:
    """Video uint8 (T, H, W, 3) RGB and keypoints 0/1 uint8 (T, H, W) of one take; from `frames_valid` on all is zero."""
    margin_px = max(1, min(spec.height, spec.width) // 50)
    scene = room(take.seed, take.source, spec.height + 2 * margin_px, spec.width + 2 * margin_px)
    puppets = cast_puppets(take, num_classes)
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


def restless_parts(label: int, num_classes: int) -> tuple[bool, ...]:
    """In which parts of the clip the hands of a class move: never, always, then only in some of its halves, quarters …"""
    num_parts = max(1, (num_classes - 1).bit_length())
    masks = [0, 2**num_parts - 1, *range(1, 2**num_parts - 1)]
    return tuple(bool(masks[label] >> part & 1) for part in range(num_parts))


def cast_puppets(take: Take, num_classes: int) -> list[Puppet]:
    """Who is on stage, back to front: in a third of the sources somebody at the edge who sits still, and the one who acts."""
    clothes = (take.seed, take.source)
    puppets = []
    if unit(*clothes, "bystander") < 0.3:
        place = 0.08 if take.unit("edge") < 0.5 else 0.92
        puppets.append(Puppet(place, 0.5, unit(*clothes, "second shirt"), 1.0, take.unit("second start"), 0.0, (False,)))
    acting = Puppet(
        place=0.42 + 0.16 * take.unit("place"),
        scale=0.85 + 0.25 * take.unit("scale"),
        shirt=unit(*clothes, "shirt"),
        reach=0.8 + 0.3 * take.unit("reach"),
        start=take.unit("start"),
        speed=CYCLES * (0.85 + 0.3 * take.unit("speed")),
        restless=restless_parts(take.label, num_classes),
    )
    return [*puppets, acting]


@dataclass(frozen=True)
class Puppet:
    """A sitting figure: x of its axis, size, what it wears, how far its hands go, and where and how fast they are on their path."""

    place: float
    scale: float
    shirt: float  # 0 … 1: what it wears
    reach: float
    start: float  # where on their path the hands start, in turns: uniform
    speed: float  # turns a clip
    restless: tuple[bool, ...]  # equal parts of the clip, and whether the hands move in each

    def at(self, x: float, y: float) -> Point:
        return self.place + self.scale * x, 0.6 + self.scale * (y - 0.6)

    def turn(self, now: float) -> float:
        """Where on their path the hands are at `now`, which is 0 … 1 over the clip."""
        share = 1 / len(self.restless)
        return self.start + self.speed * sum(min(share, max(0.0, now - part * share)) for part, moving in enumerate(self.restless) if moving)

    def arm(self, side: int, now: float) -> tuple[Point, Point, Point]:
        """Shoulder, elbow and wrist; side is -1 or 1."""
        turn = self.turn(now)
        upper = 0.22 + 0.17 * self.reach * wave(turn)  # from straight down, outwards, in turns
        fore = 0.26 + 0.20 * self.reach * wave(turn + 0.05)
        x, y = 0.12 * side, 0.43
        elbow = x + UPPER_ARM * side * wave(upper), y + UPPER_ARM * wave(upper + 0.25)
        wrist = elbow[0] + FOREARM * side * wave(fore), elbow[1] + FOREARM * wave(fore + 0.25)
        return self.at(x, y), self.at(*elbow), self.at(*wrist)

    def joints(self, now: float) -> list[Point]:
        """The fifteen joints that a sitting person shows."""
        return [*self.arm(-1, now), *self.arm(1, now), *(self.at(x, y) for x, y in STILL_JOINTS)]

    def colours(self) -> tuple[Colour, Colour, Colour]:
        """Skin, shirt and sleeve: light sleeves before a dark room, so that a tiny model sees them soon."""
        light = 50 * self.shirt
        return (150 + light, 100 + light, 75 + light), (30 + light, 40 + light, 90 - light), (235, 235, 180 + light)

    def paint_body(self, canvas: Canvas) -> None:
        skin, shirt, _ = self.colours()
        canvas.limb(self.at(0, 0.56), self.at(0, 1.0), 0.11 * self.scale, shirt)
        canvas.limb(self.at(-0.09, 0.46), self.at(0.09, 0.46), 0.05 * self.scale, shirt)
        canvas.limb(self.at(0, 0.34), self.at(0, 0.40), 0.035 * self.scale, skin)
        canvas.limb(self.at(0, 0.26), self.at(0, 0.30), 0.065 * self.scale, skin)

    def paint_arms(self, canvas: Canvas, now: float) -> None:
        _, _, sleeve = self.colours()
        for side in (-1, 1):
            shoulder, elbow, wrist = self.arm(side, now)
            canvas.limb(shoulder, elbow, 0.095 * self.scale, sleeve)
            canvas.limb(elbow, wrist, 0.080 * self.scale, sleeve)
            canvas.limb(wrist, wrist, 0.105 * self.scale, sleeve)  # a mitten: large light things in motion are learned in half the steps


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


def room(seed: int, source: str, height: int, width: int) -> np.ndarray:
    """A blurred background uint8 (height, width, 3) with a fine grain, different for each source."""
    picture = np.zeros((height, width, 3), np.float32) + np.float32(75)
    for cells, contrast in ((3, 45), (8, 22), (24, 7)):
        picture += (blurred(noise((cells + 1, cells + 1, 3), seed, source, "room", cells), height, width) - np.float32(0.5)) * np.float32(contrast)
    grain = noise((height, width, 1), seed, source, "grain") * np.float32(4)
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


def unit(*what: int | str) -> float:
    """A number in [0, 1) that belongs to what it stands for."""
    return hash64(*what) / 2**64


def noise(shape: tuple[int, ...], *what: int | str) -> np.ndarray:
    """float32 in [0, 1) of that shape."""
    return uniforms(math.prod(shape), *what).astype(np.float32).reshape(shape)
