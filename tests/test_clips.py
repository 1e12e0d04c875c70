"""The nouns of clips/: geometry, registry, command line, written-out chance, keypoints, whole files."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips import command
from clips.clip import ClipSpec
from clips.codecs import CODECS
from clips.errors import ClipError, InputError
from clips.files import sha256_of, temporary_name, whole_file, write_once, write_whole
from clips.keypoints import mask_of, points_of
from clips.mix import hash64, mix64, permutation, uniforms
from clips.registry import check_name, resolve

# --- clip, registry, command


@pytest.mark.parametrize("numbers", [(0, 4, 4), (4, 0, 4), (4, 4, -1)])
def test_a_clip_without_a_frame_or_a_pixel_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        ClipSpec(*numbers)


def test_a_spec_knows_its_shapes_and_reads_as_t_h_w() -> None:
    spec = ClipSpec(39, 320, 240)
    assert (spec.video_shape, spec.mask_shape, str(spec)) == ((39, 320, 240, 3), (39, 320, 240), "39x320x240")
    assert ClipSpec(**spec.as_dict()) == spec


def test_an_unknown_name_is_an_error_that_offers_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--codec jpg: unknown; expected one of jpeg, zstd\. Did you mean jpeg\?"):
        check_name(CODECS, "jpg", "--codec")
    with pytest.raises(InputError, match=r"expected one of jpeg, zstd\.$"):  # nothing near: nothing offered
        resolve(CODECS, "qqqqqq", "--codec")


def test_a_registry_imports_only_what_is_chosen() -> None:
    registry = {"good": "json:dumps", "broken": "no_such_module:thing"}
    assert resolve(registry, "good", "--x")([1]) == "[1]"
    with pytest.raises(ModuleNotFoundError):
        resolve(registry, "broken", "--x")


@dataclass(frozen=True)
class Flags:
    """Two flags."""

    names: tuple[str, ...] = ()
    """Some names."""
    count: int = 3
    """A count."""


def test_lists_on_the_command_line_are_separated_by_spaces() -> None:
    assert command.parse(Flags, "prog", "does", ["--names", "a", "b", "--count", "5"]) == Flags(("a", "b"), 5)
    assert command.parse(Flags, "prog", "does", ["--names", "c"], default=Flags(("a",), 7)) == Flags(("c",), 7)


@dataclass(frozen=True)
class Outer:
    """Flags within flags, as training has them."""

    flags: Flags = field(default_factory=Flags)
    folder: Path = Path("here")
    other: Path | None = None


def test_a_flat_config_fills_a_nested_one_again() -> None:
    config = Outer(Flags(("a", "b"), 5), Path("there"))
    flat = command.flatten(config)
    assert flat == {"names": ("a", "b"), "count": 5, "folder": "there", "other": None}
    assert command.with_values(Outer(), json.loads(json.dumps(flat)), "config.json") == config
    assert command.with_values(Outer(), {"count": 4}, "config.json") == Outer(Flags(count=4))
    with pytest.raises(InputError, match=r"config.json: cuont is no flag of this command\. Did you mean count\?"):
        command.with_values(Outer(), {"cuont": 4}, "config.json")


def test_what_a_user_can_cause_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        raise error

    assert command.run(lambda: fail(ClipError("shard x: damaged."))) == 2
    assert capsys.readouterr().err == "error: shard x: damaged.\n"
    assert command.run(lambda: fail(KeyboardInterrupt())) == 130
    assert (command.run(lambda: None), command.run(lambda: 1)) == (0, 1)
    with pytest.raises(ValueError, match="ours"):  # our own faults keep their traceback
        command.run(lambda: fail(ValueError("ours")))


# --- mix


def test_mix64_is_splitmix64() -> None:
    """The first outputs of SplitMix64 from state 0, as published with the generator."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden * k % 2**64 for k in range(1, 6)], np.uint64)
    assert mix64(states).tolist() == expected


def test_mix64_sends_different_numbers_to_different_numbers() -> None:
    low = np.arange(50_000, dtype=np.uint64)
    numbers = np.concatenate([low, ~low])
    assert len(np.unique(mix64(numbers))) == 100_000


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.integers(-(2**70), 2**70), st.text(max_size=5))
def test_a_permutation_holds_every_number_once(count: int, seed: int, name: str) -> None:
    found = permutation(count, seed, name)
    assert sorted(found.tolist()) == list(range(count))
    assert found.tolist() == permutation(count, seed, name).tolist()


def test_chance_is_pinned_for_all_time() -> None:
    """Worked out with Python's whole numbers; a change of any of these changes every order and every crop."""
    assert hash64(0, "train") == 0xB3B6A4C6304184D0
    assert permutation(10, 0, "epoch", 1).tolist() == [2, 3, 4, 6, 8, 7, 1, 5, 9, 0]
    assert uniforms(3, "a").tolist() == [0.06814155734612204, 0.9006725853459199, 0.2983727725111214]


def test_hashes_tell_numbers_texts_and_their_borders_apart() -> None:
    parts: list[tuple[int | str, ...]] = [(1,), ("1",), (1, 1), (11,), ("a", "b"), ("ab",), ("b", "a"), ("", "ab"), ("ab", ""), (-1,), ()]
    assert len({hash64(*one) for one in parts}) == len(parts)


def test_uniforms_are_even_and_below_one() -> None:
    found = uniforms(100_000, 7)
    assert found.min() >= 0 and found.max() < 1
    counts = np.histogram(found, bins=10, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 500  # five standard deviations
    assert found[:5].tolist() == uniforms(5, 7).tolist()  # more of them changes none


# --- keypoints


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["bool", "u1", "i1", "<u2", ">i4", "i8", "u8"]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_points_are_where_numpy_finds_ones_and_give_the_mask_back(shape: tuple[int, int, int], dtype: str, seed: int, fortran: bool) -> None:
    mask = (np.random.RandomState(seed).rand(*shape) < 0.3).astype(dtype)
    given_mask = np.asfortranarray(mask) if fortran else mask
    points = points_of(given_mask)
    assert points.dtype == np.uint16 and points.shape == (int(mask.astype(bool).sum()), 3)
    assert np.array_equal(points, np.argwhere(mask))
    assert np.array_equal(mask_of(points, shape), mask)


def test_a_mask_of_zeros_has_no_points_and_comes_back() -> None:
    points = points_of(np.zeros((3, 5, 7), np.uint8))
    assert points.shape == (0, 3) and not mask_of(points, (3, 5, 7)).any()


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i4", "u8"])
@pytest.mark.parametrize("value", [2, 127])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 6, 6)])  # also in the tail that does not fill eight bytes
def test_another_value_than_0_and_1_is_refused_and_named(dtype: str, value: int, place: tuple[int, int, int]) -> None:
    mask = np.zeros((2, 7, 7), dtype)
    mask[place] = value
    with pytest.raises(ValueError, match=f"holds {value}; expected 0 and 1"):
        points_of(mask)


def test_a_negative_value_is_no_one() -> None:
    with pytest.raises(ValueError, match="holds -1"):
        points_of(np.full((1, 3, 3), -1, np.int8))


def test_a_mask_too_large_for_16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="65535"):
        points_of(np.zeros((1, 1, 65536), np.uint8))


# --- files


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def fail_while_writing() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            assert not path.exists()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_while_writing()
    assert list(tmp_path.iterdir()) == []
    write_whole(path, b"whole")
    with pytest.raises(RuntimeError, match="stop"):
        whole_file_over_an_old_one(path)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"newer")
    assert path.read_bytes() == b"newer"


def whole_file_over_an_old_one(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError("stop")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_get_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "whole", b"")
        write_once(tmp_path / "once", b"")
    finally:
        os.umask(before)
    for name in ("whole", "once"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_the_first_to_take_a_name_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_once(path, b"%d" % number * 1000), range(8)))
    first = path.read_bytes()
    assert len(set(first)) == 1 and len(first) == 1000
    write_once(path, b"later")
    assert path.read_bytes() == first

    def no_links(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    write_once(path, b"later")
    write_once(tmp_path / "other", b"new")
    assert path.read_bytes() == first and (tmp_path / "other").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "plan.json"]


def test_a_config_file_that_is_missing_is_a_folder_or_no_json_says_which(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("--lr 1")
    for name, fault in (("none.json", "no such file"), (".", "cannot be read (Is a directory)"), ("text", "not readable as JSON")):
        with pytest.raises(InputError) as error:
            command.read_values(tmp_path / name, ())
        assert str(error.value).startswith(f"--config {tmp_path / name}: {fault}"), error.value


def test_temporary_names_differ_and_are_hidden(tmp_path: Path) -> None:
    names = {temporary_name(tmp_path / "x.tar") for _ in range(100)}
    assert len(names) == 100
    assert all(name.name.startswith(".x.tar.") and name.parent == tmp_path and name.suffix == ".tmp" for name in names)


def test_sha256_of_a_file_is_hashlibs(tmp_path: Path) -> None:
    for size in (0, 1, 2**20, 2**20 + 1):
        blob = b"\x07" * size
        (tmp_path / "file").write_bytes(blob)
        assert sha256_of(tmp_path / "file") == hashlib.sha256(blob).hexdigest()


def test_the_rooms_of_the_format_import_no_torch() -> None:
    import subprocess

    code = "import sys, clips.synthetic, clips.manifest, clips.command, convert.__main__, clips.codecs.jpeg, clips.codecs.zstd; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert found.stdout.strip() == "False"
