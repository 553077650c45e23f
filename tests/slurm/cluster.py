"""A SLURM cluster on this machine: munged, slurmctld and two slurmd, each node with a name, an address, a network
namespace and mounts of its own. The daemons are the distribution's; only that they share a kernel is not real."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launching import ROOT

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "setpriv")
NODES = ("n1", "n2")

CONFIG = """
ClusterName=mixmim
SlurmctldHost={host}({network}.254)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge/socket
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=n1 NodeHostname=n1 NodeAddr={network}.1 Port=17001 CPUs=2 RealMemory=8000 Gres=gpu:1
NodeName=n2 NodeHostname=n2 NodeAddr={network}.2 Port=17002 CPUs=2 RealMemory=8000 Gres=gpu:1
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [program for program in NEEDED if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} missing: install slurm-wlm, munge and iproute2 (make test does it as root)"
    return "" if os.geteuid() == 0 else "only root can start SLURM's daemons and network namespaces"


def ip(*words: str) -> None:
    """ip(8)."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Cluster:
    """A cluster that is up. `run` calls SLURM's commands as on its login node."""

    folder: Path
    number: int  # of the network, 1 to 250: clusters of test runs side by side take different ones
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        """Starts everything and waits until both nodes are idle."""
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(host=os.uname().nodename, network=self.network, port=7000 + self.number, folder=self.folder)
        )
        (self.folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{self.address(name)} {name}\n" for name in NODES)
        )
        self._start_munged()
        self._build_network()
        self.daemons["ctl"] = self._daemon(["slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf")], "ctl")
        for name in NODES:
            self.start_node(name)
        self.wait(self.all_idle, "idle nodes")

    def _start_munged(self) -> None:
        home, key = self.folder / "munge", self.folder / "munge" / "key"
        home.mkdir()
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (home, key):
            shutil.chown(path, "munge")
        options = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        places = [f"--{option}={home / option.removesuffix('-file')}" for option in options]
        user = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        self.daemons["munged"] = self._daemon([*user, "munged", "--foreground", *places], "munged")
        self.wait((home / "socket").exists, "munged")

    @property
    def network(self) -> str:
        return f"10.213.{self.number}"

    def address(self, node: str) -> str:
        return f"{self.network}.{NODES.index(node) + 1}"

    def space(self, node: str) -> str:
        """The node's network namespace."""
        return f"mixmim{self.number}-{node}"

    def _build_network(self) -> None:
        """A bridge, on which this machine is the login and controller node, and a namespace for each node."""
        self._remove_network()
        bridge = f"mixmim{self.number}"
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{self.network}.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for node in NODES:
            space = self.space(node)
            ip("netns", "add", space)
            ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", space, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def _remove_network(self) -> None:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", self.space(node)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"mixmim{self.number}"], capture_output=True)

    def start_node(self, node: str, *mounts: str) -> None:
        """Starts a node, after commands that change what it sees of the file system."""
        slurmd = f"exec slurmd -D -N {node} -f {self.folder}/slurm.conf"
        setup = [f"hostname {node}", f"mount --bind {self.folder}/hosts /etc/hosts", *mounts, slurmd]
        # not `ip netns exec`, which hides /sys/fs/cgroup, where slurmd looks
        inside = ["nsenter", f"--net=/run/netns/{self.space(node)}", "unshare", "--mount", "--uts", "sh", "-ec"]
        self.daemons[node] = self._daemon([*inside, "\n".join(setup)], node)

    def kill_node(self, node: str) -> None:
        """The node is gone at once: its daemon and everything that it has started."""
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def processes(self, node: str) -> list[int]:
        """All that run on a node."""
        found = subprocess.run(["ip", "netns", "pids", self.space(node)], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def all_idle(self) -> bool:
        """Whether both nodes wait for work."""
        return self.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"]

    def _daemon(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("ab") as out:
            # a test run that is killed leaves no daemons behind
            command = ["setpriv", "--pdeathsig=KILL", *command]
            return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """What makes SLURM's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, code: int = 0) -> str:
        """A command on the login node, in the repository's root; what it printed."""
        names = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        done = subprocess.run(
            command, env=names | self.environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def wait(self, happened: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Looks again and again until it has happened."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self.run('scontrol', 'show', 'node')}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends every process of the cluster and takes the network away."""
        for name in set(NODES) & self.daemons.keys():
            self.kill_node(name)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self._remove_network()
