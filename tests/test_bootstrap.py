"""Intervals against sklearn on repeated rows, scipy's bootstrap, and a closed form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from training import bootstrap
from training.bootstrap import intervals, intervals_of, resampled, weighted_metrics
from training.metrics import METRICS, Judged, evaluate
from training.threshold import at_threshold

TWO, THREE = ("nongesture", "gesture"), ("a", "b", "c")


def binary(labels: Sequence[int], scores: Sequence[float], sources: Sequence[str] | None = None, positive: str | None = None) -> Judged:
    """Two classes, from the probabilities of class 1."""
    high = np.asarray(scores, np.float64)
    return Judged(np.asarray(labels, np.int64), np.stack([1 - high, high], axis=1), sources or [str(n) for n in range(len(labels))], TWO, positive)


rows_of_two = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=30)
rows_of_three = st.lists(st.tuples(st.integers(0, 2), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 3)), min_size=1, max_size=25)


def assert_as_repeated(judged: Judged, weights: Sequence[int]) -> None:
    """A clip of weight 3 counts as three equal clips do for sklearn, and one of weight 0 not at all."""
    found = weighted_metrics(judged, np.asarray([weights, [1] * len(weights)], np.float64), threshold=0.5 if len(judged.class_names) == 2 else None)
    for row, times in enumerate((weights, [1] * len(weights))):
        repeated = np.repeat(np.arange(len(times)), times)
        labels, probabilities = judged.labels[repeated], judged.probabilities[repeated]
        expected = evaluate(labels, probabilities, judged.class_names, judged.positive)
        if len(judged.class_names) == 2:
            again = Judged(labels, probabilities, [""] * len(labels), judged.class_names, judged.positive)
            expected |= {"f1_at_threshold": at_threshold(again, 0.5)["f1_at_threshold"]}
        for name, values in found.items():
            value = expected[name]
            assert values[row] == pytest.approx(np.nan if value is None else value, nan_ok=True), name


@settings(deadline=None, max_examples=30)  # sklearn takes milliseconds an example
@given(rows_of_two, st.sampled_from([None, *TWO]))
def test_weights_count_as_repeated_clips_of_two_classes_also_with_ties(rows: list[tuple[int, int, int]], positive: str | None) -> None:
    labels, scores, weights = zip(*rows, strict=True)
    assert_as_repeated(binary(labels, [score / 6 for score in scores], positive=positive), weights)


@settings(deadline=None, max_examples=30)  # sklearn takes milliseconds an example
@given(rows_of_three)
def test_weights_count_as_repeated_clips_of_three_classes(rows: list[tuple[int, tuple[int, int, int], int]]) -> None:
    labels, scores, weights = zip(*rows, strict=True)
    probabilities = np.asarray(scores, np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert_as_repeated(Judged(np.asarray(labels), probabilities, [""] * len(labels), THREE), weights)


def test_a_resample_draws_as_many_sources_as_there_are_each_with_all_its_clips() -> None:
    sources = ["b", "a", "b", "c", "a", "a"]
    weights = np.concatenate(list(resampled(sources, num_resamples=300)))
    assert weights.shape == (300, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])  # b
    np.testing.assert_array_equal(weights[:, [1, 1]], weights[:, [4, 5]])  # a
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), 3)
    assert {tuple(row) for row in weights[:, [0, 1, 3]].tolist()} == {(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)}  # all ten occur
    assert weights[:, [0, 1, 3]].mean(axis=0) == pytest.approx(1, abs=0.15)


def test_resamples_depend_on_the_seed_alone_and_not_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [f"s{number % 7}" for number in range(20)]
    whole = np.concatenate(list(resampled(sources, 3, 50)))
    assert not np.array_equal(whole, np.concatenate(list(resampled(sources, 4, 50))))
    monkeypatch.setattr(bootstrap, "CHUNK", 45)
    parts = list(resampled(sources, 3, 50))
    assert len(parts) == 25
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_interval_of_a_mean_over_equal_sources_is_scipys() -> None:
    chance = np.random.RandomState(1)
    share = chance.uniform(0.2, 1, 30)  # each source's accuracy
    right = (np.arange(20) < np.round(share * 20)[:, None]).astype(int)  # (30 sources, 20 clips)
    judged = binary([1] * 600, np.where(right.ravel() == 1, 0.9, 0.1).tolist(), [f"s{number // 20:02d}" for number in range(600)])
    found = intervals(judged).ends["accuracy"]
    theirs = scipy.stats.bootstrap((right.mean(axis=1),), np.mean, n_resamples=4000, method="percentile", random_state=0).confidence_interval
    assert found == pytest.approx((theirs.low, theirs.high), abs=0.012)


def test_equal_clips_of_a_source_make_nothing_surer() -> None:
    right = [1] * 32 + [0] * 18  # of fifty sources
    once = intervals(binary([1] * 50, [0.1 + 0.8 * one for one in right], [str(n) for n in range(50)])).ends["accuracy"]
    many = intervals(binary([1] * 500, [0.1 + 0.8 * right[n // 10] for n in range(500)], [str(n // 10) for n in range(500)])).ends["accuracy"]
    assert once == many and once is not None
    deviation = (0.64 * 0.36 / 50) ** 0.5
    assert once == pytest.approx((0.64 - 1.96 * deviation, 0.64 + 1.96 * deviation), abs=0.03)


def test_every_metric_has_an_interval_around_it() -> None:
    chance = np.random.RandomState(0)
    labels = chance.randint(0, 2, 400)
    judged = binary(labels.tolist(), np.clip(0.3 + 0.3 * labels + chance.normal(0, 0.2, 400), 0, 1).tolist(), [f"s{n % 40}" for n in range(400)])
    found, values = intervals(judged, threshold=0.45), evaluate(judged.labels, judged.probabilities, TWO) | at_threshold(judged, 0.45)
    assert set(found.ends) == {*METRICS, "f1_at_threshold"} and list(found.notes) == ["intervals over 40 sources"]
    for name, ends in found.ends.items():
        value = values[name]
        assert ends is not None and isinstance(value, float) and ends[0] < value < ends[1] and ends[1] - ends[0] < 0.25


@pytest.mark.parametrize(("num_sources", "there"), [(4, False), (5, True)])
def test_fewer_than_five_sources_have_no_interval_and_say_so(num_sources: int, there: bool) -> None:
    judged = binary([0, 1] * 10, [0.2, 0.7] * 10, [str(n // 2 % num_sources) for n in range(20)])
    found = intervals(judged)
    assert bool(found.ends) is there
    assert list(found.notes) == ["intervals over 5 sources, too few: they are too narrow" if there else "no intervals: 4 sources, expected at least 5"]


@pytest.mark.parametrize(("num_sources", "is_few"), [(9, True), (10, False)])
def test_intervals_over_fewer_than_ten_sources_warn_in_few_words(num_sources: int, is_few: bool) -> None:
    judged = binary([0, 1] * 20, [0.2, 0.7] * 20, [str(n // 2 % num_sources) for n in range(40)])
    (note,) = intervals(judged).notes
    assert note.startswith(f"intervals over {num_sources} sources") and ("too few" in note) is is_few


def test_resamples_without_a_class_are_left_out_and_told() -> None:
    def sometimes(weights: np.ndarray) -> dict[str, np.ndarray]:
        numbers = np.arange(len(weights), dtype=float)
        return {"rare_metric": np.where(numbers % 20 == 0, np.nan, numbers), "rarer": np.where(numbers % 5 == 0, np.nan, numbers), "never": numbers * np.nan}

    found = intervals_of(sometimes, [str(n) for n in range(8)])
    assert found.ends["rare_metric"] == pytest.approx(tuple(np.quantile([n for n in range(1000) if n % 20], [0.025, 0.975])))
    assert found.ends["rarer"] is None and found.ends["never"] is None
    assert list(found.notes) == [
        "intervals over 8 sources, too few: they are too narrow",
        "no interval of rarer: undefined in over 10 % of the resamples",
        "up to 50 of 1000 resamples left out of rare metric: they lack a class",
    ]


def test_a_class_in_one_source_of_many_leaves_auroc_without_an_interval() -> None:
    judged = binary([1, *[0] * 9], [0.9, *[0.1] * 9])
    found = intervals(judged)
    assert found.ends["auroc"] is None and found.ends["accuracy"] is not None
    assert any(note.startswith("no interval of") and "auroc" in note for note in found.notes)  # (9/10)^10 = 0.35 of the resamples miss it
