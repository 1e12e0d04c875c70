"""python -m training doctor: whether this node and this job will do for a training, in a second or two and before it begins.

train.py's flags, the node -> facts (doctor_facts) -> findings (doctor_checks, doctor_data) -> lines, exit code
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from clips.environment import allocation

from . import doctor_checks, doctor_data
from .doctor_checks import Finding
from .doctor_facts import Facts, gather
from .doctor_flags import read_flags

CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    doctor_data.versions,
    doctor_data.flags,
    doctor_checks.ranks,
    doctor_checks.cores,
    doctor_checks.srun_cores,
    doctor_checks.gpus,
    doctor_checks.driver,
    doctor_checks.shared_memory,
    doctor_checks.open_files,
    doctor_checks.time_left,
    doctor_data.dataset_home,
    doctor_data.shards_and_ranks,
    doctor_data.stage_dir,
    doctor_data.logger_folder,
    doctor_data.room_for_runs,
    doctor_data.weights_at_hand,
)


@dataclass(frozen=True)
class DoctorConfig:
    """Looks for what would end or slow a training here: the job, its cores and GPUs, disks, shards, weights, versions. Give it train.py's flags too."""

    quiet: bool = False
    """Only what is not ok, and a summary."""
    json: bool = False
    """All findings as a JSON list."""


def doctor(args: Sequence[str]) -> int:
    """Prints a line for each check; 1 when one fails, else 0. `args` may hold any of train.py's flags."""
    begin_s = time.monotonic()
    facts = gather(read_flags(args, allocation().array))
    findings = examine(facts)
    if "--json" in args:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            if finding.state != "ok" or "--quiet" not in args:
                print(finding)
        print(summary(findings, facts.host, time.monotonic() - begin_s), flush=True)
    return int(any(finding.state == "fail" for finding in findings))


def examine(facts: Facts) -> list[Finding]:
    """What every check found, in their order."""
    return [check(facts) for check in CHECKS]


def summary(findings: Sequence[Finding], host: str, seconds: float) -> str:
    """Such as `doctor: 16 checks on n1 in 0.8 s: 14 ok, 1 warn, 1 fail`."""
    states = Counter(finding.state for finding in findings)
    said = ", ".join(f"{states[state]} {state}" for state in ("ok", "warn", "fail") if states[state])
    return f"doctor: {len(findings)} checks on {host} in {seconds:.1f} s: {said}"
