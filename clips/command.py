"""What every command line shares: flat flags from a dataclass, errors as one line, a log to read."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from .environment import ranks
from .errors import InputError
from .registry import nearest


# Any: a dataclass or a union of them, and an instance
def parse(config: Any, prog: str, description: str, args: Sequence[str] | None = None, default: Any = None) -> Any:
    """The dataclass filled from the command line: nested dataclasses give flat flags, lists are separated by spaces."""
    return tyro.cli(
        config,
        prog=prog,
        description=description,
        args=args,
        default=default if default is not None else tyro.MISSING_NONPROP,
        console_outputs=ranks().rank == 0,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def parse_verb(verbs: Mapping[str, type], prog: str, description: str) -> object:
    """The dataclass of the chosen verb, filled from the command line: `prog VERB --flag …`."""
    named = tuple(Annotated[config, tyro.conf.subcommand(verb)] for verb, config in verbs.items())
    union = Union[named]  # type: ignore[valid-type]  # noqa: UP007  # made at run time
    return parse(union, prog, description)


def flatten(config: Any) -> dict[str, Any]:  # Any: a dataclass of dataclasses, and JSON
    """Flag names to JSON values: what config.json holds."""
    flat: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            flat |= flatten(value)
        else:
            flat[field.name] = str(value) if isinstance(value, Path) else value
    return flat


def read_values(path: Path, facts: Sequence[str]) -> Any:  # Any: JSON
    """The flags in a run's config.json, without its `facts`, which are no flags."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file. Give the config.json of a run.") from None
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror or error}). Give the config.json of a run.") from error
    except ValueError as error:
        raise InputError(f"--config {path}: not readable as JSON ({error}). Give the config.json of a run.") from error
    return {name: value for name, value in values.items() if name not in facts} if isinstance(values, dict) else values


def with_values(default: Any, values: Mapping[str, Any], origin: str) -> Any:  # Any: as above
    """The dataclass `default` with its fields, at any depth, replaced by `values` read from `origin`, which must all be flags."""
    if not isinstance(values, Mapping):
        raise InputError(f"{origin}: expected flags and their values, found {type(values).__name__}. Give the config.json of a run.")
    known = flatten(default)
    if unknown := sorted(set(values) - set(known)):
        are = "is no flag" if len(unknown) == 1 else "are no flags"
        raise InputError(f"{origin}: {', '.join(unknown)} {are} of this command.{nearest(known, unknown[0])}")
    try:
        return _replaced(default, values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{origin}: a value is of the wrong kind ({error}). Give the config.json of a run.") from error


def _replaced(default: Any, values: Mapping[str, Any]) -> Any:  # Any: as above
    changed: dict[str, Any] = {}
    for field in fields(default):
        old = getattr(default, field.name)
        if is_dataclass(old):
            changed[field.name] = _replaced(old, values)
        elif field.name in values:
            value = values[field.name]
            value = tuple(value) if isinstance(value, list) else value
            changed[field.name] = Path(value) if isinstance(value, str) and "Path" in str(field.type) else value
    return replace(default, **changed)


def run(main: Callable[[], int | None]) -> int:
    """The exit code of `main`; what a user or a disk can cause is one line on stderr and exit code 2, an interrupt is 130."""
    before = signal.signal(signal.SIGTERM, _terminate)  # scancel and time limits: end as an interrupt does, nothing half written
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or "input or output"
        print(f"error: {where}: {error.strerror or error}. Look after the disk or folder, then run the same command.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command again continues", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def show_log(verbose: bool = True) -> None:
    """Log lines on stderr, as plain sentences; only entry points call this."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
