"""What a training was fed, as one number an epoch that anyone can work out again from the plan, whatever the ranks were.

clip as it was read -> its proof -> a rank's sum -> all ranks' sum (mod 2^128) -> certificate.json, which python -m loaders certify compares
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from clips.errors import InputError
from clips.files import write_json

CERTIFICATE = "certificate.json"
FORMAT = 1
MODULUS = 1 << 128
Record = dict[str, Any]  # Any: JSON. An epoch's {"epoch", "clips", "sum": hex, "bad": [[position, key]], "class_counts": [int]}
State = dict[str, Any]  # likewise {"epochs": [Record], "under_way": Record or None}; torch.load(weights_only=True) reads it back

_HASHER = hashlib.blake2b(digest_size=16, person=b"clip certificate")  # copied for each clip: .5 us against .7 for a new one
_PLACE = struct.Struct("<QQ")
_LABEL = struct.Struct("<q")


def clip_proof(epoch: int, position: int, key: str, label: int) -> int:
    """128 bits of a clip at its place in the epoch's order; key and label as read with its frames, not as the plan has them."""
    return proof_sum(epoch, (position,), (spelled(key, label),))


def spelled(key: str, label: int) -> bytes:
    """What a proof says of a clip: the label in eight bytes, then the key, the one part without a fixed length."""
    return _LABEL.pack(label) + key.encode("utf-8", "surrogateescape")


def proof_sum(epoch: int, positions: Iterable[int], clips: Iterable[bytes]) -> int:
    """The sum mod 2^128 of the proofs of `spelled` clips. A sum, so that neither ranks nor micro-batches nor their order matter."""
    total = 0
    for position, clip in zip(positions, clips, strict=True):
        hasher = _HASHER.copy()
        hasher.update(_PLACE.pack(epoch, position) + clip)
        total += int.from_bytes(hasher.digest(), "little")
    return total % MODULUS


@dataclass
class Tally:
    """What was consumed of one epoch: clips with the bad ones, of which there is neither proof nor class."""

    epoch: int
    class_counts: list[int]
    clips: int = 0
    proof: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, record: Record) -> Tally:
        bad = [(position, key) for position, key in record["bad"]]
        return cls(record["epoch"], list(record["class_counts"]), record["clips"], int(record["sum"], 16), bad)

    def record(self) -> Record:
        bad = [list(one) for one in sorted(self.bad)]
        return {"epoch": self.epoch, "clips": self.clips, "sum": f"{self.proof:032x}", "bad": bad, "class_counts": list(self.class_counts)}

    def add(self, other: Tally) -> None:
        if self.epoch != other.epoch:
            raise ValueError(f"one rank is in epoch {self.epoch}, another in epoch {other.epoch}")
        self.clips += other.clips
        self.proof = (self.proof + other.proof) % MODULUS
        self.bad += other.bad
        self.class_counts = [mine + theirs for mine, theirs in zip(self.class_counts, other.class_counts, strict=True)]


class Certificate:
    """One rank's part of the certificate. The finished epochs are those of all ranks, the one under way is this rank's share.

    begin -> add for each micro-batch -> finish with all ranks' states; a checkpoint keeps `merge` of all ranks' states.
    """

    def __init__(self, num_classes: int, rank: int = 0) -> None:
        self._num_classes, self._rank = num_classes, rank
        self._epochs: list[Record] = []
        self._tally: Tally | None = None

    def begin(self, epoch: int, consumed: int = 0) -> None:
        """Starts the epoch, or goes on in the one that was loaded: `consumed` is the position that training begins at."""
        if self._epochs and epoch <= self._epochs[-1]["epoch"]:
            raise ValueError(f"epoch {epoch} begins after epoch {self._epochs[-1]['epoch']} ended")
        if self._tally is None:
            self._tally = Tally(epoch, [0] * self._num_classes)
        expected = consumed if self._rank == 0 else 0
        if (self._tally.epoch, self._tally.clips) != (epoch, expected):
            raise ValueError(f"epoch {epoch} begins at {consumed}, but {self._tally.clips} clips of epoch {self._tally.epoch} are certified")

    def add(self, proof: int, labels: Sequence[int], bad: Sequence[tuple[int, str]] = ()) -> None:
        """A micro-batch that enters the model: the sum of its good clips' proofs, their labels, and position and key of each bad one."""
        if self._tally is None:
            raise ValueError("no epoch has begun")
        if labels and not 0 <= min(labels) <= max(labels) < self._num_classes:
            raise ValueError(f"labels {min(labels)} … {max(labels)} of {self._num_classes} classes")
        self._tally.clips += len(labels) + len(bad)
        self._tally.proof = (self._tally.proof + proof) % MODULUS
        self._tally.bad += [(int(position), key) for position, key in bad]  # out of an array they are numpy's, which no checkpoint gives back
        for label in labels:
            self._tally.class_counts[label] += 1

    @property
    def num_bad(self) -> int:
        """This rank's bad clips of the epoch under way, each once however often it is repeated."""
        return len({key for _, key in self._tally.bad}) if self._tally else 0

    def finish(self, states: Sequence[State]) -> Record:
        """Ends the epoch with the `state_dict` of every rank, this one's too; gives its record, the same on all ranks."""
        if self.state_dict() not in states:
            raise ValueError("this rank's state is not among those of all ranks")
        record: Record | None = merge(states)["under_way"]
        if record is None:
            raise ValueError("no epoch has begun")
        self._epochs.append(record)
        self._tally = None
        return record

    def state_dict(self) -> State:
        """This rank's part; `merge` those of all ranks for a checkpoint or a file."""
        return {"epochs": list(self._epochs), "under_way": None if self._tally is None else self._tally.record()}

    def load_state_dict(self, merged: State) -> None:
        """Goes on from the merged state: rank 0 takes the epoch under way, the others begin theirs with nothing; any number of ranks."""
        self._epochs = list(merged["epochs"])
        under_way = merged["under_way"]
        self._tally = None if under_way is None else Tally.of(under_way) if self._rank == 0 else Tally(under_way["epoch"], [0] * self._num_classes)


def merge(states: Sequence[State]) -> State:
    """The state of all ranks together; ValueError where they disagree on what is finished or under way."""
    first = states[0]
    if any(state["epochs"] != first["epochs"] or (state["under_way"] is None) != (first["under_way"] is None) for state in states):
        raise ValueError("the ranks do not agree on which epochs are finished")
    if first["under_way"] is None:
        return first
    total = Tally.of(first["under_way"])
    for state in states[1:]:
        total.add(Tally.of(state["under_way"]))
    return {"epochs": first["epochs"], "under_way": total.record()}


def write_certificate(path: Path, merged: State) -> None:
    write_json(path, {"format": FORMAT, **merged})


def read_certificate(path: Path) -> State:
    """The merged state; InputError for a missing or damaged file and for another format."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = state["format"]
        merged = {name: state[name] for name in ("epochs", "under_way")} if found == FORMAT else {}
        _check(merged)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected the folder of a run that has ended an epoch. Look at the path, or train on.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a certificate ({error!r}). The run writes it anew with its next checkpoint.") from error
    if not merged:
        raise InputError(f"{path}: format {found}; this program reads format {FORMAT}. Use the program that trained.")
    return merged


def _check(merged: State) -> None:
    """Raises where the records are not as they would be written, or not in the order of epochs."""
    records = [*merged.get("epochs", []), *filter(None, [merged.get("under_way")])]
    for record in records:
        numbers = [record["epoch"], record["clips"], *record["class_counts"], *(position for position, _ in record["bad"])]
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or Tally.of(record).record() != record:
            raise ValueError(f"no epoch's record: {record}")
    if any(later["epoch"] <= earlier["epoch"] for earlier, later in pairwise(records)):
        raise ValueError(f"epochs {[record['epoch'] for record in records]}")
