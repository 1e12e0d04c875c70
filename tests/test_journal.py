"""When a run is too bad to go on, from steps to the line that ends it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from clips.errors import InputError
from training.distributed import Group
from training.journal import Journal
from training.meter import Meter
from training.precision import Precision
from training.progress import Progress
from training.run_folder import RunFolder
from training.watch import Watch

CPU = torch.device("cpu")


@dataclass
class Clips:
    """A step's clips, by number."""

    number: int
    labels: Sequence[int] = (0, 1)
    proof: int = 0
    bad: Sequence[Any] = ()

    @property
    def key(self) -> Sequence[str]:
        return [f"clip{self.number}", f"clip{self.number}b"]


@dataclass
class Certificate:
    """Counts nothing."""

    num_bad: int = 0
    proofs: list[int] = field(default_factory=list)

    def add(self, proof: int, labels: Sequence[int], bad: Sequence[tuple[int, str]] = ()) -> None:
        self.proofs.append(proof)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def finish(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}


def journal(folder: Path, mode: str, max_skipped: int) -> Journal:
    run = RunFolder(folder)
    run.begin({})
    watch, group = Watch(CPU, counts_norms=mode != "fp16"), Group(0, 1, 0, CPU, "single")
    return Journal(run, group, Progress(), Certificate(), watch, ("a", "b"), 0, max_skipped, lambda _: None)


def test_gradients_that_stay_infinite_under_fp16_end_the_run_and_name_the_clips(tmp_path: Path) -> None:
    made, precision = journal(tmp_path, "fp16", max_skipped=2), Precision("fp16", CPU)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    batches = made.fed(Clips(number) for number in range(100))

    def step() -> None:
        next(batches)
        precision.backward((weight * 0).sum())
        weight.grad = torch.full((2,), math.inf)
        made.step(torch.tensor(1.0), precision.step(optimizer, [weight], 1.0), 2)

    for number in range(18):  # the scale falls to 1 in 16 of them, then two are faults
        step()
        if number % 10 == 9:
            made.write_steps(0.1, Meter())
    assert made.write_steps(0.1, Meter())["skipped"] == 2
    step()
    with pytest.raises(InputError, match=r"--max-skipped 2: 3 steps .* the last with the clips clip18, clip18b\. Look at these clips"):
        made.write_steps(0.1, Meter())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped"] for line in lines] == [0, 2, 3] and {line["train/loss"] for line in lines} == {1.0}


def test_a_step_that_does_not_log_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the device is a number read from a tensor."""
    made, precision = journal(tmp_path, "fp16", max_skipped=0), Precision("fp16", CPU)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a step waited for the device"))
    precision.backward((weight * torch.tensor([math.inf, 1.0])).sum())
    made.step(torch.tensor(1.0), precision.step(optimizer, [weight], 1.0), 2)
