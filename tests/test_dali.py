"""DALI on its CPU operators against the webdataset loader on the same JPEG shards: to the byte where nothing is resized. The contract is in test_loaders.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from clips.clip import ClipSpec
from clips.errors import InputError
from convert.pack import PackConfig, pack
from loaders import dali_graph as graph
from loaders.batch import Batch
from loaders.dali import carried
from loaders.sample import AugmentConfig
from loaders.source import open_source
from loaders.stream import DecodeIn, LoaderConfig
from loaders.views import Views
from tests import by_hand
from tests.loading import (
    CROP_ALONE,
    MANY_SHARDS_MIB,
    STORED,
    Found,
    assert_same,
    by_key,
    expected_clip,
    keys_in,
    keys_of,
    npz_home,
    opened,
    shards,
)
from tests.making import write_home
from tests.packing import use_threads
from tests.test_loaders_memory import anonymous_bytes

pytest.importorskip("nvidia.dali")
WARM_UP = 12
PAINTED = replace(CROP_ALONE, colour=0.4, strength=9.0, erasing=0.8)


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def jpegs(base: Path) -> Path:
    return shards(base, "jpeg", MANY_SHARDS_MIB)


@pytest.mark.parametrize("decode_in", ["threads", "process"])
@pytest.mark.parametrize("augment", [CROP_ALONE, PAINTED], ids=["cut", "painted"])
def test_frames_crop_flip_colours_and_points_are_the_webdataset_loaders_to_the_byte(jpegs: Path, augment: AugmentConfig, decode_in: DecodeIn) -> None:
    with opened(jpegs, "webdataset", augment=augment) as expected, opened(jpegs, "dali", augment=augment, decode_in=decode_in) as made:
        for epoch in (0, 1):
            assert_all_same(list(made.training(epoch)), list(expected.training(epoch)))


def assert_all_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert_same(by_key(ours), by_key(theirs))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.number, one.position, one.labels, one.proof, one.bad) == (other.number, other.position, other.labels, other.proof, other.bad)
        assert torch.equal(one.weight, other.weight) and torch.equal(one.label, other.label)


def shifted_down(values: dict[str, np.ndarray]) -> None:
    values["corner"][:, 0] += np.where(values["corner"][:, 0] < STORED.height - 12, 1, -1)


def shifted_right(values: dict[str, np.ndarray]) -> None:
    values["corner"][:, 1] += np.where(values["corner"][:, 1] < STORED.width - 16, 1, -1)


def never_flipped(values: dict[str, np.ndarray]) -> None:
    values["flip"][:] = 0


@pytest.mark.parametrize("fault", [shifted_down, shifted_right, never_flipped, "a frame late"])
def test_a_shift_by_one_pixel_or_one_frame_shows(
    jpegs: Path, base: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[dict[str, np.ndarray]], None] | str
) -> None:
    """Against the webdataset loader to the byte, and against the npz as near as JPEG keeps them."""
    boxes_of = graph.boxes_of

    def wrong_boxes(*given: Any) -> dict[str, np.ndarray]:  # Any: passed on
        values = boxes_of(*given)
        if callable(fault):
            fault(values)
        return values

    def wrong_frames(*given: Any) -> list[np.ndarray]:  # Any: passed on
        frames = carried(*given)
        return frames if callable(fault) else frames[1:] + frames[:1]

    with opened(jpegs, "webdataset") as made:
        expected = by_key(made.training(0))
    with opened(jpegs, "dali") as made:
        right = by_key(made.training(0))
        monkeypatch.setattr(graph, "boxes_of", wrong_boxes)
        monkeypatch.setattr(graph, "carried", wrong_frames)
        found = by_key(made.training(0))
    with pytest.raises(AssertionError):
        assert_same(found, expected)
    assert farness(found, base) > 2 * farness(right, base)


def farness(found: Found, base: Path) -> float:
    """The mean difference from the snippets' own pixels."""
    return float(np.mean([np.abs(video.astype(int) - expected_clip(npz_home(base), key, ClipSpec(5, 12, 16), 0)[0]) for key, (video, _, _) in found.items()]))


@pytest.mark.parametrize("size", [(10, 10), (24, 32), (31, 47)])
def test_what_is_resized_is_within_one_of_the_webdataset_loaders_and_half_of_exact(jpegs: Path, size: tuple[int, int]) -> None:
    spec, augment = ClipSpec(4, *size), AugmentConfig()
    whole = ClipSpec(4, STORED.height, STORED.width)
    uncut = AugmentConfig(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3), hflip=0)
    with opened(jpegs, "webdataset", spec=spec, augment=augment) as expected, opened(jpegs, "dali", spec=spec, augment=augment) as made:
        ours, theirs = by_key(made.training(2)), by_key(expected.training(2))
    with opened(jpegs, "webdataset", spec=whole, augment=uncut) as source, opened(jpegs, "dali", "train", spec, augment=uncut) as made:
        stored, resized = by_key(source.training(2)), by_key(made.training(2))
    for key in ours:
        assert np.abs(ours[key][0].astype(int) - theirs[key][0]).max() <= 1
        np.testing.assert_array_equal(ours[key][1], theirs[key][1])
        assert np.abs(resized[key][0] - by_hand.bilinear(stored[key][0], size)).max() < 0.501


@pytest.mark.parametrize("views", [Views(1, 1), Views(2, 3)])
def test_evaluation_gives_every_view_also_of_a_short_last_batch(jpegs: Path, views: Views) -> None:
    """Seven clips, four at once; then training goes on with two at once."""
    spec = ClipSpec(5, STORED.height, STORED.width)
    with opened(jpegs, "dali", "val", spec, 4, 4) as made, opened(jpegs, "webdataset", "val", spec, 4, 4) as expected:
        ours, theirs = list(made.evaluation(views)), list(expected.evaluation(views))
    assert [len(batch) for batch in ours] == views.count * [4] + views.count * [3]
    for one, other in zip(ours, theirs, strict=True):
        assert one.key == other.key and (one.video.int() - other.video.int()).abs().max() <= (views.count > 1)
    with opened(jpegs, "dali") as made, opened(jpegs, "webdataset") as expected:
        assert_all_same(list(made.training(0)), list(expected.training(0)))


def test_a_resume_at_every_step_and_two_ranks_give_what_one_rank_gives_at_once(jpegs: Path) -> None:
    with opened(jpegs, "webdataset") as made:
        whole = by_key(made.training(1))
    with opened(jpegs, "dali") as made, opened(jpegs, "dali", rank=0, world_size=2) as first, opened(jpegs, "dali", rank=1, world_size=2) as second:
        for step in range(6):
            assert_same(by_key(made.training(1, consumed=4 * step)), dict(list(whole.items())[4 * step :]))
        halves = [list(first.training(1, consumed=8)), list(second.training(1, consumed=8))]
    in_order = sorted(pair for half in halves for batch in half for pair in zip(batch.position, batch.key, strict=True))
    assert [key for _, key in in_order] == list(whole)[8:]
    both = by_key(halves[0]) | by_key(halves[1])
    assert_same({key: both[key] for _, key in in_order}, dict(list(whole.items())[8:]))


def test_clips_lie_where_dali_wrote_them_and_stay_there(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy on the way to the training, and none of them written over, not even once the loader is closed."""
    places = []

    def noted(tensor: Any) -> torch.Tensor:  # Any: DALI's tensor
        places.append(tensor.data_ptr())
        return from_dlpack(tensor)

    monkeypatch.setattr(graph, "from_dlpack", noted)
    with opened(jpegs, "dali", augment=PAINTED) as made:
        kept = list(made.training(0))
        assert [batch.video.data_ptr() for batch in kept] == places
        copies = [batch.video.clone() for batch in kept]
        keys_in(made.training(1))
    assert len(set(places[: len(kept)])) == len(kept) == 10
    assert all(torch.equal(batch.video, copy) for batch, copy in zip(kept, copies, strict=True))


def test_memory_goes_back_when_the_last_view_of_it_is_gone_and_not_before() -> None:
    """What tells DALI on a GPU; torch keeps the storage's Python object as long as the storage."""
    video, told = torch.zeros(4, 3), []
    graph.when_gone(video, lambda: told.append("gone"))
    view = video.view(-1)[3:5]
    array = view.numpy()
    del video, view
    gc.collect()
    assert told == [] and array.shape == (2,)
    del array
    assert told == ["gone"]


def test_the_executor_is_the_one_that_never_writes_over_what_is_held(jpegs: Path) -> None:
    with opened(jpegs, "dali") as made:
        assert isinstance(made._graph, graph.DaliGraph) and made._graph._pipe.exec_dynamic


def test_an_epoch_left_half_way_or_ended_by_another_spoils_none(jpegs: Path) -> None:
    with opened(jpegs, "webdataset") as made:
        whole = by_key(made.training(1))
    with opened(jpegs, "dali") as made:
        left = made.training(0)
        for _ in range(3):
            next(left)
        ended = made.training(0)
        next(ended)
        assert_same(by_key(made.training(1)), whole)
        for former in (left, ended):
            with pytest.raises(RuntimeError, match="ended by a later one of the same loader"):
                next(former)
        next(made.training(0))
        assert_same(by_key(made.training(1)), whole)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of 96x128."""
    folder = tmp_path_factory.mktemp("larger")
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        pack(PackConfig(write_home(folder, {"train": {"a": 6, "b": 6}}, 9, 96, 128), folder / "shards", "jpeg", workers=1))
    return folder / "shards"


def test_memory_stays_flat_over_ten_epochs(larger: Path) -> None:
    """What the system counts grows by less than three of the fourteen clips that an epoch gives: DALI's pools wander, and settle after 40 epochs."""
    spec, held = ClipSpec(9, 96, 128), []
    with opened(larger, "dali", spec=spec, augment=AugmentConfig()) as made:
        for epoch in range(WARM_UP + 10):
            keys_in(made.training(epoch))
            next(made.training(epoch))  # and left half-way
            gc.collect()
            held.append(anonymous_bytes(os.getpid()))
    assert np.polyfit(np.arange(10), np.array(held[WARM_UP:], float), 1)[0] < 3 * 9 * 96 * 128 * 3


def test_the_source_still_decodes_a_frame_where_a_frame_is_asked_for(jpegs: Path) -> None:
    """As the training does before it begins, to count joints."""
    from loaders.joints import joints_kept

    sources = [open_source(jpegs, "train", loader) for loader in ("dali", "webdataset")]
    kept = [joints_kept(source, range(21), AugmentConfig(), 0, (12, 16)) for source in sources]
    assert kept[0] == kept[1] and kept[0] is not None and 0 < kept[0] < 1
    for source in sources:
        source.close()


def test_zstd_shards_are_unpacked_by_the_threads_and_resized_by_dali(base: Path) -> None:
    home = shards(base, "zstd", MANY_SHARDS_MIB)
    with opened(home, "dali") as made, opened(home, "webdataset") as expected:
        assert isinstance(made._graph, graph.DaliGraph) and made._graph.row_shape == (24, 32, 3)
        assert_all_same(list(made.training(0)), list(expected.training(0)))


def test_a_folder_of_npz_is_an_error_that_says_how_to_pack_it(base: Path) -> None:
    home = npz_home(base)
    with pytest.raises(InputError, match=rf"^--loader dali: {home} holds no shards; .*python -m convert pack --dataset-home {home} --output SHARDS"):
        open_source(home, "train", "dali")
    assert keys_of(home)


@pytest.mark.parametrize("load", [-0.1, 1.5])
def test_a_share_of_the_jpeg_engine_is_between_none_and_all(tmp_path: Path, load: float) -> None:
    with pytest.raises(InputError, match=f"^--hw-decoder-load {load}: expected 0 … 1"):
        LoaderConfig(tmp_path, hw_decoder_load=load)


def test_a_device_on_which_dali_cannot_start_is_an_error_with_its_reason(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pipe: Any) -> None:  # Any: DALI's pipeline
        raise RuntimeError("CUDA driver version is insufficient\n for CUDA runtime version")

    monkeypatch.setattr("nvidia.dali.pipeline.Pipeline.build", refuse)
    says = r"^--loader dali: DALI cannot start on cpu \(CUDA driver version is insufficient for CUDA runtime version\).*--loader webdataset\.$"
    with pytest.raises(InputError, match=says), opened(jpegs, "dali"):
        pass
