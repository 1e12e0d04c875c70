"""One process at a time does a piece of work: a claim file with a heartbeat, on any file system, without locks.

Two runs into one share would only do the work twice (names are temporary, bytes are the same), so a claim saves time, it
guards no data: what a race could do here is let both go on.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError
from .files import temporary_name, write_once

logger = logging.getLogger(__name__)

BEAT_S = 10.0
STALE_S = 60.0  # six beats: a file server that hangs for half a minute loses nobody's claim


class HeldError(InputError):
    """Another process holds the claim and may be alive."""


@contextmanager
def claimed(path: Path, does: str = "packs this share") -> Iterator[None]:
    """Holds `path` while the block runs; HeldError, which says what the holder `does`, while its heartbeat is younger than 60 s."""
    mine = json.dumps(_myself() | {"nonce": secrets.token_hex(8)})
    while not _take(path, mine):
        _refuse_or_remove(path, does)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, stop), name="heartbeat", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        with suppress(OSError):
            if path.read_text() == mine:
                path.unlink()


def _take(path: Path, mine: str) -> bool:
    write_once(path, mine.encode())
    try:
        return path.read_text() == mine
    except FileNotFoundError:
        return False


def is_held(path: Path) -> bool:
    """Whether the claim's holder may be alive."""
    found = _holder(path)
    return found is not None and _may_live(*found)


def age_s(path: Path) -> float:
    """Since the file was touched, by the file system's own time: clocks of nodes differ. Raises OSError."""
    probe = temporary_name(path.with_name("now"))
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _holder(path: Path) -> tuple[dict[str, str | int], float] | None:
    """Who holds the claim and how old its heartbeat is; None where there is no claim."""
    try:
        holder = json.loads(path.read_text())
        return (holder, age_s(path)) if isinstance(holder, dict) else ({}, STALE_S)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}, STALE_S


def _may_live(holder: dict[str, str | int], silent_s: float) -> bool:
    return silent_s < STALE_S and not _is_dead(holder)


def _refuse_or_remove(path: Path, does: str) -> None:
    """Raises while the holder may be alive; removes the claim of one that is not."""
    found = _holder(path)
    if found is None:
        return
    holder, silent_s = found
    if _may_live(holder, silent_s):
        raise HeldError(
            f"{path}: process {holder.get('pid')} on {holder.get('host')} {does}, its heartbeat is {max(0, silent_s):.0f} s old. "
            f"Wait for it; if it is dead, wait until the heartbeat is {STALE_S:.0f} s old."
        )
    logger.info(f"taking over from process {holder.get('pid')} on {holder.get('host')}, whose heartbeat stopped")
    path.unlink(missing_ok=True)


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with suppress(OSError):  # a hanging mount: the next beat may reach it
            os.utime(path)


def _myself() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "space": _process_space(), "started": started(os.getpid()) or ""}


def _is_dead(holder: dict[str, str | int]) -> bool:
    """Whether the holder was a process of this very machine that has ended; False where that cannot be told."""
    pid = holder.get("pid")
    return holder.get("space") == _process_space() and isinstance(pid, int) and started(pid) != holder.get("started")


def _process_space() -> str:
    """Names this boot of this machine and this container's process numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + ":" + os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)  # equal to no other: only the heartbeat counts


def started(pid: int) -> str | None:
    """When the process started, in clock ticks since boot; None where it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
