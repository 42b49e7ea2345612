"""A Ray cluster of several nodes on this machine, whose nodes can be lost."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import ray

TIMEOUT = 180  # seconds until a node is there
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # Ray writes a token to the home folder otherwise
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # for drivers whose cluster is lost, 60 otherwise
}
"""For nodes and drivers."""
RENAMED = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']  # a machine with another name


class RayCluster:
    """Nodes of this machine until the end of the context. `environment`: of their processes."""

    def __init__(self, environment=None):
        self.environment = {**os.environ, **(environment or {}), **ENVIRONMENT}
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets have to be short
        self.nodes = {}
        self.host = ray.util.get_node_ip_address()
        with socket.create_server((self.host, 0)) as server:
            self.address = f"{self.host}:{server.getsockname()[1]}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for name in self.nodes:
            self.signal_node(name, signal.SIGKILL)
        for node in self.nodes.values():
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self, name, cpus=1, gpus=0):
        """Start a node, the first one being the head, and wait until it is there. GPUs need not exist."""
        place = [f"--address={self.address}"]
        if not self.nodes:
            place = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
            place += [f"--temp-dir={self.folder}", "--disable-usage-stats"]
        resources = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={10**8}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.host}"]
        renamed = [*RENAMED, name] if can_rename() else []
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            self.nodes[name] = subprocess.Popen(
                [*renamed, *command, *place, *resources],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )
        end = time.monotonic() + TIMEOUT
        while "Ray runtime started" not in (text := log.read_text()):
            assert self.nodes[name].poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.1)

    def signal_node(self, name, number):
        """Send a signal to all processes of a node at once."""
        send(number, [self.nodes[name].pid, *descendants(self.nodes[name].pid)])


def can_rename():
    """Return whether a process can have a name of the machine of its own."""
    return not subprocess.run([*RENAMED, "other", "true"], capture_output=True).returncode


def descendants(pid):
    """Return the ids of all processes that a process and its children have started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def actors_of(pid):
    """Return the ids of the processes of actors of imvar among the descendants of a process."""
    found = []
    for child in descendants(pid):
        with suppress(OSError):
            if (Path("/proc") / str(child) / "cmdline").read_bytes().startswith(b"ray::WorkingActor"):
                found.append(child)
    return found


def send(number, processes):
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
