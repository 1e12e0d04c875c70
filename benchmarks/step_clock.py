"""How long a training step takes on its device, and what memory it holds; the device is waited for at the ends of a measurement alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from loaders.batch import Batch

from .step_sides import Side, resident

LEAST_STEPS = 5  # of a measurement, where time is short
AGAIN = 3  # steps on a GPU before every measurement but the first: another way has had the caches, and its memory was given back
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


@dataclass
class Way:
    """One side at one micro-batch, eager or compiled, and what was measured of it."""

    name: str
    side: Side
    size: int  # clips at once
    backend: str | None  # of torch.compile; None: eager
    batch: Batch = field(init=False)
    forward: nn.Module = field(init=False)
    first_s: float | None = None  # the first step, compilation included
    graphs: int = 0  # compiled, and breaks between them
    breaks: int = 0
    peak_bytes: int | None = None
    steps: int = 0  # of a measurement
    step_ms: list[float] = field(default_factory=list)  # one a round
    cpu_ms: list[float] = field(default_factory=list)  # of a CPU's cores in a step, one a round; on a GPU the host waits by spinning
    slowest_ms: float = 0.0  # step of all rounds

    @property
    def clips_per_s(self) -> list[float]:
        """One value a round."""
        return [1000 * self.size / ms for ms in self.step_ms]

    def measure(self, device: torch.device, warm_up: int, steps: int, limit_s: float) -> None:
        """A round: steps that warm up, then as many of `steps` as fit into `limit_s`, LEAST_STEPS at least; RuntimeError where the loss is not finite."""
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if self.first_s is None:
            self._first(device)
            step_s = self._warm_up(device, warm_up - 1, limit_s / 2) or self.first_s or 0.0
            self.steps = max(min(steps, LEAST_STEPS), min(steps, int(limit_s / step_s)))
        elif device.type == "cuda":
            self._warm_up(device, min(warm_up, AGAIN), limit_s / 2)
        cpu_s = time.process_time()
        times_ms = step_times_ms(self._step, device, self.steps)
        cpu_s = time.process_time() - cpu_s
        if self.side.loss() is None:
            raise RuntimeError("the loss is not finite: skipped updates cost less, so nothing is measured")
        if self.peak_bytes is None and device.type == "cuda":
            self.peak_bytes = self._own_peak()
        self.step_ms.append(sum(times_ms) / self.steps)
        if device.type == "cpu":
            self.cpu_ms.append(1000 * cpu_s / self.steps)
        self.slowest_ms = max(self.slowest_ms, *times_ms)

    def _warm_up(self, device: torch.device, num: int, limit_s: float) -> float | None:
        """Seconds of the last of `num` steps, fewer where they take longer than `limit_s`; None without a step."""
        begin, step_s = time.perf_counter(), None
        for number in range(num):
            if number >= 2 and time.perf_counter() - begin > limit_s:
                break
            step_s = waited_s(self._step, device)
        return step_s

    def _first(self, device: torch.device) -> None:
        """The first step of all, compilation included."""
        self.batch, self.forward = self.side.batch(self.size), self.side.module
        if self.backend:
            counters.clear()
            # One graph for one size: by default the second size that a process sees is compiled for sizes of all kinds.
            self.forward = torch.compile(self.side.module, dynamic=False, backend=self.backend)  # type: ignore[assignment]  # a module of a module
        self.first_s = waited_s(self._step, device)
        if self.backend:
            self.graphs, self.breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # without what compilation tried

    def _step(self) -> None:
        self.side.step(self.forward, self.batch)

    def _own_peak(self) -> int:
        """Bytes, without what other ways hold at the same time."""
        own = sum(tensor.nbytes for tensor in resident(self.side, self.batch) if tensor.is_cuda)
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() + own


def waited_s(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step, until the device has done it."""
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def step_times_ms(step: Callable[[], None], device: torch.device, steps: int) -> list[float]:
    """Of each step: between events on a GPU, all read at the end, and on the host's clock on a CPU."""
    if device.type != "cuda":
        return [1000 * waited_s(step, device) for _ in range(steps)]
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def matmul_tflops(device: torch.device, dtype: torch.dtype, rounds: int) -> list[float]:
    """What a large product of random square matrices reaches: no step can be faster."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)

    waited_s(product, device)
    torch.mm(left.detach().requires_grad_(), right).sum().backward()  # cuBLAS opens in the backward thread while there is memory for it
    return [2 * size**3 / (1e9 * sum(times) / len(times)) for times in (step_times_ms(product, device, 10) for _ in range(rounds))]


def attention(kernel: str) -> AbstractContextManager[object]:
    """Attention by that kernel alone, or by torch's choice."""
    return nullcontext() if kernel == "auto" else sdpa_kernel(KERNELS[kernel])


def sizes(fits: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The micro-batch that all take, and the larger ones of those that can take more."""
    same = min(fits.values())
    return same, {name: size for name, size in fits.items() if size > same}
