"""The processes of one training and what they tell each other: one process for each GPU, or plain processes on a CPU.

    with meet() as others: start(device, others) -> Group: gather_objects, sum, broadcast_object, barrier -> close()

`meet` finds the ranks; from there to the end of its block, when one rank fails or dies, all end (together.py).
Small things (objects, sums of metrics) go over gloo on the CPU, so they never wait for the GPU; gradients go over NCCL where there are GPUs.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from clips.environment import Ranks, cpus_of_rank, ranks
from clips.errors import InputError

from .together import Together, admit, call, open_hub

RENDEZVOUS_TIMEOUT_S = 40.0  # a wrong address must show itself in under a minute, imports and the job's own start included
COLLECTIVE_TIMEOUT_S = 1800.0  # one rank may compile, write or search for its micro-batch while the others wait
RETRY_S = 0.2
T = TypeVar("T")


@dataclass
class Group:
    """This process among the processes of one training; ranks are 0 … world_size - 1. With one process every method is local."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str  # "torchrun", "srun" or "single"
    objects: dist.ProcessGroup | None = field(default=None, repr=False)  # the gloo group; None is the default group

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    def gather_objects(self, obj: Any) -> list[Any]:  # Any: whatever pickle carries
        """Every rank's `obj` in rank order, on every rank."""
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self.objects)
        return gathered

    def broadcast_object(self, obj: Any) -> Any:  # Any: whatever pickle carries
        """Rank 0's `obj`, on every rank."""
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def ask_main(self, ask: Callable[[], T]) -> T:
        """Rank 0's answer on all ranks; an InputError of rank 0 is raised on all, so that it is said once."""
        answer: T | InputError | None = None
        if self.is_main:
            try:
                answer = ask()
            except InputError as error:
                answer = error
        answer = self.broadcast_object(answer)
        if isinstance(answer, InputError):
            raise answer
        return answer

    def sum(self, values: list[float]) -> list[float]:
        """The sums over the ranks, each added in fp64; every rank gives the same number of values and gets the same bits."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.objects)
        return total.tolist()

    def barrier(self) -> None:
        """Returns when every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self.objects)

    def close(self) -> None:
        """Leaves the process group when every rank is here: for a clean end. After an error the process ends without."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


def meet(timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> Together:
    """The ranks that torchrun's or srun's variables describe, met; alone when there are none.

    InputError when the others are not found in `timeout_s`.
    """
    place = ranks()
    if place.world_size == 1:
        return Together(place)
    where = f"{place.master_addr}:{place.master_port}"
    try:
        store = find_store(place, timeout_s)
        hub = find_hub(place, store, timeout_s)
    except (OSError, RuntimeError) as error:  # nobody listens, unknown host, too few ranks, or the port is taken
        found = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"rank {place.rank} of {place.world_size} ({place.launcher}): expected all ranks at {where} within {timeout_s:.0f} s, found: {found}. "
            "Check that all ranks were started, that MASTER_ADDR is rank 0's host and that no other training uses MASTER_PORT."
        ) from error
    return Together(place, store, hub)


def start(device: str, others: Together) -> Group:
    """This process and its device in the group of `others`; alone without a process group. InputError when the device does not exist."""
    place = others.place
    chosen = choose_device(device, place.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    share_cores(chosen, cpus_of_rank(place))
    group = Group(place.rank, place.world_size, place.local_rank, chosen, place.launcher)
    if others.store is not None:
        connect(place, chosen, others.store)
        if chosen.type == "cuda":
            group.objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    return group


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of this process. Under srun with one visible GPU a task, each task's GPU is number 0 whatever its local rank."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu or cuda. Choose the GPUs themselves with SLURM or CUDA_VISIBLE_DEVICES.")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: no usable GPU here (torch.cuda.is_available() is false). Ask SLURM for one, or give --device cpu.")
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise InputError(f"local rank {local_rank}: this node shows {visible} GPUs. Start one process for each GPU.")
    return torch.device("cuda", min(local_rank, visible - 1))


def share_cores(device: torch.device, cpus: int) -> None:
    """On a CPU, half of the rank's `cpus` cores for the model's arithmetic: decoding works beside it.

    Measured on two busy cores: with a thread for each, beside two that decode, a tiny model trained at 10 to 40 clips/s, with one at 75 to 110.
    """
    if device.type == "cpu":
        torch.set_num_threads(max(1, cpus // 2))


def find_store(place: Ranks, timeout_s: float) -> Store:
    """The store of all ranks, when all have arrived there."""
    if place.rank != 0:
        wait_for_host(place.master_addr, place.master_port, timeout_s)
    url = f"tcp://{place.master_addr}:{place.master_port}"
    store: Store = next(rendezvous(url, place.rank, place.world_size, timeout=timedelta(seconds=timeout_s)))[0]
    store.set(f"arrived/{place.rank}", "")  # under torchrun the store is the agent's and knows nothing of the ranks
    store.wait([f"arrived/{rank}" for rank in range(place.world_size)], timedelta(seconds=timeout_s))
    return store


def find_hub(place: Ranks, store: Store, timeout_s: float) -> socket.socket:
    """This rank's connection to the hub of rank 0, which tells of the others' end."""
    if place.rank == 0:
        with open_hub() as listener:
            token = secrets.token_hex(16)
            store.set("hub", f"{listener.getsockname()[1]} {token}")
            return admit(listener, place.world_size, token, timeout_s)
    port, token = store.get("hub").decode().split()
    return call(place.master_addr, int(port), token, place.rank, timeout_s)


def connect(place: Ranks, device: torch.device, store: Store) -> None:
    """Makes the default process group of all ranks.

    The store had a short timeout and the group gets a long one: torch's own `init_process_group` has one for both.
    """
    store.set_timeout(timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        device_id=device if device.type == "cuda" else None,
    )


def wait_for_host(host: str, port: int, timeout_s: float) -> None:
    """Returns when something listens there; otherwise OSError after `timeout_s`. (Torch's client takes up to twice its timeout and prints stacks.)"""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end_s - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() + RETRY_S > end_s:
                raise
            time.sleep(RETRY_S)
