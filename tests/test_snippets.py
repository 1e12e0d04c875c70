"""The source: which snippets there are, which cannot be used and why, and what one of them holds."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips import snippets
from clips.clip import ClipSpec
from clips.errors import InputError
from clips.npz import BadNpz
from clips.snippets import (
    SOURCE_PATTERN,
    ArrayNames,
    Home,
    Snippet,
    check_headers,
    class_order,
    find,
    frames_valid,
    from_listing,
    key_of,
    parse_home_name,
    read,
)
from tests.making import HOME, tell_tale_mask, tell_tale_video, write_home

SPEC = ClipSpec(4, 16, 16)


def touch(home: Path, *paths: str) -> Path:
    """Files that `find` counts; their content is for `check_headers`."""
    for path in paths:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(b"x" * 10)
    return home


def save(path: Path, **arrays: Any) -> Path:  # Any: arrays of every kind, good and bad
    """A snippet of SPEC whose arrays are replaced, or left out where None is given."""
    both = {"video": tell_tale_video(0, 4, 16, 16), "keypoints": tell_tale_mask(0, 4, 16, 16)} | arrays
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: array for name, array in both.items() if array is not None})
    return path


def all_of(home: Home) -> list[Snippet]:
    return [snippet for split in home.splits.values() for snippet in split]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


# --- find


def test_every_npz_is_found_sorted_by_key_with_its_label(tmp_path: Path) -> None:
    home = find(write_home(tmp_path, {"train": {"gesture": 3, "nongesture": 4}, "val": {"nongesture": 2}}))
    assert list(home.splits) == ["train", "val"] and home.classes == ("nongesture", "gesture")
    on_disk = sorted(p.relative_to(home.path).as_posix() for p in home.path.rglob("*.npz"))
    assert sorted(s.path for s in all_of(home)) == on_disk
    for split, found in home.splits.items():
        assert [s.key for s in found] == sorted((s.key for s in found), key=str.encode)
        for snippet in found:
            assert snippet.split == split and snippet.path == f"{snippet.key}.npz"
            assert snippet.label == {"nongesture": 0, "gesture": 1}[snippet.class_name]
            assert snippet.file_bytes == (home.path / snippet.path).stat().st_size


def test_keys_are_sorted_by_their_utf8_bytes(tmp_path: Path) -> None:
    names = ["\U0001f600", "\uffee", "z", "Z", "é", "1"]  # in UTF-16 the emoji would come before U+FFEE
    home = find(touch(tmp_path, *(f"train/a/{name}.npz" for name in names)))
    assert [s.key.removeprefix("train/a/") for s in home.splits["train"]] == ["1", "Z", "z", "é", "\uffee", "\U0001f600"]


@pytest.mark.parametrize(
    ("found", "asked", "expected"),
    [
        (["gesture", "nongesture"], (), ("nongesture", "gesture")),
        (["c", "a", "b"], (), ("a", "b", "c")),
        (["gesture", "nongesture", "other"], (), ("gesture", "nongesture", "other")),
        (["a", "b", "c"], ("b", "c", "a"), ("b", "c", "a")),
        (["nongesture", "gesture"], ("gesture", "nongesture"), ("gesture", "nongesture")),
        (["only"], (), ("only",)),
    ],
)
def test_classes_stand_in_label_order(found: list[str], asked: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert class_order(found, asked) == expected


@pytest.mark.parametrize("asked", [("a",), ("a", "b", "d"), ("a", "b", "c", "d"), ("a", "a", "b", "c")])
def test_asked_classes_are_exactly_those_found(asked: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        class_order(["a", "b", "c"], asked)
    assert one_line(error).startswith(f"--classes {' '.join(asked)}: expected")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (HOME, {"name": "ellen_show", "length_ms": 1300, "sample_rate": 1, "iou": 0.55}),
        ("ellen_show_length_650_sample_rate_4_iou_0.500000", {"name": "ellen_show", "length_ms": 650, "sample_rate": 4, "iou": 0.5}),
        ("x_length_1300_iou_thr_0.75", {"name": "x", "length_ms": 1300, "iou": 0.75}),
        ("x_length_1300_sample_rate_2_iou_1", {"name": "x", "length_ms": 1300, "sample_rate": 2, "iou": 1.0}),
        ("snippets", None),
        ("x_length_long_iou_0.5", None),
        (f"{HOME}_backup", None),
    ],
)
def test_a_homes_name_is_parsed(name: str, expected: dict[str, Any] | None) -> None:
    assert parse_home_name(name) == expected


def test_a_home_named_by_a_dot_still_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch(tmp_path / HOME, "train/a/000000000_x.npz"))
    home = find(Path("."))
    assert home.settings is not None and home.settings["length_ms"] == 1300
    assert home.path.name == HOME


def test_times_are_known_where_a_sources_numbers_are_gapless(tmp_path: Path) -> None:
    files = [
        *(f"train/{'ab'[n % 2]}/{n:09d}_whole.npz" for n in (7, 8, 9)),  # over both classes
        *(f"train/a/{n:09d}_gap.npz" for n in (0, 2)),
        "train/a/000000003_twice.npz",
        "train/b/000000003_twice.npz",
        "train/a/nonumber.npz",
        "train/a/000000005_one_more.npz",
    ]
    found = {s.path.split("/")[2]: s for s in find(touch(tmp_path / HOME, *files)).splits["train"]}
    times = {name: (s.begin_ms, s.end_ms) for name, s in found.items()}
    assert [times[f"{n:09d}_whole.npz"] for n in (7, 8, 9)] == [(0, 1300), (1300, 2600), (2600, 3900)]
    assert times["000000000_gap.npz"] == times["000000002_gap.npz"] == times["000000003_twice.npz"] == times["nonumber.npz"] == (None, None)
    assert (found["nonumber.npz"].source, found["nonumber.npz"].index) == ("nonumber", None)
    assert (found["000000005_one_more.npz"].source, found["000000005_one_more.npz"].index) == ("one_more", 5)


def test_without_a_length_in_the_homes_name_times_are_unknown(tmp_path: Path) -> None:
    found = find(touch(tmp_path / "snippets", "train/a/000000000_x.npz", "train/a/000000001_x.npz")).splits["train"]
    assert [(s.index, s.begin_ms, s.end_ms) for s in found] == [(0, None, None), (1, None, None)]


def test_another_source_pattern_is_followed(tmp_path: Path) -> None:
    home = find(touch(tmp_path / HOME, "train/a/talk-3.npz", "train/a/talk-4.npz"), source_pattern=r"^(?P<source>.+)-(?P<index>\d+)$")
    assert [(s.source, s.index, s.begin_ms) for s in home.splits["train"]] == [("talk", 3, 0), ("talk", 4, 1300)]


@pytest.mark.parametrize("pattern", ["(", r"^(?P<index>\w+)_(?P<source>.+)$"])
def test_a_source_pattern_that_cannot_be_used_is_an_error(pattern: str, tmp_path: Path) -> None:
    touch(tmp_path, "train/a/one_two.npz")
    with pytest.raises(InputError) as error:
        find(tmp_path, source_pattern=pattern)
    assert "--source-pattern" in one_line(error)


def test_a_number_too_long_to_store_is_no_running_number(tmp_path: Path) -> None:
    (found,) = find(touch(tmp_path / HOME, f"train/a/{'9' * 30}_x.npz")).splits["train"]
    assert found.index is None and found.source == "x" and found.begin_ms is None


def test_hidden_files_other_files_and_other_folders_are_no_snippets(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1_x.npz", "train/a/.2_x.npz", "train/a/notes.txt", "train/.cache/3_x.npz", "extra/a/4_x.npz", "train/readme.npz")
    assert [s.path for s in all_of(find(tmp_path))] == ["train/a/1_x.npz"]


def test_a_missing_home_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        find(tmp_path / "nowhere")
    assert "nowhere: no such folder" in one_line(error)


@pytest.mark.parametrize("files", [(), ("train/a/x.txt",), ("gesture/1_x.npz",), ("trian/a/1_x.npz",)])
def test_an_empty_home_says_what_was_expected_and_found(files: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path, *files)
    with pytest.raises(InputError) as error:
        find(tmp_path)
    assert "expected {train,val,test}/CLASS/*.npz, found " in one_line(error)
    assert (files[0].split("/")[0] if files else "an empty folder") in one_line(error)


def test_asked_splits_must_exist_and_hold_snippets(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1_x.npz", "val/a/notes.txt")
    for asked in ("test", "val", "tset"):
        with pytest.raises(InputError) as error:
            find(tmp_path, splits=(asked,))
        assert one_line(error).startswith(f"--splits {asked}:")
    assert list(find(tmp_path).splits) == ["train"]


def test_classes_come_from_all_splits_even_where_one_is_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "train/gesture/1_x.npz", "val/nongesture/1_x.npz")
    home = find(tmp_path, splits=("val",))
    assert list(home.splits) == ["val"] and home.classes == ("nongesture", "gesture")
    assert home.splits["val"][0].label == 0


def test_dots_in_a_key_are_replaced_and_a_collision_is_an_error(tmp_path: Path) -> None:
    assert key_of("train/cl.ass/000000001_a.b c é.npz") == "train/cl_ass/000000001_a_b c é"
    touch(tmp_path, "train/a/1_x.y.npz", "train/a/1_x_y.npz")
    with pytest.raises(InputError) as error:
        find(tmp_path)
    text = one_line(error)
    assert "train/a/1_x.y.npz" in text and "train/a/1_x_y.npz" in text and "'train/a/1_x_y'" in text


@pytest.mark.parametrize("name", [b"1_\xff\xfe.npz", b"1_a\nb.npz"])
def test_a_name_that_cannot_be_printed_is_an_error(name: bytes, tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1_x.npz")
    Path(os.fsdecode(os.fsencode(tmp_path / "train/a") + b"/" + name)).write_bytes(b"")
    with pytest.raises(InputError) as error:
        find(tmp_path)
    assert "not a printable UTF-8 name" in one_line(error)


def test_a_link_to_nothing_is_one_bad_snippet_among_the_others(tmp_path: Path) -> None:
    home = write_home(tmp_path, {"train": {"a": 2}})
    (home / "train/a/2_x.npz").symlink_to(tmp_path / "gone.npz")
    snippets = find(home).splits["train"]
    _, _, bad = check_headers(home, snippets, ArrayNames())
    assert len(snippets) == 3 and [one.path for one in bad] == ["train/a/2_x.npz"] and "cannot be read" in bad[0].reason


def test_a_listing_alone_gives_the_same_snippets_as_the_files(tmp_path: Path) -> None:
    home = find(touch(tmp_path / HOME, *(f"train/{'ab'[n % 2]}/{n:09d}_x.npz" for n in range(7)), "train/a/1_é b.npz"))
    listing = [(s.path, s.file_bytes) for s in home.splits["train"]]
    assert from_listing(listing[::-1], home.classes, 1300, SOURCE_PATTERN) == home.splits["train"]


# --- check_headers


def test_every_bad_snippet_is_listed_at_once_with_its_reason(tmp_path: Path) -> None:
    home = tmp_path / HOME
    video, mask = tell_tale_video(0, 4, 16, 16), tell_tale_mask(0, 4, 16, 16)
    made: dict[str, dict[str, Any]] = {
        "lacks_video": {"video": None},
        "lacks_keypoints": {"keypoints": None},
        "pickled": {"notes": np.array([{"a": 1}], dtype=object)},
        "float_video": {"video": video.astype(np.float32)},
        "grey_video": {"video": video[..., 0]},
        "float_mask": {"keypoints": mask.astype(np.float32)},
        "other_shape": {"video": video[:3], "keypoints": mask[:3]},
        "mask_shape": {"keypoints": mask[:, :8]},
    }
    for number in range(5):
        save(home / f"train/a/{number}_good.npz")
    for name, arrays in made.items():
        save(home / f"train/b/9_{name}.npz", **arrays)
    whole = (home / "train/a/0_good.npz").read_bytes()
    (home / "train/b/9_cut.npz").write_bytes(whole[: len(whole) // 2])
    found = all_of(find(home))
    spec, extras, bad = check_headers(home, found, ArrayNames())
    assert spec == SPEC and list(extras) == ["notes"]
    reasons = {one.path.removeprefix("train/b/9_").removesuffix(".npz"): one.reason for one in bad}
    assert reasons.keys() == made.keys() | {"cut"}
    parts = {
        "lacks_video": "no array 'video'; it holds keypoints",
        "lacks_keypoints": "no array 'keypoints'; it holds video (--keypoints optional allows that)",
        "pickled": "'notes' holds pickled objects",
        "float_video": "'video' is float32 (4, 16, 16, 3); expected uint8 (T, H, W, 3)",
        "grey_video": "'video' is uint8 (4, 16, 16); expected uint8 (T, H, W, 3)",
        "float_mask": "'keypoints' is float32 (4, 16, 16); expected an integer or bool mask",
        "other_shape": "'video' is uint8 (3, 16, 16, 3); the others are uint8 (4, 16, 16, 3)",
        "mask_shape": "'keypoints' is uint8 (4, 8, 16); expected (4, 16, 16)",
        "cut": "not a whole npz",
    }
    for name, part in parts.items():
        assert part in reasons[name], reasons[name]
    lines = str(snippets.list_bad(bad, len(found), "Mend them.")).splitlines()
    assert lines[0] == "9 of 14 snippets cannot be used:" and lines[-1] == "Mend them." and len(lines) == 11


@pytest.mark.parametrize(("mode", "num_bad"), [("required", 2), ("optional", 1), ("none", 0)])
def test_keypoints_may_be_required_optional_or_none(mode: Any, num_bad: int, tmp_path: Path) -> None:
    save(tmp_path / "train/a/1_good.npz")
    save(tmp_path / "train/a/2_without.npz", keypoints=None)
    save(tmp_path / "train/a/3_wrong.npz", keypoints=np.zeros((4, 8, 8), np.uint8))
    _, extras, bad = check_headers(tmp_path, all_of(find(tmp_path)), ArrayNames(keypoints_mode=mode))
    assert len(bad) == num_bad and extras == {}


def test_a_home_without_any_usable_video_says_what_the_first_holds(tmp_path: Path) -> None:
    save(tmp_path / "train/a/1_x.npz", video=None, frames=tell_tale_video(0, 4, 16, 16))
    with pytest.raises(InputError) as error:
        check_headers(tmp_path, all_of(find(tmp_path)), ArrayNames())
    assert "frames uint8 (4, 16, 16, 3)" in one_line(error) and "--video-key" in one_line(error)
    spec, extras, bad = check_headers(tmp_path, all_of(find(tmp_path)), ArrayNames(video="frames"))
    assert (spec, extras, bad) == (SPEC, {}, [])


def test_a_wrong_name_for_the_keypoints_says_what_the_first_holds_and_lists_no_file(tmp_path: Path) -> None:
    for number in range(30):
        save(tmp_path / f"train/a/{number}_x.npz")
    with pytest.raises(InputError) as error:
        check_headers(tmp_path, all_of(find(tmp_path)), ArrayNames(keypoints="joints"))
    text = one_line(error)
    assert "none of 30 snippets holds 'joints'" in text and "keypoints uint8 (4, 16, 16)" in text and "--keypoints-key" in text and ".npz" not in text
    assert check_headers(tmp_path, all_of(find(tmp_path)), ArrayNames(keypoints="joints", keypoints_mode="optional"))[2] == []


def test_further_arrays_come_with_the_bytes_of_the_largest(tmp_path: Path) -> None:
    save(tmp_path / "train/a/1_x.npz", flow=np.zeros((4, 5), np.float32), fps=np.array(29.97))
    save(tmp_path / "train/a/2_x.npz", flow=np.zeros((4, 9), np.float32))
    save(tmp_path / "train/a/3_x.npz", words=np.array(["ab", "abc"]))
    _, extras, _ = check_headers(tmp_path, all_of(find(tmp_path)), ArrayNames())
    assert extras == {"flow": 144, "fps": 8, "words": 24} and list(extras) == sorted(extras)


def test_headers_read_by_many_threads_at_once_are_never_taken_for_damaged(tmp_path: Path) -> None:
    """CPython 3.11's ast, which numpy parses headers with, keeps its depth for all threads together: one of 2000 failed without a lock."""
    save(tmp_path / "train/a/1_x.npz")
    found = list(find(tmp_path).splits["train"]) * 2000

    def let_others_run(*_: Any) -> None:
        time.sleep(0)

    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(let_others_run)  # memory is asked for in the middle of parsing
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    try:
        assert check_headers(tmp_path, found, ArrayNames())[2] == []
    finally:
        gc.callbacks.remove(let_others_run)
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)


def test_a_home_of_broken_files_alone_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1_x.npz", "train/a/2_x.npz")
    with pytest.raises(InputError, match=r"none of 2 snippets holds 'video'.*train/a/1_x.npz: not a whole npz"):
        check_headers(tmp_path, all_of(find(tmp_path)), ArrayNames())


# --- read


def test_a_snippet_is_read_as_numpy_reads_it(tmp_path: Path) -> None:
    flow = np.random.RandomState(0).randint(0, 256, (4, 16, 16, 6), dtype=np.uint8)
    path = save(tmp_path / "x.npz", video_OF=flow)
    content = read(path, SPEC, ArrayNames(), ("video_OF", "sometimes_there"))
    with np.load(path) as expected:
        assert np.array_equal(content.video, expected["video"]) and content.video.dtype == np.uint8
        assert content.keypoints is not None and np.array_equal(content.keypoints, expected["keypoints"])
        assert content.points is not None and np.array_equal(content.points, np.argwhere(expected["keypoints"]))
    assert list(content.extras) == ["video_OF"] and np.array_equal(content.extras["video_OF"], flow)


@pytest.mark.parametrize("dtype", ["bool", "i1", "u1", "<i2", ">i4", "i8", "u8"])
def test_a_mask_may_have_any_integer_dtype(dtype: str, tmp_path: Path) -> None:
    mask = tell_tale_mask(3, 4, 16, 16).astype(dtype)
    content = read(save(tmp_path / "x.npz", keypoints=mask), SPEC, ArrayNames())
    assert content.keypoints is not None and content.keypoints.dtype == np.dtype(dtype)
    assert content.points is not None and np.array_equal(content.points, np.argwhere(mask))


@pytest.mark.parametrize("value", [2, 255])
def test_a_mask_with_other_values_is_a_bad_snippet(value: int, tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", keypoints=tell_tale_mask(3, 4, 16, 16) * np.uint8(value))
    with pytest.raises(BadNpz, match=f"array keypoints: the mask holds {value}; expected 0 and 1 alone"):
        read(path, SPEC, ArrayNames())
    assert read(path, SPEC, ArrayNames(keypoints_mode="none")).points is None  # not looked at


def test_another_geometry_is_bad_unless_any_is_taken(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz")
    with pytest.raises(BadNpz, match=r"the others are uint8 \(5, 16, 16, 3\)"):
        read(path, ClipSpec(5, 16, 16), ArrayNames())
    assert read(path, None, ArrayNames()).video.shape == (4, 16, 16, 3)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_only_a_tail_of_zeros_is_padding(lit: list[bool]) -> None:
    video = np.zeros((len(lit), 2, 2, 3), np.uint8)
    video[lit, 1, 0, 2] = 1  # one pixel of one colour is enough
    expected = len(lit) if not any(lit) else max(number for number, one in enumerate(lit) if one) + 1
    assert frames_valid(video) == expected
