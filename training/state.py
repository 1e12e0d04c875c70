"""All that a checkpoint keeps of a run, gathered from the ranks and given back to any number of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from clips.errors import InputError

from . import checkpoint, watch
from .distributed import Group
from .progress import Progress
from .run_folder import RunFolder
from .signals import Wishes
from .watch import Watch

logger = logging.getLogger(__name__)


class Part(Protocol):
    """What has a state of its own."""

    def state_dict(self) -> dict[str, Any]: ...  # Any: tensors and plain values

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...  # Any: as above, and what torch gives


@dataclass(frozen=True)
class RunState:
    """`parts` are the same on all ranks; `certificate` and `watch` are each rank's own, merged for the file. `write` puts the certificate into a file."""

    folder: RunFolder
    group: Group
    progress: Progress
    wishes: Wishes
    parts: Mapping[str, Part]
    certificate: Part
    merge: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]  # Any: as above
    write: Callable[[Path, dict[str, Any]], None]
    watch: Watch
    micro_batch: int

    def save(self) -> None:
        """A checkpoint from which the run goes on exactly, on any number of ranks; all of them call this."""
        gathered = self.group.gather_objects((self.certificate.state_dict(), self.watch.state_dict()))
        certificate = self.merge([part for part, _ in gathered])
        state = {name: part.state_dict() for name, part in self.parts.items()} | {
            "progress": self.progress.state_dict(),
            "certificate": certificate,
            "watch": watch.merged([part for _, part in gathered]),
            "num_lines": self.folder.num_lines,
            "micro_batch": self.micro_batch,
            "gpu": torch.cuda.get_device_name(self.group.device) if self.group.device.type == "cuda" else None,  # a micro-batch holds for one kind
        }
        if self.group.is_main:
            checkpoint.save(self.folder.path, self.progress.step, state)
            self.write(self.folder.path / "certificate.json", certificate)
        self.wishes.saved()

    def restore(self, saved: dict[str, Any]) -> None:  # Any: as above
        """Goes on from what `save` wrote; a finished run's optimiser may be missing, and is said."""
        for name, part in self.parts.items():
            if name in saved:
                part.load_state_dict(saved[name])
            elif name == "optimizer":
                logger.info(f"the finished run kept no state of the {name}, which starts anew; --keep-optimizer keeps it")
            else:
                raise InputError(f"{self.folder.path / 'checkpoints'}: the checkpoint holds no {name}. It is of another program; give another --logger-folder.")
        self.progress.load_state_dict(saved["progress"])
        self.certificate.load_state_dict(saved["certificate"])
        if self.group.is_main:
            self.watch.load_state_dict(saved["watch"])
        logger.info(f"continuing in epoch {self.progress.trained + 1} after {self.progress.consumed} clips, step {self.progress.step}")


def check_all_read(group: Group, folder: Path, saved: Mapping[str, Any] | None) -> None:  # Any: as above
    """Raises InputError on all ranks where they do not read the same checkpoint, or some of them none: a network file system may show it late."""
    found = {str(step) for step in group.gather_objects(saved["progress"]["step"] if saved else "none")}
    if len(found) > 1:
        raise InputError(f"{folder / 'checkpoints'}: the ranks read those of steps {', '.join(sorted(found))}. Look after the file system, start again.")
