"""Written-out 64-bit mixing: the one source of order and chance, so that no library's version can change them.

numpy promises no stable Generator stream across versions; these few lines do not change.
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of SplitMix64
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # David Stafford's "Mix13" multipliers
MASK64 = (1 << 64) - 1


def mix64(numbers: np.ndarray) -> np.ndarray:
    """uint64 (N,) mixed in place and returned: SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection on 64 bits."""
    numbers ^= numbers >> np.uint64(30)
    numbers *= np.uint64(FIRST)
    numbers ^= numbers >> np.uint64(27)
    numbers *= np.uint64(SECOND)
    numbers ^= numbers >> np.uint64(31)
    return numbers


def hash64(*parts: int | str) -> int:
    """64 bits from any numbers and texts: BLAKE2b over their length-prefixed UTF-8 spellings."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        spelling = f"{type(part).__name__}:{part}".encode("utf-8", "surrogateescape")
        digest.update(len(spelling).to_bytes(4, "little") + spelling)
    return int.from_bytes(digest.digest(), "little")


def permutation(count: int, *seed: int | str) -> np.ndarray:
    """int64 (count,): 0 … count−1 in an order that `seed` alone decides; the argsort of distinct mixed numbers, so no ties."""
    numbers = np.arange(count, dtype=np.uint64)
    numbers ^= np.uint64(hash64(*seed))
    mix64(numbers)
    numbers ^= np.uint64(hash64("second round", *seed))
    return np.argsort(mix64(numbers))


def uniforms(count: int, *seed: int | str) -> np.ndarray:
    """float64 (count,) in [0, 1): SplitMix64's stream started at the hash of `seed`, 53 bits each."""
    state = np.uint64(hash64(*seed)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (mix64(state) >> np.uint64(11)) * 2.0**-53
