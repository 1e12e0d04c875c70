"""What is written down of an epoch: each batch in the certificate, each logged step and the epoch in the run folder, and when it is too bad to go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from clips.errors import InputError

from .distributed import Group
from .meter import Meter
from .progress import Progress
from .run_folder import RunFolder
from .watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JournalConfig:
    """What is written down, and what ends a run."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl; only these steps wait for the GPU."""
    max_skipped: int = 10
    """Steps whose loss or gradients are not finite: they change nothing and are counted; one more ends the run and names their clips."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise InputError(f"--log-every {self.log_every}: expected at least 1.")
        if self.max_skipped < 0:
            raise InputError(f"--max-skipped {self.max_skipped}: expected at least 0.")


class BadClip(Protocol):
    """A clip that could not be read: its place in the epoch's order, its key as planned, and why."""

    @property
    def position(self) -> int: ...

    @property
    def key(self) -> str: ...

    @property
    def reason(self) -> str: ...


class Proven(Protocol):
    """A batch that proves what it holds: keys of all clips, labels and proof of those that were read, and the others."""

    @property
    def key(self) -> Sequence[str]: ...

    @property
    def labels(self) -> Sequence[int]: ...

    @property
    def proof(self) -> int: ...

    @property
    def bad(self) -> Sequence[BadClip]: ...


class Certificate(Protocol):
    """Sums up the proofs of an epoch, over all ranks at its end."""

    @property
    def num_bad(self) -> int: ...

    def add(self, proof: int, labels: Sequence[int], bad: Sequence[tuple[int, str]] = ()) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...  # Any: JSON

    def finish(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]: ...  # Any: JSON


ProvenBatch = TypeVar("ProvenBatch", bound=Proven)


@dataclass
class Journal:
    """One rank's. `mfu_of` gives a GPU's share of its peak from its clips/s."""

    folder: RunFolder
    group: Group
    progress: Progress
    certificate: Certificate
    watch: Watch
    class_names: Sequence[str]
    max_bad_clips: int
    max_skipped: int
    mfu_of: Callable[[float], float | None]
    _keys: list[str] = field(default_factory=list)  # of the step under way
    _num_unread: int = 0  # clips of it

    def fed(self, batches: Iterator[ProvenBatch]) -> Iterator[ProvenBatch]:
        """The batches, each entered into the certificate as the model takes it; clips that could not be read are named."""
        for batch in batches:
            self.certificate.add(batch.proof, batch.labels, [(clip.position, clip.key) for clip in batch.bad])
            self._keys += batch.key
            self._num_unread += len(batch.bad)
            for clip in batch.bad:
                logger.warning(f"bad clip at place {clip.position} of epoch {self.progress.trained + 1}, weight 0: {clip.reason}")
            yield batch

    def step(self, loss: torch.Tensor, grad_norm: torch.Tensor, num_clips: int) -> None:
        """A step is done, with a loss that is a mean over this rank's clips in which unread ones count as 0; nothing waits for the device."""
        num_read = len(self._keys) - self._num_unread
        self.watch.add(loss * (len(self._keys) / num_read) if self._num_unread and num_read else loss, grad_norm, tuple(self._keys))
        self._keys.clear()
        self._num_unread = 0
        self.progress.step += 1
        self.progress.consumed += num_clips

    def write_steps(self, lr: float, meter: Meter) -> dict[str, Any]:  # Any: JSON values
        """A line on the steps since the last one; raises InputError on all ranks for too many bad clips or skipped steps."""
        progress, group = self.progress, self.group
        seen = self.watch.read(group)
        progress.loss_sum += seen.loss_sum
        progress.loss_steps += seen.num_losses
        progress.skipped += len(seen.skipped)
        num_bad = round(group.sum([self.certificate.num_bad])[0])
        wait, rank = max(group.gather_objects((meter.longest_wait, group.rank)))
        record: dict[str, Any] = {"loss": seen.loss, "lr": lr, "grad_norm": seen.grad_norm, "bad_clips": num_bad, "skipped": progress.skipped}
        record |= meter.report() | {"longest_wait_ms": wait.ms, "longest_wait": f"{wait.stage} {wait.file} on rank {rank}"}
        if group.device.type == "cuda":
            record |= {"mfu": self.mfu_of(record["clips_per_s"] / group.world_size)}
            record |= {"gpu_memory_gib": torch.cuda.max_memory_allocated(group.device) / 2**30}
        self.folder.log({"step": progress.step, "epoch": progress.trained} | {f"train/{name}": value for name, value in record.items()})
        if num_bad > self.max_bad_clips:
            place = f"{num_bad} clips of epoch {progress.trained + 1} cannot be read, named above"
            raise InputError(f"--max-bad-clips {self.max_bad_clips}: {place}. Mend them or allow more.")
        if progress.skipped > self.max_skipped:
            last = f", the last with the clips {', '.join(seen.skipped[-1])}" if seen.skipped else ""
            raise InputError(
                f"--max-skipped {self.max_skipped}: {progress.skipped} steps had a loss or gradients that are not finite{last}. "
                "Look at these clips, or take a lower --lr or --precision fp32."
            )
        return record

    def end_epoch(self, epochs: int, meter: Meter) -> None:
        """The epoch's line, and its record in the certificate."""
        progress = self.progress
        fed = self.certificate.finish(self.group.gather_objects(self.certificate.state_dict()))
        counts = dict(zip(self.class_names, fed["class_counts"], strict=True))
        loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else None
        progress.end_epoch()
        speed = meter.report_epoch()
        record = {"loss": loss, **speed, "bad_clips": len(fed["bad"]), "clips": counts}
        self.folder.log({"step": progress.step, "epoch": progress.trained} | {f"epoch/{name}": value for name, value in record.items()})
        rate = f"{speed['clips_per_s']:.1f} clips/s, data wait {speed['data_wait_percent']:.1f} % of the step; " if speed else ""
        classes = ", ".join(f"{count} {name}" for name, count in counts.items())
        logger.info(f"epoch {progress.trained}/{epochs}: train loss {float('nan') if loss is None else loss:.4f}, {rate}{classes}")
