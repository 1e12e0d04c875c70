"""What would make a test set too easy: the same clip, or the same source, in several splits. Warned of, never blocked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from clips.format import IndexEntry

# Of 192. On 80 real clips: a copy at JPEG quality 50 differs by 0 to 8 bits, at half the size and back by 0 to 3, with noise of
# +-3 in each value by 0 to 15 (median 1), moved by one frame by 0 to 28; clips of different sources by 53 to 136. Windows of one
# source that follow each other differ by 1 to 89: those of still scenes are found, too.
NEAR_BITS = 16
DHASH_BYTES = 24
CHUNK = 1024  # rows compared at once: 1024 x 40 000 distances are 80 MB
BITS = np.array([bin(value).count("1") for value in range(256)], np.uint8)


def identical(splits: Mapping[str, Sequence[IndexEntry]]) -> list[list[str]]:
    """Groups of keys whose source videos have equal bytes and that lie in more than one split."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for split, entries in splits.items():
        for entry in entries:
            groups[entry.video_sha256].append((split, entry.facts.key))
    return sorted(sorted(key for _, key in group) for group in groups.values() if len({split for split, _ in group}) > 1)


def shared_sources(splits: Mapping[str, Sequence[IndexEntry]]) -> dict[str, list[str]]:
    """Sources that occur in more than one split, with these."""
    places: dict[str, set[str]] = defaultdict(set)
    for split, entries in splits.items():
        for entry in entries:
            places[entry.facts.source].add(split)
    return {source: sorted(found) for source, found in sorted(places.items()) if len(found) > 1}


def near(splits: Mapping[str, Sequence[IndexEntry]]) -> list[list[str]]:
    """Pairs of keys of different splits whose dhashes differ in at most NEAR_BITS of 192 bits, and whose bytes differ."""
    pairs = []
    names = sorted(splits)
    hashes = {name: np.frombuffer(b"".join(entry.dhash for entry in splits[name]), np.uint8).reshape(len(splits[name]), DHASH_BYTES) for name in names}
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            pairs += [
                [splits[one][a].facts.key, splits[other][b].facts.key]
                for a, b in _close(hashes[one], hashes[other])
                if splits[one][a].video_sha256 != splits[other][b].video_sha256
            ]
    return sorted(pairs)


def _close(one: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start in range(0, len(one), CHUNK):
        distance = np.zeros((len(one[start : start + CHUNK]), len(other)), np.uint16)
        for byte in range(one.shape[1]):
            distance += BITS[one[start : start + CHUNK, byte, None] ^ other[None, :, byte]]
        found += [(int(a) + start, int(b)) for a, b in np.argwhere(distance <= NEAR_BITS)]
    return found
