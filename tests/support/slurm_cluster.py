"""A SLURM cluster of one node on this machine, for tests: Debian's packages slurm-wlm and munge.

It runs as the current user, with its own configuration, key, ports and files in a folder, beside any other SLURM of the
machine. Like many small clusters it has no accounting, so `sacct` knows nothing.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SYSTEM = "/usr/sbin"  # of the daemons; not on the PATH of every user

# Jobs in the partition `low` are preempted by those in `urgent`: they are sent their signal, and have a minute to save.
# `cred_expire` is also the time that a requeued job waits, two minutes by default; 5 seconds is the least.
CONFIG = """
ClusterName=levin
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs of SLURM that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    """Return PATH with the folder of the daemons."""
    return os.pathsep.join([os.environ["PATH"], SYSTEM])


class SlurmCluster:
    """A running cluster. Use it in a `with` statement, which stops it and ends its jobs.

    Args:
        folder: Folder for all its files, which exists.
        cpus: Number of CPUs that the node claims to have; each job takes one or more.
        memory: Memory that the node claims to have, MB.
    """

    def __init__(self, folder: Path, cpus: int = 4, memory: int = 8000) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen] = []
        values = {"host": self.host, "user": getpass.getuser(), "folder": folder, "cpus": cpus, "memory": memory}
        (folder / "slurm.conf").write_text(CONFIG.format(**values, ports=free_ports(2)))

    def __enter__(self) -> Self:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        try:
            self._start("munged", "--foreground", "--force", *options, f"--seed-file={self.folder / 'munge.seed'}")
            self._wait_until((self.folder / "munge.socket").exists)
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D", "-N", self.host)
            self._wait_until(
                lambda: self.call("sinfo", "--noheader", "--format=%T", check=False).split()[:1] == ["idle"]
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, *words: str) -> None:
        """Start a daemon. It writes its log into the folder."""
        with (self.folder / f"{words[0]}.out").open("w") as output:
            self.daemons.append(
                subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )

    def _wait_until(self, condition, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            ended = [each.args[0] for each in self.daemons if each.poll() is not None]
            if ended or time.monotonic() > end:
                logs = [file.read_text()[-2000:] for file in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("\n".join([f"SLURM does not start (ended: {ended})", *logs]))
            time.sleep(0.1)

    def call(self, *words: str, check: bool = True) -> str:
        """Run a command of SLURM and return what it prints."""
        answer = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        if check and answer.returncode:
            raise RuntimeError(f"{' '.join(words)} failed: {answer.stderr}")
        return answer.stdout

    def __exit__(self, *_: object) -> None:
        if len(self.daemons) == 3:
            self.call("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}", check=False)
            self.call("scancel", f"--user={getpass.getuser()}", check=False)
            end = time.monotonic() + 30
            while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
