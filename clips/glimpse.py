"""What a folder is that was given in place of another: shards, snippets, or a part of either."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def hint_at(folder: Path) -> str:
    """A sentence, with a space before it, on what of ours lies there and what to give instead; empty for anything else."""
    above = folder.absolute().parent
    if has_shards(folder):
        return " These are shards of python -m convert pack."
    if any(folder.glob("*.index.mp")):
        return f" This is one split of shards: give the folder above it, {above}."
    if any(folder.glob("*.npz")):
        return f" If this is one class of a split, give the folder two above it, {above.parent}."
    if any(folder.glob("*/*.npz")):
        return f" If this is one split of snippets, give the folder above it, {above}."
    return ""


def expect_shards(folder: Path) -> None:
    """Raises InputError for snippets, and for a part of a home; shards that merely lack their manifest are left to `read_manifest`."""
    if has_shards(folder):
        return
    hint = " These are npz snippets: pack them first, python -m convert pack." if any(folder.glob("*/*/*.npz")) else hint_at(folder)
    if hint:
        raise InputError(f"{folder}: expected the folder of shards that python -m convert pack wrote.{hint}")


def has_shards(folder: Path) -> bool:
    return any(folder.glob("*/*.index.mp"))
