"""What a clip costs: tokens, floating point operations, memory; and how much of a GPU's peak a speed is.

Letters: N tokens, D width, I inner width of the MLP, L layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from clips.clip import ClipSpec

from .classifier import ClipClassifier

Precision = Literal["bf16", "fp16", "fp32"]
ADAMW_BYTES = 16  # a trained parameter, its gradient and two moments, float32
# Share of the device's memory that a step leaves to fragments, kernels' workspaces and uploads. Simulated peaks of a step (both base models, both
# geometries, 1 and 4 clips, both precisions, with and without checkpointing) lie between 0.8 and 1.06 of `step_bytes`; not measured on a GPU.
SPARE = 0.15


@dataclass(frozen=True)
class Cost:
    """Of one clip, and of a step of `micro_batch` clips."""

    tokens: int
    gflop_forward: float
    gflop_forward_backward: float  # what the model needs: layers computed twice to save memory count once
    activation_bytes_per_clip: int  # kept for the backward pass
    checkpointed_bytes_per_clip: int  # the same with activation checkpointing: each layer's input, and all of the layer at work
    fixed_bytes: int  # parameters, gradients, AdamW's moments, and the half precision copies that autocast keeps
    micro_batch: int

    def describe(self) -> str:
        """A line for the log."""
        kept = f"{_memory(self.activation_bytes_per_clip)}, or {_memory(self.checkpointed_bytes_per_clip)} with activation checkpointing"
        return f"cost of a clip: {self.tokens} tokens, {self.gflop_forward_backward:.3g} GFLOP forward and backward, estimated to keep {kept}"

    def step_bytes(self, checkpointed: bool) -> int:
        """Memory of a step at its fullest."""
        clip = self.checkpointed_bytes_per_clip if checkpointed else self.activation_bytes_per_clip
        return self.fixed_bytes + self.micro_batch * clip


def _memory(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def estimate(model: ClipClassifier, spec: ClipSpec | None = None, micro_batch: int = 1, dtype: Precision = "bf16") -> Cost:
    """The cost of training `model` (as it is frozen) on clips of `spec`, its own by default, under CUDA's autocast or in fp32."""
    spec = spec or model.spec
    work = _work(model, spec)
    kept = _kept(model, spec, dtype)
    size = 4 if dtype == "fp32" else 2
    trained = _count(model, True)
    return Cost(
        tokens=_tokens(model, spec),
        gflop_forward=work.forward / 1e9,
        gflop_forward_backward=(work.forward + work.backward(model)) / 1e9,
        activation_bytes_per_clip=kept.embedding + int(model.config.num_hidden_layers) * kept.layer,
        checkpointed_bytes_per_clip=kept.embedding + int(model.config.num_hidden_layers) * kept.layer_input + kept.layer,
        fixed_bytes=trained * ADAMW_BYTES + _count(model, False) * 4 + (0 if size == 4 else size * (trained + _count(model, False))),
        micro_batch=micro_batch,
    )


def needs_checkpointing(model: ClipClassifier, micro_batch: int, dtype: Precision, memory_bytes: int) -> bool:
    """Whether a step of `micro_batch` clips wants activation checkpointing to fit into a device of `memory_bytes`: --activation-checkpointing auto."""
    return estimate(model, None, micro_batch, dtype).step_bytes(checkpointed=False) > (1 - SPARE) * memory_bytes


# Dense bf16 peaks of NVIDIA's data sheets; the first pattern that is found in torch.cuda.get_device_name() holds. fp16 has the same peaks.
PEAKS = (
    (r"\bMIG\b", None),  # a part of a GPU
    (r"\bA40\b", 149.7e12),
    (r"\bA100\b", 312e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a GPU by its name; None where we know none."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def mfu(clips_per_s: float, cost: Cost, peak: float | None) -> float | None:
    """Model FLOPs utilisation of one GPU that trains on `clips_per_s`, 0 to 1; None without a peak."""
    return None if peak is None else clips_per_s * cost.gflop_forward_backward * 1e9 / peak


@dataclass(frozen=True)
class _Work:
    """Operations of a clip's forward pass, two for a multiplication and addition."""

    patches: float
    keypoints: float
    linear: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        return self.patches + self.keypoints + self.linear + self.attention + self.head

    def backward(self, model: ClipClassifier) -> float:
        """Twice the forward's, but pixels need no gradient, and of a frozen model only what lies behind a trained parameter."""
        if not model.frozen:
            return self.patches + self.keypoints + 2 * (self.linear + self.attention + self.head)
        if model.uses_keypoints:
            return self.keypoints + self.linear + 2 * self.attention + 2 * self.head
        return self.head


def _work(model: ClipClassifier, spec: ClipSpec) -> _Work:
    """Exactly what torch's counter counts in matrix products; norms, GELU and softmax are left out on both sides."""
    config = model.config
    D, I, L = int(config.hidden_size), int(config.intermediate_size), int(config.num_hidden_layers)  # noqa: E741  # letters of the legend
    times, down, across = model.patch.grid(spec)
    places, patches = down * across, times * down * across
    area = model.patch.frames * model.patch.height * model.patch.width
    if _divided(model):
        rows = times * (places + 1)  # over space, each frame brings the class token along
        linear = patches * 10 * D * D + rows * 8 * D * D + (patches + 1) * 4 * D * I  # over time there is one dense layer more
        attention = 4 * patches * times * D + 4 * rows * (places + 1) * D
    else:
        N = _tokens(model, spec)
        linear, attention = N * (8 * D * D + 4 * D * I), 4 * N * N * D
    return _Work(
        patches=2 * patches * D * 3 * area,
        keypoints=2 * patches * D * area if model.uses_keypoints else 0,
        linear=L * linear,
        attention=L * attention,
        head=2 * D * int(config.num_labels),
    )


@dataclass(frozen=True)
class _Kept:
    """Bytes of a clip that the backward pass needs."""

    embedding: int  # and of the last norm
    layer: int
    layer_input: int


def _kept(model: ClipClassifier, spec: ClipSpec, dtype: Precision) -> _Kept:
    """Counted tensor by tensor, in units of a token's width. Norms keep their input in float32, whatever autocast says; the rest its type."""
    if model.frozen and not model.uses_keypoints:
        return _Kept(0, 0, 0)
    config = model.config
    D, N = int(config.hidden_size), _tokens(model, spec)
    size = 4 if dtype == "fp32" else 2
    mlp = 1 + 2 * int(config.intermediate_size) / D  # its input; before and after GELU
    attention, norms, sums = 5.0, 2, 1  # its input; query, key and value; the output
    if _divided(model):
        attention, norms, sums = 2 * attention + 1, 3, 2  # over time, then its dense layer's input; over space
    if model.frozen:  # no linear layer wants its input: the norms' outputs, that of GELU, that between the two dense layers over time
        attention, mlp = attention - (3 if _divided(model) else 1), mlp - 1 - int(config.intermediate_size) / D
    layer = N * (D * (4 * norms + size * (attention + mlp)) + 4 * sums * int(config.num_attention_heads))
    area = model.patch.frames * model.patch.height * model.patch.width
    channels = (0 if model.frozen else 3) + model.uses_keypoints
    timesformer = config.model_type == "timesformer"
    stream = 4 if timesformer else size  # TimeSformer adds float32 parameters to its tokens, VideoMAE a table in their type
    last = N * D * stream if timesformer else 0  # its class token is a view of all the last tokens
    return _Kept(N * area * channels * size + last, int(layer), N * D * stream)


def _tokens(model: ClipClassifier, spec: ClipSpec) -> int:
    """Of a clip, the class token included where there is one."""
    times, down, across = model.patch.grid(spec)
    return times * down * across + (model.config.model_type == "timesformer")


def _divided(model: ClipClassifier) -> bool:
    return getattr(model.config, "attention_type", None) == "divided_space_time"


def _count(model: nn.Module, trained: bool) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad == trained)
