"""Decoding in one process beside the training's, so that threads and a busy Python loop do not take the lock from each other.

training: run(pass) -> receive a batch's place -> upload -> give the place back      beside: DecodeThreads into memory that both see

The process imports no torch: it is there in a third of a second. It ends when the training's end of the channel closes, however that happens.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from clips.errors import InputError

from .decode import DecodeThreads, Effort, Outcome, RawBatch
from .requests import Pass, Recipe, Request
from .source import ClipSource

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # for the training, which may still want batches
EXIT_S = 10.0
ANY_PASS = 0  # of an error before the first pass, which is number 1


@dataclass(frozen=True)
class Job:
    """All that the other process needs to know."""

    source: ClipSource
    recipe: Recipe
    effort: Effort
    with_points: bool
    shape: tuple[int, ...]  # of the shared memory, uint8 (slots, B, T, H, W, 3)
    stage: Path | None
    log_level: int


@dataclass(frozen=True)
class Message:
    """From the other process: a batch of a pass that lies in a slot, or that the pass has ended, well or with an error."""

    of_pass: int
    slot: int | None = None
    requests: Sequence[Request] = ()
    outcomes: Sequence[Outcome] = ()
    error: Exception | None = None


class Beside:
    """The other process, seen from the training; one pass at a time, beginning another ends the former."""

    def __init__(self, job: Job, pin: Callable[[np.ndarray], Callable[[], None]] | None = None) -> None:
        self._memory = _shared_memory(job.shape)
        self._slots: np.ndarray = np.frombuffer(mmap.mmap(self._memory, 0), np.uint8, count=int(np.prod(job.shape))).reshape(job.shape)
        self._unpin = pin(self._slots) if pin else None
        ours, theirs = socket.socketpair()
        self._socket, self._channel = ours, Connection(os.dup(ours.fileno()))
        program = f"import sys; sys.path[:] = {sys.path!r}; from loaders.beside import main; main()"
        with theirs, _blocked(SIGNALS):
            files = (theirs.fileno(), self._memory)
            self._process = subprocess.Popen([sys.executable, "-c", program, *map(str, files)], pass_fds=files, stdin=subprocess.DEVNULL)
        self._pass = 0
        try:
            self._send(job)
        except BaseException:
            self.close()
            raise

    def run(self, asked: Pass) -> Iterator[RawBatch]:
        """Decoded batches in the order asked."""
        self._pass += 1
        number = self._pass
        self._send(("run", number, asked))
        return self._receive(number)

    def _receive(self, number: int) -> Iterator[RawBatch]:
        try:
            while True:
                if number != self._pass:
                    raise RuntimeError("this pass was ended by a later one of the same loader; take batches from one pass at a time")
                message = self._next()
                if message.of_pass not in (number, ANY_PASS):
                    self._free(message.slot)
                elif message.error:
                    raise message.error
                elif message.slot is None:
                    return
                else:
                    video = self._slots[message.slot, : len(message.requests)]
                    yield RawBatch(video, message.requests, message.outcomes, partial(self._free, message.slot))
        finally:
            self._tell(("stop", number))

    def _next(self) -> Message:
        try:
            message: Message = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        return message

    def _free(self, slot: int | None) -> None:
        if slot is not None:
            self._tell(("free", slot))

    def _tell(self, message: object) -> None:
        """Sends what nobody needs any more if the process is gone; `_next` will say that it is."""
        with suppress(OSError, ValueError):
            self._channel.send(message)

    def _send(self, message: object) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise self._gone() from error

    def _gone(self) -> InputError:
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return InputError(f"the decoding process {self._process.pid} closed its channel but goes on. End it, and start again; this is an error of ours.")
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return InputError(
            f"the decoding process {self._process.pid} {how}; expected it to live as long as the training. Its message above says why; "
            "after signal 9 look for too little memory (smaller --prefetch, or more --mem from SLURM), then run the same command again."
        )

    def close(self) -> None:
        """The process sees the end of its channel and goes, also when a child of the training still holds a copy of our end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._channel.close()
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._unpin:
            self._unpin()
            self._unpin = None
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        self._slots = np.empty(0, np.uint8)  # the mapping ends with the last batch of it that somebody still holds


def _shared_memory(shape: tuple[int, ...]) -> int:
    """A file descriptor of memory without a name: /dev/shm may be small, and a killed process leaves nothing behind."""
    num_bytes, ram_bytes = math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > ram_bytes:  # it would be handed out until the kernel kills somebody
        held = f"{num_bytes >> 20} MiB of memory for decoded batches; this machine has {ram_bytes >> 20}"
        raise InputError(f"{held}. Take a smaller --prefetch or --micro-batch.")
    descriptor = os.memfd_create("gesture-clips", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # now, as an error, and not later, as a signal that ends the process
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{num_bytes >> 20} MiB of memory for decoded batches: {error.strerror}. Take a smaller --prefetch or --micro-batch.") from error
    return descriptor


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """A process that starts meanwhile never gets these signals, not even before its first line: it inherits what is blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main() -> None:
    """What the other process does, until its channel ends."""
    channel, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    try:
        job: Job = channel.recv()  # the source opens its files again
        logging.basicConfig(level=job.log_level, format="%(message)s", stream=sys.stderr)
        slots = np.frombuffer(mmap.mmap(memory, 0), np.uint8, count=int(np.prod(job.shape))).reshape(job.shape)
        mailbox = Mailbox(channel, slots)
        threading.Thread(target=mailbox.listen, name="listen", daemon=True).start()
        if job.stage:
            job.source.stage(job.stage)
            for line in job.source.describe()[1:]:
                logger.info(line)
    except InputError as error:
        _say(channel, Message(ANY_PASS, error=error))
        return
    except EOFError:
        return
    decoder = DecodeThreads(job.source, mailbox, job.effort, job.with_points)
    while True:
        number, asked = mailbox.runs.get()
        try:
            for raw in decoder.run(job.recipe.batches(job.source, asked)):
                if mailbox.wanted != number:
                    raw.release()
                    break
                _say(channel, Message(number, mailbox.number_of(raw.video), raw.requests, raw.outcomes))
            _say(channel, Message(number))
        except InputError as error:
            _say(channel, Message(number, error=error))
        except Exception:
            _say(channel, Message(number, error=RuntimeError(f"in the decoding process: {traceback.format_exc()}")))


def _say(channel: Connection, message: Message) -> None:
    """Sends to the training; ends the process where nobody hears it any more."""
    try:
        channel.send(message)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


class Mailbox:
    """The slots of shared memory, free or with the training, and what the training asks for."""

    def __init__(self, channel: Connection, slots: np.ndarray) -> None:
        self.runs: SimpleQueue[tuple[int, Pass]] = SimpleQueue()
        self.wanted = 0  # the pass whose batches are wanted
        self._channel, self._slots = channel, slots
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(len(slots)):
            self._free.put(slot)

    def take(self, wait: bool) -> tuple[np.ndarray, Callable[[], None]] | None:
        if not wait and self._free.empty():
            return None
        slot = self._free.get()
        return self._slots[slot], partial(self._free.put, slot)

    def number_of(self, video: np.ndarray) -> int:
        """The slot that a batch lies in."""
        return (video.ctypes.data - self._slots.ctypes.data) // self._slots[0].nbytes

    def listen(self) -> None:
        """Reads the training's wishes; ends the process with the channel."""
        try:
            while True:
                kind, *content = self._channel.recv()
                if kind == "free":
                    self._free.put(content[0])
                elif kind == "run":
                    self.wanted = content[0]
                    self.runs.put((content[0], content[1]))
                elif self.wanted == content[0]:  # stop
                    self.wanted = 0
        except (EOFError, OSError):
            os._exit(0)
        except Exception:  # deaf, the process would wait for a free slot for ever, and the training for a batch
            traceback.print_exc()
            os._exit(1)
