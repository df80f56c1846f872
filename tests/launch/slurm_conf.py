"""Configuration of the test cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CPUS, GPUS = 8, 2  # of a node; there are more than this machine may have, and the GPUs are not real

_TEXT = """\
ClusterName=rpptest
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
MpiParams=ports=23000-23999
ReturnToService=2
MailProg=/bin/true
TreeWidth=50
GresTypes=gpu
# As sites have it, so that a dead node goes unnoticed for long.
SlurmdTimeout=300
# A requeued job starts after 13 s, not 125 s.
AuthInfo=cred_expire=5
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
KillWait=5
MessageTimeout=10
TCPTimeout=2
NodeName=DEFAULT CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=20000 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def write_configuration(root: Path, controller: tuple[str, str], nodes: Mapping[str, str]) -> Path:
    """slurm.conf and what it needs in `root`. controller: (name, address); nodes: addresses by name."""
    for folder in ("state", "spool", "log", "run"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lines = [f"NodeName={name} NodeAddr={address} Gres=gpu:{GPUS}" for name, address in nodes.items()]
    (root / "slurm.conf").write_text(
        _TEXT.format(
            root=root, controller=controller[0], controller_address=controller[1], cpus=CPUS, nodes="\n".join(lines)
        )
    )
    for index in range(GPUS):  # any file will do
        (root / "run" / f"gpu{index}").touch()
    (root / "gres.conf").write_text(f"Name=gpu File={root}/run/gpu[0-{GPUS - 1}]\n")
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    return root / "slurm.conf"
