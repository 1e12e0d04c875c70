"""The certificate: sums that no rank, micro-batch or resume changes, and that every exchanged clip does."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips.errors import InputError
from loaders.certificate import Certificate, Record, clip_proof, merge, proof_sum, read_certificate, spelled, write_certificate
from loaders.plan import Plan

GOLDEN = Path(__file__).parent / "golden" / "proofs.json"
NUM_CLASSES = 3
often = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
keys = st.text(st.characters(codec="utf-8"), max_size=12)


def proof_by_hand(epoch: int, position: int, key: str, label: int) -> int:
    blob = b"".join(number.to_bytes(8, "little", signed=True) for number in (epoch, position, label)) + key.encode()
    return int.from_bytes(hashlib.blake2b(blob, digest_size=16, person=b"clip certificate").digest(), "little")


def key_of(number: int) -> str:
    return f"train/c/{number:06d}"


def label_of(number: int) -> int:
    return number % NUM_CLASSES


def record_by_hand(plan: Plan, epoch: int, consumed: int, bad: set[int]) -> Record:
    """What a record must say of the first `consumed` places of an epoch, from the order alone; `bad` are clips' numbers."""
    places = list(enumerate(plan.order(epoch)[:consumed].tolist()))
    good = [(position, number) for position, number in places if number not in bad]
    total = sum(proof_by_hand(epoch, position, key_of(number), label_of(number)) for position, number in good) % 2**128
    listed = [[position, key_of(number)] for position, number in places if number in bad]
    counts = [sum(label_of(number) == label for _, number in good) for label in range(NUM_CLASSES)]
    return {"epoch": epoch, "clips": consumed, "sum": f"{total:032x}", "bad": listed, "class_counts": counts}


def train(certificates: list[Certificate], plan: Plan, epoch: int, begin: int, end: int, bad: set[int]) -> None:
    """Each rank trains from position `begin` to `end` of the epoch."""
    ranks = len(certificates)
    for rank, certificate in enumerate(certificates):
        certificate.begin(epoch, begin)
        share = replace(plan, rank=rank, world_size=ranks, micro_batch=1)
        for part, _ in zip(share.training(epoch, begin), range((end - begin) // ranks), strict=False):
            pairs = list(zip(part.positions.tolist(), part.numbers.tolist(), strict=True))
            good = [(position, number) for position, number in pairs if number not in bad]
            proof = sum(clip_proof(epoch, position, key_of(number), label_of(number)) for position, number in good)
            listed = [(position, key_of(number)) for position, number in pairs if number in bad]
            certificate.add(proof, [label_of(number) for _, number in good], listed)


def started(ranks: int, saved: dict[str, Any] | None = None) -> list[Certificate]:
    certificates = [Certificate(NUM_CLASSES, rank) for rank in range(ranks)]
    for certificate in certificates:
        if saved is not None:
            certificate.load_state_dict(saved)
    return certificates


def finish(certificates: list[Certificate]) -> Record:
    states = [certificate.state_dict() for certificate in certificates]
    records = [certificate.finish(states) for certificate in certificates]
    assert all(record == records[0] for record in records)
    return records[0]


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@often
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), keys, st.integers(-1, 2**31))
def test_a_proof_is_the_one_worked_out_by_hand(epoch: int, position: int, key: str, label: int) -> None:
    assert clip_proof(epoch, position, key, label) == proof_by_hand(epoch, position, key, label)


@often
@given(*[st.tuples(st.integers(0, 3), st.integers(0, 3), st.text("01ab\x00", max_size=3), st.integers(0, 3))] * 2)
def test_two_clips_have_one_proof_only_if_they_agree_in_all(one: tuple[int, int, str, int], other: tuple[int, int, str, int]) -> None:
    assert (clip_proof(*one) == clip_proof(*other)) == (one == other)


def test_a_sum_is_that_of_the_proofs_in_any_order_and_has_128_bits() -> None:
    places = [(position, key_of(position), label_of(position)) for position in range(50)]
    expected = sum(proof_by_hand(7, *place) for place in places)
    assert expected >= 2**128
    for ordered in (places, places[::-1]):
        assert proof_sum(7, [place[0] for place in ordered], [spelled(*place[1:]) for place in ordered]) == expected % 2**128


@pytest.mark.golden
def test_the_proofs_are_the_golden_ones() -> None:
    """A promise to every certificate ever written: there is no reason to change them."""
    for case in json.loads(GOLDEN.read_text(encoding="utf-8")):
        place = case["epoch"], case["position"], case["key"], case["label"]
        assert f"{clip_proof(*place):032x}" == case["proof"] == f"{proof_by_hand(*place):032x}"


@often
@given(st.data())
def test_any_ranks_with_any_resumes_certify_the_same(data: st.DataObject) -> None:
    plan = Plan(data.draw(st.integers(6, 40)), 6, 6, seed=data.draw(st.integers(0, 99)))
    bad = data.draw(st.sets(st.integers(0, plan.num_clips - 1), max_size=4))
    end = plan.steps_per_epoch * 6
    saved = None
    for epoch in range(2):
        cuts = sorted(data.draw(st.lists(st.integers(0, plan.steps_per_epoch), max_size=3)))
        for begin, stop in zip((0, *cuts), (*cuts, plan.steps_per_epoch), strict=True):
            certificates = started(data.draw(st.sampled_from([1, 2, 3, 6])), saved)
            train(certificates, plan, epoch, 6 * begin, 6 * stop, bad)
            saved = through_torch(merge([certificate.state_dict() for certificate in certificates]))
            assert saved["under_way"] == record_by_hand(plan, epoch, 6 * stop, bad)
        assert finish(certificates) == record_by_hand(plan, epoch, end, bad)
        saved = certificates[-1].state_dict()
    assert saved == {"epochs": [record_by_hand(plan, epoch, end, bad) for epoch in range(2)], "under_way": None}


def test_two_clips_that_changed_places_are_seen_in_the_sum() -> None:
    plan = Plan(12, 6, 6, seed=1)
    certificate = Certificate(NUM_CLASSES)
    certificate.begin(0)
    order = plan.order(0).tolist()
    order[2], order[9] = order[9], order[2]
    for position, number in enumerate(order):
        certificate.add(clip_proof(0, position, key_of(number), label_of(number)), [label_of(number)])
    found, expected = finish([certificate]), record_by_hand(plan, 0, 12, set())
    assert found["sum"] != expected["sum"] and found["clips"] == expected["clips"]


def test_a_checkpoint_leaves_the_ranks_as_they_were() -> None:
    """Merging is looking: what each rank goes on with is its own part."""
    plan = Plan(24, 6, 6, seed=2)
    certificates = started(3)
    train(certificates, plan, 0, 0, 12, set())
    states = [certificate.state_dict() for certificate in certificates]
    before = json.dumps(states)
    assert merge(states) == merge(states[::-1])
    assert json.dumps(states) == before == json.dumps([certificate.state_dict() for certificate in certificates])


def test_a_state_that_was_taken_does_not_change_with_its_certificate() -> None:
    certificate = Certificate(NUM_CLASSES)
    certificate.begin(0)
    certificate.add(5, [0, 1], [(2, "k")])
    taken = certificate.state_dict()
    before = json.dumps(taken)
    certificate.add(5, [0, 1], [(5, "k")])
    finish([certificate])
    assert json.dumps(taken) == before
    loaded = Certificate(NUM_CLASSES)
    loaded.load_state_dict(taken)
    loaded.begin(0, 3)
    loaded.add(1, [2], [(4, "k")])
    assert json.dumps(taken) == before


def begun(epoch: int, clips: int = 0, rank: int = 0) -> Certificate:
    certificate = Certificate(NUM_CLASSES, rank)
    certificate.begin(epoch)
    certificate.add(1, [0] * clips)
    return certificate


def ended() -> Certificate:
    certificate = begun(4)
    finish([certificate])
    return certificate


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: Certificate(2).add(1, [0]), "no epoch has begun"),
        (lambda: Certificate(2).finish([Certificate(2).state_dict()]), "no epoch has begun"),
        (lambda: begun(0).add(1, [0, 3]), "labels 0 … 3 of 3 classes"),
        (lambda: begun(0).add(1, [-1]), "labels -1"),
        (lambda: begun(0).begin(1), "epoch 1 begins at 0, but 0 clips of epoch 0"),
        (lambda: begun(0, 6).begin(0), "begins at 0, but 6 clips of epoch 0"),
        (lambda: begun(0, 6).begin(0, 12), "begins at 12, but 6 clips"),
        (lambda: Certificate(2).begin(0, 6), "begins at 6, but 0 clips"),
        (lambda: begun(0, 6, rank=1).begin(0, 6), "begins at 6, but 6 clips"),
        (lambda: ended().begin(4), "epoch 4 begins after epoch 4 ended"),
        (lambda: begun(0, 6).finish([begun(0, 3).state_dict()]), "not among those of all ranks"),
        (lambda: merge([begun(0).state_dict(), begun(1).state_dict()]), "one rank is in epoch 0, another in epoch 1"),
        (lambda: merge([begun(0).state_dict(), ended().state_dict()]), "do not agree"),
        (lambda: merge([ended().state_dict(), Certificate(3).state_dict()]), "do not agree"),
    ],
)
def test_what_would_make_a_wrong_certificate_is_refused(wrong: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        wrong()


def test_refused_labels_leave_the_certificate_as_it_was() -> None:
    certificate = begun(0, 2)
    before = certificate.state_dict()
    with pytest.raises(ValueError):
        certificate.add(9, [0, 1, 7])
    assert certificate.state_dict() == before


def test_a_file_gives_back_what_was_written_and_says_which_format_it_has(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    plan = Plan(24, 6, 6, seed=2)
    certificates = started(2)
    train(certificates, plan, 0, 0, 24, {3, 5})
    finish(certificates)
    train(certificates, plan, 1, 0, 12, {3, 5})
    merged = merge([certificate.state_dict() for certificate in certificates])
    write_certificate(path, merged)
    assert read_certificate(path) == merged
    assert json.loads(path.read_text(encoding="utf-8"))["format"] == 1
    write_certificate(path, Certificate(2).state_dict())
    assert read_certificate(path) == {"epochs": [], "under_way": None}


GOOD = {"epoch": 0, "clips": 3, "sum": "0" * 31 + "7", "bad": [[1, "k"]], "class_counts": [1, 1]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not a certificate"),
        ("[]", "not a certificate"),
        ("{}", "not a certificate .*'format'"),
        (json.dumps({"format": 2}), "format 2; this program reads format 1"),
        (json.dumps({"format": 1, "epochs": []}), "not a certificate .*under_way"),
        (json.dumps({"format": 1, "epochs": [GOOD, GOOD], "under_way": None}), r"not a certificate .*epochs \[0, 0\]"),
        (json.dumps({"format": 1, "epochs": [GOOD], "under_way": GOOD}), r"not a certificate .*epochs \[0, 0\]"),
        *[
            (json.dumps({"format": 1, "epochs": [{**GOOD, name: value}], "under_way": None}), "not a certificate")
            for name, value in [("epoch", "0"), ("clips", -1), ("sum", "x"), ("sum", "7"), ("bad", [[1, "k"], 2]), ("class_counts", 3), ("more", 1)]
        ],
    ],
)
def test_another_file_is_an_error_that_names_it(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(content)
    with pytest.raises(InputError, match=text) as raised:
        read_certificate(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"certificate\.json: missing"):
        read_certificate(tmp_path / "certificate.json")


def test_numbers_of_numpy_are_taken_as_python_s() -> None:
    """Positions and labels often come out of arrays; a state must still be plain."""
    certificate = Certificate(NUM_CLASSES)
    certificate.begin(0)
    position, label = np.int64(2), np.int64(1)
    certificate.add(clip_proof(0, position, "k", label), [label, label], [(position, "k")])
    state = certificate.state_dict()
    assert through_torch(state) == state == json.loads(json.dumps(state))
