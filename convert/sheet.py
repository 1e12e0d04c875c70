"""The contact sheet as one PNG: a row of frames a clip, the joints drawn over them.

All lengths are in pixels. Rows stand in as many columns as keep the picture from being higher than wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .shown import STRIP_FRAMES, Pick, Sheet, small_size, strip_numbers

MARGIN, COLUMN_GAP, ROW_GAP, FRAME_GAP = 32, 40, 22, 4
TITLE_HEIGHT, CAPTION_HEIGHT = 92, 30
LEAST_WIDTH = 720  # of a column: a caption needs room beside narrow frames
INK, GREY, PAPER, EMPTY = "#1a1a1a", "#667085", "#ffffff", "#f2f4f7"
DOT_CORE, DOT_RIM = 2.1, 3.4  # radii of a joint: yellow with a black rim shows on bright and on dark

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_picture(sheet: Sheet, file: BinaryIO) -> None:
    """A PNG in RGB; the same clips give the same bytes."""
    height, width = small_size(sheet.manifest.stored, enlarge=True)
    strip_width = max(LEAST_WIDTH, STRIP_FRAMES * (width + FRAME_GAP) - FRAME_GAP)
    row_height = CAPTION_HEIGHT + height + ROW_GAP
    columns = max(1, math.ceil(math.sqrt(len(sheet.picks) * row_height / strip_width)))
    rows = -(-len(sheet.picks) // columns)
    picture_width = 2 * MARGIN + columns * strip_width + (columns - 1) * COLUMN_GAP
    picture = Image.new("RGB", (picture_width, 2 * MARGIN + TITLE_HEIGHT + rows * row_height - (ROW_GAP if rows else 0)), PAPER)
    draw = ImageDraw.Draw(picture)
    _head(draw, sheet, picture_width - 2 * MARGIN)
    for number, pick in enumerate(sheet.picks):
        column, row = divmod(number, rows)
        left, top = MARGIN + column * (strip_width + COLUMN_GAP), MARGIN + TITLE_HEIGHT + row * row_height
        _caption(draw, sheet, pick, left, top, strip_width)
        _strip(picture, sheet, pick, left, top + CAPTION_HEIGHT, (height, width))
    picture.save(file, "PNG")


def _head(draw: ImageDraw.ImageDraw, sheet: Sheet, width: int) -> None:
    _text(draw, MARGIN, MARGIN, sheet.title, 26, INK, width)
    _text(draw, MARGIN, MARGIN + 38, sheet.sentence, 17, GREY, width)


def _caption(draw: ImageDraw.ImageDraw, sheet: Sheet, pick: Pick, left: int, top: int, width: int) -> None:
    """Label, key and what a run took it for on the left, the facts on the right."""
    middle = top + CAPTION_HEIGHT // 2 - 3
    right = left + width
    position = _chip(draw, left, middle, pick.label, sheet.colour_of(pick.label)) + 10
    facts = sheet.caption_of(pick)
    right -= _text(draw, right, middle, facts, 14, GREY, width // 2, anchor="rm") + 12
    if pick.prediction is not None and pick.probability is not None:
        position += _text(draw, position, middle, "predicted", 14, GREY, right - position, anchor="lm") + 8
        position = _chip(draw, position, middle, f"{pick.prediction} {pick.probability:.3f}", sheet.colour_of(pick.prediction)) + 10
    _text(draw, position, middle, pick.entry.facts.key, 14, INK, right - position, anchor="lm")


def _strip(picture: Image.Image, sheet: Sheet, pick: Pick, left: int, top: int, size: tuple[int, int]) -> None:
    height, width = size
    numbers = strip_numbers(pick.entry.facts.frames_valid)
    points = sheet.points_of(pick)
    draw = ImageDraw.Draw(picture)
    for place in range(STRIP_FRAMES):
        x = left + place * (width + FRAME_GAP)
        draw.rectangle((x, top, x + width - 1, top + height - 1), EMPTY)
    for place, (number, frame) in enumerate(zip(numbers, sheet.frames_of(pick, numbers, size), strict=True)):
        with_joints = draw_joints(frame, points[points[:, 0] == number, 1:], (sheet.manifest.source.height, sheet.manifest.source.width))
        x = left + place * (width + FRAME_GAP)
        picture.paste(Image.fromarray(with_joints), (x, top))
        draw.text((x + 5, top + height - 4), str(number), "#ffffff", _font(12), "lb", stroke_width=2, stroke_fill="#000000")


def draw_joints(frame: np.ndarray, points: np.ndarray, source: tuple[int, int]) -> np.ndarray:
    """A copy of the frame, uint8 (h, w, 3), with a dot at each of the points (N, 2) of y, x in a source of (H, W) pixels."""
    height, width = frame.shape[:2]
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    distance = np.full((height, width), np.inf)  # to the nearest joint
    for y, x in (points + 0.5) * (height / source[0], width / source[1]):
        distance = np.minimum(distance, np.hypot(rows - y, columns - x))
    drawn = frame.astype(np.float64)
    for radius, colour in ((DOT_RIM, (0, 0, 0)), (DOT_CORE, (255, 230, 0))):
        cover = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
        drawn += cover * (np.asarray(colour) - drawn)
    return np.rint(drawn).astype(np.uint8)


def _chip(draw: ImageDraw.ImageDraw, left: int, middle: int, text: str, colour: str) -> int:
    """A label on its colour; returns where it ends."""
    width = round(draw.textlength(text, _font(14))) + 16
    draw.rounded_rectangle((left, middle - 11, left + width, middle + 11), 5, colour)
    draw.text((left + 8, middle), text, "#ffffff", _font(14), "lm")
    return left + width


def _text(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, colour: str, width: int, anchor: str = "la") -> int:
    """Draws the text, its middle left out where it is wider than `width`; returns how wide it is."""
    shown = fitted(text, width, lambda part: draw.textlength(part, _font(size)))
    draw.text((x, y), shown, colour, _font(size), anchor)
    return round(draw.textlength(shown, _font(size)))


def fitted(text: str, width: float, length: Callable[[str], float]) -> str:
    """The text, or as much of its two ends, joined by …, as is no longer than `width`."""
    if length(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        shorter = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
        if length(shorter) <= width:
            return shorter
    return "…"


def _font(size: int) -> Font:
    """Pillow's own typeface: no file to look for, the same picture on every machine."""
    return ImageFont.load_default(size)
