"""The share of joints that crops and erased boxes leave: where joints are everywhere it is the share of the area."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loaders.joints import joints_kept
from loaders.sample import AugmentConfig, painted, whole_view
from loaders.source import ChooseFrames, ClipSource, Fetched, Frames, Loaded, open_source
from tests.loading import MANY_SHARDS_MIB, SEED, find_entry, flip_byte, keys_of, npz_home, shards
from tests.sources import Around


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


class WithPoints(Around):
    """Every clip has the same points; frames are not decoded."""

    def __init__(self, inside: ClipSource, points: np.ndarray | None) -> None:
        super().__init__(inside)
        self.points = points

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        assert with_points
        return PointsAlone(self.points)


class PointsAlone:
    """One clip of such a source."""

    def __init__(self, points: np.ndarray | None) -> None:
        self.points = points

    def decode(self, frames: Frames) -> Loaded:
        return Loaded("k", 0, self.points)

    def release(self) -> None:
        """Nothing is held."""


def test_the_share_of_joints_kept_is_that_of_the_crops_area_and_of_what_is_not_erased(base: Path) -> None:
    inside = open_source(npz_home(base), "train")
    everywhere = WithPoints(inside, np.argwhere(np.ones((1, 24, 32))))
    numbers, size = range(21), (24, 32)
    whole = AugmentConfig(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3))
    assert joints_kept(everywhere, numbers, whole, SEED, size) == 1
    assert joints_kept(everywhere, numbers, AugmentConfig(crop_scale=(0.25, 0.25), crop_ratio=(4 / 3, 4 / 3)), SEED, size) == pytest.approx(0.25)
    erased = [painted(whole_view(24, 32), replace(whole, erasing=1), SEED, 0, fact.key).erasure for fact in inside.facts]
    areas = [1 - np.prod([part.stop - part.start for part in one.of(24, 32)]) / (24 * 32) for one in erased if one]
    assert len(areas) == 21 and joints_kept(everywhere, numbers, replace(whole, erasing=1), SEED, size) == pytest.approx(np.mean(areas))
    assert joints_kept(WithPoints(inside, None), numbers, whole, SEED, size) is None
    inside.close()


def test_the_share_of_joints_kept_is_read_from_any_source_and_bad_clips_are_left_out(base: Path, tmp_path: Path) -> None:
    torn, found = tmp_path / "torn", []
    shutil.copytree(shards(base, "zstd", MANY_SHARDS_MIB), torn)
    tar, entry = find_entry(torn, keys_of(npz_home(base))[1])  # most clips lose some joints, so one fewer changes the mean
    for offset in entry.frames["offset"].tolist():
        flip_byte(tar, offset + 20)
    for home in (npz_home(base), shards(base, "zstd", MANY_SHARDS_MIB), torn):
        with closing(open_source(home, "train")) as source:
            found.append([joints_kept(source, range(21), AugmentConfig(crop_scale=scale), SEED, (24, 32)) for scale in ((0.5, 1.0), (0.08, 0.1))])
    assert found[0] == found[1] != found[2]
    for common, small in found:
        assert common is not None and small is not None and 0.5 < common < 1 and small < 0.4
