"""The order of clips: properties over many sizes, and literals that may never change."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips.errors import InputError
from clips.format import ClipFacts
from clips.mix import mix64, permutation, uniforms
from loaders.plan import Part, Plan, balanced_labels
from tests import by_hand

GOLDEN = Path(__file__).parent / "golden"
MANY = 1_000_000
often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Shape:
    """A training's sizes, made so that everything divides and an epoch has at least one step; balanced where there are labels."""

    ranks: int
    micro_batch: int
    accumulation: int
    num_clips: int
    seed: int
    epoch: int
    labels: tuple[int, ...] = ()

    @property
    def batch_size(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation

    @property
    def epoch_clips(self) -> int:
        counts = [self.labels.count(label) for label in set(self.labels)]
        return len(counts) * min(counts) if counts else self.num_clips

    @property
    def steps(self) -> int:
        return self.epoch_clips // self.batch_size

    def plan(self, rank: int = 0) -> Plan:
        labels = np.array(self.labels) if self.labels else None
        return Plan(self.num_clips, self.batch_size, self.micro_batch, self.seed, rank, self.ranks, labels)

    def single(self) -> Plan:
        """The same training on one rank that sees its whole step at once."""
        return replace(self.plan(), micro_batch=self.batch_size, world_size=1)


@st.composite
def shapes(draw: st.DrawFn, balance: bool | None = None) -> Shape:
    ranks, micro_batch, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    batch_size = ranks * micro_batch * accumulation
    labels: list[int] = []
    if draw(st.booleans()) if balance is None else balance:
        classes = draw(st.integers(1, 4))
        fewest = -(-batch_size // classes)
        counts = [draw(st.integers(fewest, 3 * fewest + 3)) for _ in range(classes)]
        labels = draw(st.permutations([label for label, count in enumerate(counts) for _ in range(count)]))
    num_clips = len(labels) or draw(st.integers(batch_size, 5 * batch_size + 7))
    return Shape(ranks, micro_batch, accumulation, num_clips, draw(st.integers(0, 2**40)), draw(st.integers(0, 1000)), tuple(labels))


def order_by_hand(shape: Shape, epoch: int) -> list[int]:
    """An epoch's order with lists alone."""
    if not shape.labels:
        return by_hand.permutation(shape.num_clips, "order", shape.seed, epoch)
    chosen: list[int] = []
    classes = sorted(set(shape.labels))
    taken = min(shape.labels.count(label) for label in classes)
    for label in classes:
        members = [number for number, one in enumerate(shape.labels) if one == label]
        stretches = len(members) // taken
        shuffled = by_hand.permutation(len(members), "balance", shape.seed, label, epoch // stretches)
        begin = epoch % stretches * taken
        chosen += [members[place] for place in shuffled[begin : begin + taken]]
    return [chosen[place] for place in by_hand.permutation(len(chosen), "order", shape.seed, epoch)]


def listed(parts: Iterable[Part]) -> list[list[int]]:
    return [part.numbers.tolist() for part in parts]


def placed(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """Position and number of each clip, in the order in which they come."""
    return [pair for part in parts for pair in zip(part.positions.tolist(), part.numbers.tolist(), strict=True)]


@often
@given(shapes())
def test_training_gives_every_clip_at_most_once_and_full_batches_alone(shape: Shape) -> None:
    seen = [number for rank in range(shape.ranks) for one in listed(shape.plan(rank).training(shape.epoch)) for number in one]
    assert len(seen) == len(set(seen)) == shape.steps * shape.batch_size
    assert set(seen) <= set(range(shape.num_clips))


@often
@given(shapes())
def test_every_rank_gets_as_many_micro_batches_all_of_one_size(shape: Shape) -> None:
    assert shape.plan().steps_per_epoch == shape.steps > 0
    for rank in range(shape.ranks):
        sizes = [len(one) for one in listed(shape.plan(rank).training(shape.epoch))]
        assert sizes == [shape.micro_batch] * (shape.steps * shape.accumulation)


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
    expected = order_by_hand(shape, shape.epoch)
    assert shape.plan().order(shape.epoch).tolist() == expected
    assert len(expected) == shape.plan().epoch_clips == shape.epoch_clips
    seen = [number for one in listed(shape.single().training(shape.epoch)) for number in one]
    assert seen == expected[: len(seen)]


@often
@given(shapes())
def test_a_position_is_the_place_in_the_order_of_all_ranks(shape: Shape) -> None:
    pairs = sorted(pair for rank in range(shape.ranks) for pair in placed(shape.plan(rank).training(shape.epoch)))
    assert pairs == list(enumerate(order_by_hand(shape, shape.epoch)[: shape.steps * shape.batch_size]))


@often
@given(shapes())
def test_a_resume_from_every_position_gives_the_same_tail(shape: Shape) -> None:
    for rank in range(shape.ranks):
        whole = [placed([part]) for part in shape.plan(rank).training(shape.epoch)]
        for step in range(shape.steps + 1):
            tail = [placed([part]) for part in shape.plan(rank).training(shape.epoch, step * shape.batch_size)]
            assert tail == whole[step * shape.accumulation :]


@often
@given(shapes(), st.data())
def test_one_then_two_then_three_then_one_rank_give_what_one_alone_gives(shape: Shape, data: st.DataObject) -> None:
    plan = replace(shape.single(), batch_size=6, micro_batch=6) if shape.epoch_clips >= 6 else None
    if plan is None:
        return
    steps = plan.steps_per_epoch
    cuts = sorted(data.draw(st.lists(st.integers(0, steps), min_size=3, max_size=3)))
    seen: list[tuple[int, int]] = []
    for ranks, begin, end in zip((1, 2, 3, 1), (0, *cuts), (*cuts, steps), strict=True):
        parts = [list(replace(plan, micro_batch=1, rank=rank, world_size=ranks).training(shape.epoch, 6 * begin)) for rank in range(ranks)]
        seen += [pair for rank in parts for pair in placed(rank[: (end - begin) * 6 // ranks])]
    assert sorted(seen) == placed(plan.training(shape.epoch))


@often
@given(shapes(), st.integers(1, 6))
def test_evaluation_gives_every_clip_exactly_once_and_shares_evenly(shape: Shape, micro_batch: int) -> None:
    plans = [replace(shape.plan(rank), batch_size=shape.ranks * micro_batch, micro_batch=micro_batch) for rank in range(shape.ranks)]
    batches = [listed(plan.evaluation()) for plan in plans]
    assert [number for rank in batches for one in rank for number in one] == list(range(shape.num_clips))
    assert all(position == number for plan in plans for position, number in placed(plan.evaluation()))
    shares = [sum(map(len, rank)) for rank in batches]
    assert max(shares) - min(shares) <= 1
    for rank in batches:
        assert all(len(one) == micro_batch for one in rank[:-1]) and all(0 < len(one) <= micro_batch for one in rank[-1:])


def test_evaluation_of_fewer_clips_than_ranks_leaves_some_ranks_without_any() -> None:
    batches = [listed(Plan(2, 5, 1, 0, rank, 5).evaluation()) for rank in range(5)]
    assert sorted(batches) == [[], [], [], [[0]], [[1]]]


@often
@given(st.integers(20, 300), st.integers(0, 2**40), st.integers(0, 1000), st.booleans())
def test_epochs_and_seeds_have_orders_of_their_own(num_clips: int, seed: int, epoch: int, balance: bool) -> None:
    labels = np.arange(num_clips) % 2 if balance else None
    order = Plan(num_clips, 1, 1, seed, labels=labels).order(epoch)
    assert sorted(order.tolist()) == list(range(num_clips)) or (balance and num_clips % 2)
    assert not np.array_equal(order, Plan(num_clips, 1, 1, seed, labels=labels).order(epoch + 1))
    assert not np.array_equal(order, Plan(num_clips, 1, 1, seed + 1, labels=labels).order(epoch))


def test_what_is_left_out_changes_so_that_every_clip_has_its_turn() -> None:
    plan = Plan(num_clips=10, batch_size=4, micro_batch=4, seed=0)
    left_out = [set(range(10)) - {number for one in listed(plan.training(epoch)) for number in one} for epoch in range(40)]
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


@often
@given(shapes(balance=True))
def test_a_balanced_epoch_has_of_every_class_as_many_clips_as_the_smallest_has(shape: Shape) -> None:
    order = shape.plan().order(shape.epoch)
    smallest = min(shape.labels.count(label) for label in set(shape.labels))
    assert np.bincount(np.array(shape.labels)[order]).tolist() == [smallest] * len(set(shape.labels))
    assert len(set(order.tolist())) == len(order)


@often
@given(shapes(balance=True))
def test_balanced_clips_come_again_only_after_all_whole_stretches_of_their_class(shape: Shape) -> None:
    taken = shape.epoch_clips // len(set(shape.labels))
    for label in set(shape.labels):
        stretches = shape.labels.count(label) // taken
        first = shape.epoch - shape.epoch % stretches
        cycle = [number for epoch in range(first, first + stretches) for number in shape.plan().order(epoch).tolist() if shape.labels[number] == label]
        assert len(cycle) == len(set(cycle)) == stretches * taken


def test_what_a_balanced_cycle_leaves_out_changes_so_that_every_clip_has_its_turn() -> None:
    labels = np.array([0] * 3 + [1] * 8)  # of the eight two come in no epoch of a cycle of two
    plan = Plan(11, 1, 1, seed=0, labels=labels)
    left_out = [set(range(3, 11)) - {*plan.order(2 * cycle).tolist(), *plan.order(2 * cycle + 1).tolist()} for cycle in range(40)]
    assert all(len(clips) == 2 for clips in left_out)
    assert set.union(*left_out) == set(range(3, 11))
    times = np.bincount(np.concatenate([plan.order(epoch) for epoch in range(800)]), minlength=11)
    assert times[:3].tolist() == [800] * 3
    assert np.abs(times[3:] - 300).max() < 4.5 * np.sqrt(400 * 0.75 * 0.25)  # of each of 400 cycles with chance 6/8


def test_balanced_classes_are_mixed_within_the_epoch() -> None:
    labels = np.array([0] * 200 + [1] * 500)
    halves = [np.count_nonzero(labels[Plan(700, 1, 1, seed, labels=labels).order(0)[:200]]) for seed in range(50)]
    assert np.abs(np.array(halves) - 100).max() < 4.5 * np.sqrt(200 / 8)  # drawn without putting back: 200 * 1/2 * 1/2 * 1/2
    assert len(set(halves)) > 5


def test_labels_in_any_integer_type_give_the_same_order_and_those_of_other_clips_are_refused() -> None:
    labels = np.array([0, 1, 1, 0, 1, 2, 2])
    orders = [Plan(7, 1, 1, 9, labels=labels.astype(dtype)).order(3).tolist() for dtype in (np.uint8, np.int32, np.int64)]
    assert orders[0] == orders[1] == orders[2]
    with pytest.raises(ValueError, match=r"labels of shape \(7,\) for 6 clips"):
        Plan(6, 1, 1, 9, labels=labels)


def facts_with(labels: list[int]) -> list[ClipFacts]:
    return [ClipFacts(f"train/{label}/{number:04d}", label, "s", None, None, None, 8) for number, label in enumerate(labels)]


def test_a_class_without_clips_cannot_be_balanced_and_is_named() -> None:
    assert balanced_labels(facts_with([1, 0, 1]), ("rest", "wave")).tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="--balance: no clips of wave, point; expected some of every class"):
        balanced_labels(facts_with([0, 2, 2]), ("rest", "wave", "nod", "point"))
    with pytest.raises(InputError, match="--balance: no clip has label 1"):
        Plan(3, 1, 1, 0, labels=balanced_labels(facts_with([0, 2, 2])))


@often
@given(shapes(), st.sampled_from([2, 3]))
def test_repeats_bring_each_clip_of_a_step_that_many_times_in_a_row_in_the_order_without_them(shape: Shape, repeats: int) -> None:
    plan = replace(shape.single(), batch_size=shape.batch_size * repeats, micro_batch=shape.batch_size * repeats, repeats=repeats)
    assert (plan.steps_per_epoch, plan.epoch_clips) == (shape.steps, shape.epoch_clips * repeats)
    assert plan.order(shape.epoch).tolist() == [number for number in order_by_hand(shape, shape.epoch) for _ in range(repeats)]
    for with_repeats, without in zip(plan.training(shape.epoch), shape.single().training(shape.epoch), strict=True):
        assert with_repeats.numbers.tolist() == [number for number in without.numbers.tolist() for _ in range(repeats)]
    ranks = [replace(shape.plan(rank), batch_size=plan.batch_size, repeats=repeats) for rank in range(shape.ranks)]
    assert sorted(pair for one in ranks for pair in placed(one.training(shape.epoch))) == placed(plan.training(shape.epoch))
    assert placed(plan.training(shape.epoch, plan.batch_size)) == placed(plan.training(shape.epoch))[plan.batch_size :]
    assert placed(plan.evaluation()) == [(number, number) for number in range(shape.num_clips)]


@pytest.mark.parametrize("repeats", [0, 3])
def test_repeats_that_do_not_divide_the_batch_are_an_error(repeats: int) -> None:
    with pytest.raises(InputError, match=f"--repeats {repeats}: expected a divisor of --batch-size 8"):
        Plan(9, 8, 8, 0, repeats=repeats)


@pytest.mark.parametrize("balance", [False, True])
def test_an_order_of_many_clips_costs_few_bytes_each(balance: bool) -> None:
    """Measured: 16 bytes a clip, 19 balanced; ten million take 2.3 and 3.4 s of a core and a process of 183 and 259 MB."""
    labels = (np.arange(MANY) % 3 == 0).astype(np.int64) if balance else None
    tracemalloc.start()
    try:
        part = next(Plan(MANY, 64, 64, 0, labels=labels).training(3))
        assert tracemalloc.get_traced_memory()[1] < 24 * MANY
        tracemalloc.reset_peak()
        evaluated = list(zip(range(3), Plan(MANY, 64, 64, 0).evaluation(), strict=False))
        assert len(part.numbers) == 64 and len(evaluated) == 3
        assert tracemalloc.get_traced_memory()[1] < 24 * MANY
    finally:
        tracemalloc.stop()


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
def test_sizes_that_do_not_divide_are_an_error_that_names_the_flag(plan: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Plan(seed=0, **plan)


def test_a_batch_larger_than_the_split_is_an_error_that_says_how_many_clips_there_are() -> None:
    with pytest.raises(InputError, match=r"--batch-size 12: an epoch has 11 clips, not enough for one step. Give a --batch-size of at most 8,"):
        list(Plan(num_clips=11, batch_size=12, micro_batch=3, seed=0, world_size=4).training(0))
    assert len(list(Plan(num_clips=11, batch_size=12, micro_batch=3, seed=0, world_size=4).evaluation())) == 1
    balanced = Plan(num_clips=11, batch_size=8, micro_batch=8, seed=0, labels=np.array([0, 0, 0] + [1] * 8))
    with pytest.raises(InputError, match=r"--batch-size 8: an epoch has 6 clips in balanced classes"):
        balanced.check_epoch()


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
    golden = json.loads((GOLDEN / "order.json").read_text(encoding="utf-8"))
    for case in golden["permutation"]:
        assert permutation(case["count"], *case["seed"]).tolist() == case["order"] == by_hand.permutation(case["count"], *case["seed"])
    for case in golden["uniforms"]:
        assert uniforms(case["count"], *case["seed"]).tolist() == case["draws"] == by_hand.uniforms(case["count"], *case["seed"])
    for case in golden["training"]:
        plans = [Plan(case["num_clips"], case["batch_size"], case["micro_batch"], case["seed"], rank, len(case["ranks"])) for rank in range(len(case["ranks"]))]
        assert [listed(plan.training(case["epoch"])) for plan in plans] == case["ranks"]


@pytest.mark.golden
def test_the_balanced_order_is_the_golden_one() -> None:
    """As above: a promise."""
    for case in json.loads((GOLDEN / "order_balanced.json").read_text(encoding="utf-8")):
        shape = Shape(1, 1, 1, len(case["labels"]), case["seed"], 0, tuple(case["labels"]))
        orders = [shape.plan().order(epoch).tolist() for epoch in range(len(case["orders"]))]
        assert orders == case["orders"] == [order_by_hand(shape, epoch) for epoch in range(len(case["orders"]))]
