"""What pixels a checkpoint expects: mean, standard deviation and channel order, and where we know them from.

transformers' processor classes agree with neither training code (their class defaults are .5 for VideoMAE and ImageNet's for
TimeSformer) and know no channel order, so preprocessor_config.json is read here, and the order comes from the table below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clips.errors import InputError

from .config import ModelConfig, Triple

NC = "CC-BY-NC-4.0"


@dataclass(frozen=True)
class Pixels:
    """Statistics of pixels / 255 in the checkpoint's own channel order, and that order."""

    mean: Triple
    std: Triple
    channel_order: str  # "rgb" or "bgr"


# From the training codes: ssv2.py of VideoMAE; MEAN and STD of TimeSformer's configs. bgr is TimeSformer's SSv2 loader (cv2.imdecode).
FAMILIES = {
    "videomae": Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "rgb"),
    "timesformer": Pixels((0.45, 0.45, 0.45), (0.225, 0.225, 0.225), "bgr"),
}


@dataclass(frozen=True)
class Known:
    """What we have read about a published checkpoint and what its files do not say."""

    channel_order: str
    licence: str | None


# The first entry whose owner and name begin and end a hub id. VideoMAE reads with decord (RGB); TimeSformer reads SSv2's JPEG frames with
# cv2 and never turns them (BGR), Kinetics' videos with PyAV (RGB).
KNOWN = (
    ("MCG-NJU/videomae-", "", Known("rgb", NC)),
    ("facebook/timesformer-", "-ssv2", Known("bgr", NC)),
    ("facebook/timesformer-", "", Known("rgb", NC)),
    ("fcakyon/timesformer-", "-ssv2", Known("bgr", None)),
)


def known(hub_id: str | None) -> Known | None:
    """The table's entry for a hub id; None where there is none."""
    for start, end, entry in KNOWN if hub_id else ():
        if hub_id is not None and hub_id.startswith(start) and hub_id.endswith(end):
            return entry
    return None


def choose_pixels(config: ModelConfig, values: Mapping[str, Any], processor: Mapping[str, Any], processor_name: str, hub_id: str | None) -> tuple[Pixels, str]:
    """Flags first, then what lies beside the checkpoint, then what is known of it; and a line that says what was used and why."""
    if config.mean is None or config.std is None:
        _check_steps(processor, processor_name)
    family = FAMILIES[values["model_type"]]
    mean, mean_from = _statistic(config.mean, "mean", processor, processor_name, family.mean)
    std, std_from = _statistic(config.std, "std", processor, processor_name, family.std)
    order, order_from = _channel_order(config, values, processor, processor_name, hub_id)
    mean_text = _text(mean) if mean_from == std_from else f"{_text(mean)} ({mean_from})"
    return Pixels(mean, std, order), f"pixels: mean {mean_text}, std {_text(std)} ({std_from}); channel order {order} ({order_from})"


def _statistic(flag: Triple | None, name: str, processor: Mapping[str, Any], processor_name: str, family: Triple) -> tuple[Triple, str]:
    """Three numbers and where they come from."""
    if flag is not None:
        return flag, f"--{name}"
    found = processor.get(f"image_{name}")
    if found is None:
        return family, "its family's training code; the checkpoint says nothing"
    lowest = 0.0 if name == "mean" else 1e-6
    if not (isinstance(found, list | tuple) and len(found) == 3 and all(isinstance(value, int | float) and lowest <= value <= 1 for value in found)):
        raise InputError(f"{processor_name}: image_{name} is {found!r}; expected three numbers from 0 to 1. Give --{name}.")
    return (float(found[0]), float(found[1]), float(found[2])), processor_name


def _channel_order(config: ModelConfig, values: Mapping[str, Any], processor: Mapping[str, Any], processor_name: str, hub_id: str | None) -> tuple[str, str]:
    """rgb or bgr and where that comes from."""
    if config.channel_order is not None:
        return config.channel_order, "--channel-order"
    if "channel_order" in processor:
        if processor["channel_order"] not in ("rgb", "bgr"):
            raise InputError(f"{processor_name}: channel_order is {processor['channel_order']!r}; expected rgb or bgr. Give --channel-order.")
        return processor["channel_order"], processor_name
    entry = known(hub_id)
    if entry is not None:
        return entry.channel_order, f"known of {hub_id}"
    if values["model_type"] == "timesformer" and len(values.get("id2label") or ()) == 174:
        return "bgr", "its 174 classes are those of Something-Something V2, which TimeSformer learned from BGR; --channel-order overrides"
    if values["model_type"] == "videomae":
        return "rgb", "its family's training code"
    return "rgb", "assumed, nothing says otherwise; --channel-order overrides"


def _check_steps(processor: Mapping[str, Any], name: str) -> None:
    """Raises unless the processor normalises pixels / 255, the one thing that mean and std can mean here."""
    factor = processor.get("rescale_factor", 1 / 255)
    if processor.get("do_rescale") is False or processor.get("do_normalize") is False or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise InputError(
            f"{name}: do_rescale {processor.get('do_rescale')}, do_normalize {processor.get('do_normalize')}, rescale_factor {factor}; "
            "expected pixels / 255, then mean and std. Give --mean and --std for pixels / 255."
        )


def _text(numbers: Triple) -> str:
    return " ".join(f"{number:g}" for number in numbers)
