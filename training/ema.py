"""A moving average of the weights: what is evaluated and kept as the best where --ema is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Ema:
    """The average of a model's trained parameters, fp32 on their device, under the model's own keys.

    average += (1 - decay) x (weights - average) after each step, with a decay of at most (1 + updates) / (10 + updates), so that the random
    start is soon forgotten (as in TensorFlow's ExponentialMovingAverage): of 0.999 the first 9 000 steps take less. Steps that changed no weight,
    because their gradients were not finite, do not count: their number is kept on the device, so that nobody waits to learn it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"a decay of {decay}; expected above 0 and below 1")
        self.decay = decay
        self._weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._average = {name: parameter.detach().float().clone() for name, parameter in self._weights.items()}
        self._updates = torch.zeros((), dtype=torch.float64, device=next(iter(self._average.values())).device)

    @property
    def updates(self) -> int:
        """How many steps the average holds; waits for the device."""
        return int(self._updates)

    @torch.no_grad()
    def update(self, is_taken: torch.Tensor | None = None) -> None:
        """Takes in the weights as they are now, if the step changed them: bool () on the device, by default true. Nothing waits for the GPU."""
        taken = torch.ones_like(self._updates) if is_taken is None else is_taken.to(self._updates)
        self._updates += taken
        share = taken * (1 - ((1 + self._updates) / (10 + self._updates)).clamp(max=self.decay))
        average = list(self._average.values())
        change = torch._foreach_sub([weight.detach().float() for weight in self._weights.values()], average)  # in the room of gradients that are gone
        torch._foreach_mul_(change, share.float())
        torch._foreach_add_(average, change)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average as its weights inside, and its own again outside; another update in between is an error of the caller."""
        own = [weight.detach().clone() for weight in self._weights.values()]
        self._copy(list(self._average.values()))
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self._weights.values(), values, strict=True):
            weight.copy_(value)

    def state_dict(self) -> dict[str, Any]:  # Any: torch's own way
        """The average by the model's own keys, and how often it was updated."""
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # Any: as above
        """Goes on from a saved average; ValueError where it is another model's."""
        if state["average"].keys() != self._average.keys():
            differing = sorted(state["average"].keys() ^ self._average.keys())
            raise ValueError(f"the average of another model: {', '.join(differing[:3])} on one side alone")
        self._updates.fill_(state["updates"])
        for name, value in state["average"].items():
            self._average[name].copy_(value)
