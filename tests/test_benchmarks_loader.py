"""The loader's benchmark measures what it says, on a few clips; never how long it took."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from benchmarks import rivals
from benchmarks.floor import Floor, PassClips, pass_clips
from benchmarks.loader import LEGEND, LoaderBenchConfig, bench
from benchmarks.ours import Finished, HandedOver, Setting, Where, opened
from benchmarks.plot import PlotConfig, plot
from benchmarks.result import measure, read_results, result, write_results
from benchmarks.rivals import Batches, Task, careful, documented
from clips.clip import ClipSpec
from clips.codecs.jpeg import JpegCodec
from clips.errors import InputError
from convert.pack import PackConfig, pack
from loaders.sample import View, frames_uniform, whole_view
from tests.making import write_home
from tests.packing import use_threads

# Python 3.12 and later say so of DataLoader's workers wherever a thread lives.
pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")
# webdataset leaves its files to the garbage collector
unclosed = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")

SPEC = ClipSpec(4, 24, 24)
CLIPS = 8
RIVALS = {"webdataset_as_documented", "webdataset_with_care"}
OURS = {"webdataset", "webdataset_device_path", "webdataset_device_path_process", "npz"}
FLOORS = {"floor", "floor+read"}
UNITS = {"cpu": "CPU ms/clip", "over_floor": "ratio", "speed": "clips/s", "first_batch": "ms", "open_and_first_batch": "ms", "memory": "MB"}
MakeRival = Callable[[Sequence[str], Task], Batches]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight clips in two shards, and the same as npz; one has a padded tail."""
    folder = tmp_path_factory.mktemp("benchmark")
    home = write_home(folder / "npz", {"train": {"gesture": 5, "nongesture": 3}}, frames=7, height=40, width=48, padded_every=5)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        pack(PackConfig(home, folder / "shards", shard_mib=0.07))
    return folder / "shards", home


@pytest.fixture
def chosen(homes: tuple[Path, Path]) -> PassClips:
    return pass_clips(homes[0], "train", SPEC.frames, CLIPS, 1)


def one_pass(make: MakeRival, chosen: PassClips) -> list[tuple[Sequence[str], torch.Tensor, Sequence[int]]]:
    """All batches of a rival that works in this process."""
    batches = list(make([str(tar) for tar in chosen.tars], Task(SPEC.frames, SPEC.height, 4, 0)))
    gc.collect()  # what webdataset leaves behind is noticed in this test and not in the next
    return batches


def test_every_row_is_measured_in_one_run(homes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, home = homes
    threads, path = torch.get_num_threads(), tmp_path / "results.jsonl"
    results = {one.name: one for one in bench(LoaderBenchConfig(shards, home, frames=4, size=24, threads=2, quick=True, json=path))}
    expected = {f"loader/{row}/{kind}" for row in FLOORS | OURS | RIVALS for kind in UNITS if row not in FLOORS or kind in ("cpu", "over_floor", "speed")}
    assert set(results) == expected
    for name, one in results.items():
        assert one.unit == UNITS[name.split("/")[2]]
        assert one.n == (1 if name.split("/")[2] in ("memory", "first_batch", "open_and_first_batch") else 2)
        assert all(map(math.isfinite, (one.value, *one.spread))) and one.spread[0] <= one.value <= one.spread[1]
        assert one.value > 0 or name.endswith("/memory")
        assert one.config["clips"] == 24  # quick: at least 24
    assert results["loader/floor/over_floor"].spread == (1, 1)
    assert {name: (one.value, one.n) for name, one in read_results(path).items()} == {name: (one.value, one.n) for name, one in results.items()}
    told = capsys.readouterr().out
    assert "webdataset with care" in told and told.rstrip().endswith(LEGEND)
    assert all(word in LEGEND for word in ("floor+read", "over floor", "device path", "as documented", "with care", "[least-greatest]"))
    assert torch.get_num_threads() == threads


def test_shards_in_the_place_of_npz_are_refused(homes: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="expected npz snippets"):
        bench(LoaderBenchConfig(homes[0], homes[0]))


def test_an_npz_folder_of_other_clips_is_refused(homes: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_home(tmp_path, {"train": {"gesture": 2, "nongesture": 1}}, frames=7)
    with pytest.raises(InputError, match="has no clip 'train/gesture/000000002"):
        bench(LoaderBenchConfig(homes[0], other, frames=4, size=24, threads=1, quick=True, rivals=False))


def test_a_pass_reads_whole_shards_and_gives_each_worker_as_many(homes: tuple[Path, Path]) -> None:
    all_tars = sorted((homes[0] / "train").glob("*.tar"))
    assert len(all_tars) == 2
    first = pass_clips(homes[0], "train", 4, 1, 1)
    assert first.tars == tuple(all_tars[:1]) and first.times == 1 and first.num_clips == len(first.clips)
    assert pass_clips(homes[0], "train", 4, 1, 3).times == 3  # one tar, three workers
    both = pass_clips(homes[0], "train", 4, 20, 2)
    assert both.tars == tuple(all_tars) and both.times == 3 and both.num_clips == 24


@pytest.mark.parametrize("reading", [False, True])
def test_the_floor_decodes_the_frames_that_our_loader_decodes(chosen: PassClips, reading: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: Counter[bytes] = Counter()
    decode = JpegCodec.decode

    def watched(codec: JpegCodec, blob: bytes | memoryview, out: np.ndarray) -> None:
        decoded[bytes(blob)] += 1
        decode(codec, blob, out)

    monkeypatch.setattr(JpegCodec, "decode", watched)
    floor = Floor(chosen, 2, reading)
    assert sum(floor.clips()) == CLIPS
    floor.close()
    by_floor, decoded = decoded, Counter()
    ours = HandedOver(chosen, Setting(SPEC, 4, 2), "threads", opened(chosen.home, chosen))
    assert list(ours.clips()) == [4, 4]
    ours.close()
    assert by_floor == decoded and sum(decoded.values()) == CLIPS * SPEC.frames


def test_the_floor_sees_a_changed_frame(homes: tuple[Path, Path], chosen: PassClips, tmp_path: Path) -> None:
    tar = tmp_path / "train.tar"
    blob = bytearray(chosen.tars[0].read_bytes())
    blob[chosen.clips[0].offsets[1] + 5] ^= 1
    tar.write_bytes(blob)
    changed = replace(chosen, tars=(tar,), clips=(replace(chosen.clips[0], tar=tar),))
    with pytest.raises(InputError, match="another crc32"):
        Floor(changed, 1, False)


@unclosed
@pytest.mark.parametrize("make", [documented, careful])
def test_rivals_give_the_clips_shapes_and_labels_that_our_loader_gives(chosen: PassClips, make: MakeRival) -> None:
    source = opened(chosen.home, chosen)
    ours = Finished(chosen, Setting(SPEC, 4, 2), source)
    expected = {key: int(label) for batch in ours.loader.training(0) for key, label in zip(batch.key, batch.label, strict=True)}
    ours.close()
    found: dict[str, int] = {}
    for keys, video, labels in one_pass(make, chosen):
        assert video.dtype == torch.uint8 and video.shape == (len(keys), *SPEC.video_shape) and video.is_contiguous()
        found |= {key: int(label) for key, label in zip(keys, labels, strict=True)}
    assert found == expected and len(found) == CLIPS


@unclosed
@pytest.mark.parametrize("make", [documented, careful])
def test_rivals_make_the_pixels_that_our_loader_makes_of_the_same_frames_and_view(
    chosen: PassClips, make: MakeRival, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_chance(task: Task, frames_valid: int, height: int, width: int) -> tuple[np.ndarray, View]:
        return frames_uniform(task.frames, frames_valid, None), whole_view(height, width)

    monkeypatch.setattr(rivals, "_chance", without_chance)
    source = opened(chosen.home, chosen)
    setting = Setting(SPEC, 4, 1)
    ours = Finished(chosen, setting, source)
    expected = {key: video.clone() for batch in ours.loader.evaluation() for key, video in zip(batch.key, batch.video, strict=True)}
    ours.close()
    for keys, video, _ in one_pass(make, chosen):
        for key, clip in zip(keys, video, strict=True):
            assert (clip.int() - expected[key].int()).abs().max() <= 1


@unclosed
def test_the_careful_rival_decodes_the_chosen_frames_alone(chosen: PassClips, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = JpegCodec.decode

    def watched(codec: JpegCodec, blob: bytes, out: np.ndarray) -> None:
        nonlocal decoded
        decoded += 1
        decode(codec, blob, out)

    monkeypatch.setattr(JpegCodec, "decode", watched)
    assert sum(len(video) for _, video, _ in one_pass(careful, chosen)) == CLIPS
    assert decoded == CLIPS * SPEC.frames


@pytest.mark.parametrize("where", ["threads", "process"])
def test_frames_are_handed_over_as_they_are_stored(chosen: PassClips, where: Where) -> None:
    clips = {clip.key: clip for clip in chosen.clips}
    ours = HandedOver(chosen, Setting(SPEC, 4, 2), where, opened(chosen.home, chosen))
    for raw in ours.batches():
        for outcome, video in zip(raw.outcomes, raw.video, strict=True):
            assert outcome.loaded is not None
            clip = clips.pop(outcome.loaded.key)
            blob = clip.tar.read_bytes()
            for offset, size, frame in zip(clip.offsets, clip.sizes, video, strict=True):
                assert np.array_equal(simplejpeg.decode_jpeg(blob[offset : offset + size]), frame)
        raw.release()
    ours.close()
    assert not clips


def test_each_task_is_counted_with_its_own_clips_and_on_the_given_clock() -> None:
    clock = iter(range(1000))
    cpu_ms, _ = measure({"one": lambda: None, "ten": lambda: None}, {"one": 1, "ten": 10}, 3, lambda: float(next(clock)))
    assert cpu_ms == {"one": [1000.0] * 3, "ten": [100.0] * 3}  # one second between two looks at the clock


def test_the_plot_is_drawn_from_written_results_and_the_same_each_time(tmp_path: Path) -> None:
    setting = {"frames": 16, "size": 224, "threads": 2}
    rows = {"floor": [4.0, 5.0], "webdataset": [7.0, 9.0], "webdataset_with_care": [12.0, 11.0]}
    write_results(tmp_path / "results.jsonl", [result(f"loader/{name}/cpu", "CPU ms/clip", values, setting) for name, values in rows.items()], "ext4")
    for name in ("one.png", "two.png"):
        plot(PlotConfig(tmp_path / "results.jsonl", tmp_path / name))
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(("text", "said"), [("no json\n", "expected results as JSON lines"), ("", "holds no loader/floor/cpu")])
def test_a_plot_of_other_files_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "other.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        plot(PlotConfig(tmp_path / "other.jsonl", tmp_path / "plot.png"))
