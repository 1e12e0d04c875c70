"""How a clip's pixels are changed in training beyond crop and flip: numbers alone, drawn from the clip's own chance, for any loader to apply.

colour (a matrix for each pixel, solarize, posterize) -> erasure (a box of one colour), the same for all frames of a clip
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 256  # coefficients are multiples of 1 / 256: times a byte and summed they are exact in fp32, so a CPU and a GPU give the same bytes
GREY = 128  # what contrast pulls towards; the clip's own mean would cost a pass over its pixels
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL's mode L
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
RGB = np.linalg.inv(YIQ)
OPS = ("brightness", "contrast", "saturation", "hue", "solarize", "posterize")
OPS_A_CLIP = 2  # RandAugment's N (Cubuk et al. 2020)
JITTER_DRAWS, ERASURE_DRAWS = 4, 8
LOOK_DRAWS = JITTER_DRAWS + 2 * OPS_A_CLIP + ERASURE_DRAWS
ERASED_SHARE, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of the frame's area, and height over width: Zhong et al. 2020, as VideoMAE takes them


@dataclass(frozen=True)
class Colour:
    """RGB out = matrix x (R, G, B, 1), rounded to a byte; then values above `above` are turned over (255 - v), then all but `bits` are cleared."""

    matrix: tuple[tuple[float, float, float, float], ...]
    above: int = 255
    bits: int = 0xFF


@dataclass(frozen=True)
class Erasure:
    """A box, in shares of the finished frame, and the RGB that it is filled with; joints in it are gone too."""

    top: float
    left: float
    height: float
    width: float
    fill: tuple[int, int, int]

    def of(self, height: int, width: int) -> tuple[slice, slice]:
        """Its rows and columns in a frame of this size: at least one of each."""
        return _stretch(self.top, self.height, height), _stretch(self.left, self.width, width)


def _stretch(place: float, share: float, size: int) -> slice:
    """`place`, 0 to below 1, says where in the room that is left."""
    length = max(1, round(share * size))
    begin = int(place * (size - length + 1))
    return slice(begin, begin + length)


def random_colour(draws: np.ndarray, jitter: float, strength: float) -> Colour | None:
    """Brightness, contrast and saturation times 1 ± jitter and hue by ± jitter / 4 of a turn (.4 as in MoCo v2), then two ops at `strength` 0 … 10.

    The ops are RandAugment's that change colours, magnitudes as timm has them but for posterize, which keeps 4 bits and more; those that move pixels
    are left to the crop. `draws` (LOOK_DRAWS,).
    """
    if not jitter and not strength:
        return None
    signed = 2 * draws[:JITTER_DRAWS] - 1
    matrix = brightness(1 + jitter * signed[0])
    for change in (contrast(1 + jitter * signed[1]), saturation(1 + jitter * signed[2]), hue(jitter / 4 * signed[3])):
        matrix = then(matrix, change)
    above, bits, level = 255, 0xFF, strength / 10
    for op_draw, sign_draw in draws[JITTER_DRAWS : JITTER_DRAWS + 2 * OPS_A_CLIP].reshape(-1, 2) if strength else ():
        op, sign = OPS[int(op_draw * len(OPS))], 1 if sign_draw < 0.5 else -1
        if op == "solarize":
            above = max(0, 255 - int(256 * level))
        elif op == "posterize":
            bits = 0xFF << round(4 * level) & 0xFF
        elif op == "hue":
            matrix = then(matrix, hue(sign * level / 10))
        else:
            matrix = then(matrix, {"brightness": brightness, "contrast": contrast, "saturation": saturation}[op](1 + sign * 0.9 * level))
    return Colour(exact(matrix), above, bits)


def random_erasure(draws: np.ndarray, chance: float) -> Erasure | None:
    """With `chance` a box of a random place, size, shape and colour. `draws` (LOOK_DRAWS,)."""
    happens, area, shape, down, across, *fill = draws[-ERASURE_DRAWS:].tolist()
    if happens >= chance:
        return None
    share = ERASED_SHARE[0] + area * (ERASED_SHARE[1] - ERASED_SHARE[0])
    low, high = map(math.log, ERASED_RATIO)
    ratio = math.exp(low + shape * (high - low))
    red, green, blue = (int(256 * draw) for draw in fill)
    return Erasure(down, across, min(1.0, math.sqrt(share * ratio)), min(1.0, math.sqrt(share / ratio)), (red, green, blue))


def brightness(factor: float) -> np.ndarray:
    """float64 (3, 4), as all below: the pixel times `factor`."""
    return _affine(factor * np.eye(3))


def contrast(factor: float) -> np.ndarray:
    """The distance from grey times `factor`."""
    return _affine(factor * np.eye(3), (1 - factor) * GREY)


def saturation(factor: float) -> np.ndarray:
    """The distance from the pixel's own grey times `factor`."""
    return _affine(factor * np.eye(3) + (1 - factor) * LUMA)


def hue(turns: float) -> np.ndarray:
    """Colours turned about grey in YIQ, from red towards yellow: brightness stays."""
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    return _affine(RGB @ np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ YIQ)


def then(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Both in one, without cutting to 0 … 255 between them."""
    return np.concatenate([second[:, :3] @ first[:, :3], second[:, :3] @ first[:, 3:] + second[:, 3:]], axis=1)


def _affine(linear: np.ndarray, offset: float = 0.0) -> np.ndarray:
    return np.concatenate([linear, np.full((3, 1), offset)], axis=1)


def exact(matrix: np.ndarray) -> tuple[tuple[float, float, float, float], ...]:
    """The nearest multiples of 1 / STEPS; the diagonal takes up the rounding of its row, so that all three rows treat grey alike."""
    whole = np.rint(matrix * STEPS)
    for row in range(3):
        others = [column for column in range(3) if column != row]
        whole[row, row] = round(float(matrix[row, :3].sum()) * STEPS) - whole[row, others].sum()
    return tuple((a, b, c, d) for a, b, c, d in (whole / STEPS).tolist())


def matrices(colours: Sequence[Colour | None]) -> np.ndarray:
    """float32 (N, 3, 4) of N clips; the one that changes nothing where there is None."""
    return np.array([np.eye(3, 4) if colour is None else colour.matrix for colour in colours], np.float32)
