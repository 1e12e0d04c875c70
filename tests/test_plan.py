"""The order of clips: properties over many sizes, and literals that may never change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips.errors import InputError
from clips.mix import mix64, permutation, uniforms
from loaders.plan import Plan
from tests import by_hand

GOLDEN = Path(__file__).parent / "golden" / "order.json"
often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Shape:
    """A training's sizes, made so that everything divides."""

    ranks: int
    micro_batch: int
    accumulation: int
    num_clips: int
    seed: int
    epoch: int

    @property
    def batch_size(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation

    def plan(self, rank: int = 0) -> Plan:
        return Plan(self.num_clips, self.batch_size, self.micro_batch, self.seed, rank, self.ranks)

    def single(self) -> Plan:
        """The same training on one rank that sees its whole step at once."""
        return Plan(self.num_clips, self.batch_size, self.batch_size, self.seed)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    ranks, micro_batch, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    batch_size = ranks * micro_batch * accumulation
    num_clips = draw(st.integers(batch_size, 5 * batch_size + 7))
    return Shape(ranks, micro_batch, accumulation, num_clips, draw(st.integers(0, 2**40)), draw(st.integers(0, 1000)))


def listed(numbers: object) -> list[list[int]]:
    return [one.tolist() for one in numbers]  # type: ignore[attr-defined]  # an iterator of arrays


@often
@given(shapes())
def test_training_gives_every_clip_at_most_once_and_full_batches_alone(shape: Shape) -> None:
    seen = [number for rank in range(shape.ranks) for one in shape.plan(rank).training(shape.epoch) for number in one.tolist()]
    assert len(seen) == len(set(seen)) == shape.num_clips // shape.batch_size * shape.batch_size
    assert set(seen) <= set(range(shape.num_clips))


@often
@given(shapes())
def test_every_rank_gets_as_many_micro_batches_all_of_one_size(shape: Shape) -> None:
    for rank in range(shape.ranks):
        sizes = [len(one) for one in shape.plan(rank).training(shape.epoch)]
        assert sizes == [shape.micro_batch] * (shape.num_clips // shape.batch_size * shape.accumulation)


@often
@given(shapes())
def test_the_ranks_one_after_another_give_the_global_batch_whatever_their_number_and_micro_batch(shape: Shape) -> None:
    whole = listed(shape.single().training(shape.epoch))
    ranks = [listed(shape.plan(rank).training(shape.epoch)) for rank in range(shape.ranks)]
    for step, batch in enumerate(whole):
        micro = range(step * shape.accumulation, (step + 1) * shape.accumulation)
        assert [number for rank in ranks for place in micro for number in rank[place]] == batch


@often
@given(shapes())
def test_an_epoch_is_the_order_worked_out_by_hand(shape: Shape) -> None:
    expected = by_hand.permutation(shape.num_clips, "order", shape.seed, shape.epoch)
    seen = [number for one in shape.single().training(shape.epoch) for number in one.tolist()]
    assert seen == expected[: len(seen)]


@often
@given(shapes())
def test_a_resume_from_every_position_gives_the_same_tail(shape: Shape) -> None:
    for rank in range(shape.ranks):
        whole = listed(shape.plan(rank).training(shape.epoch))
        for step in range(shape.num_clips // shape.batch_size + 1):
            tail = listed(shape.plan(rank).training(shape.epoch, step * shape.batch_size))
            assert tail == whole[step * shape.accumulation :]


@often
@given(shapes(), st.integers(1, 6))
def test_evaluation_gives_every_clip_exactly_once_and_shares_evenly(shape: Shape, micro_batch: int) -> None:
    plans = [Plan(shape.num_clips, shape.ranks * micro_batch, micro_batch, 0, rank, shape.ranks) for rank in range(shape.ranks)]
    batches = [listed(plan.evaluation()) for plan in plans]
    assert [number for rank in batches for one in rank for number in one] == list(range(shape.num_clips))
    shares = [sum(map(len, rank)) for rank in batches]
    assert max(shares) - min(shares) <= 1
    for rank in batches:
        assert all(len(one) == micro_batch for one in rank[:-1]) and all(0 < len(one) <= micro_batch for one in rank[-1:])


def test_evaluation_of_fewer_clips_than_ranks_leaves_some_ranks_without_any() -> None:
    batches = [listed(Plan(2, 5, 1, 0, rank, 5).evaluation()) for rank in range(5)]
    assert sorted(batches) == [[], [], [], [[0]], [[1]]]


@often
@given(st.integers(20, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_epochs_and_seeds_have_orders_of_their_own(num_clips: int, seed: int, epoch: int) -> None:
    order = Plan(num_clips, 1, 1, seed).order(epoch)
    assert sorted(order.tolist()) == list(range(num_clips))
    assert not np.array_equal(order, Plan(num_clips, 1, 1, seed).order(epoch + 1))
    assert not np.array_equal(order, Plan(num_clips, 1, 1, seed + 1).order(epoch))


def test_what_is_left_out_changes_so_that_every_clip_has_its_turn() -> None:
    plan = Plan(num_clips=10, batch_size=4, micro_batch=4, seed=0)
    left_out = [set(range(10)) - {number for one in plan.training(epoch) for number in one.tolist()} for epoch in range(40)]
    assert all(len(clips) == 2 for clips in left_out)
    assert set.union(*left_out) == set(range(10))


def test_a_clip_comes_early_as_often_as_late_and_epochs_do_not_follow_each_other() -> None:
    num_clips, epochs = 64, 400
    orders = np.stack([Plan(num_clips, 1, 1, 5).order(epoch) for epoch in range(epochs)])
    places = np.argsort(orders, axis=1)
    spread = num_clips / np.sqrt(12 * epochs)  # the standard deviation of a mean place
    assert np.abs(places.mean(axis=0) - (num_clips - 1) / 2).max() < 4.5 * spread
    following = [np.corrcoef(places[epoch], places[epoch + 1])[0, 1] for epoch in range(epochs - 1)]
    assert abs(np.mean(following)) < 4.5 / np.sqrt(epochs * num_clips)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (dict(num_clips=0, batch_size=1, micro_batch=1), "no clips"),
        (dict(num_clips=9, batch_size=0, micro_batch=1), "--batch-size 0"),
        (dict(num_clips=9, batch_size=5, micro_batch=1, world_size=2), "--batch-size 5: expected a multiple of the 2 ranks"),
        (dict(num_clips=9, batch_size=1, micro_batch=1, world_size=2), "--batch-size 1: expected a multiple of the 2 ranks"),
        (dict(num_clips=9, batch_size=8, micro_batch=3, world_size=2), "--micro-batch 3: expected a divisor of the 4 clips"),
        (dict(num_clips=9, batch_size=8, micro_batch=8, world_size=2), "--micro-batch 8: expected a divisor of the 4 clips"),
        (dict(num_clips=9, batch_size=8, micro_batch=0), "--micro-batch 0"),
    ],
)
def test_sizes_that_do_not_divide_are_an_error_that_names_the_flag(plan: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Plan(seed=0, **plan)


def test_a_batch_larger_than_the_split_is_an_error_that_says_how_many_clips_there_are() -> None:
    with pytest.raises(InputError, match=r"--batch-size 12: larger than the split, which holds 11 clips. Expected at most 8\."):
        list(Plan(num_clips=11, batch_size=12, micro_batch=3, seed=0, world_size=4).training(0))
    assert len(list(Plan(num_clips=11, batch_size=12, micro_batch=3, seed=0, world_size=4).evaluation())) == 1


def test_a_position_inside_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="position 6"):
        list(Plan(num_clips=20, batch_size=4, micro_batch=4, seed=0).training(0, consumed=6))


def test_the_mix_is_splitmix64_as_others_wrote_it() -> None:
    """The first numbers of the public reference implementation started at 1234567."""
    state = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert mix64(state.copy()).tolist() == expected == [by_hand.mixed(int(number)) for number in state]


@pytest.mark.golden
def test_the_order_and_the_chance_are_the_golden_ones_and_those_worked_out_by_hand() -> None:
    """These literals are a promise to every run ever made: there is no reason to change them."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for case in golden["permutation"]:
        assert permutation(case["count"], *case["seed"]).tolist() == case["order"] == by_hand.permutation(case["count"], *case["seed"])
    for case in golden["uniforms"]:
        assert uniforms(case["count"], *case["seed"]).tolist() == case["draws"] == by_hand.uniforms(case["count"], *case["seed"])
    for case in golden["training"]:
        plans = [Plan(case["num_clips"], case["batch_size"], case["micro_batch"], case["seed"], rank, len(case["ranks"])) for rank in range(len(case["ranks"]))]
        assert [listed(plan.training(case["epoch"])) for plan in plans] == case["ranks"]
