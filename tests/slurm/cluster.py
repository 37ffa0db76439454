"""A real Slurm on this machine: munged, slurmctld and a few nodes, each with a host name and processes of its own.

Every node is a slurmd inside its own UTS, PID and mount namespaces: a process of one node cannot see or signal those of
another, node names resolve inside the nodes alone, and killing a node's init is a power cut. GPUs are device nodes that
Slurm hands out and nobody opens. Everything lies under one folder and listens on free ports: clusters do not meet.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import attrs

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge"
PATIENCE = 60.0
GPUS = 8
CPUS = 16

DIES_WITH_THIS = ("setpriv", "--pdeathsig", "KILL")
"""A test session that is killed leaves no daemons behind."""
NODE = """
hostname "$1" && mount --bind "$3" /etc/hosts && mount -t tmpfs -o size=1g tmpfs /dev/shm || exit 1
slurmd -D -N "$1" -f "$2" &
daemon=$!
trap 'kill -TERM $daemon; wait $daemon; exit 0' TERM
while :; do sleep 86400 & wait $!; done
"""
"""A node's init: reaps orphans, stays when its slurmd is gone."""


def unavailable() -> str:
    """Why no Slurm can be brought up here, or nothing."""
    path = _path()
    if missing := [name for name in BINARIES if shutil.which(name, path=path) is None]:
        return f"no {', '.join(missing)}; on Debian: apt-get install --no-install-recommends {PACKAGES}"
    if os.geteuid() != 0:
        return "nodes need namespaces of their own, and only root may make them"
    if not Path("/sys/fs/cgroup").is_mount():
        return "slurmd wants /sys/fs/cgroup to be mounted"
    probe = subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return f"no namespaces here: {probe.stderr.decode().strip()}" if probe.returncode else ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@attrs.define(kw_only=True)
class Cluster:
    """A Slurm that is up, as a user at its login node has it."""

    folder: Path
    addresses: dict[str, str]
    """Node -> where it listens; all of them are this machine."""
    more: dict[str, str] = attrs.field(factory=dict)
    """Environment of its user."""
    _nodes: dict[str, subprocess.Popen[bytes]] = attrs.field(factory=dict)

    @property
    def nodes(self) -> list[str]:
        return list(self.addresses)

    @property
    def env(self) -> dict[str, str]:
        """What makes Slurm's commands mean this cluster."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        return {**inherited, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf"), **self.more}

    def command(self, *words: str) -> str:
        """A command of Slurm's; its standard output."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self, name: str = "") -> dict[str, str]:
        """Job -> its state, of all that are not over."""
        lines = self.command("squeue", "--noheader", "--format=%i %T", *(["--name", name] if name else [])).splitlines()
        return dict(line.split() for line in lines)

    def states(self) -> dict[str, str]:
        """Node -> idle, mixed, allocated, down*, ..."""
        return dict(line.split() for line in self.command("sinfo", "-hN", "-o", "%N %T").splitlines())

    def power_off(self, node: str) -> None:
        """Every process of the node ends at once, and Slurm is told that it is down."""
        self._kill(node)
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def power_on(self, node: str) -> None:
        """Bring it back, idle."""
        self._start(node)
        self.command("scontrol", "update", f"nodename={node}", "state=resume")
        until(lambda: self.states()[node] == "idle", f"{node} did not come back")

    def _start(self, node: str) -> None:
        namespaces = ("--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
        init = ("bash", "-c", NODE, f"init-{node}", node, str(self.folder / "slurm.conf"), str(self.folder / "hosts"))
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        with (self.folder / "log" / f"{node}.out").open("ab") as log:
            self._nodes[node] = subprocess.Popen(
                (*DIES_WITH_THIS, "unshare", *namespaces, *init),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kill(self, node: str) -> None:
        # --kill-child ends the namespace's init with unshare, and the kernel everything in it with init.
        self._nodes[node].kill()
        self._nodes.pop(node).wait()

    def end_nodes(self) -> None:
        for node in list(self._nodes):
            self._kill(node)


def until(condition: Callable[[], object], sentence: str, patience: float = PATIENCE) -> None:
    """Wait for another process to bring `condition` about."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, sentence
        time.sleep(0.1)


@contextmanager
def cluster(folder: Path, nodes: int = 5) -> Iterator[Cluster]:
    """Bring a cluster up in `folder`, with every node idle; nothing of it is left afterwards."""
    for name in ("state", "log", "spool", "munge", "dev"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    up = Cluster(folder=folder, addresses={f"node{i}": f"127.0.1.{10 + i}" for i in range(1, nodes + 1)})
    _configure(up)
    with ExitStack() as daemons:
        _daemon(up, daemons, "munged", *_munge(folder))
        until((folder / "munge" / "socket").exists, "munged did not listen")
        _daemon(up, daemons, "slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf"))
        daemons.callback(up.end_nodes)
        for node in up.nodes:
            up._start(node)
        until(lambda: _idle(up), f"nodes did not come up; see {folder / 'log'}")
        yield up


def _idle(up: Cluster) -> bool:
    try:
        return set(up.states().values()) == {"idle"}
    except AssertionError:  # slurmctld does not answer yet
        return False


def _munge(folder: Path) -> Sequence[str]:
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key-file": key, "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return ("--foreground", "--force", *(f"--{name}={folder / 'munge' / file}" for name, file in files.items()))


def _daemon(up: Cluster, daemons: ExitStack, *command: str) -> None:
    with (up.folder / "log" / f"{command[0]}.out").open("wb") as log:
        process = subprocess.Popen(
            (*DIES_WITH_THIS, *command),
            env=up.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    daemons.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()


def _configure(up: Cluster) -> None:
    folder = up.folder
    ports = _free_ports(1 + len(up.nodes))
    for index in range(GPUS):
        os.mknod(folder / "dev" / f"gpu{index}", 0o020666, os.makedev(1, 3))
    inside = "".join(f"{address} {node}\n" for node, address in up.addresses.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{inside}")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    names = ",".join(up.nodes)
    (folder / "gres.conf").write_text(
        f"NodeName={names} Name=gpu Type=h200 File={folder}/dev/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n"
    )
    machines = "".join(
        f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port}\n"
        for (node, address), port in zip(up.addresses.items(), ports[1:], strict=True)
    )
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, port=ports[0], host=socket.gethostname(), gpus=GPUS, cpus=CPUS)
        + f"{machines}PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE DefaultTime=60 State=UP\n"
    )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]


CONFIGURATION = """
ClusterName=prltest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job is held until now + cred_expire + 1 s, by default two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ReturnToService=1
SlurmdTimeout=10
KillWait=5
MinJobAge=300
TCPTimeout=2
MessageTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
NodeName=DEFAULT CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:h200:{gpus}
"""
