"""Clips in which nothing moves: every valid frame is stored as the same bytes. Told from the indexes alone."""

from __future__ import annotations

from collections.abc import Sequence

from clips.format import IndexEntry
from clips.words import counted

SHOWN = 3


def is_still(entry: IndexEntry) -> bool:
    """Whether its valid frames, two or more, have one size and one crc32."""
    valid = entry.frames[: entry.facts.frames_valid]
    return len(valid) > 1 and bool((valid["size"] == valid["size"][0]).all() and (valid["crc32"] == valid["crc32"][0]).all())


def still_in_words(keys: Sequence[str]) -> str:
    """`2 clips with equal frames throughout: 'a', 'b'`, the first few named."""
    named = ", ".join(f"'{key}'" for key in keys[:SHOWN]) + (", …" if len(keys) > SHOWN else "")
    return f"{counted(len(keys), 'clip')} with equal frames throughout: {named}"
