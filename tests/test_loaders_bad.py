"""Clips that cannot be read: named to the byte, or counted against a budget and left out of sums; never replaced in silence."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from clips.errors import ClipError
from clips.format import IndexEntry
from loaders.batch import Batch
from loaders.decode import StoredFrames
from loaders.sample import whole_view
from loaders.shards import _member_name
from loaders.source import open_source
from loaders.stream import DecodeIn
from tests.loading import MANY_SHARDS_MIB, STORED, Found, assert_same, by_key, find_entry, flip_byte, home_for, keys_in, keys_of, npz_home, opened, shards
from tests.sources import Neighbour

CRC32 = "has another crc32 than the index promises"


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def packed(base: Path, tmp_path: Path) -> Path:
    """Shards of its own for a test to damage."""
    return Path(shutil.copytree(shards(base, "zstd", MANY_SHARDS_MIB), tmp_path / "shards"))


def header_of(entry: IndexEntry) -> int:
    """Where the tar header of the frames begins: for short names the block before them."""
    return entry.members["frames.mp"][0] - tarfile.BLOCKSIZE


DAMAGE: dict[str, tuple[str, Callable[[IndexEntry], int], str]] = {  # member that is named, byte to flip, reason
    "frame": ("frames.mp", lambda entry: int(entry.frames["offset"][2]) + 5, f"frame 2 {CRC32}"),
    "name": ("frames.mp", lambda entry: header_of(entry) + 3, "its header in the tar is damaged (bad checksum)"),
    "label": ("cls", lambda entry: entry.members["cls"][0], CRC32),
    "points": ("keypoints.mp", lambda entry: entry.members["keypoints.mp"][0] + 12, CRC32),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_without_a_budget_a_flipped_byte_names_shard_clip_member_and_offset(packed: Path, base: Path, kind: str) -> None:
    key = keys_of(npz_home(base))[7]
    path, entry = find_entry(packed, key)
    member, place, reason = DAMAGE[kind]
    flip_byte(path, place(entry))
    where = f"{path}: clip '{key}', member {member} at offset {entry.members[member][0]}"
    with opened(packed) as made, pytest.raises(ClipError, match=f"^{re.escape(f'{where}: {reason}. Run python -m convert verify on its folder.')}$"):
        list(made.evaluation())


def test_a_header_that_names_another_clip_is_an_error_though_its_checksum_is_right(packed: Path, base: Path) -> None:
    one, other = (find_entry(packed, keys_of(npz_home(base))[number]) for number in (3, 7))
    with other[0].open("rb") as file:
        file.seek(header_of(other[1]))
        header = file.read(tarfile.BLOCKSIZE)
    with one[0].open("r+b") as file:
        file.seek(header_of(one[1]))
        file.write(header)
    with opened(packed) as made, pytest.raises(ClipError, match=f"clip '{one[1].facts.key}', .* its header in the tar names '{other[1].facts.key}.frames.mp'"):
        list(made.evaluation())


def test_every_flipped_byte_beside_the_frames_is_an_error_or_changes_nothing(packed: Path, base: Path) -> None:
    """The label, the header that holds the key, the points."""
    key = keys_of(npz_home(base))[7]
    path, entry = find_entry(packed, key)
    stretches = [entry.members["cls"], (header_of(entry), tarfile.BLOCKSIZE), entry.members["keypoints.mp"]]
    places = [place for begin, size in stretches for place in range(begin, begin + size)]
    with closing(open_source(packed, "train")) as source:
        number = [fact.key for fact in source.facts].index(key)
        frames = StoredFrames(np.empty((2, *STORED.video_shape[1:]), np.uint8), whole_view(STORED.height, STORED.width))

        def load() -> tuple[str, int, bytes]:
            loaded = source.fetch(number, lambda frames_valid: np.array([0, 4]), True).decode(frames)
            assert loaded.points is not None
            return loaded.key, loaded.label, loaded.points.tobytes()

        right, harmless = load(), []
        for place in places:
            flip_byte(path, place)
            try:
                assert load() == right
                harmless.append(place - header_of(entry))
            except ClipError as error:
                assert str(error).startswith(f"{path}: clip '{key}', member ")
            flip_byte(path, place)
        assert load() == right
    assert set(harmless) <= set(range(148, 156))  # after the digits of a header's checksum nothing counts


@pytest.mark.parametrize("name", ["train/a/" + 120 * "x" + ".frames.mp", "train/á/\U0001f44b.frames.mp"])
def test_a_damaged_header_of_a_long_or_foreign_name_is_refused_or_gives_a_name(name: str) -> None:
    """Such a name has blocks of its own, of which no checksum is kept; `decode` compares what it gives with the planned one."""
    stream, info = io.BytesIO(), tarfile.TarInfo(name)
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
        header = stream.getvalue()
    assert len(header) == 3 * tarfile.BLOCKSIZE and _member_name(header) == name
    for place in range(len(header)):
        damaged = bytearray(header)
        damaged[place] ^= 0x55
        with suppress(tarfile.TarError, UnicodeError):
            assert isinstance(_member_name(bytes(damaged)), str)


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_shard_that_vanishes_or_is_replaced_is_read_on_until_it_is_closed(packed: Path, what: str) -> None:
    path = packed / "train" / "train-000001.tar"
    with opened(packed) as made:
        whole = by_key(made.evaluation())
        path.unlink()
        if what == "replaced":
            path.write_bytes(b"another file")
        assert_same(by_key(made.evaluation()), whole)


def test_a_shard_that_is_overwritten_in_place_is_an_error(packed: Path) -> None:
    path = packed / "train" / "train-000001.tar"
    with opened(packed) as made:
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(ClipError, match=f"^{re.escape(str(path))}: clip"):
            list(made.evaluation())


def proof_by_hand(epoch: int, position: int, key: str) -> int:
    label = ["nongesture", "gesture"].index(key.split("/")[1])
    blob = b"".join(number.to_bytes(8, "little", signed=True) for number in (epoch, position, label)) + key.encode()
    return int.from_bytes(hashlib.blake2b(blob, digest_size=16, person=b"clip certificate").digest(), "little")


def test_the_proof_is_of_the_clips_that_were_read_in_training_alone(packed: Path) -> None:
    with opened(packed) as made:
        for batch in made.training(5, consumed=8):
            assert batch.proof == sum(proof_by_hand(5, *pair) for pair in zip(batch.position, batch.key, strict=True)) % 2**128
        assert {batch.proof for batch in made.evaluation()} == {0}


def test_a_source_that_gives_a_neighbour_gives_another_proof(packed: Path) -> None:
    with opened(packed) as right, opened(packed, around=Neighbour) as wrong:
        pairs = list(zip(right.training(0), wrong.training(0), strict=True))
    for planned, found in pairs:
        assert (planned.number, planned.position) == (found.number, found.position)
        assert planned.key != found.key and planned.proof != found.proof


BAD = (2, 3, 9)  # the places in the order of those that are damaged: a whole batch of two, and one


@dataclass(frozen=True)
class Damaged:
    """A home with three damaged clips, what it gave before in epoch 1 and in evaluation, and the keys of the three in epoch 1's order."""

    home: Path
    training: Found
    evaluation: Found
    bad: list[str]


@pytest.fixture(params=["webdataset", "npz"])
def damaged(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Damaged:
    home = Path(shutil.copytree(home_for(base, request.param), tmp_path / "damaged"))
    with opened(home) as made:
        training, evaluation = by_key(made.training(1)), by_key(made.evaluation())
    bad = [list(training)[place] for place in BAD]
    for key in bad:
        if request.param == "npz":
            flip_byte(home / f"{key}.npz", (home / f"{key}.npz").stat().st_size // 3)
        else:
            path, entry = find_entry(home, key)
            for offset in entry.frames["offset"].tolist():
                flip_byte(path, offset)
    return Damaged(home, training, evaluation, bad)


@pytest.mark.parametrize("decode_in", ["threads", "process"])
def test_within_the_budget_bad_clips_stay_in_their_batches_as_zeros_without_weight(damaged: Damaged, decode_in: DecodeIn) -> None:
    with opened(damaged.home, decode_in=decode_in, max_bad_clips=len(BAD)) as made:
        for _ in range(2):  # each pass has the whole budget
            batches = list(made.training(1))
            assert {len(batch) for batch in batches} == {2}
            assert_good_are_right_and_bad_are_nothing(batches, damaged.training, damaged.bad)
            assert [(one.position, one.key) for batch in batches for one in batch.bad] == list(zip(BAD, damaged.bad, strict=True))
            for batch in batches:
                good = [pair for pair in zip(batch.position, batch.key, strict=True) if pair[1] not in damaged.bad]
                assert batch.proof == sum(proof_by_hand(1, *pair) for pair in good) % 2**128
        assert_good_are_right_and_bad_are_nothing(list(made.evaluation()), damaged.evaluation, damaged.bad)


def assert_good_are_right_and_bad_are_nothing(batches: Sequence[Batch], whole: Found, bad: Sequence[str]) -> None:
    """`whole` is what the batches would hold without damage."""
    assert keys_in(batches) == list(whole)
    for batch in batches:
        assert batch.keypoints is not None and [one.key for one in batch.bad] == [key for key in batch.key if key in bad]
        assert batch.label.tolist() == [whole[key][2] for key in batch.key]
        assert batch.labels == [whole[key][2] for key in batch.key if key not in bad]
        assert all(f"clip '{one.key}'" in one.reason and batch.key[list(batch.position).index(one.position)] == one.key for one in batch.bad)
        for place, key in enumerate(batch.key):
            is_good = key not in bad
            assert batch.weight[place] == is_good
            np.testing.assert_array_equal(batch.video[place], whole[key][0] * is_good, key)
            np.testing.assert_array_equal(batch.keypoints[place], whole[key][1] * is_good, key)


@pytest.mark.parametrize(("budget", "num_seen", "last", "counted"), [(0, 2, 1, ""), (1, 2, 1, "2"), (2, 8, 2, "3")])
def test_beyond_the_budget_the_batches_before_come_first_and_the_error_says_how_many(
    damaged: Damaged, budget: int, num_seen: int, last: int, counted: str
) -> None:
    says = rf" That is bad clip {counted} of a pass; --max-bad-clips allows {budget}\." if budget else ""
    with opened(damaged.home, max_bad_clips=budget) as made:
        for _ in range(2):
            seen: list[str] = []
            with pytest.raises(ClipError, match=rf"clip '{damaged.bad[last]}'[^']*\.{says}$"):
                for batch in made.training(1):
                    seen += batch.key
            assert seen == list(damaged.training)[:num_seen]
        assert keys_in(made.training(1, consumed=12)) == list(damaged.training)[12:]
