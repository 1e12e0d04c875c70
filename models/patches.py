"""Patch embedding straight from uint8 clips, with the pixel normalisation folded into the weights.

    uint8 (B, T, H, W, 3) -> gather, 1 byte an element -> (x - c) / 64 -> linear with 64 W' -> tokens (B, N, D)

The convolution of a checkpoint has kernel = stride, so y = W ((x / 255 - m) / s) + b is exactly y = W' (x - c) + b' with
W' = W / (255 s) and b' = b + sum W' (c - 255 m). The centre c = round(255 m) is an integer: bytes and x - c are then exact in
bfloat16 and float16, and the rounding of W' multiplies |x - c| instead of x (1.8 times more exact than c = 0, measured). The
64 keeps the gradient of the folded weight at the size that normalised pixels give it: without it, it is 57 times larger and
drives a float16 loss scaler down.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pixels import Pixels

SCALE = 64  # a power of two: dividing by it is exact in every float type


class FoldedPatch(nn.Module):
    """A drop-in for the patch convolution: `weight` and `bias` are the checkpoint's own parameters, unnormalised and in its channel order."""

    offset: Tensor
    keypoint_weight: nn.Parameter | None  # (D, t, p, p) of the fourth channel

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, pixels: Pixels) -> None:
        super().__init__()
        assert conv.bias is not None, "both architectures have a patch bias"
        self.weight, self.bias = conv.weight, conv.bias  # (D, 3, t, p, p) or (D, 3, p, p); (D,)
        self.patch: tuple[int, int, int] = (1, 1, *conv.kernel_size)[-3:]  # type: ignore[assignment]  # mypy loses the length of the slice
        self.order = (0, 1, 2) if pixels.channel_order == "rgb" else (2, 1, 0)  # RGB memory position -> channel of the weight
        self.means = tuple(255 * pixels.mean[k] for k in self.order)  # in RGB, the order of memory
        self.stds = tuple(255 * pixels.std[k] for k in self.order)
        self.centres = tuple(round(mean) for mean in self.means)
        t, p, q = self.patch
        # Repeated to the whole patch: an inner loop of length 3 would not vectorise. Integers / 64 survive .half() unrounded.
        self.register_buffer("offset", torch.tensor(self.centres, dtype=torch.float32).repeat(t * p * q) / -SCALE, persistent=False)
        self.register_parameter("keypoint_weight", None)

    def add_keypoints(self) -> None:
        """A fourth channel for the joints' 0/1 masks, zero at the start. A parameter of its own: the checkpoint's keep their shape."""
        self.keypoint_weight = nn.Parameter(self.weight.new_zeros(len(self.weight), *self.patch))

    def forward(self, video: Tensor, keypoints: Tensor | None = None) -> Tensor:
        """Tokens (B, T/t * H/p * W/p, D) of a uint8 (B, T, H, W, 3) batch, in the order t, h, w, in the type that autocast asks for.

        `keypoints` uint8 (B, T, H, W) needs `add_keypoints` before.
        """
        device = video.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        with torch.autocast(device, enabled=False):
            weight, bias = self.folded()
            pixels = torch.add(self.offset.to(dtype), self.gather(video), alpha=1 / SCALE)
            tokens = F.linear(pixels, weight.to(dtype), bias.to(dtype))
            if keypoints is not None and self.keypoint_weight is not None:
                # A product of its own, not a longer one: with zero weights it adds exact zeros, so a new channel changes no bit.
                tokens = tokens + F.linear(self.gather(keypoints[..., None]).to(dtype), self.keypoint_weight.flatten(1).to(dtype))
            return tokens

    def gather(self, video: Tensor) -> Tensor:
        """The bytes of each patch side by side, uint8 (B, N, t * p * p * C): the one copy of the clip, in runs of C p bytes."""
        t, p, q = self.patch
        split = video.unflatten(1, (-1, t)).unflatten(3, (-1, p)).unflatten(5, (-1, q))  # B, T/t, t, H/p, p, W/p, p, C
        return split.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)

    def folded(self) -> tuple[Tensor, Tensor]:
        """64 W' as (D, t * p * p * 3) in the order of the gathered bytes, and b' (D,), both at least float32; gradients reach weight and bias."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.to(wide).reshape(self.weight.shape[0], 3, *self.patch)
        channels = [weight[:, k] * (SCALE / std) for k, std in zip(self.order, self.stds, strict=True)]  # each (D, t, p, p)
        bias = self.bias.to(wide)
        for channel, centre, mean in zip(channels, self.centres, self.means, strict=True):
            bias = bias + channel.sum((1, 2, 3)) * ((centre - mean) / SCALE)
        return torch.stack(channels, dim=-1).flatten(1), bias
