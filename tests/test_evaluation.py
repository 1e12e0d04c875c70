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
from training.evaluation import Scores, in_words, metrics_of, prediction_rows, probabilities
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


def on_ranks(num_clips: int, *shares: list[Clips], max_bad_clips: int = 0) -> list[np.ndarray]:
    """What each rank gives, each with its own model and its share of the batches."""
    table, barrier = [None] * len(shares), Barrier(len(shares))

    def work(rank: int) -> np.ndarray:
        group = Thread(rank, len(shares), rank, CPU, "torchrun", table=table, barrier_of_all=barrier)
        return probabilities(models[rank], shares[rank], num_clips, FP32, group, max_bad_clips).probabilities

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


@pytest.mark.parametrize("is_training", [True, False])
def test_dropout_is_off_and_the_model_comes_back_in_its_mode(is_training: bool) -> None:
    model = tiny(dropout=0.9).train(is_training)
    np.testing.assert_allclose(probabilities(model, batches([0, 1], [2]), 3, FP32, ALONE).probabilities, alone(3), rtol=1e-5)
    assert {module.training for module in model.modules()} == {is_training}


def test_no_gradients_are_kept() -> None:
    model, kept = tiny(), []
    model.register_forward_hook(lambda *answer: kept.append(answer[-1].requires_grad))
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


def test_bad_clips_of_all_ranks_count_against_one_budget() -> None:
    shares = [[replace(batches([0, 1])[0], bad=[unread(0)])], [replace(batches([2])[0], bad=[unread(2)])]]
    with pytest.raises(InputError, match=r"--max-bad-clips 1: 2 clips cannot be read\. The first: clip 0 is damaged"):
        on_ranks(3, *shares, max_bad_clips=1)
    np.testing.assert_array_equal(np.isnan(on_ranks(3, *shares, max_bad_clips=2)[0]).any(axis=1), [True, False, True])


def test_metrics_in_words_are_one_line_with_four_digits() -> None:
    metrics = evaluate([0, 0, 1, 1], [[0.75, 0.25], [0.25, 0.75], [0.25, 0.75], [0.5, 0.5]], CLASSES)
    assert in_words(metrics) == (  # by hand: the loss is -(2 log 0.75 + log 0.25 + log 0.5) / 4
        "loss 0.6637, accuracy 0.5000, balanced accuracy 0.5000, f1 0.5000, auroc 0.6250, average precision 0.5833, confusion [[1, 1], [1, 1]]"
    )


def test_undefined_metrics_are_left_out_and_explained_but_a_metric_of_0_is_told() -> None:
    words = in_words(evaluate([0, 0], [[0.5, 0.5], [0.25, 0.75]], CLASSES))
    note = "no clip of class gesture in this split: balanced accuracy, F1, AUROC and average precision are undefined."
    assert words == f"loss 1.0397, accuracy 0.5000, confusion [[1, 1], [0, 0]] ({note})"
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
