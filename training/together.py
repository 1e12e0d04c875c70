"""The ranks of one training end together: when one fails or is killed, the others end within seconds, and each says why in one line.

    each rank ── one open TCP connection: "done" or why it fails ──→ hub, a thread of rank 0 ── all done, or who failed ──→ each rank

The kernel closes the connections of a dead process, however it died. So there is no heartbeat: a rank that computes for an hour, holds
Python's lock or is stopped for a while is alive. The answer is awaited in a thread, which can end a process whose main thread sits in NCCL or gloo.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from clips.environment import Ranks
from clips.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

GRACE_S = 2.0  # after one failure the others may be about to fail for the same reason
SIGNAL_S = 1.0  # for a main thread to see a signal
LAST_RESORT_S = 30  # for last words and messages of a rank that fails; then the kernel ends it
HELLO_S = 5.0  # a rank names itself as soon as it is connected
MAX_REASON = 500  # characters that one rank tells the others
ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="single")
DONE = ""  # what a rank says at its clean end, instead of a reason
INTERRUPTED = "interrupted"


class Together:
    """This rank among the others, to be used with `with` around all that they do together; alone it only speaks `last_words`.

    A clean end waits for the other ranks. An error does not: it goes to the others first, and is silent here if rank 0 says the same.
    """

    def __init__(self, place: Ranks = ALONE, store: Store | None = None, hub: socket.socket | None = None) -> None:
        self.place = place
        self.store = store  # torch's, for its process groups
        self.last_words: Callable[[str], None] = lambda reason: None  # called with the reason of an early end, from any thread
        self.leaves_sigterm = False  # to the main thread, which saves before it ends
        self._hub = hub
        self._error: BaseException | None = None  # of the main thread
        self._answer: dict[int, str | None] = {}  # failed rank -> its reason; None: it ended without one
        self._answered = threading.Event()
        if hub is not None:
            threading.Thread(target=self._listen, args=(hub,), name="together", daemon=True).start()
            threading.Thread(target=self._await_signal, args=(_signals(),), name="signals", daemon=True).start()

    def __enter__(self) -> Together:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._leave()
        elif self._hub is None:
            self._say_last(in_words(error))
        else:
            self._fail(self._hub, error)

    def _leave(self) -> None:
        """Waits for all others' clean end; if one of them fails, `_listen` ends this process here."""
        if self._hub is not None:
            say(self._hub, DONE)
            self._answered.wait()
            signal.set_wakeup_fd(-1)
            self._hub.close()

    def _fail(self, hub: socket.socket, error: BaseException) -> None:
        """Tells the others; leaves the process to the error, or ends it in silence if rank 0 has the same to say."""
        self._error, reason = error, in_words(error)
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        atexit.register(end, code)  # after the error's message: NCCL's destructors would wait for the other ranks
        signal.alarm(LAST_RESORT_S)
        say(hub, reason)
        self._answered.wait()  # at most GRACE_S in the hub
        self._say_last(reason)
        if self.place.rank != 0 and self._answer.get(0) == reason:
            raise SystemExit(code)

    def _listen(self, hub: socket.socket) -> None:
        """Waits for the hub's answer, and ends this process if another rank failed and the main thread has nothing of its own to say."""
        heard = listen(hub)
        self._answer = {0: None} if heard is None else {int(rank): reason for rank, reason in json.loads(heard)}
        if self._answer and not self._has_its_own_reason():
            self._end()
        self._answered.set()

    def _has_its_own_reason(self) -> bool:
        """Whether the main thread failed by itself: not because a collective broke, or a launcher cleans up, after another rank's death."""
        follows = isinstance(self._error, (RuntimeError, KeyboardInterrupt)) and None in self._answer.values()
        return self._error is not None and not follows

    def _end(self) -> NoReturn:
        """Says whose end this rank's is, and ends it."""
        signal.alarm(LAST_RESORT_S)
        rank, answer = self.place.rank, self._answer
        cause = next((other for other, reason in answer.items() if reason is None), rank if rank in answer else next(iter(answer)))
        reason = answer[cause] or "killed, out of memory or cut off; its own log or the scheduler's may say more"
        line = f"rank {cause} of {self.place.world_size} ended: {reason.rstrip('.')}."
        try:
            if cause != rank:
                print(f"error: {line} Rank {rank} ends too.", file=sys.stderr)
            elif rank == 0 or answer.get(0) != reason:
                print("interrupted; the same command again continues", file=sys.stderr)
            self._say_last(reason if cause == rank else line)
        finally:
            end(130 if cause == rank else 2)

    def _await_signal(self, signals: socket.socket) -> None:
        """Fails for a main thread that does not come to see SIGTERM or SIGINT: Python runs its handlers only between two of its own instructions."""
        while (number := signals.recv(1)[0]) not in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGTERM and self.leaves_sigterm):
            pass
        if self._hub is not None and not self._answered.wait(SIGNAL_S) and self._error is None:
            say(self._hub, INTERRUPTED)

    def _say_last(self, reason: str) -> None:
        with contextlib.suppress(OSError):  # a full disk may be the reason itself
            self.last_words(reason)


def in_words(error: BaseException) -> str:
    """The error as one line that may stand in another rank's log."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    text = " ".join(str(error).split())[:MAX_REASON]
    return text if text and isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def end(code: int) -> NoReturn:
    """Ends this process now, without waiting for threads or other ranks."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that is gone, a closed stream
            stream.flush()
    os._exit(code)


def open_hub() -> socket.socket:
    """Where rank 0 listens for the others, at a port that the kernel chose."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def admit(listener: socket.socket, world_size: int, token: str, timeout_s: float) -> socket.socket:
    """Starts the hub when all ranks have called; gives rank 0's own connection to it. TimeoutError when ranks are missing."""
    mine, own = socket.socketpair()
    members, end_s = {0: own}, time.monotonic() + timeout_s
    try:
        while len(members) < world_size:
            listener.settimeout(max(0.01, end_s - time.monotonic()))
            connection, _ = listener.accept()
            connection.settimeout(HELLO_S)
            said = (listen(connection) or "").split()
            if len(said) == 2 and said[0] == token:
                members[int(said[1])] = keep_alive(connection)
            else:
                connection.close()  # not one of us: the port is open to the network
    except OSError:
        for member in (mine, *members.values()):
            member.close()
        raise
    threading.Thread(target=serve, args=(members,), name="hub", daemon=True).start()
    return mine


def call(host: str, port: int, token: str, rank: int, timeout_s: float) -> socket.socket:
    """This rank's connection to the hub of rank 0; OSError when nobody answers there."""
    connection = keep_alive(socket.create_connection((host, port), timeout=timeout_s))
    say(connection, f"{token} {rank}")
    return connection


def serve(members: dict[int, socket.socket]) -> None:
    """The hub: waits until all ranks are done, or one failed, and tells every rank which failed and why.

    A rank's death is told at once. After a reason the hub waits up to GRACE_S for those of the others: often all have the same.
    """
    failed: dict[int, str | None] = {}
    waiting, end_s, poll = dict(members), float("inf"), select.poll()
    rank_of = {connection.fileno(): rank for rank, connection in members.items()}
    for number in rank_of:
        poll.register(number, select.POLLIN)
    while waiting and None not in failed.values() and time.monotonic() < end_s:
        for number, _ in poll.poll(None if not failed else max(0.0, end_s - time.monotonic()) * 1000):
            poll.unregister(number)
            rank = rank_of[number]
            reason = listen(waiting.pop(rank))
            if reason != DONE:
                failed[rank] = reason
                end_s = min(end_s, time.monotonic() + GRACE_S)
    for rank in sorted(members, reverse=True):  # rank 0 last: its process may end as soon as it hears
        say(members[rank], json.dumps(list(failed.items())))
    for connection in members.values():
        connection.close()


def say(connection: socket.socket, line: str) -> None:
    """Sends a line. To a rank that is gone it cannot be sent, and need not be."""
    with contextlib.suppress(OSError):
        connection.sendall(line.encode() + b"\n")


def listen(connection: socket.socket) -> str | None:
    """The next line that the other side says; None when it is gone."""
    heard = b""
    with contextlib.suppress(OSError):
        while (byte := connection.recv(1)) not in (b"", b"\n"):
            heard += byte
        if byte:
            return heard.decode(errors="replace")
    return None


def keep_alive(connection: socket.socket) -> socket.socket:
    """Blocking, and closed by the kernel when the other machine has been silent for three minutes: one without power closes nothing."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 8)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _signals() -> socket.socket:
    """Where this process's signals can be read, one byte each, whatever its main thread is doing."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    return reader
