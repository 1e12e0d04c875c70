"""A real SLURM of two virtual nodes on this machine, for a test's life: munged, slurmctld and a slurmd for each node, no accounting.

apt-get (when missing) -> slurm.conf -> daemons, each node under a host name of its own -> sbatch, squeue, scontrol -> all gone

Needs root and Debian's packages munge, slurmctld, slurmd and slurm-client (22.05 and later were seen to work).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
NODES = ("n1", "n2")
CPUS = 256  # that each node claims, whatever the machine has
GPUS = {"a40": 8, "a100": 8, "h100": 4, "h200": 4}  # that each node claims to have: names alone, there is no device behind them
START_S = 60.0
# Time limits are looked at every 30 s, a requeued job waits for cred_expire + 1 s: 2 is refused, 5 works.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=3600
MaxArraySize=1001
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """With `with`: up and idle inside, gone after. `run` gives its commands the right configuration."""

    def __init__(self, folder: Path) -> None:
        if len(str(folder)) > 60:
            raise ValueError(f"{folder}: SLURM's sockets below it must stay under 108 bytes; take a shorter name")
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        install()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def run(self, *words: str | Path, cwd: Path | None = None, check: bool = True) -> str:
        """What a command says on stdout; AssertionError with its words and stderr where it fails."""
        done = subprocess.run([str(word) for word in words], env=self.environ, cwd=cwd, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path | None = None) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd).strip().split(";")[0]

    def shown(self, job: str, name: str) -> str:
        """One of the values that scontrol shows of a job or of an array's element such as 12_3."""
        match = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", "-o", job))
        assert match, f"job {job}: no {name}"
        return match[1]

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, CANCELLED, …"""
        return self.shown(job, "JobState")

    def number(self, job: str) -> str:
        """A job's own number, of an array's element such as 12_3 too."""
        return self.shown(job, "JobId")

    def restarts(self, job: str) -> int:
        return int(self.shown(job, "Restarts"))

    def ran_s(self, job: str) -> float:
        """How long a job that ended ran at last."""
        begin, end = (datetime.fromisoformat(self.shown(job, name)) for name in ("StartTime", "EndTime"))
        return (end - begin).total_seconds()

    def wait(self, what: str, reached: Callable[[], bool], within_s: float) -> None:
        """Returns once `reached`; AssertionError, with what the queue holds, when it takes longer."""
        end_s = time.monotonic() + within_s
        while not reached():
            assert time.monotonic() < end_s, f"{what}: not within {within_s:.0f} s\n{self.run('squeue', '-l')}"
            time.sleep(0.2)

    def wait_for(self, job: str, *states: str, within_s: float = 120.0) -> str:
        """The state, once it is one of `states`."""
        self.wait(f"job {job} {' or '.join(states)}", lambda: self.state(job) in states, within_s)
        return self.state(job)

    def _start(self) -> None:
        folder = self.folder
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = free_ports(1 + len(NODES))
        gres = ",".join(f"gpu:{kind}:{count}" for kind, count in GPUS.items())
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres={gres} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        (folder / "slurm.conf").write_text(CONF.format(host="ctl", port=ports[0], folder=folder, nodes="\n".join(lines)))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n" if version() < (23, 11) else "CgroupPlugin=disabled\n")
        (folder / "gres.conf").write_text("\n".join(self._devices()) + "\n")
        (folder / "hosts").write_text("127.0.0.1 localhost ctl " + " ".join(NODES) + "\n")
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "seed"}
        self._spawn("munged", ["munged", "-F", *(f"--{option}={folder / name}" for option, name in files.items())])
        self.wait_quietly("munged", ["munge", "-S", f"{folder}/munge.socket", "-n"])
        self._spawn("slurmctld", self._as_host("ctl", ["slurmctld", "-D", "-c"]))
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            self._spawn(f"slurmd-{name}", self._as_host(name, ["slurmd", "-D", "-c", "-N", name]))
        self.wait_quietly("idle nodes", ["sh", "-c", f"[ $(sinfo -h -N -p debug -t idle | wc -l) = {len(NODES)} ]"])

    def _devices(self) -> list[str]:
        """Lines of gres.conf, with a character device that leads nowhere for each GPU: without a file slurmd counts none."""
        lines, first = [], 0
        (self.folder / "dev").mkdir()
        for kind, count in GPUS.items():
            for number in range(first, first + count):
                os.mknod(self.folder / "dev" / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null
            lines.append(f"Name=gpu Type={kind} File={self.folder}/dev/gpu[{first}-{first + count - 1}]")
            first += count
        return lines

    def _as_host(self, name: str, words: Sequence[str]) -> list[str]:
        """The command under a host name of its own, which its private /etc/hosts knows. Every step execs the next: one process."""
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        return ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", script, "sh", name, str(self.folder / "hosts"), *words]

    def _spawn(self, name: str, words: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("wb") as output:
            self._daemons.append(subprocess.Popen(words, env=self.environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True))

    def wait_quietly(self, what: str, words: Sequence[str]) -> None:
        """Until the command succeeds; RuntimeError with the daemons' last lines where it does not."""
        end_s = time.monotonic() + START_S
        while subprocess.run(words, env=self.environ, capture_output=True, check=False).returncode:
            if time.monotonic() > end_s or any(daemon.poll() is not None for daemon in self._daemons):
                paths = sorted(self.folder.glob("*.out")) + sorted(self.folder.glob("*.log"))
                logs = [f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in paths]
                raise RuntimeError(f"{what}: not there after {START_S:.0f} s\n" + "\n".join(logs))
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends jobs, daemons and whatever a job left behind."""
        if (self.folder / "slurm.conf").exists() and len(self._daemons) > 1:
            subprocess.run(["scancel", "--state=RUNNING", "-u", "root"], env=self.environ, capture_output=True, check=False, timeout=20)
            subprocess.run(["scancel", "--state=PENDING", "-u", "root"], env=self.environ, capture_output=True, check=False, timeout=20)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        for process in self.processes():
            with_no_mercy(process)

    def processes(self) -> list[int]:
        """Processes of this cluster's jobs: those whose environment names its configuration and a job or node."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environ = path.read_bytes().split(b"\0")
                alive = path.with_name("stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            except OSError:
                continue
            ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in environ
            if alive and ours and any(part.startswith((b"SLURM_JOB_ID=", b"SLURMD_NODENAME=")) for part in environ):
                found.append(int(path.parent.name))
        return found


def with_no_mercy(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def install() -> None:
    """SLURM's packages, when they are missing; RuntimeError where that cannot be."""
    if os.geteuid() != 0:
        raise RuntimeError("a test SLURM needs root: slurmd starts jobs as their users")
    need(PACKAGES)


def need(packages: Mapping[str, str]) -> None:
    """Installs the packages, by the program that each brings, whose programs are missing; RuntimeError where that cannot be."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [package for program, package in packages.items() if shutil.which(program, path=path) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise RuntimeError(f"these tests need {', '.join(missing)}; there is no apt-get here")
    policy = Path("/usr/sbin/policy-rc.d")  # keeps the packages from starting services of their own
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=quiet, capture_output=True, check=False)
        done = subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env=quiet, capture_output=True, text=True, check=False)
    finally:
        if made:
            policy.unlink()
    if done.returncode:
        raise RuntimeError(f"apt-get install {' '.join(missing)}: {done.stderr[-500:]}")


def version() -> tuple[int, int]:
    """Of slurmd, such as (22, 5)."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    said = subprocess.run(["slurmd", "-V"], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True).stdout
    year, month = re.findall(r"\d+", said)[:2]
    return int(year), int(month)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
