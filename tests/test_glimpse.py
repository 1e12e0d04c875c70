"""A folder given in place of another: each is told for what it is, with the one to give instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from clips import snippets
from clips.errors import InputError
from clips.glimpse import expect_shards
from convert.describe import DescribeConfig, describe
from convert.unpack import UnpackConfig, unpack
from convert.verify import VerifyConfig, verify
from convert.view import ViewConfig, view
from loaders.order import OrderConfig, order
from loaders.stage import StageConfig, stage

FILES = ["npz/train/a/1_x.npz", "npz/val/a/2_x.npz", "shards/train/train-000000.index.mp", "shards/train/train-000000.tar", "other/readme.txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("npz", "These are npz snippets: pack them first"),
        ("npz/train", "give the folder above it, {}/npz."),
        ("npz/train/a", "give the folder two above it, {}/npz."),
        ("shards/train", "This is one split of shards: give the folder above it, {}/shards."),
    ],
)
def test_where_shards_are_expected_the_hint_says_what_to_give(folder: Path, given: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        expect_shards(folder / given)
    assert hint.format(folder) in str(error.value)


@pytest.mark.parametrize("given", ["shards", "other", "nowhere"])
def test_shards_without_a_manifest_and_unknown_folders_are_left_to_others(folder: Path, given: str) -> None:
    expect_shards(folder / given)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("shards", "These are shards of python -m convert pack."),
        ("shards/train", "This is one split of shards: give the folder above it, {}/shards."),
        ("npz/train", "give the folder above it, {}/npz."),
        ("npz/train/a", "give the folder two above it, {}/npz."),
        ("other", "found readme.txt."),
        (".", "Did you mean {}/npz?"),
    ],
)
def test_where_snippets_are_expected_the_hint_says_what_to_give(folder: Path, given: str, hint: str) -> None:
    if given == ".":
        (folder / "shards").rename(folder / "npz" / "shards")
    with pytest.raises(InputError) as error:
        snippets.find(folder / given)
    assert str(error.value).endswith(hint.format(folder))


def test_every_command_that_reads_shards_gives_the_hint(folder: Path) -> None:
    npz, out = folder / "npz", folder / "out"
    for read in (
        lambda: verify(VerifyConfig(npz)),
        lambda: describe(DescribeConfig(npz)),
        lambda: unpack(UnpackConfig(npz, out)),
        lambda: view(ViewConfig(npz, folder / "x.png")),
        lambda: stage(StageConfig(str(npz), out)),
    ):
        with pytest.raises(InputError, match="pack them first"):
            read()
    with pytest.raises(InputError, match=f"give the folder above it, {folder}/shards"):
        order(OrderConfig(folder / "shards" / "train"))
