"""python -m loaders certify: whether a run trained on exactly the clips that the plan has for it, worked out again from names alone.

config.json, DATASET_HOME -> plan -> each epoch's sum <-> certificate.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from clips.errors import InputError
from clips.format import ClipFacts
from clips.manifest import fingerprint

from .certificate import CERTIFICATE, Record, proof_sum, read_certificate, spelled
from .folds import trained_on
from .plan import Plan, balanced_labels
from .source import open_source

BAR_AFTER_S = 1.0  # shorter checks show no progress bar


@dataclass(frozen=True)
class CertifyConfig:
    """Tells of each epoch of a run whether every clip came exactly as planned, and which ones could not be trained on."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with config.json and certificate.json."""
    dataset_home: Path | None = None
    """The run's data, where they lie elsewhere by now: shards or snippets."""


class Planned:
    """What the plan says of a run: the clips in label and key, and their order in any epoch."""

    def __init__(self, facts: Sequence[ClipFacts], plan: Plan, class_names: tuple[str, ...]) -> None:
        self.plan, self.class_names = plan, class_names
        self.epoch_clips = plan.steps_per_epoch * plan.batch_size
        self._keys = [fact.key for fact in facts]
        self._labels = np.array([fact.label for fact in facts])
        self._spelled = [spelled(fact.key, fact.label) for fact in facts]

    def faults(self, record: Record, under_way: bool) -> list[str]:
        """How what was trained on differs from the plan: sentences, none where nothing does."""
        epoch, clips, bad = record["epoch"], record["clips"], dict(record["bad"])
        if clips % self.plan.batch_size or clips > self.epoch_clips or not (under_way or clips == self.epoch_clips):
            return [f"{clips} clips were consumed; the plan has {self.epoch_clips} in steps of {self.plan.batch_size}"]
        order = self.plan.order(epoch)[:clips]
        stray = [key for position, key in bad.items() if position >= clips or self._keys[order[position]] != key]
        if stray or len(bad) < len(record["bad"]):
            return [f"bad clips that the plan has not there: {', '.join(stray) or 'one place twice'}"]
        good = np.delete(np.arange(clips), list(bad))
        faults = []
        found, expected = record["sum"], proof_sum(epoch, good.tolist(), map(self._spelled.__getitem__, order[good].tolist()))
        if int(found, 16) != expected:
            faults.append(f"the sum of its clips is {found}; the plan's is {expected:032x}")
        counts = np.bincount(self._labels[order[good]], minlength=len(self.class_names)).tolist()
        if record["class_counts"] != counts:
            faults.append(f"{self.in_classes(record['class_counts'])} were counted; the plan has {self.in_classes(counts)}")
        return faults

    def in_classes(self, counts: Sequence[int]) -> str:
        names = [*self.class_names, *("of no class",) * (len(counts) - len(self.class_names))]
        return ", ".join(f"{count} {name}" for count, name in zip(counts, names, strict=False))


def certify(config: CertifyConfig) -> int:
    """0 where every epoch is as planned, 1 where one differs; the verdicts go to stdout. InputError without a run or its data."""
    certificate = read_certificate(config.run / CERTIFICATE)
    planned = read_plan(config)
    under_way = certificate["under_way"]
    records = [*certificate["epochs"], *([under_way] if under_way else [])]
    there = {record["epoch"] for record in records}
    differing = [epoch for epoch in range(max(there, default=-1) + 1) if epoch not in there]
    lines = [f"epoch {epoch}: missing" for epoch in differing]
    with tqdm(total=sum(record["clips"] for record in records), unit="clip", unit_scale=True, desc="certify", disable=None, delay=BAR_AFTER_S) as progress:
        for record in records:
            faults = planned.faults(record, record is under_way)
            lines.append(verdict(record, faults, planned, record is under_way))
            differing += [record["epoch"]] if faults else []
            progress.update(record["clips"])
    for line in lines:
        print(line)
    print(summary(len(records), sorted(differing)))
    return 1 if differing else 0


def verdict(record: Record, faults: Sequence[str], planned: Planned, under_way: bool) -> str:
    """The line of one epoch, counted from 0 as in the plan."""
    clips = f"{record['clips']} of {planned.epoch_clips} clips so far" if under_way else f"{record['clips']} clips"
    if faults:
        return f"epoch {record['epoch']}: DIFFERS from the plan: {'; '.join(faults)}"
    bad = f"; not trained on, because they were bad: {', '.join(key for _, key in record['bad'])}" if record["bad"] else ""
    return f"epoch {record['epoch']}: {clips} as planned ({planned.in_classes(record['class_counts'])}){bad}"


def summary(num_epochs: int, differing: Sequence[int]) -> str:
    if differing:
        return f"not as planned: epoch {', '.join(map(str, differing))}"
    return f"{num_epochs} epoch{'' if num_epochs == 1 else 's'} as planned: each clip that was trained on came in its place, and no other"


def read_plan(config: CertifyConfig) -> Planned:
    """The run's plan, from its configuration and the names in its data; InputError where the data are other ones."""
    path = config.run / "config.json"
    flags = _read_flags(path)
    home = config.dataset_home or Path(flags["dataset_home"])
    source = open_source(home, "train")
    source.close()
    facts = trained_on(source, flags["fraction"], flags.get("fold"))
    expected, found = flags["data"]["train"], fingerprint([fact.key for fact in facts], [fact.label for fact in facts])
    if found != expected:
        raise InputError(
            f"--dataset-home {home}: holds other training clips than the run {config.run} had: the sha256 of keys and labels is {found[:12]}…, "
            f"{path.name} names {expected[:12]}…. Give the folder that it was trained on, or its shards."
        )
    labels = balanced_labels(facts, source.class_names) if flags.get("balance") else None
    plan = Plan(len(facts), flags["batch_size"], flags["batch_size"], flags["seed"], labels=labels, repeats=flags.get("repeats", 1))
    return Planned(facts, plan, source.class_names)


def _read_flags(path: Path) -> dict[str, Any]:  # Any: JSON values
    """A run's config.json as far as the plan hangs on it."""
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, type | tuple[type, ...]] = {"dataset_home": str, "fraction": (int, float), "batch_size": int, "seed": int}
        wrong = [name for name, kind in kinds.items() if not isinstance(flags[name], kind)]
        wrong += [] if isinstance(flags["data"]["train"], str) else ["data"]
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected the folder of a run (--logger-folder). Look at the path.") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not the configuration of a run ({error!r}). Give the --logger-folder of a training.") from error
    if wrong:
        raise InputError(f"{path}: not the configuration of a run (look at {', '.join(wrong)}). Give the --logger-folder of a training.")
    return flags
