"""What happened since the last line of the log, kept on the device: only a step that logs waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .distributed import Group


@dataclass(frozen=True)
class Interval:
    """Over all ranks: the sum and number of finite losses, the last gradients' norm, and the keys of each step that was skipped."""

    loss_sum: float
    num_losses: int
    grad_norm: float
    skipped: Sequence[Sequence[str]]

    @property
    def loss(self) -> float | None:
        """The mean; None where no loss was finite."""
        return self.loss_sum / self.num_losses if self.num_losses else None


class Watch:
    """One rank's steps since the last reading."""

    def __init__(self, device: torch.device, counts_norms: bool) -> None:
        """`counts_norms`: an infinite norm is a fault; under fp16 it is how the loss scale finds its value, and only NaN is one."""
        self._counts_norms = counts_norms
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)  # of finite losses, their number; float32 would drop the later ones' digits
        self._faults: list[torch.Tensor] = []
        self._keys: list[Sequence[str]] = []
        self._before: list[list[str]] = []  # keys of steps that were skipped since the last reading, before a restart
        self._norm = torch.zeros((), device=device)

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor, keys: Sequence[str]) -> None:
        """A step's loss and norm, and the keys of this rank's clips; nothing waits."""
        is_finite = loss.isfinite()
        self._totals += torch.stack([torch.where(is_finite, loss, 0.0), is_finite.to(loss.dtype)])
        self._faults.append(~is_finite | (~grad_norm.isfinite() if self._counts_norms else grad_norm.isnan()))
        self._keys.append(keys)
        self._norm = grad_norm

    def read(self, group: Group) -> Interval:
        """Waits for the device, and begins anew; the same on all ranks, to be called by all."""
        faults = torch.stack(self._faults).tolist() if self._faults else []
        parts = group.gather_objects((self._totals.tolist(), [(keys if fault else None) for fault, keys in zip(faults, self._keys, strict=True)], self._before))
        skipped: list[list[str]] = [keys for part in parts for keys in part[2]]
        skipped += [[key for keys in step if keys for key in keys] for step in zip(*(part[1] for part in parts), strict=True) if any(step)]
        interval = Interval(sum(part[0][0] for part in parts), round(sum(part[0][1] for part in parts)), self._norm.item(), skipped)
        self._totals.zero_()
        self._faults.clear()
        self._keys.clear()
        self._before = []
        return interval

    def state_dict(self) -> dict[str, Any]:  # Any: tensors and plain values
        """The totals of this rank since the last reading, and the keys of each step, none where nothing was wrong with it; waits for the device."""
        faults = torch.stack(self._faults).tolist() if self._faults else []
        return {"totals": self._totals.cpu(), "keys": self._before + [list(keys) if fault else [] for fault, keys in zip(faults, self._keys, strict=True)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # Any: as above
        """Goes on with what all ranks had, on one of them."""
        self._totals.copy_(state["totals"])
        self._before = [keys for keys in state["keys"] if keys]


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:  # Any: as above
    """What all ranks had; the totals of a single one keep their bits."""
    longest = max(len(state["keys"]) for state in states)
    padded = [[[]] * (longest - len(state["keys"])) + state["keys"] for state in states]  # what one rank brought from before comes first
    keys = [[key for part in step for key in part] for step in zip(*padded, strict=True)]
    return {"totals": torch.stack([state["totals"] for state in states]).sum(dim=0), "keys": keys}
