"""What this process and all that it started have used: CPU seconds, and memory that is their own."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_MS = 20
CLOCK_OF_A_PROCESS = 2  # Linux's CPUCLOCK_SCHED: the lower bits of a process's clock id, above them ~pid
OWN_MEMORY = ("Pss_Anon:", "Pss_Shmem:")  # pages of files, such as libraries, can be dropped and are left out


def cpu_s() -> float:
    """CPU seconds of this process, of its descendants that live, and of those that have ended and were waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_descendant_cpu_s, descendants()))


def _descendant_cpu_s(pid: int) -> float:
    """To the nanosecond for the process itself, in ticks of 10 ms for its own ended children; 0 where it is gone."""
    try:
        fields = _stat(pid)
        return time.clock_gettime(~pid << 3 | CLOCK_OF_A_PROCESS) + (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def descendants() -> list[int]:
    """The ids of the processes that this one started, and so on down."""
    children: dict[int, list[int]] = {}
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                children.setdefault(int(_stat(int(folder))[1]), []).append(int(folder))
            except OSError:  # ended meanwhile
                continue
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found[1:]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: the name before it may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def memory_mb() -> float:
    """Anonymous and shared memory of this process and its descendants; a page that several of them hold counts once."""
    return sum(map(_own_kib, [os.getpid(), *descendants()])) * 1024 / 1e6


def _own_kib(pid: int) -> int:
    """0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(OWN_MEMORY))


def give_memory_back() -> None:
    """Returns to the system what earlier work has freed, so that later work is seen to take its own."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


class PeakMemory:
    """`mb` is the most that `watch_memory` has seen above the memory at its begin."""

    def __init__(self) -> None:
        self._before = self._most = memory_mb()
        self._ended = threading.Event()

    @property
    def mb(self) -> float:
        return self._most - self._before

    def look(self) -> None:
        self._most = max(self._most, memory_mb())

    def look_until_ended(self) -> None:
        while not self._ended.wait(SAMPLE_MS / 1000):
            self.look()

    def end(self) -> None:
        self._ended.set()


@contextmanager
def watch_memory() -> Iterator[PeakMemory]:
    """Looks at the memory every 20 ms while the body runs. It takes CPU time: never while something is timed."""
    give_memory_back()
    peak = PeakMemory()
    thread = threading.Thread(target=peak.look_until_ended, name="watch memory", daemon=True)
    thread.start()
    try:
        yield peak
        peak.look()
    finally:
        peak.end()
        thread.join()
