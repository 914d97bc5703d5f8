"""Several nodes: two hosts, each a network namespace of this machine with a host name of its own, follow docs/multi_node.md."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny


IP = shutil.which("ip", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin") or "ip"
AS_HOST = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
"""Of a shell in a namespace of its own for mounts and names: become the host, and run the command."""


@dataclass(frozen=True)
class Host:
    """A machine as far as its network, name and processes go; the file system is this machine's.

    Args:
        namespace: of the network.
        name: host name.
        hosts: file that stands for /etc/hosts there.
    """

    namespace: str
    name: str
    hosts: Path

    def start(self, line: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
        """Run a command from a folder."""
        become = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", AS_HOST]
        return subprocess.Popen(
            [*become, str(self.hosts), self.name, *line], cwd=folder, text=True, start_new_session=True,
            env=tiny.environment() | {"GLOO_SOCKET_IFNAME": "eth0"} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def kill(self) -> None:
        """Every process at once, as in a power cut; its machine still answers."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        for pid in map(int, listed.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def unplug(self) -> None:
        """Take the cable out: from here on nothing arrives, and nothing says so."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
