"""Which tensor of a checkpoint goes where in the installed transformers' model, exactly or not at all.

transformers renames VideoMAE's query and value biases in some versions and not in others:

    hub files, and folders saved by 5.18 and later      attention.attention.q_bias       v_bias        no key bias
    folders saved by 5.17; the model in memory of all   attention.attention.query.bias   value.bias    key.bias in 5.17 alone

so every spelling is tried against the keys that the model really has. A key bias moves all scores of a query by the same amount
and softmax takes it out again: where one side lacks it, zero is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clips.errors import InputError

HEAD = ("classifier.",)
POOLING = ("fc_norm.",)  # VideoMAE's norm between pooling and classifier: new where the checkpoint has no classifier
DECODER = ("decoder.", "encoder_to_decoder.", "mask_token")  # VideoMAE's self-supervised half
SPELLINGS = ((".attention.attention.q_bias", ".attention.attention.query.bias"), (".attention.attention.v_bias", ".attention.attention.value.bias"))
KEY_BIAS = ".attention.attention.key.bias"
KEYPOINTS = ".embeddings.patch_embeddings.projection.keypoint_weight"  # ours: the fourth input channel


@dataclass(frozen=True)
class Fitted:
    """Tensors under the model's own keys, all but those of the new head; and what was dropped, as lines."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def has_head(tensors: Iterable[str]) -> bool:
    """Whether a checkpoint holds a classifier; a self-supervised or a bare encoder has none."""
    return any(key.startswith(HEAD) for key in tensors)


def fit(name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], encoder: str, keep_head: bool) -> Fitted:
    """The checkpoint's tensors under the keys of `wanted`; whatever is missing, left over, misshapen or not finite is an InputError."""
    new = () if keep_head else HEAD if has_head(tensors) else HEAD + POOLING
    wanted = {key: value for key, value in wanted.items() if not key.startswith(new)}
    found, notes = _without_decoder(_with_encoder(tensors, encoder), encoder, wanted)
    found = {key: value for key, value in found.items() if not key.startswith(new)}
    found = respelled(name, found, wanted)
    found, key_notes = _key_biases(found, wanted)
    found, channel_notes = _keypoints(found, wanted)
    _check(name, found, wanted)
    return Fitted(found, (*notes, *key_notes, *channel_notes))


def respelled(name: str, tensors: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors with each bias under the spelling that is wanted."""
    wanted = set(wanted)
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        target = next((spelling for spelling in _spellings(key) if spelling in wanted), key)
        if target in result:
            raise InputError(f"{name}: holds {target} in two spellings; expected one. Keep the one that was trained.")
        result[target] = tensor
    return result


def _spellings(key: str) -> Iterable[str]:
    """The key, and what it is called in memory if the file has the old name."""
    yield key
    for old, new in SPELLINGS:
        if key.endswith(old):
            yield key.removesuffix(old) + new


def _with_encoder(tensors: Mapping[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """The keys of a bare encoder (`embeddings…`) as those of a classifier's encoder (`videomae.embeddings…`)."""
    if any(key.startswith(f"{encoder}.") for key in tensors):
        return dict(tensors)
    return {key if key.startswith(HEAD + POOLING + DECODER) else f"{encoder}.{key}": tensor for key, tensor in tensors.items()}


def _without_decoder(tensors: dict[str, Tensor], encoder: str, wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Drops what only self-supervised training needs, and the encoder's last norm where pooling has its own."""
    dropped = [key for key in tensors if key.startswith(DECODER)]
    notes = [f"dropped {len(dropped)} tensors of the self-supervised decoder"] if dropped else []
    last_norm = [key for key in tensors if key.startswith(f"{encoder}.layernorm.") and key not in wanted]
    if last_norm and not has_head(tensors):
        notes.append(f"dropped {' and '.join(last_norm)}: tokens are averaged, then normalised by a new fc_norm, as the authors fine-tune")
        dropped += last_norm
    return {key: tensor for key, tensor in tensors.items() if key not in dropped}, tuple(notes)


def _key_biases(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Zeros where only the model has key biases; none where only the checkpoint has them."""
    extra = [key for key in tensors if key.endswith(KEY_BIAS) and key not in wanted]
    zeros = {key: torch.zeros_like(value) for key, value in wanted.items() if key.endswith(KEY_BIAS) and key not in tensors}
    kept = {key: tensor for key, tensor in tensors.items() if key not in extra}
    notes = (f"left out {len(extra)} key biases, which softmax cancels",) if any(bool(tensors[key].any()) for key in extra) else ()
    return {**kept, **zeros}, notes


def _keypoints(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The fourth channel as it was trained, or as it is in the model (zero), or left out where the model has none."""
    left_out = [key for key in tensors if key.endswith(KEYPOINTS) and key not in wanted]
    new = {key: value for key, value in wanted.items() if key.endswith(KEYPOINTS) and key not in tensors}
    kept = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    notes = ("left out the keypoints' channel of the checkpoint; --use-keypoints channel keeps it",) if left_out else ()
    return {**kept, **new}, notes


def _check(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises InputError that names every kind of difference."""
    both = [key for key in wanted if key in found]
    shapes = [f"{key} is {tuple(found[key].shape)}, expected {tuple(wanted[key].shape)}" for key in both if found[key].shape != wanted[key].shape]
    kinds = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": shapes,
        "not finite": [key for key in both if not bool(torch.isfinite(found[key]).all())],
    }
    problems = "; ".join(f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in kinds.items() if keys)
    if problems:
        raise InputError(f"{name}: does not fit the model that its config.json describes; {problems}. Check that config and weights belong together.")


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
