"""A SLURM cluster of this one machine, private to a test: munged, slurmctld and slurmd of Debian's slurm-wlm."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
CONFIG = """
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=60
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=toy Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def available() -> bool:
    """Whether the programs are here and may be started (slurmd wants root)."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return os.geteuid() == 0 and all(shutil.which(name, path=path) for name in PROGRAMS)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for(what: Callable[[], bool], seconds: float, why: str) -> None:
    """Wait until something is so; AssertionError with ``why`` after too long."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:.0f} s in vain for {why}")
        time.sleep(0.3)


class Cluster:
    """The running daemons; use as a context manager. ``environment`` is for sbatch, srun and scontrol."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "SLURM_CONF": str(folder / "slurm.conf"),
        }  # fmt: skip
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o711)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        text = CONFIG.format(
            host=socket.gethostname().split(".")[0], ports=free_ports(2), folder=self.folder, user="root"
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\nIgnoreSystemd=yes\n")
        names = ("pid", "log", "seed")
        options = [f"--{name}-file={self.folder}/munge.{name}" for name in names]
        listening = self.folder / "munge.socket"
        self.start("munged", "--foreground", "--force", f"--socket={listening}", f"--key-file={key}", *options)
        wait_for(listening.exists, 20, "munged")
        self.start("slurmctld", "-D")
        self.start("slurmd", "-D")
        wait_for(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%t"), 60, f"an idle node: {self.logs()}")
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", "--full", "--quiet", "-p", "toy")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def start(self, *command: str) -> None:
        """A daemon in the foreground of its own session."""
        log = open(self.folder / f"{command[0]}.out", "w")  # noqa: SIM115  the daemon's own
        self.daemons.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        )

    def ask(self, *command: str, text: str | None = None) -> str:
        """What a command prints."""
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=self.environment, timeout=60)
        return done.stdout + done.stderr

    def submit(self, script: str) -> str:
        """Hand a script to sbatch; the job's number."""
        said = self.ask("sbatch", "--parsable", text=script)
        assert said.strip().isdigit(), said
        return said.strip()

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED, ..."""
        words = dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)
        return words.get("JobState", "?")

    def logs(self) -> str:
        """What the daemons said."""
        return "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("*.log")))
