"""Damage of every kind to packed folders is found by verify, and a full, lost or read-only disk harms nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clips.errors import InputError
from clips.manifest import index_path, tar_path
from convert.merge import MergeConfig, merge
from convert.pack import PackConfig, pack
from convert.unpack import UnpackConfig, unpack
from convert.verify import VerifyConfig, verify
from tests.forging import Forged, first, forge
from tests.making import write_home
from tests.packing import convert, not_half_written, tree, use_threads

CODECS = ("zstd", "jpeg")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each codec, with one shard of three clips and a kept array."""
    folder = tmp_path_factory.mktemp("small")
    home = write_home(folder, {"train": {"a": 2, "b": 1}}, frames=3, height=16, width=16)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_threads(monkeypatch)
        for codec in CODECS:
            pack(PackConfig(home, folder / codec, codec=codec, workers=1))
    return folder


@pytest.fixture
def whole(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage."""
    use_threads(monkeypatch)
    for codec in CODECS:
        shutil.copytree(small / codec, tmp_path / codec)
        assert is_whole(tmp_path / codec)
    return tmp_path


def is_whole(folder: Path) -> bool:
    """What verify says without the npz; a refusal of one line is a finding, any other exception fails the test."""
    try:
        return verify(VerifyConfig(folder, workers=1)) == 0
    except InputError as error:
        assert "\n" not in str(error)
        return False


def one_after_another(path: Path, changes: Iterator[tuple[str, bytes]]) -> list[str]:
    """The changes of the file's bytes that were not found."""
    before = path.read_bytes()
    missed = []
    for name, after in changes:
        assert after != before
        path.write_bytes(after)
        if is_whole(path.parent if path.name == "manifest.json" else path.parent.parent):
            missed.append(name)
    path.write_bytes(before)
    return missed


def flips(blob: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """One bit flipped in each of `count` bytes, spread over the whole, the first and the last among them."""
    chance = random.Random(len(blob))
    places = {0, len(blob) - 1, *(chance.randrange(number * len(blob) // count, (number + 1) * len(blob) // count) for number in range(count))}
    for place in sorted(places):
        yield f"byte {place}", blob[:place] + bytes([blob[place] ^ 1 << chance.randrange(8)]) + blob[place + 1 :]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("name", "count"), [("train/train-000000.tar", 300), ("train/train-000000.index.mp", 150), ("manifest.json", 400), ("train/plan.json", 200)]
)
def test_every_flipped_bit_is_found(name: str, count: int, codec: str, whole: Path) -> None:
    path = whole / codec / name
    assert path.stat().st_size >= count
    assert one_after_another(path, flips(path.read_bytes(), count)) == []
    assert is_whole(whole / codec)


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_at_a_tars_border_is_found(codec: str, whole: Path) -> None:
    path = whole / codec / "train/train-000000.tar"
    blob = path.read_bytes()
    lengths = {length for border in range(0, len(blob), 512) for length in (border, border + 1)}
    assert len(lengths) > 50
    assert one_after_another(path, ((f"{length} bytes", blob[:length]) for length in sorted(lengths))) == []
    for other in (index_path(whole / codec, "train", "train-000000"), whole / codec / "manifest.json", whole / codec / "train/plan.json"):
        blob = other.read_bytes()
        assert one_after_another(other, ((f"{length} bytes", blob[:length]) for length in {0, 1, len(blob) // 2, len(blob) - 3})) == []


@pytest.mark.parametrize("suffix", [".tar", ".index.mp"])
def test_a_shard_that_came_or_went_is_found(suffix: str, whole: Path) -> None:
    path = whole / f"zstd/train/train-000000{suffix}"
    shutil.copy(path, path.with_name(f"train-000001{suffix}"))
    assert not is_whole(whole / "zstd")
    path.with_name(f"train-000001{suffix}").unlink()
    assert is_whole(whole / "zstd")
    shutil.copy(whole / f"jpeg/train/{path.name}", path)  # the same clips of another folder
    assert not is_whole(whole / "zstd")
    path.unlink()
    assert not is_whole(whole / "zstd")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("suffix", ["cls", "frames.mp", "json", "keypoints.mp"])
def test_a_changed_byte_of_a_member_is_found_when_all_sums_but_the_jsons_are_made_right(suffix: str, codec: str, whole: Path) -> None:
    """Index, crc32 and sha256 of tar and index agree with the changed byte; nothing that a byte can become is a traceback."""
    chance = random.Random(len(suffix))
    untouched = tree(whole / codec)
    members: dict[str, bytes] = {}
    forge(whole / codec, first(lambda clip: members.update(clip.members)))
    blob = members[suffix]
    missed = []
    for place in sorted(chance.sample(range(len(blob)), min(40, len(blob)))):
        changed = blob[:place] + bytes([blob[place] ^ chance.randrange(1, 256)]) + blob[place + 1 :]
        forge(whole / codec, first(put_into(suffix, changed)))
        if is_whole(whole / codec):
            missed.append((place, blob[place], changed[place]))
    forge(whole / codec, first(put_into(suffix, blob)))
    assert tree(whole / codec) == untouched
    assert missed == []


def put_into(suffix: str, blob: bytes) -> Callable[[Forged], None]:
    return lambda clip: clip.members.update({suffix: blob})


# --- disks that are full, lost or read-only


Mount = Callable[..., Path]


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Mount]:
    """`tmpfs("size=1m")` gives a folder on a file system of its own; again, with "remount,…", changes it."""
    folder = tmp_path / "disk"

    def mount(options: str) -> Path:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    """Twelve shards of a clip, 60 KB each."""
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 8}, "val": {"a": 4}}, frames=8, height=48, width=48)
    return PackConfig(home, tmp_path / "quiet", codec="zstd", shard_mib=0.05, workers=2)


def test_a_full_disk_is_one_clear_line_and_with_more_space_the_bytes_are_those_of_a_quiet_run(packing: PackConfig, tmpfs: Mount) -> None:
    pack(packing)
    disk = tmpfs("size=400k")
    command = ("pack", "--dataset-home", packing.dataset_home, "--output", disk / "out", "--codec", "zstd", "--shard-mib", "0.05", "--workers", "2")
    done = convert(*command)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("error: ") and "No space left on device" in last and "the same command" in last
    assert not_half_written(disk / "out")
    there = {name: blob for name, blob in tree(disk / "out").items() if name.endswith(".index.mp")}
    assert there and there.items() <= tree(packing.output).items()
    tmpfs("remount,size=8m")
    done = convert(*command)
    assert done.returncode == 0 and f"packing {12 - len(there)} shards ({len(there)} of 12 are already there)" in done.stderr, done.stderr
    assert tree(disk / "out") == tree(packing.output)


@pytest.mark.parametrize("size_kib", [0, 4, 8, 12, 16, 100, 700, 760, 800, 840])
def test_wherever_space_ends_it_is_a_refusal_that_the_same_command_mends(size_kib: int, packing: PackConfig, tmpfs: Mount) -> None:
    """From a disk that takes no plan to one that takes everything but the manifest."""
    pack(packing)
    disk = tmpfs("size=4m")
    (disk / "ballast").write_bytes(bytes(max(0, (4096 - size_kib) * 1024)))
    config = replace(packing, output=disk / "out")
    try:
        pack(config)
    except InputError as error:
        assert "No space left on device" in str(error) and "\n" not in str(error)
        assert not_half_written(disk / "out")
    (disk / "ballast").unlink()
    pack(config)
    assert tree(disk / "out") == tree(packing.output)


def test_a_read_only_disk_is_one_clear_line(packing: PackConfig, tmpfs: Mount) -> None:
    disk = tmpfs("size=4m")
    config = replace(packing, output=disk / "out")
    pack(replace(config, task=0, tasks=2))
    before = tree(disk)
    tmpfs("remount,ro")
    for verb in (
        lambda: pack(replace(config, task=1, tasks=2)),
        lambda: pack(replace(config, task=0, tasks=2)),
        lambda: pack(replace(config, output=disk / "other")),
        lambda: unpack(UnpackConfig(small_shards(packing), disk / "npz", workers=1)),
    ):
        with pytest.raises(InputError) as error:
            verb()
        assert "Read-only file system" in str(error.value) and "\n" not in str(error.value)
    assert tree(disk) == before
    tmpfs("remount,rw")
    pack(replace(config, task=1, tasks=2))
    tmpfs("remount,ro")
    with pytest.raises(InputError, match="Read-only file system"):
        merge(MergeConfig(disk / "out"))
    tmpfs("remount,rw")
    merge(MergeConfig(disk / "out"))


def small_shards(packing: PackConfig) -> Path:
    pack(packing)
    return packing.output


def test_verify_leaves_a_read_only_folder_in_peace(packing: PackConfig, tmpfs: Mount) -> None:
    disk = tmpfs("size=4m")
    pack(replace(packing, output=disk / "out"))
    tmpfs("remount,ro")
    assert verify(VerifyConfig(disk / "out", packing.dataset_home, workers=1)) == 0


def test_a_file_in_the_place_of_a_folder_is_one_clear_line(packing: PackConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/val").write_text("a file")
    with pytest.raises(InputError, match="cannot be written") as error:
        pack(replace(packing, output=tmp_path / "out"))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no plan"):
        merge(MergeConfig(tmp_path / "nowhere"))
    assert tar_path(tmp_path, "train", "train-000000") == tmp_path / "train/train-000000.tar"
