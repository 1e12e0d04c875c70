"""One training at a time writes into a run's folder: two jobs of a chain, or a requeued one and its successor, never tear it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from clips.claim import BEAT_S, STALE_S, HeldError, claimed

from .distributed import Group

logger = logging.getLogger(__name__)

FILE = ".claim"
PATIENCE_S = STALE_S + BEAT_S  # by then the claim of a node that died is stale
RETRY_S = 1.0


@contextmanager
def alone(folder: Path, group: Group, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Rank 0 holds the folder while the block runs. HeldError on all ranks where another training still has it after `patience_s`."""
    try:
        with ExitStack() as held:
            group.ask_main(lambda: _hold(folder / FILE, held, patience_s))
            yield
    finally:
        if group.is_main:
            with suppress(OSError):  # of a run that never began nothing is left
                folder.rmdir()


def _hold(claim: Path, held: ExitStack, patience_s: float) -> None:
    end_s, has_said = time.monotonic() + patience_s, False
    while True:
        claim.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(claimed(claim, "trains this run"))
            return
        except FileNotFoundError:  # another, which never began, removed the empty folder just now
            continue
        except HeldError as error:
            if time.monotonic() >= end_s:
                raise
            if not has_said:
                logger.info(f"{error} Waiting up to {patience_s:.0f} s.")
                has_said = True
            time.sleep(min(RETRY_S, patience_s))
