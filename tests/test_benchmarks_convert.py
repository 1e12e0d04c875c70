"""The benchmarks of packing and storage measure what they say, on a few made-up clips; never how long it took."""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
from PIL import Image

from benchmarks import convert
from benchmarks.convert import ConvertBenchConfig, bench_convert, chosen_clips
from benchmarks.plots import Panel, Point, draw
from benchmarks.result import Result, cell, markdown, result
from benchmarks.storage import StorageBenchConfig, bench_storage, ways
from clips.errors import InputError
from clips.snippets import find
from tests.making import HOME, write_home
from tests.packing import members_of, source_of

COUNTS = {"train": {"gesture": 5, "nongesture": 4}, "test": {"nongesture": 1}}  # four sources: 4 + 1, 3 + 1 and 1 snippets


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("snippets"), COUNTS, frames=5, height=48, width=40)


def check(results: list[Result], units: dict[str, str]) -> None:
    """Every name once, its unit, and a value among what was measured."""
    assert {one.name: one.unit for one in results} == units
    for one in results:
        assert one.n >= 1
        assert 0 < one.spread[0] <= one.value <= one.spread[1]
        assert one.config["clips"] == 4


def lines_of(path: Path) -> list[dict[str, object]]:
    """The results as they were written, which name neither host nor folder."""
    text = path.read_text()
    assert str(path.parent) not in text and HOME not in text and '"host"' not in text
    return [json.loads(line) for line in text.splitlines()]


def test_all_ways_to_pack_are_measured_in_one_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = {"nobody's": ("no_such_library", lambda module: module.decompress)}
    monkeypatch.setattr(convert, "INFLATES", {name: convert.INFLATES[name] for name in ("zlib", "isal")} | missing)
    results = bench_convert(ConvertBenchConfig(home, clips=4, rounds=2, json=tmp_path / "results.jsonl"))
    units = {f"convert/inflate/{name}": "CPU ms/clip" for name in ("zlib", "isal", "np.load")}
    units |= {f"convert/{name}/cpu": "CPU ms/clip" for name in ("floor", "ours", "plain")}
    units |= {f"convert/{name}/speed": "clips/s" for name in ("floor", "ours", "plain")}
    units |= {"convert/ours_over_floor": "ratio", "convert/plain_over_ours": "ratio", "convert/memory_above_imports": "MB"}
    memory = [one for one in results if one.name == "convert/memory_above_imports"]
    assert [one.config["clips_per_shard"] for one in memory] == [2, 3]
    check([one for one in results if one not in memory] + memory[:1], units)
    assert all(one.n == 2 for one in results if one not in memory)
    assert len(lines_of(tmp_path / "results.jsonl")) == len(results)
    assert "nobody's: not installed, left out" in capsys.readouterr().out


def test_the_plain_way_stores_the_frames_and_points_that_we_store(home: Path, tmp_path: Path) -> None:
    found = find(home)
    chosen, recipe = chosen_clips(found, 4)
    convert._ours(found, chosen, recipe, tmp_path)
    convert._plain(found, chosen, recipe, tmp_path)
    plain = {}
    with tarfile.open(tmp_path / "plain-000000.tar") as tar:
        plain = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]  # all are files
    (tmp_path / "plain-000000.tar").unlink()
    ours = members_of(tmp_path)
    assert plain.keys() == ours.keys() and len(ours) == 16
    for name in ours:
        if name.endswith(".mp"):
            assert msgpack.unpackb(plain[name]) == msgpack.unpackb(ours[name])
        elif name.endswith(".json"):
            arrays = json.loads(ours[name])["arrays"]
            assert json.loads(plain[name])["sha256"] == {array: told["sha256"] for array, told in arrays.items()}
        else:
            assert plain[name] == ours[name]


@pytest.mark.parametrize("name", convert.INFLATES)
def test_every_inflate_gives_the_arrays_of_the_npz(home: Path, name: str) -> None:
    inflate = convert._inflate(name)
    if inflate is None:
        pytest.skip(f"{name} is not installed")
    found = find(home)
    chosen, recipe = chosen_clips(found, 1)
    video, mask = convert._members(home / chosen[0].path, recipe.names)
    arrays = source_of(home, chosen[0].key)
    for member, array in ((video, arrays["video"]), (mask, arrays["keypoints"])):
        inflated = inflate(member.blob, member.num_bytes)
        assert inflated[member.data_offset :] == array.tobytes()
        assert zlib.crc32(inflated) == member.crc32
    assert video.is_video and not mask.is_video


def test_clips_are_taken_from_all_sources_in_turn(home: Path) -> None:
    found = find(home)
    keys = [[snippet.source for snippet in chosen_clips(found, num)[0]] for num in (1, 5, 6, 100)]
    sources = sorted({snippet.source for snippets in found.splits.values() for snippet in snippets})
    assert [len(one) for one in keys] == [1, 5, 6, 10]
    assert keys[1] == sources and keys[2] == [*sources, sources[1]]
    assert len({snippet.key for snippet in chosen_clips(found, 100)[0]}) == 10


def test_snippets_that_are_not_compressed_are_refused(tmp_path: Path) -> None:
    home = write_home(tmp_path, {"train": {"gesture": 1}})
    (path,) = home.rglob("*.npz")
    with np.load(path) as arrays:
        held = dict(arrays)
    np.savez(path, **held)
    with pytest.raises(InputError, match=r"'video' is not compressed; expected a file of np\.savez_compressed\.$"):
        bench_convert(ConvertBenchConfig(home, clips=1))


@pytest.mark.parametrize("config", [ConvertBenchConfig, StorageBenchConfig])
def test_no_clips_and_no_rounds_are_refused(config: type[ConvertBenchConfig] | type[StorageBenchConfig]) -> None:
    for clips, rounds in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="expected at least 1 of each"):
            config(Path("home"), clips=clips, rounds=rounds)


def test_storage_is_measured_for_every_way(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_lines, plot = tmp_path / "results.jsonl", tmp_path / "storage.png"
    results = bench_storage(StorageBenchConfig(home, clips=4, rounds=2, json=json_lines, plot=plot))
    names = ["jpeg_50", "jpeg_75", "jpeg_85", "jpeg_90", "jpeg_95", "jpeg_98", "jpeg_90_4:2:2", "jpeg_90_4:4:4", "jpeg_90_progressive"]
    lossless = ["zstd_1", "zstd_3", "zstd_9"]
    measured = {"size_mean": "MB/clip", "share_of_npz_mean": "%", "decode": "CPU ms/clip", "encode": "CPU ms/clip"}
    units = {f"storage/{name}/{what}": unit for name in names + lossless for what, unit in measured.items()}
    check(results, units | {f"storage/{name}/psnr_mean": "dB" for name in names})
    values = {one.name: one.value for one in results}
    for what in ("size_mean", "psnr_mean"):
        by_quality = [values[f"storage/jpeg_{quality}/{what}"] for quality in (50, 75, 85, 90, 95, 98)]
        assert by_quality == sorted(by_quality)
    assert len(lines_of(json_lines)) == len(results)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(names + lossless) and len({line.count("|") for line in rows}) == 1
    assert sum("| exact | exact |" in line for line in rows) == len(lossless)
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


def test_frames_are_stored_smaller_only_where_they_are_larger() -> None:
    assert [[way.store_size for way in ways(side) if way.store_size] for side in (320, 256, 100)] == [[256, 224], [224], []]


def test_each_way_writes_what_its_name_says() -> None:
    frame = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    for way in ways(320):
        blob, out = way.codec.encode(frame), np.zeros_like(frame)
        way.codec.decode(blob, out)
        if way.codec.lossless:
            assert np.array_equal(out, frame)
            continue
        frame_header = next(blob.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in blob)
        assert blob[frame_header + 1] == (0xC2 if way.family == "progressive" else 0xC0)
        sampling = blob[frame_header + 11]  # of luma, across and down, against 1 × 1 of colour
        assert sampling == {"jpeg 90, 4:2:2": 0x21, "jpeg 90, 4:4:4": 0x11}.get(way.name, 0x22)


def test_a_result_named_a_mean_is_one() -> None:
    assert (result("size_mean", "MB", [1, 2, 6]).value, result("size", "MB", [1, 2, 6]).value) == (3, 2)


def test_tables_are_markdown_and_cells_tell_the_spread() -> None:
    assert cell([3.0, 1.0, 2.26], 1) == "2.3 [1.0-3.0]"
    assert markdown(["way", "MB"], [["a", "1"], ["b", "2"]]) == "| way | MB |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"


def test_the_same_points_give_the_same_picture(tmp_path: Path) -> None:
    panel = Panel("title", "MB", "ms", [Point(0.1, 1.0, "a", "one"), Point(1.0, 2.0, "b", "one"), Point(0.5, 1.5, "c", "two", (-1, -1))], from_zero=True)
    pictures = []
    for name, panels in (("a", [panel]), ("b", [panel]), ("c", [panel, panel])):
        draw(tmp_path / f"{name}.png", panels)
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1]
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "c.png") as two:
        assert (two.width, two.height) == (2 * one.width, one.height)
        assert len(np.unique(np.asarray(one.convert("L")))) > 10  # something is drawn
