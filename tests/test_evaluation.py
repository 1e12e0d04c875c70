"""Evaluation against each clip's probabilities worked out alone, over one rank and two."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clips.errors import InputError
from clips.format import ClipFacts
from loaders.batch import BadClip
from training.distributed import Group
from training.evaluation import Scores, in_words, judged_of, metrics_of, prediction_rows, probabilities, scored, why_unusable
from training.metrics import Prediction, evaluate
from training.precision import Precision

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
ALONE = Group(0, 1, 0, CPU, "single")
CLASSES = ("nongesture", "gesture")


@dataclass(frozen=True)
class Clips:
    """What evaluation uses of a batch: uint8 (B, T, H, W, 3), and each clip's place in the split."""

    video: torch.Tensor
    number: Sequence[int]
    bad: Sequence[BadClip] = ()
    keypoints: torch.Tensor | None = None


@dataclass
class Thread(Group):
    """One rank of several that are threads of this process."""

    table: list[Any] | None = None  # Any: whatever pickle carries
    barrier_of_all: Barrier | None = None

    def gather_objects(self, obj: Any) -> list[Any]:
        assert self.table is not None and self.barrier_of_all is not None
        self.table[self.rank] = obj
        self.barrier_of_all.wait(timeout=5)
        return list(self.table)


def tiny(dropout: float = 0.0) -> nn.Module:
    """Three classes from 12 numbers a clip; the same weights whatever the dropout."""
    torch.manual_seed(0)
    return nn.Sequential(Floats(), nn.Linear(12, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


class Floats(nn.Module):
    """float32 (B, N) of uint8 clips."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.flatten(1).float() / 64


def clip(number: int) -> torch.Tensor:
    """uint8 (1, 2, 2, 3), another one for each number; what evaluation sees is whatever the model takes."""
    return torch.randint(0, 256, (1, 1, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def batches(*numbers: Sequence[int]) -> list[Clips]:
    return [Clips(torch.cat([clip(number) for number in batch]), batch) for batch in numbers]


def alone(num_clips: int) -> np.ndarray:
    """Each clip's softmax by numpy in fp64, one clip at a time, in order: float64 (num_clips, 3)."""
    with torch.no_grad():
        logits = np.concatenate([tiny().eval()(clip(number)).double().numpy() for number in range(num_clips)])
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


def on_ranks(num_clips: int, *shares: list[Clips], max_bad_clips: int = 0, num_views: int = 1) -> list[np.ndarray]:
    """What each rank gives, each with its own model and its share of the batches."""
    table, barrier = [None] * len(shares), Barrier(len(shares))

    def work(rank: int) -> np.ndarray:
        group = Thread(rank, len(shares), rank, CPU, "torchrun", table=table, barrier_of_all=barrier)
        return probabilities(models[rank], shares[rank], num_clips, FP32, group, max_bad_clips, num_views).probabilities

    models = [copy.deepcopy(model) for model in [tiny()] * len(shares)]
    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(work, range(len(shares))))


def test_rows_are_in_the_order_of_the_clips_numbers_whatever_the_order_of_the_batches() -> None:
    found = probabilities(tiny(), batches([4, 1], [6, 0, 3], [2], [5]), 7, FP32, ALONE).probabilities
    assert found.dtype == np.float32 and found.shape == (7, 3)
    np.testing.assert_allclose(found, alone(7), rtol=1e-5)
    assert len(np.unique(found[:, 0])) == 7  # otherwise a wrong order could pass


def test_two_ranks_get_all_rows_in_order() -> None:
    for found in on_ranks(7, batches([4, 1], [6]), batches([5, 0, 3], [2])):
        np.testing.assert_allclose(found, alone(7), rtol=1e-5)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_rank_without_batches_gets_the_rows_of_the_others(empty: int) -> None:
    shares = [batches([2, 0], [1]), batches([2, 0], [1])]
    shares[empty] = []
    for found in on_ranks(3, *shares):
        np.testing.assert_allclose(found, alone(3), rtol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 2], "2 clips were evaluated, 2 of them different; expected each of 3 once"),
        ([0, 1], "2 clips were evaluated, 2 of them different"),
        ([0, 1, 2, 1], "4 clips were evaluated, 3 of them different"),
        ([0, 1, 1], "3 clips were evaluated, 2 of them different"),
        ([0, 1, 2, 3], "4 clips were evaluated, 4 of them different"),
        ([0, 1, 3], "3 clips were evaluated, 3 of them different"),
    ],
)
def test_a_missing_a_doubled_and_a_foreign_clip_are_errors(numbers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probabilities(tiny(), batches(numbers), 3, FP32, ALONE)


def test_a_clip_that_two_ranks_evaluated_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 clips were evaluated, 3 of them different"):
        on_ranks(3, batches([0, 1]), batches([2, 1]))


def shifted(clips: Clips, shift: int) -> Clips:
    """The same clips seen otherwise."""
    return replace(clips, video=clips.video + shift)  # bytes wrap around


def test_a_clips_probabilities_are_the_mean_over_its_views_whatever_their_order_and_rank() -> None:
    views = [[shifted(clips, shift) for clips in batches([4, 1], [6, 0, 3], [2], [5])] for shift in (0, 40, 90)]
    each = [probabilities(tiny(), view, 7, FP32, ALONE).probabilities.astype(np.float64) for view in views]
    assert np.abs(each[0] - each[1]).max() > 0.01  # otherwise a single view could pass
    expected = np.mean(each, axis=0)
    one_by_one = [clips for view in views for clips in view]
    in_a_row = [clips for same in zip(*views, strict=True) for clips in same]
    for order in (one_by_one, in_a_row):
        found = probabilities(tiny(), order, 7, FP32, ALONE, num_views=3).probabilities
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for found in on_ranks(7, in_a_row[::2], in_a_row[1::2], num_views=3):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_clip_without_one_of_its_views_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 clips were evaluated, 2 of them different; expected each of 2 2 times"):
        probabilities(tiny(), batches([0, 1], [1]), 2, FP32, ALONE, num_views=2)
    with pytest.raises(ValueError, match="4 clips were evaluated, 2 of them different; expected each of 2 2 times"):
        probabilities(tiny(), batches([0, 1], [1], [1]), 2, FP32, ALONE, num_views=2)
    with pytest.raises(ValueError, match="2 clips were evaluated, 2 of them different; expected each of 2 2 times"):
        probabilities(tiny(), batches([0, 1]), 2, FP32, ALONE, num_views=2)


def test_a_clip_unread_in_one_view_is_left_out_and_counts_once() -> None:
    first, second = batches([0, 1, 2]), batches([0, 1, 2])
    share = [replace(first[0], bad=[unread(1)]), second[0], replace(second[0], bad=[unread(1)])]
    found = probabilities(tiny(), share, 3, FP32, ALONE, max_bad_clips=1, num_views=3)
    assert list(found.unread) == [1] and np.isnan(found.probabilities[1]).all()
    np.testing.assert_allclose(found.probabilities[[0, 2]], alone(3)[[0, 2]], rtol=1e-5)


def test_the_model_comes_back_in_its_mode_also_when_nobody_takes_all_batches() -> None:
    model = tiny().train()
    rows = scored(model, batches([0], [1]), FP32)
    clips, found = next(rows)
    assert clips.number == [0] and not model.training and not found.requires_grad
    rows.close()
    assert model.training and torch.is_grad_enabled()


def test_the_model_sees_the_joints_of_a_batch_that_has_some() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    class Sees(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs)
            return torch.zeros(len(inputs[0]), 2)

    with_joints = replace(batches([0])[0], keypoints=torch.ones((1, 1, 2, 2), dtype=torch.uint8))
    probabilities(Sees(), [with_joints, *batches([1])], 2, FP32, ALONE)
    assert [len(inputs) for inputs in seen] == [2, 1] and seen[0][1] is with_joints.keypoints


@pytest.mark.parametrize("is_training", [True, False])
def test_dropout_is_off_and_the_model_comes_back_in_its_mode(is_training: bool) -> None:
    model = tiny(dropout=0.9).train(is_training)
    np.testing.assert_allclose(probabilities(model, batches([0, 1], [2]), 3, FP32, ALONE).probabilities, alone(3), rtol=1e-5)
    assert {module.training for module in model.modules()} == {is_training}


def test_no_gradients_are_kept() -> None:
    model, kept = tiny(), []
    list(model.children())[-1].register_forward_hook(lambda *answer: kept.append(answer[-1].requires_grad))
    probabilities(model, batches([0], [1]), 2, FP32, ALONE)
    assert kept == [False, False]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_softmax_is_fp32_also_under_bf16() -> None:
    found = probabilities(tiny(), batches([0, 1, 2]), 3, Precision("bf16", CPU), ALONE).probabilities
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)  # bf16's own steps near one are 0.004
    np.testing.assert_allclose(found, alone(3), atol=0.02)
    assert found.dtype == np.float32


def test_prediction_rows_tell_each_clip_and_an_unknown_label_as_none() -> None:
    facts = [ClipFacts("a", 1, "one.mp4", 3, 40, 80, 5), ClipFacts("b", -1, "two.mp4", None, None, None, 5), ClipFacts("c", 0, "two.mp4", 0, 0, 9, 5)]
    scores = np.array([[0.25, 0.75], [0.5, 0.5], [1, 0]], np.float32)
    assert prediction_rows(facts, "val", Scores(scores, {})) == [
        Prediction("a", "val", 1, [0.25, 0.75], "one.mp4", 40, 80),
        Prediction("b", "val", None, [0.5, 0.5], "two.mp4", None, None),
        Prediction("c", "val", 0, [1.0, 0.0], "two.mp4", 0, 9),
    ]


def test_as_many_scores_as_clips_are_needed() -> None:
    with pytest.raises(ValueError, match="shorter"):
        prediction_rows([ClipFacts("a", 1, "one.mp4", 3, 40, 80, 5)] * 2, "val", Scores(np.zeros((1, 2), np.float32), {}))


def unread(number: int) -> BadClip:
    return BadClip(number, f"clip{number}", f"clip {number} is damaged")


def test_clips_that_were_not_read_have_no_probabilities_and_are_left_out_of_the_metrics() -> None:
    share = [replace(batch, bad=[unread(number) for number in batch.number if number in (1, 4)]) for batch in batches([0, 1, 2], [3, 4])]
    scores = probabilities(tiny(), share, 5, FP32, ALONE, max_bad_clips=2)
    assert dict(scores.unread) == {1: "clip 1 is damaged", 4: "clip 4 is damaged"}
    read = [0, 2, 3]
    assert np.isnan(scores.probabilities[[1, 4]]).all()
    np.testing.assert_allclose(scores.probabilities[read], alone(5)[read], rtol=1e-5)
    facts = [ClipFacts(f"clip{number}", number % 3, "", None, None, None, 5) for number in range(5)]
    metrics = metrics_of(facts, scores, ("a", "b", "c"), None)
    assert metrics["unread"] == 2 and metrics["loss"] == pytest.approx(-np.log(alone(5)[read, [0, 2, 0]]).mean(), rel=1e-5)
    assert "2 clips could not be read" in in_words(metrics)
    assert [row.probabilities is None for row in prediction_rows(facts, "val", scores)] == [False, True, False, False, True]


def test_what_is_judged_are_the_clips_that_were_read_with_their_sources() -> None:
    facts = [ClipFacts(f"clip{number}", number % 2, f"source{number}", None, None, None, 5) for number in range(4)]
    scores = np.array([[0.25, 0.75], [np.nan, np.nan], [0.5, 0.5], [1, 0]], np.float32)
    found = judged_of(facts, Scores(scores, {1: "clip 1 is damaged"}), CLASSES, "gesture")
    assert (found.labels.tolist(), found.sources, found.counted) == ([0, 0, 1], ["source0", "source2", "source3"], [1])
    assert found.probabilities.dtype == np.float64 and found.probabilities.tolist() == [[0.25, 0.75], [0.5, 0.5], [1, 0]]
    assert found.predictions.tolist() == [1, 0, 0]  # of equals the earlier


def test_a_compiled_model_is_not_compiled_again_for_evaluation() -> None:
    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
        sizes.append(len(inputs))
        return graph

    model = tiny()
    model.compile(backend=count)
    found = probabilities(model, batches([0, 1], [2]), 3, FP32, ALONE).probabilities
    np.testing.assert_allclose(found, alone(3), rtol=1e-5)
    assert not sizes
    model(clip(0))
    assert sizes


def test_bad_clips_of_all_ranks_count_against_one_budget() -> None:
    shares = [[replace(batches([0, 1])[0], bad=[unread(0)])], [replace(batches([2])[0], bad=[unread(2)])]]
    with pytest.raises(InputError, match=r"--max-bad-clips 1: 2 clips cannot be read\. The first: clip 0 is damaged"):
        on_ranks(3, *shares, max_bad_clips=1)
    np.testing.assert_array_equal(np.isnan(on_ranks(3, *shares, max_bad_clips=2)[0]).any(axis=1), [True, False, True])


def test_metrics_in_words_are_one_line_with_four_digits() -> None:
    metrics = evaluate([0, 0, 1, 1], [[0.75, 0.25], [0.25, 0.75], [0.25, 0.75], [0.5, 0.5]], CLASSES)
    assert in_words(metrics) == (  # by hand: the loss is -(2 log 0.75 + log 0.25 + log 0.5) / 4
        "loss 0.6637, accuracy 0.5000, balanced accuracy 0.5000, f1 0.5000, auroc 0.6250, average precision 0.5833, confusion 1 1 / 1 1 (a row a label)"
    )


def test_intervals_and_the_threshold_of_val_are_told_beside_the_metrics() -> None:
    metrics: dict[str, Any] = evaluate([0, 1], [[0.75, 0.25], [0.25, 0.75]], CLASSES)
    metrics |= {"intervals": {"auroc": [0.5, 1.0]}, "threshold": 0.4, "f1_at_threshold": 1.0, "notes": ["few sources."]}
    words = in_words(metrics)
    assert "accuracy 1.0000, " in words and "auroc 1.0000 [0.5000-1.0000], " in words
    assert "average precision 1.0000, f1 1.0000 at val's threshold 0.4000, confusion" in words and words.endswith("(few sources.)")


def test_undefined_metrics_are_left_out_and_explained_but_a_metric_of_0_is_told() -> None:
    words = in_words(evaluate([0, 0], [[0.5, 0.5], [0.25, 0.75]], CLASSES))
    note = "no clip of class gesture in this split: balanced accuracy, F1, AUROC and average precision are undefined."
    assert words == f"loss 1.0397, accuracy 0.5000, confusion 1 1 / 0 0 (a row a label) ({note})"
    assert "accuracy 0.0000" in in_words(evaluate([0], [[0.25, 0.75]], CLASSES))


@pytest.mark.parametrize(
    ("labels", "scores", "reason"),
    [
        ([], np.zeros((0, 2)), "the split has no clips."),
        ([0, 1], [[0.5, 0.5], [np.nan, np.nan]], "1 of 2 clips have a probability that is not finite: the model diverged."),
    ],
)
def test_where_all_metrics_are_undefined_only_the_reason_is_told(labels: list[int], scores: list[list[float]], reason: str) -> None:
    assert in_words(evaluate(labels, scores, CLASSES)).strip() == f"({reason})"


def test_a_split_that_says_nothing_of_the_model_names_the_cause_and_what_to_do() -> None:
    facts = [ClipFacts(f"clip{number}", number, f"source{number}", None, None, None, 5) for number in range(2)]
    nan, good = np.full((2, 2), np.nan, np.float32), np.full((2, 2), 0.5, np.float32)
    causes = [
        (Scores(nan, {0: "cut short", 1: "cut short"}), "none of its 2 clips could be read. Look after its files"),
        (Scores(nan, {}), "2 of 2 clips have a probability that is not finite: the model diverged. Take a lower --lr"),
        (Scores(nan, {0: "cut short"}), "1 clip could not be read and is left out. 1 of 1 clips have a probability that is not finite"),
    ]
    for scores, message in causes:
        found = why_unusable(metrics_of(facts, scores, CLASSES, None), scores)
        assert found is not None and found.startswith(message) and ("--lr" in found) == ("diverged" in found)
    usable = Scores(good, {})
    assert why_unusable(metrics_of(facts, usable, CLASSES, None), usable) is None
    empty = Scores(np.zeros((0, 2), np.float32), {})
    assert str(why_unusable(metrics_of([], empty, CLASSES, None), empty)).startswith("the split has no clips. Look after its files")
