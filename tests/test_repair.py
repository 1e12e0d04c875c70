"""What verify says of damaged shards: which clips, which commands mend them, and that nothing found earlier counts any longer."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clips.manifest import read_index, read_manifest, tar_path
from convert.describe import gather
from convert.pack import PackConfig, pack
from convert.still import is_still
from convert.verified import VERIFIED, read_verified
from convert.verify import VerifyConfig, verify
from tests.making import write_home
from tests.packing import convert, rewrite, snippets_of, tree, use_threads

COUNTS = {"train": {"a": 5, "b": 4}, "val": {"a": 1, "b": 1}}


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> PackConfig:
    """One shard a split, with none of the defaults."""
    use_threads(monkeypatch)
    caplog.set_level(logging.INFO)
    home = write_home(tmp_path, COUNTS, frames=4)
    config = PackConfig(home, tmp_path / "out", codec="jpeg", quality=80, store_size=16, classes=("b", "a"), keypoints="optional", shard_mib=0.2, workers=2)
    pack(config)
    return config


def flip(path: Path, place: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)


def entries_of(output: Path, split: str) -> list:
    return list(read_index(output, split, read_manifest(output).splits[split].shards[0]).clips)


def test_each_damaged_clip_of_a_shard_is_named_and_no_other(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    path = tar_path(packing.output, "train", "train-000000")
    first, second, third, *others = entries_of(packing.output, "train")
    flip(path, int(first.frames["offset"][2]) + 5)
    flip(path, second.members["cls"][0])
    for frame in (0, 3):
        flip(path, int(third.frames["offset"][frame]))
    caplog.clear()
    assert verify(VerifyConfig(packing.output, workers=1)) == 1
    assert f"sha256 is not the manifest's; 3 of {len(others) + 3} clips damaged:" in caplog.text
    assert f"'{first.facts.key}': frames.mp (frame 2)\n" in caplog.text
    assert f"'{second.facts.key}': cls\n" in caplog.text
    assert f"'{third.facts.key}': frames.mp (frames 0, 3)\n" in caplog.text
    assert not any(entry.facts.key in caplog.text for entry in others)


def test_a_change_between_the_clips_and_one_of_all_clips_are_told_apart(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    path = tar_path(packing.output, "val", "val-000000")
    flip(path, path.stat().st_size - 1)
    assert verify(VerifyConfig(packing.output, workers=1)) == 1
    assert "no clip of 2 is damaged, the change lies between them." in caplog.text
    path.write_bytes(bytes(path.stat().st_size))
    assert verify(VerifyConfig(packing.output, workers=1)) == 1
    assert "all its clips are damaged, 2." in caplog.text


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_the_commands_that_verify_names_bring_every_byte_back(codec: str, packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    if codec == "zstd":
        packing = replace(packing, output=packing.output.with_name("exact"), codec="zstd", quality=90, level=3, store_size=None, extras="drop", shard_mib=0.03)
        rewrite(snippets_of(packing.dataset_home)[0], fps=np.array(25))
        pack(packing)
    whole = {name: blob for name, blob in tree(packing.output).items() if name != VERIFIED}
    flip(tar_path(packing.output, "train", "train-000000"), 3000)
    (packing.output / "val/val-000000.index.mp").write_bytes(b"")
    caplog.clear()
    assert verify(VerifyConfig(packing.output, packing.dataset_home, workers=1)) == 1
    lines = [record.getMessage().strip() for record in caplog.records]
    assert "To repair 2 shards, restore from a copy, or remove and pack again:" in lines
    for line in lines:
        if line.startswith("rm -f "):
            for word in shlex.split(line)[2:]:
                Path(word).unlink()
    (command,) = [line for line in lines if line.startswith("python -m convert pack ")]
    done = convert(*shlex.split(command)[3:], "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert tree(packing.output) == whole


def test_without_the_snippets_at_hand_the_command_says_which_to_give(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    flip(tar_path(packing.output, "train", "train-000000"), 3000)
    verify(VerifyConfig(packing.output, workers=1))
    assert f"DATASET_HOME being the snippets of {packing.dataset_home.name}:" in caplog.text and "--dataset-home $DATASET_HOME" in caplog.text
    assert "--splits train\n" in caplog.text.replace(" --classes b a", "")


def test_a_changed_npz_asks_for_no_repair_of_its_shard(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    path = snippets_of(packing.dataset_home)[0]
    with np.load(path) as arrays:
        rewrite(path, video=arrays["video"][:, ::-1])
    assert verify(VerifyConfig(packing.output, packing.dataset_home, workers=1)) == 1
    assert "its npz changed since it was packed: video" in caplog.text and "repair" not in caplog.text


def test_what_a_verify_found_ends_with_a_later_one_that_fails_or_is_killed(packing: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole_again() -> None:
        assert verify(VerifyConfig(packing.output, packing.dataset_home, workers=1)) == 0
        assert read_verified(packing.output) is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    path = tar_path(packing.output, "train", "train-000000")
    for home in (packing.dataset_home, None):
        whole_again()
        flip(path, 3000)
        assert verify(VerifyConfig(packing.output, home, workers=1)) == 1
        assert read_verified(packing.output) is None and not (packing.output / VERIFIED).exists()
        flip(path, 3000)
    whole_again()
    verify(VerifyConfig(packing.output, workers=1))
    assert read_verified(packing.output) is not None  # sums that are right say nothing against it
    monkeypatch.setattr("convert.verify.in_processes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify(VerifyConfig(packing.output, packing.dataset_home, workers=1))
    assert read_verified(packing.output) is None


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_clips_in_which_nothing_moves_are_named_by_pack_verify_and_describe(codec: str, packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    still, padded, single = snippets_of(packing.dataset_home / "train")[:3]
    chance = np.random.RandomState(1)
    frame = chance.randint(1, 255, (1, 32, 32, 3)).astype(np.uint8)
    for path, frames in ((still, [1, 1, 1, 1]), (padded, [1, 1, 0, 0]), (single, [1, 0, 0, 0])):
        rewrite(path, video=np.concatenate([frame * shown for shown in frames]))
    output = packing.output.with_name("stills")
    caplog.clear()
    pack(PackConfig(packing.dataset_home, output, codec=codec, workers=1))
    keys = [f"train/a/{path.stem}" for path in (still, padded)]
    sentence = f"2 clips with equal frames throughout: '{keys[0]}', '{keys[1]}'"
    assert f"train: {sentence}\n" in caplog.text
    caplog.clear()
    assert verify(VerifyConfig(output, workers=1)) == 0 and sentence in caplog.text
    facts = gather(output)
    assert facts.splits["train"].still == keys and facts.splits["val"].still == [] and facts.all.still == keys
    assert sum(is_still(entry) for entry in entries_of(output, "train")) == 2
