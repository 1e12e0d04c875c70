"""Work spread over processes that end with this one, with a progress bar in clips."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from tqdm import tqdm

from clips.errors import InputError

Result = TypeVar("Result")
POLL_S = 0.5
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ENDING = {signal.SIGINT, signal.SIGTERM}  # a terminal's and a scheduler's: both reach all processes at once


def in_processes(work: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], processes: int, total: int, verb: str) -> Iterator[Result]:
    """`work(*job)` of each job, in the order in which they end; `work` calls `count()` for each of the `total` clips.

    What a job raises is raised here and ends the others. Processes are spawned: forking one with threads may hang.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    executor = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, initializer=_start, initargs=(counter, os.getpid()))
    try:
        with executor, tqdm(total=total, unit="clips", desc=verb, smoothing=0.05, disable=None) as progress:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # the processes start in here, with this mask
            pending = {executor.submit(_interruptible, work, *job) for job in jobs}
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            try:
                while pending:
                    done, pending = wait(pending, timeout=POLL_S)
                    progress.update(counter.value - progress.n)
                    for future in done:
                        yield future.result()
            finally:
                for future in pending:
                    future.cancel()
    except BrokenProcessPool as error:
        raise InputError(f"{verb}: a worker was killed, probably for want of memory. Run the same command again with fewer --workers.") from error


_counter: Synchronized[int]  # clips done by all processes; set at each one's start


def count() -> None:
    """One clip more is done."""
    with _counter.get_lock():
        _counter.value += 1


def _interruptible(work: Callable[..., Result], *job: Any) -> Result:
    """The job's result. An interrupt ends a job, which cleans up; between jobs it waits: there it would be a traceback for each process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        return work(*job)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def _start(counter: Synchronized[int], parent: int) -> None:
    global _counter
    _counter = counter
    if os.getpid() != parent:  # tests run the workers as threads
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed main process leaves nobody behind
        if os.getppid() != parent:
            os._exit(1)
