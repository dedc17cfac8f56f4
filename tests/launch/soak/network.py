"""Nodes that are network namespaces of this machine: an address, a host name and process numbers of their own.

They hang on one bridge, whose own address is the supervisor's. Needs root and the commands ip, tc and unshare.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.launch.soak.remote_shell import PORT

SHELL = Path(__file__).with_name("remote_shell.py")
NETWORK = "10.213.77"
BRIDGE = "fbisoak"


def why_not() -> str:
    """Why there can be no such nodes here; empty if there can."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "unshare") if not shutil.which(name)]
    return f"{', '.join(missing)} not found" if missing else ""


def command(*words: str, check: bool = True) -> None:
    subprocess.run(words, check=check, capture_output=not check)


class NetworkNode:
    """One node; `start` brings it up."""

    def __init__(self, number: int) -> None:
        self.name, self.address = f"{BRIDGE}{number}", f"{NETWORK}.{number}"
        self._cable = f"{BRIDGE}v{number}"
        self._process: subprocess.Popen[bytes] | None = None
        command("ip", "netns", "add", self.name)
        command("ip", "link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        command("ip", "link", "set", self._cable, "master", BRIDGE, "up")
        self._inside("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._inside("ip", "link", "set", device, "up")

    def _inside(self, *words: str) -> None:
        command("ip", "netns", "exec", self.name, *words)

    def start(self) -> None:
        """Its processes live in a namespace of their own, with the first of which they all die."""
        serve = f"hostname {self.name}; exec {sys.executable} {SHELL} serve {self.address}"
        own = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(["ip", "netns", "exec", self.name, *own, "sh", "-c", serve])
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((self.address, PORT), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, f"{self.name} does not come up"
                time.sleep(0.1)

    def lose(self) -> None:
        """As if the power went: everything on it is gone at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def cut_off(self) -> None:
        command("ip", "link", "set", self._cable, "down")

    def come_back(self) -> None:
        command("ip", "link", "set", self._cable, "up")

    def slow_down(self, rate: str) -> None:
        """What others send to it passes at this rate."""
        command(*f"tc qdisc add dev {self._cable} root tbf rate {rate} burst 16kb latency 2s".split())

    def speed_up(self) -> None:
        command("tc", "qdisc", "del", "dev", self._cable, "root", check=False)

    def has(self, pid: int) -> bool:
        """Whether the process is one of its own."""
        link = f"/proc/{pid}/ns/net"
        try:
            return os.stat(link).st_ino == os.stat(f"/run/netns/{self.name}").st_ino
        except OSError:
            return False

    def remove(self) -> None:
        if self._process and self._process.poll() is None:
            self.lose()
        command("ip", "link", "del", self._cable, check=False)
        command("ip", "netns", "del", self.name, check=False)


class Network:
    """So many nodes, up and joined; as a context, removed at its end."""

    def __init__(self, n_nodes: int) -> None:
        self._clear(n_nodes)
        command("ip", "link", "add", BRIDGE, "type", "bridge")
        command("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        command("ip", "link", "set", BRIDGE, "up")
        self.nodes = [NetworkNode(number) for number in range(1, n_nodes + 1)]

    def _clear(self, n_nodes: int) -> None:
        """What a harness that was killed left behind."""
        for number in range(1, n_nodes + 1):
            command("ip", "link", "del", f"{BRIDGE}v{number}", check=False)
            command("ip", "netns", "del", f"{BRIDGE}{number}", check=False)
        command("ip", "link", "del", BRIDGE, check=False)

    def __enter__(self) -> Network:
        for node in self.nodes:
            node.start()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.remove()
        command("ip", "link", "del", BRIDGE, check=False)
