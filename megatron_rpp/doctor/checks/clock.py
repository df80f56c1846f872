"""Do the nodes' clocks agree? Rendezvous files, heartbeats and logs carry times of several nodes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

from megatron_rpp.doctor.finding import Finding, Status
from megatron_rpp.doctor.job import Job

WARN_S, FAIL_S = 1.0, 10.0
_REMEDY = "start chronyd or ntpd on the node: systemctl restart chronyd"


def measure() -> float:
    """This node's time, in seconds since 1970."""
    return time.time()


def check(job: Job) -> list[Finding]:
    """Each node's time against the front's, at the middle of the question's way there and back."""
    asked = time.time()
    answers = job.ask_when("clock", "clock.measure", job.nodes)
    ahead = {node: told - (asked + came) / 2 for node, (told, came) in answers.items()}
    unsure = {node: (came - asked) / 2 for node, (_, came) in answers.items()}
    return judge(ahead, unsure)


def judge(ahead: Mapping[str, float], unsure: Mapping[str, float]) -> list[Finding]:
    """ahead: seconds that each node's clock is before the front's, give or take `unsure`."""
    if not ahead:
        return []
    middle = median(ahead.values())
    findings = []
    for node, seconds in ahead.items():
        off = abs(seconds - middle) - unsure[node]
        if off > WARN_S:
            status: Status = "fail" if off > FAIL_S else "warn"
            way = "ahead of" if seconds > middle else "behind"
            found = f"its clock is {abs(seconds - middle):.1f} s {way} the others'"
            findings.append(Finding("clock", status, found, _REMEDY, node, status == "fail"))
    spread = max(ahead.values()) - min(ahead.values())
    return findings or [Finding("clock", "ok", f"within {spread:.2f} s of each other")]
