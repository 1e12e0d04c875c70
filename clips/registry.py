"""Names to code that is imported only when chosen: `{"jpeg": "clips.codecs.jpeg:JpegCodec"}`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from .errors import InputError


def resolve(registry: Mapping[str, str], name: str, flag: str) -> Any:  # Any: a registry holds classes and functions alike
    """What `registry` holds under `name`; an unknown name is an error that offers the nearest."""
    check_name(registry, name, flag)
    module, attribute = registry[name].split(":")
    return getattr(import_module(module), attribute)


def check_name(names: Iterable[str], name: str, flag: str) -> None:
    """Raises InputError unless `name` is one of `names`."""
    known = sorted(names)
    if name not in known:
        raise InputError(f"{flag} {name}: unknown; expected one of {', '.join(known)}.{nearest(known, name)}")


def nearest(known: Iterable[str], name: str) -> str:
    """' Did you mean x?' or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
