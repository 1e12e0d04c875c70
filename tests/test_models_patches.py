"""The folded patch embedding against transformers' convolution on normalised floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.patches import FoldedPatch
from models.pixels import Pixels
from tests.making_models import clips, normalised

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Relative root mean square errors against float64 that we promise; measured 2.7e-7, 2.5e-3, 3.0e-4; normalised floats have 7.1e-7, 3.0e-3, 3.7e-4.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3.5e-3, torch.float16: 5e-4}


def conv(frames: int, width: int = 48) -> nn.Conv2d | nn.Conv3d:
    torch.manual_seed(0)
    return nn.Conv3d(3, width, (frames, 16, 16), (frames, 16, 16)) if frames > 1 else nn.Conv2d(3, width, 16, 16)


def plain_tokens(projection: nn.Conv2d | nn.Conv3d, pixels: Tensor) -> Tensor:
    """(B, N, D) of float pixels (B, T, 3, H, W), with the convolution's own layout."""
    if isinstance(projection, nn.Conv3d):
        return projection(pixels.permute(0, 2, 1, 3, 4)).flatten(2).transpose(1, 2)
    return projection(pixels.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, pixels.shape[:2]).flatten(1, 2)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm().detach() / expected.norm().detach())


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_tokens_of_bytes_equal_those_of_normalised_floats(frames: int, order: str, dtype: torch.dtype) -> None:
    projection, video = conv(frames), clips()
    expected = plain_tokens(projection.double(), normalised(video, MEAN, STD, order).double())
    patch = FoldedPatch(projection.float(), Pixels(MEAN, STD, order)).to(dtype)
    tokens = patch(video)
    assert tokens.dtype == dtype
    if dtype != torch.float32:  # the weights themselves are rounded by .to(dtype): that error is the convolution's, too
        expected = plain_tokens(conv(frames).to(dtype).double(), normalised(video, MEAN, STD, order).double())
    assert error(tokens, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_it_is_for_normalised_floats(dtype: torch.dtype) -> None:
    projection, video = conv(2), clips(4)
    pixels = normalised(video, MEAN, STD)
    expected = plain_tokens(conv(2).double(), pixels.double())
    with torch.autocast("cpu", dtype):
        folded, plain = FoldedPatch(projection, Pixels(MEAN, STD, "rgb"))(video), plain_tokens(projection, pixels)
    assert folded.dtype == dtype
    assert error(folded, expected) < min(BOUNDS[dtype], 1.05 * error(plain, expected))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("frames", [1, 2])
def test_gradients_of_weight_and_bias_equal_those_of_normalised_floats(dtype: torch.dtype, bound: float, shift: float, frames: int) -> None:
    """A gradient with a mean (shift) is where folding without a centre goes wrong: 12 times the error in bfloat16."""
    video, projection, exact = clips(4), conv(frames), conv(frames).double()
    expected = plain_tokens(exact, normalised(video, MEAN, STD, "bgr").double())
    upstream = shift + torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    upstream = upstream.to(dtype).double()
    expected.backward(upstream)
    patch = FoldedPatch(projection, Pixels(MEAN, STD, "bgr"))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        patch(video).backward(upstream.to(dtype))
    assert patch.weight.grad is not None and patch.bias.grad is not None
    assert exact.weight.grad is not None and exact.bias is not None and exact.bias.grad is not None
    assert error(patch.weight.grad, exact.weight.grad) < bound
    assert error(patch.bias.grad, exact.bias.grad) < bound


def test_a_loss_scale_that_normalised_floats_bear_in_float16_does_not_overflow() -> None:
    """Folded without the factor 64, the gradient in float16 is 57 times larger than that of normalised pixels."""
    video, projection = clips(4), conv(2)
    plain = conv(2)
    tokens = plain_tokens(plain, normalised(video, MEAN, STD))
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    largest = torch.autograd.grad(tokens, plain.weight, upstream)[0].abs().max()
    patch = FoldedPatch(projection, Pixels(MEAN, STD, "rgb"))
    with torch.autocast("cpu", torch.float16):
        patch(video).backward((upstream * (30000 / largest)).half())
    assert patch.weight.grad is not None
    assert bool(torch.isfinite(patch.weight.grad).all())
    assert 20000 < float(patch.weight.grad.abs().max()) < 40000


def test_bytes_and_centred_bytes_are_exact_in_half_types() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float16, torch.bfloat16):
        for centre in (104, 115, 116, 124):
            found = torch.add(torch.tensor([-centre / 64], dtype=dtype), values, alpha=1 / 64)
            assert found.dtype == dtype
            assert torch.equal(found.double() * 64, values.double() - centre)


class FreshTensors(TorchDispatchMode):
    """The dtypes of all tensors of at least `elements` that an operation newly allocates."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # the hook's own signature
        out = func(*args, **(kwargs or {}))
        storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= self.elements and out.untyped_storage().data_ptr() not in storages:
            self.dtypes.append(out.dtype)
        return out


@pytest.mark.parametrize("frames", [1, 2])
def test_a_clip_is_copied_once_as_bytes_and_made_float_once(frames: int) -> None:
    video = clips()
    with FreshTensors(video.numel()) as fresh, torch.no_grad():
        FoldedPatch(conv(frames, width=8), Pixels(MEAN, STD, "bgr"))(video)
    assert fresh.dtypes == [torch.uint8, torch.float32]


def test_half_precision_modules_keep_their_pixel_statistics() -> None:
    exact, half = (FoldedPatch(conv(2), Pixels(MEAN, STD, "rgb")) for _ in range(2))
    with torch.no_grad():
        half.weight.copy_(half.weight.half())
        exact.weight.copy_(half.weight)
        exact.bias.copy_(half.bias.half())
    assert torch.equal(half.half().folded()[1], exact.folded()[1])
