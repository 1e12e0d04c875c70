"""Made-up snippets: the users' layout, the same bytes everywhere, and classes that nothing but motion tells apart."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips.clip import ClipSpec
from clips.errors import InputError
from clips.puppets import Take, perform, restless_parts, unit
from clips.synthetic import DEFAULT_CLASSES, PADDED_EVERY, WINDOWS_PER_SOURCE, plan_takes, write_snippets

SMALL = ClipSpec(4, 24, 32)


def names(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*.npz"))


def test_a_home_has_the_layout_and_the_arrays_of_the_users_snippets(tmp_path: Path) -> None:
    home = write_snippets(tmp_path, 14, SMALL)
    assert home == tmp_path / "ellen_show_length_1300_sample_rate_1_iou_0.55"
    assert [path.name for path in tmp_path.iterdir()] == [home.name]
    written = names(home)
    assert len(written) == 14
    assert {name.rsplit("/", 1)[0] for name in written} == {f"{split}/{name}" for split in ("train", "val", "test") for name in DEFAULT_CLASSES}
    assert all(re.fullmatch(r"\w+/\w+/\d{9}_madeup_\d{4}\.npz", name) for name in written)
    for name in written:
        with np.load(home / name, allow_pickle=False) as arrays:
            assert set(arrays) == {"video", "keypoints"}
            video, keypoints = arrays["video"], arrays["keypoints"]
        assert (video.dtype, video.shape) == (np.uint8, (4, 24, 32, 3))
        assert (keypoints.dtype, keypoints.shape) == (np.uint8, (4, 24, 32))
        assert set(np.unique(keypoints)) == {0, 1}
        assert keypoints.sum(axis=(1, 2)).max() <= 2 * 25


@settings(max_examples=100, deadline=None)
@given(num_clips=st.integers(1, 300), num_classes=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_sources_lie_in_one_split_with_gapless_windows_and_every_split_has_every_class(num_clips: int, num_classes: int, seed: int) -> None:
    plan = plan_takes(num_clips, 39, num_classes, seed)
    assert len(plan) == num_clips
    windows: defaultdict[str, list[int]] = defaultdict(list)
    splits: defaultdict[str, set[str]] = defaultdict(set)
    labels: defaultdict[str, set[int]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for split, take in plan:
        windows[take.source].append(take.window)
        splits[take.source].add(split)
        labels[split].add(take.label)
        counts[split] += 1
    assert all(found == list(range(len(found))) and len(found) <= WINDOWS_PER_SOURCE for found in windows.values())
    assert all(len(found) == 1 for found in splits.values())
    if num_clips >= 3 * num_classes:
        assert all(labels[split] == set(range(num_classes)) for split in ("train", "val", "test"))
    if num_clips >= 60:
        assert counts["val"] == counts["test"] == round(0.15 * num_clips)


def test_every_sixteenth_clip_ends_in_zeros() -> None:
    takes = [take for split, take in plan_takes(100, 39, 2, seed=0) if split == "train"]
    assert [number for number, take in enumerate(takes) if take.frames_valid < 39] == list(range(PADDED_EVERY - 1, len(takes), PADDED_EVERY))
    video, keypoints = perform(Take(0, "madeup_0001", 0, 1, frames_valid=3), 2, ClipSpec(5, 24, 24))
    assert video[:3].any(axis=(1, 2, 3)).all() and keypoints[:3].any(axis=(1, 2)).all()
    assert not video[3:].any() and not keypoints[3:].any()


def test_the_same_call_again_changes_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    home = write_snippets(tmp_path, 6, SMALL)
    before = {name: (home / name).stat().st_mtime_ns for name in names(home)}
    assert write_snippets(tmp_path, 6, SMALL) == home
    assert {name: (home / name).stat().st_mtime_ns for name in names(home)} == before
    two = DEFAULT_CLASSES
    for num_clips, spec, classes, seed in ((7, SMALL, two, 0), (6, SMALL, two, 1), (6, SMALL, ("nongesture", "wave"), 0), (6, ClipSpec(4, 24, 24), two, 0)):
        with pytest.raises(InputError, match=r"Remove that folder or choose another --output"):
            write_snippets(tmp_path, num_clips, spec, classes, seed)


def test_an_interrupted_call_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, **_: np.ndarray) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        write_snippets(tmp_path, 6, SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("classes", [(), ("a", "a"), ("a/b", "c"), ("..", "a"), ("", "a")])
def test_class_names_that_are_no_folders_are_refused(classes: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--classes"):
        write_snippets(tmp_path, 6, SMALL, classes)
    assert list(tmp_path.iterdir()) == []


def test_no_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--clips 0"):
        write_snippets(tmp_path, 0, SMALL)


def test_the_bytes_of_a_clip_never_change() -> None:
    """Worked out once; another machine, numpy or Python that gives other bytes is a bug."""
    video, keypoints = perform(Take(7, "madeup_0003", 2, 1, frames_valid=3), 2, ClipSpec(4, 48, 40))
    assert hashlib.sha256(video.tobytes()).hexdigest()[:16] == "b58f368cc6bee881"
    assert hashlib.sha256(keypoints.tobytes()).hexdigest()[:16] == "892ebe29a763d7d9"


def test_the_plan_of_a_small_home_never_changes(golden: Callable[[str, str], None]) -> None:
    lines = [f"{split} {take.label} {take.source} {take.window} {take.frames_valid}\n" for split, take in plan_takes(48, 39, 3, seed=1)]
    golden("takes.txt", "".join(lines))


@pytest.mark.parametrize("num_classes", range(1, 18))
def test_any_number_of_classes_moves_in_as_many_ways(num_classes: int) -> None:
    ways = [restless_parts(label, num_classes) for label in range(num_classes)]
    assert len(set(ways)) == num_classes
    assert not any(ways[0])
    assert num_classes == 1 or all(ways[1])


def out_of_fold_auroc(features: np.ndarray, labels: np.ndarray, sources: list[str]) -> dict[str, float]:
    """Two readers that never saw the source that they judge: a forest and a straight line."""
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    readers = {
        "forest": ExtraTreesClassifier(200, random_state=0),
        "line": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)),
    }
    return {
        name: roc_auc_score(labels, cross_val_predict(reader, features, labels, groups=sources, cv=GroupKFold(4), method="predict_proba")[:, 1])
        for name, reader in readers.items()
    }


def test_one_frame_tells_nothing_about_the_class_and_motion_tells_all() -> None:
    from sklearn.metrics import roc_auc_score

    spec = ClipSpec(13, 64, 64)
    takes = [take for _, take in plan_takes(360, spec.frames, 2, seed=0)]
    pictures, marks, motion = [], [], []
    for take in takes:
        video, keypoints = perform(take, 2, spec)
        t = int(unit("which frame", take.source, take.window) * take.frames_valid)
        pictures.append(video[t].reshape(16, 4, 16, 4, 3).mean((1, 3)).ravel())
        marks.append(keypoints[t].reshape(16, 4, 16, 4).max((1, 3)).ravel())
        motion.append(np.abs(np.diff(video[: take.frames_valid].astype(np.int16), axis=0)).mean())
    labels, sources = np.array([take.label for take in takes]), [take.source for take in takes]
    assert roc_auc_score(labels, motion) > 0.9
    for features in (np.array(pictures), np.array(marks, np.float64)):
        for reader, auroc in out_of_fold_auroc(features, labels, sources).items():
            assert 0.35 < auroc < 0.65, f"{reader}: {auroc:.3f}"
