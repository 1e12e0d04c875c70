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
    start is soon forgotten (as in TensorFlow's ExponentialMovingAverage): of 0.999 the first 9 000 steps take less.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"a decay of {decay}; expected above 0 and below 1")
        self.decay, self.updates = decay, 0
        self._weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._average = {name: parameter.detach().float().clone() for name, parameter in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now; nothing waits for the GPU."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [weight.detach().float() for weight in self._weights.values()]  # no copy of fp32
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)

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
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self._average[name].copy_(value)
