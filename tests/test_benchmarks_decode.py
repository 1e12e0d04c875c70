"""The decoders' benchmark decodes what it says and says what it measured, on a few small clips; never how long it took."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from benchmarks import decode_ways
from benchmarks.decode import DecodeConfig, Measured, Setting, bench_decode, default_threads, kinds_of, settings_of
from benchmarks.decode_report import Row, choice, rows_of
from benchmarks.decode_ways import Buffers, Decoder, InThreads, MemorySource, make_up, opener, read_clips, why_not
from benchmarks.result import Result, read_results, result, write_results
from clips.clip import ClipSpec
from clips.errors import InputError
from convert.pack import PackConfig, pack
from loaders.decode import RawBatch
from tests.making import write_home
from tests.packing import use_threads

STORED, SPEC = ClipSpec(7, 40, 40), ClipSpec(4, 24, 24)
SMALL = DecodeConfig(quick=True, threads=(1,), decoders=("simplejpeg", "zstd-resized"))
NO_GPU = "torch sees no GPU here"
has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return MemorySource(make_up(3, STORED), STORED.height, 90)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def batches_of(way: InThreads, num_batches: int, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What a way has in its buffers when it tells of a batch."""
    seen: list[np.ndarray] = []

    def look(self: InThreads, raw: RawBatch) -> None:
        seen.append(raw.video.copy())

    monkeypatch.setattr(InThreads, "_upload", look)
    assert len(list(way.run(num_batches))) == num_batches
    way.close()
    return seen


def expected(source: MemorySource, num_clips: int) -> list[tuple[np.ndarray, Any]]:
    """The stored frames of the first clips asked for, by simplejpeg itself, and the view of each."""
    found = []
    for request in islice(source.requests(SPEC.frames), num_clips):
        chosen = request.choose(source.facts[request.number].frames_valid)
        found.append((np.stack([simplejpeg.decode_jpeg(source.blobs[request.number][frame]) for frame in chosen]), request.view))
    return found


def test_threads_decode_the_chosen_frames_of_every_clip_in_turn(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    way = InThreads(source, SPEC, 2, 2, Buffers(False), "")
    found = np.concatenate(batches_of(way, 3, monkeypatch))
    for video, (frames, _) in zip(found, expected(source, 6), strict=True):
        assert np.array_equal(video, frames)


def test_finished_clips_are_the_view_resized(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    way = InThreads(source, SPEC, 3, 1, Buffers(False), "resized")
    for video, (frames, view) in zip(np.concatenate(batches_of(way, 1, monkeypatch)), expected(source, 3), strict=True):
        box = view.box
        region = torch.from_numpy(frames[:, box.top : box.top + box.height, box.left : box.left + box.width].copy()).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(region.double(), (24, 24), mode="bilinear").permute(0, 2, 3, 1)
        resized = resized.flip(2) if view.flip else resized
        assert np.abs(video - resized.numpy()).max() <= 1.01


def test_zstd_gives_back_what_pillow_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = make_up(2, STORED)
    source = MemorySource(clips, 32, None)
    whole = ClipSpec(7, 32, 32)
    assert source.stored == whole and source.codec.lossless
    found = np.concatenate(batches_of(InThreads(source, whole, 2, 1, Buffers(False), ""), 1, monkeypatch))
    for video, (fact, frames), request in zip(found, clips, source.requests(7), strict=False):
        for frame, number in zip(video, request.choose(fact.frames_valid), strict=True):
            assert np.array_equal(frame, np.asarray(Image.fromarray(frames[number]).resize((32, 32), Image.Resampling.BICUBIC)))


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_dali_gives_the_clips_that_our_threads_give(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    from loaders.dali_graph import DaliGraph

    run, seen = DaliGraph.run, []

    def watched(self: DaliGraph, batches: Iterator[RawBatch]) -> Iterator[Any]:
        for done in run(self, batches):
            seen.append(done.video.numpy().copy())
            yield done

    monkeypatch.setattr(DaliGraph, "run", watched)
    way = opener("dali-cpu", source, SPEC, 3, 1, None, Buffers(False))()
    assert len(list(way.run(2))) == 2
    way.close()
    ours = batches_of(InThreads(source, SPEC, 3, 1, Buffers(False), "resized"), 2, monkeypatch)
    assert len(seen) == 2 and all(np.abs(a.astype(int) - b).mean() < 1 for a, b in zip(seen, ours, strict=True))


class FakeDecoder:
    """Stands for nvImageCodec's, which does not work without a GPU: refuses empty streams."""

    def __init__(self, **how: Any) -> None:
        self.how = how
        self.seen: list[list[bytes]] = []

    def decode(self, streams: list[bytes]) -> list[bytes | None]:
        self.seen.append(streams)
        return [stream or None for stream in streams]


def test_nvimagecodec_is_given_the_chosen_frames_and_what_it_refuses_is_an_error(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(Decoder=FakeDecoder, CodeStream=bytes, Backend=lambda kind, load_hint: (kind, load_hint), HW_GPU_ONLY="hw")
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=library))
    monkeypatch.setattr(decode_ways, "wait", lambda device: None)
    way: Any = opener("nvimgcodec-engine", source, SPEC, 2, 3, None, Buffers(False))()
    assert way._decoder.how["max_num_cpu_threads"] == 3 and way._decoder.how["backends"] == [("hw", 1.0)]
    assert len(list(way.run(2))) == 2
    frames = [simplejpeg.decode_jpeg(blob) for blobs in way._decoder.seen for blob in blobs]
    assert np.array_equal(np.stack(frames), np.concatenate([video for video, _ in expected(source, 4)]))
    monkeypatch.setattr(source, "blobs", [[b""] * len(blobs) for blobs in source.blobs])
    with pytest.raises(RuntimeError, match="8 of 8 frames were refused"):
        list(way.run(1))


def test_a_damaged_frame_ends_its_way_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build = MemorySource.__init__

    def damaged(self: MemorySource, clips: Any, shorter: int, quality: int | None) -> None:
        build(self, clips, shorter, quality)
        if quality is None:
            self.blobs[0] = [blob[:-1] + b"?" for blob in self.blobs[0]]

    monkeypatch.setattr(MemorySource, "__init__", damaged)
    results = bench_decode(SMALL)
    assert {one.name.split("/")[3] for one in results} == {"simplejpeg"}
    assert "zstd-resized/1_threads: failed, RuntimeError: clip '" in capsys.readouterr().out


def test_every_decoder_is_measured_or_named(no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, path, plot = torch.get_num_threads(), tmp_path / "results.jsonl", tmp_path / "plot.png"
    write_results(path, [result("other/one", "ms", [1.0])], "ext4")
    before = path.read_bytes()
    config = DecodeConfig(quick=True, threads=(2, 1), quality=(90, 75), json=path, plot=plot)
    results = {one.name: one for one in bench_decode(config)}
    there = ["simplejpeg", "simplejpeg-resized", "zstd", "zstd-resized", *(["dali-cpu"] if has_dali else [])]
    ways = {f"4x96/{'raw' if 'zstd' in decoder else 'q90'}/{decoder}/{number}_threads" for decoder in there for number in (1, 2)}
    ways |= {f"{clips}/{'raw' if 'zstd' in decoder else 'q90'}/{decoder}/2_threads" for decoder in there for clips in ("8x96", "4x64")}
    ways |= {f"4x96/q75/{decoder}/2_threads" for decoder in there if "zstd" not in decoder}
    units = {"speed": "clips/s", "cpu": "CPU ms/clip", "host": "% of a core"}
    assert set(results) == {f"decode/{way}/{kind}" for way in ways for kind in units}
    for name, one in results.items():
        assert one.unit == units[name.split("/")[5]] and one.n == 2 and 0 <= one.spread[0] <= one.value <= one.spread[1]
    assert path.read_bytes().startswith(before)
    written = [line.split('"', 4)[3] for line in path.read_text().splitlines()]
    assert Counter(written) == Counter(["other/one", *results])  # each name once
    assert read_results(path)["decode/4x96/q90/simplejpeg/1_threads/speed"].value == results["decode/4x96/q90/simplejpeg/1_threads/speed"].value
    told = capsys.readouterr().out
    for decoder in set(get_args(Decoder)) - set(there):
        assert f"{decoder}: not measured, {NO_GPU if decoder != 'dali-cpu' else 'NVIDIA DALI is not installed'}" in told
    assert f"GPU decoders were not measured: {NO_GPU}" in told
    assert plot.read_bytes()[:4] == b"\x89PNG" and torch.get_num_threads() == threads


def test_packed_clips_are_encoded_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = write_home(tmp_path / "npz", {"train": {"gesture": 3, "nongesture": 2}}, frames=7, height=40, width=40)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        pack(PackConfig(home, tmp_path / "shards", "zstd"))
    clips = read_clips(tmp_path / "shards", "train", 3)
    assert [fact.key for fact, _ in clips] == sorted(path.relative_to(home).with_suffix("").as_posix() for path in home.rglob("*.npz"))[::2]
    for fact, video in clips:
        assert np.array_equal(video, np.load(home / f"{fact.key}.npz")["video"])
    config = replace(SMALL, dataset_home=tmp_path / "shards", frames=(4,), quality=(90,), store_size=(40,), size=24)
    results = bench_decode(config)
    assert results and all(one.config["source"] == "encoded anew" and one.config["clips"] == 3 for one in results)
    assert "encoded anew" in capsys.readouterr().out
    with pytest.raises(InputError, match="--store-size 64: expected 16"):
        bench_decode(replace(config, store_size=(64,)))


def test_what_was_measured_before_a_kill_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure, taken = Measured.measure, []

    def watched(self: Measured) -> None:
        measure(self)
        taken.append(self.name)
        if len(taken) == 6:  # two to calibrate, two of the first round, two of the second
            assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3 * 3
            raise KeyboardInterrupt

    monkeypatch.setattr(Measured, "measure", watched)
    with pytest.raises(KeyboardInterrupt):
        bench_decode(replace(SMALL, json=tmp_path / "results.jsonl"))
    found = read_results(tmp_path / "results.jsonl")
    assert {(one.name.split("/")[3], one.n) for one in found.values()} == {("simplejpeg", 1), ("zstd-resized", 2)}


def test_what_comes_after_the_minutes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no decoder was measured"):
        bench_decode(replace(SMALL, minutes=1e-9))
    assert "decode/8x96/raw/zstd-resized/1_threads: left out, --minutes 1e-09 are over" in capsys.readouterr().out


def test_all_but_the_base_is_varied_one_at_a_time() -> None:
    config = DecodeConfig(threads=(4, 1), hw_decoder_load=(0.65, 0.0, 1.0))
    base = Setting(16, 90, 320)
    assert settings_of(config) == [base, Setting(39, 90, 320), Setting(16, 75, 320), Setting(16, 95, 320), Setting(16, 90, 256)]
    mixed = [("dali-mixed", 4, 0.65), ("dali-mixed", 4, 0.0), ("dali-mixed", 4, 1.0), ("dali-mixed", 1, 0.65)]
    assert kinds_of(config, ["zstd", "dali-mixed"], base) == [("zstd", 4, None), ("zstd", 1, None), *mixed]
    assert kinds_of(config, ["zstd", "dali-mixed"], Setting(16, 75, 320)) == [("dali-mixed", 4, 0.65)]  # no quality in zstd
    assert kinds_of(config, ["zstd", "dali-mixed"], Setting(16, 90, 256)) == [("zstd", 4, None), ("dali-mixed", 4, 0.65)]
    assert [default_threads(cores) for cores in (1, 2, 3, 6, 16)] == [(1,), (2, 1), (2, 1, 3), (4, 1, 2, 6), (4, 1, 2, 8, 16)]


class Counting:
    """A way whose every batch takes a tick of the clock."""

    def run(self, num_batches: int) -> Iterator[None]:
        yield from [None] * num_batches

    def close(self) -> None:
        pass


def test_the_clock_runs_from_the_first_batch_to_the_last_and_cpu_time_all_along(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = iter([0.0, 10.0, 14.0]), iter([0.0, 6.0])  # 10 s to the first batch, 4 s for three more
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu))
    one = Measured("x", 2, {}, 3)
    one.way = Counting()
    one.measure()
    assert one.clips_per_s == [3 * 2 / 4] and one.cpu_ms == [6000 / 8] and one.host_percent == [pytest.approx(100 * 6 / 14)]


def test_a_way_that_was_calibrated_has_measured_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    one = Measured("x", 2, {}, 3)
    one.open(Counting, 20.0)  # three batches took a tick: sixty take twenty
    assert one.batches == 60 and one.clips_per_s == one.cpu_ms == one.host_percent == []


def row(decoder: str, threads: int, share: float | None, speed: tuple[float, float], cpu: tuple[float, float], gpu: str | None) -> Row:
    config = {"decoder": decoder, "threads": threads, "share": share, "gpu": gpu, "source": "made up", "cores": 8, "frames": 16, "quality": 90}
    found = {"speed": result("", "clips/s", speed), "cpu": result("", "CPU ms/clip", cpu)}
    return Row("16x320 q90", config, found)


def test_the_choice_is_of_what_was_measured_and_the_simpler_one_where_spreads_meet() -> None:
    gpu = "NVIDIA H200"
    rows = [
        row("simplejpeg-gpu", 1, None, (100, 120), (9, 9), gpu),
        row("dali-mixed", 1, 0.65, (150, 160), (5, 5), gpu),
        row("dali-mixed", 1, 1.0, (300, 320), (1, 1), gpu),
        row("simplejpeg-gpu", 4, None, (400, 500), (9, 9), gpu),
        row("dali-mixed", 4, 0.65, (480, 490), (5, 5), gpu),
        row("simplejpeg-gpu", 8, None, (900, 900), (9, 9), gpu),
    ]
    said = choice(rows, {})
    assert "NVIDIA H200 take with 1 thread --loader dali --hw-decoder-load 1, 310 [300-320] clips/s against 110 [100-120]; " in said
    assert "with 4 threads --loader webdataset, 450 [400-500] clips/s against 485 [480-490]." in said
    assert "8 threads" not in said and "(16x320 q90, made up, 8 cores.)" in said
    assert "were not both measured" in choice(rows[:1], {})


def test_a_node_without_a_gpu_is_told_of_its_cpu_alone() -> None:
    rows = [
        row("simplejpeg", 2, None, (900, 900), (2, 2), None),
        row("simplejpeg-resized", 1, None, (90, 90), (9, 9), None),
        row("simplejpeg-resized", 2, None, (100, 120), (7, 9), None),
        row("dali-cpu", 2, None, (200, 220), (20, 22), None),
    ]
    missing = {"dali-mixed": NO_GPU, "nvimgcodec": NO_GPU}
    said = choice(rows, missing)
    assert "take --loader webdataset: 8.0 [7.0-9.0] (simplejpeg-resized) against 21.0 [20.0-22.0] (dali-cpu)" in said
    assert said.count(NO_GPU) == 1 and "GPU decoders were not measured" in said
    faster = row("dali-cpu", 2, None, (200, 220), (5, 6), None)
    assert "take --loader dali: 5.5" in choice([*rows[:3], faster], missing)
    assert "were not both measured" in choice(rows[:3], missing)


def test_rows_come_from_the_results_of_this_benchmark_alone() -> None:
    facts = {"decoder": "dali-mixed", "threads": 4, "share": 1.0}
    names = ["decode/16x320/q90/dali-mixed/4_threads/share_1/speed", "decode/16x320/q90/dali-mixed/4_threads/share_1/gpu_memory"]
    others = ["decode/16x320/q90/dali-mixed/8_threads/share_1/gpu_memory", "loader/floor/cpu"]
    results: dict[str, Result] = {name: result(name, "", [2.0], facts) for name in names + others}
    (found,) = rows_of(results)
    assert found.clips == "16x320 q90" and set(found.found) == {"speed", "gpu_memory"} and found.share == 1.0
    assert found.told("speed", 0, 16) == "32 [32-32]" and found.told("cpu", 1) == "-"


def test_table_and_plot_come_from_written_results_without_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"frames": 16, "quality": 90, "gpu": "NVIDIA X", "source": "made up", "cores": 8}
    kinds = {"speed": [300.0, 400.0], "cpu": [1.0, 2.0], "host": [50.0], "gpu_memory": [1.25]}
    ways = [("dali-mixed", 4, 0.65), ("dali-mixed", 4, 1.0), ("simplejpeg-gpu", 4, None), ("simplejpeg-gpu", 1, None)]
    for decoder, threads, share in ways:
        told = facts | {"decoder": decoder, "threads": threads, "share": share}
        name = f"decode/16x320/q90/{decoder}/{threads}_threads" + (f"/share_{share:g}" if share is not None else "")
        write_results(tmp_path / "results.jsonl", [result(f"{name}/{kind}", "", values, told) for kind, values in kinds.items()], "none")
    for name in ("one.png", "two.png"):
        assert bench_decode(DecodeConfig(decoders=(), json=tmp_path / "results.jsonl", plot=tmp_path / name)) == []
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    said = capsys.readouterr().out
    assert "5600 [4800-6400]" in said and "1.25" in said and "0.65" in said and "NVIDIA X take with 4 threads --loader webdataset" in said
    with pytest.raises(InputError, match="no decoder was measured"):
        bench_decode(DecodeConfig(decoders=(), json=tmp_path / "none.jsonl"))


def test_a_decoder_that_is_not_at_hand_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decode_ways, "find_spec", lambda name: None)

    def no_wheel() -> None:
        raise InputError("--loader dali: no wheel")

    monkeypatch.setattr(decode_ways, "check_wheel", no_wheel)
    assert why_not("simplejpeg") is why_not("zstd-gpu") is None
    assert why_not("dali-cpu") == why_not("dali-mixed") == "no wheel"
    assert why_not("nvimgcodec-hybrid") == "nvidia.nvimgcodec is not installed; it comes with the extra dali"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"clips": 0}, "--clips 0"),
        ({"threads": (2, 0)}, "--threads 2 0"),
        ({"frames": ()}, "--frames"),
        ({"hw_decoder_load": (0.5, 1.5)}, "--hw-decoder-load 0.5 1.5"),
        ({"seconds": 0.0}, "--seconds 0"),
        ({"decoders": ()}, "--decoders: none given"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DecodeConfig(**flags)


@pytest.mark.gpu
def test_every_decoder_runs_on_a_gpu(tmp_path: Path) -> None:
    results = bench_decode(DecodeConfig(quick=True, threads=(2,), quality=(90,), json=tmp_path / "results.jsonl", plot=tmp_path / "plot.png"))
    measured = {one.name.split("/")[3] for one in results if one.name.endswith("/speed")}
    assert measured >= {decoder for decoder in get_args(Decoder) if why_not(decoder) is None} - {"nvimgcodec-engine"}  # not every GPU has an engine
    assert all(one.value >= 0 for one in results if one.name.endswith("/gpu_memory"))
