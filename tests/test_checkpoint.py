"""Checkpoints: what was saved comes back bit for bit, and damage never passes unseen."""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips.errors import InputError
from training.checkpoint import load_last, save
from training.distributed import Group
from training.state import check_all_read


def state_at(step: int) -> dict:
    """A small state of every kind of value."""
    return {"step": step, "weights": torch.full((64,), float(step)), "best": None, "history": [(1, 0.5), "auroc"]}


def loaded(folder: Path) -> dict:
    """The newest readable state, which must be there."""
    state = load_last(folder)
    assert state is not None
    return state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_no_checkpoint_yet_is_none(tmp_path: Path) -> None:
    assert load_last(tmp_path) is None
    assert load_last(tmp_path / "absent") is None


def test_the_name_is_the_step_and_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 90, 1000):
        assert save(tmp_path, step, state_at(step)) == tmp_path / "checkpoints" / f"step-{step:09d}.pt"
    assert names(tmp_path) == ["step-000000090.pt", "step-000001000.pt"]
    assert loaded(tmp_path)["step"] == 1000


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    save(tmp_path, 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    state = loaded(tmp_path)
    assert all(torch.equal(state["model"][name], value) for name, value in model.state_dict().items())
    other = torch.optim.AdamW(model.parameters(), fused=True)
    other.load_state_dict(state["optimizer"])
    for before, after in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, state_at(3))
    save(tmp_path, 3, {"again": True})
    assert load_last(tmp_path) == {"again": True}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), damage=st.sampled_from(["cut", "flip", "zero"]))
def test_a_damaged_last_checkpoint_gives_the_one_before(tmp_path: Path, place: float, damage: str) -> None:
    save(tmp_path, 1, state_at(1))
    path = save(tmp_path, 2, state_at(2))
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    if damage == "cut":
        del content[start:]
    elif damage == "flip":
        content[start] ^= 1
    else:
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)
    state = loaded(tmp_path)
    assert state["step"] in (1, 2)  # bytes that hold nothing (padding) may change unseen
    assert torch.equal(state["weights"], torch.full((64,), float(state["step"])))
    assert damage != "cut" or state["step"] == 1


def test_a_fall_back_is_logged_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, state_at(1))
    save(tmp_path, 2, state_at(2)).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path)["step"] == 1
    assert "step-000000002.pt: damaged" in caplog.text


def test_a_flipped_bit_in_the_weights_is_seen(tmp_path: Path) -> None:
    save(tmp_path, 1, state_at(1))
    path = save(tmp_path, 2, state_at(2))
    weights = np.full(64, 2, dtype="<f4").tobytes()
    content = path.read_bytes()
    assert content.count(weights) == 1
    path.write_bytes(content.replace(weights, b"\x01" + weights[1:]))
    assert loaded(tmp_path)["step"] == 1


def test_only_damaged_checkpoints_are_an_error_that_names_the_folder(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, state_at(step))
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="checkpoints: expected a readable checkpoint, found 2 damaged"):
        load_last(tmp_path)


def test_a_run_that_went_on_without_a_damaged_checkpoint_forgets_it(tmp_path: Path) -> None:
    save(tmp_path, 10, state_at(10))
    save(tmp_path, 20, state_at(20)).write_bytes(b"damaged")
    save(tmp_path, 15, state_at(15))
    assert names(tmp_path) == ["step-000000010.pt", "step-000000015.pt"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, state_at(1))

    def half(state: dict, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]  # the file that torch.save gets
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, state_at(2))
    assert names(tmp_path) == ["step-000000001.pt"]


def test_the_rest_of_a_killed_write_is_not_a_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1, state_at(1))
    (tmp_path / "checkpoints" / ".step-000000002.pt.host.1.abcd.tmp").write_bytes(b"half")
    assert loaded(tmp_path)["step"] == 1
    save(tmp_path, 2, state_at(2))
    assert names(tmp_path) == ["step-000000001.pt", "step-000000002.pt"]


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"best": {"value": np.float64(0.5)}}, r"state\['best'\]\['value'\] is a numpy.float64"),
        ({"folder": [Path("a")]}, r"state\['folder'\]\[0\]"),
        ({"weights": OrderedDict(a={1, 2})}, r"state\['weights'\]\['a'\] is a builtins.set"),
    ],
)
def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, state: dict, place: str) -> None:
    with pytest.raises(TypeError, match=place):
        save(tmp_path, 1, state)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("others", "is_refused"), [(["7", "7"], False), (["7", "none"], True), (["7", "8"], True), (["none", "none"], False)])
def test_ranks_that_read_different_checkpoints_all_stop_before_one_waits_for_the_other(tmp_path: Path, others: list[str], is_refused: bool) -> None:
    class Both(Group):
        def gather_objects(self, obj: Any) -> list[Any]:
            assert obj == (7 if others[0] == "7" else "none")
            return others

    saved = {"progress": {"step": 7}} if others[0] == "7" else None
    with pytest.raises(InputError, match="the ranks read those of steps") if is_refused else nullcontext():
        check_all_read(Both(0, 2, 0, torch.device("cpu"), "single"), tmp_path, saved)
