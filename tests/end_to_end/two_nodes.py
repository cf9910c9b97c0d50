"""Two machines on one: network namespaces with their own names and addresses, joined by a cable (a veth pair).

Each has an agent in it that runs commands, as sshd would: what it starts is no child of who asked for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from processes import ROOT, Started, environment

AGENT = """
import json, socket, subprocess, sys, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
socket.sethostname(sys.argv[2])
print("ready", flush=True)
def serve(link):
    request = json.loads(link.makefile().readline())
    with open(request["output"], "a") as output:
        code = subprocess.run(request["command"], cwd="/", env=request["environment"], shell=True, stdout=output,
                              stderr=output).returncode
    link.sendall(str(code).encode())
    link.close()
while True:
    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
"""

# Stands in for pdsh and for sshd on the other side: a clean environment and a shell for each host.
PDSH = """
import json, os, socket, sys, threading
hosts = sys.argv[sys.argv.index("-w") + 1].split(",")
command = " ".join(sys.argv[sys.argv.index("-w") + 2:])
codes = []
def run(number, host):
    link = socket.socket(socket.AF_UNIX)
    link.connect(f"{os.environ['AGENTS']}/{host}")
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    request = {"command": command.replace("%n", str(number)), "environment": clean,
               "output": f"{os.environ['AGENTS']}/{host}.log"}
    link.sendall(json.dumps(request).encode() + b"\\n")
    codes.append(int(link.makefile().read()))
threads = [threading.Thread(target=run, args=pair) for pair in enumerate(hosts)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.exit(max(codes))
"""


class TwoNodes:
    """Use as a context: everything in the namespaces ends with it."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        self.agents: list[subprocess.Popen[str]] = []

    def __enter__(self) -> TwoNodes:
        for node, address in enumerate(self.addresses):
            own_user = ["unshare", "-Ur"] if node == 0 else [*self._inside(0, users_only=True), "unshare"]
            agent = [sys.executable, "-c", AGENT, str(self.folder / address), f"node{node}"]
            self.agents.append(
                subprocess.Popen([*own_user, "-n", "-u", "--", *agent], stdout=subprocess.PIPE, text=True)
            )
            if self.agents[-1].stdout.readline() != "ready\n":
                pytest.skip("this process may not make namespaces")
        try:
            self._ip(0, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
        except subprocess.CalledProcessError:
            pytest.skip("this process may not make network interfaces")
        self._ip(0, "link", "set", "cable1", "netns", str(self.agents[1].pid))
        for node, address in enumerate(self.addresses):
            self._ip(node, "link", "set", "lo", "up")
            self._ip(node, "addr", "add", f"{address}/24", "dev", f"cable{node}")
            self._ip(node, "link", "set", f"cable{node}", "up")
        return self

    def __exit__(self, *_: Any) -> None:
        for agent in reversed(self.agents):
            agent.kill()
            agent.wait()

    def cut_the_cable(self) -> None:
        self._ip(0, "link", "set", "cable0", "down")

    def start(self, node: int, run: Path, *arguments: Any) -> Started:
        """`megastruct.start ARGUMENTS` on a node, without ssh."""
        here = ("--hostfile", self.hostfile, "--node-rank", node, "--master-addr", self.addresses[0])
        return Started(run, *arguments, *here, below=self._inside(node))

    def run_python(self, node: int, text: str, **extra: str) -> subprocess.Popen[str]:
        """A Python program on a node."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [*self._inside(node), sys.executable, "-c", text]
        return subprocess.Popen(command, cwd=ROOT, env={**environment(), **extra}, **pipes)

    def start_by_pdsh(self, run: Path, *arguments: Any) -> Started:
        """`megastruct.start ARGUMENTS` for both nodes, on the first."""
        programs = self.folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, text in (("pdsh", PDSH), ("ssh", f"print({self.addresses[0]!r})\n")):
            (programs / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
            (programs / name).chmod(0o755)
        extra = {"PATH": f"{programs}:{os.environ['PATH']}", "AGENTS": str(self.folder)}
        return Started(run, *arguments, "--hostfile", self.hostfile, below=self._inside(0), extra=extra)

    def output(self) -> str:
        """Of all that was started by pdsh."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("10.77.0.*.log")))

    def _inside(self, node: int, users_only: bool = False) -> list[str]:
        spaces = ["-U"] if users_only else ["-U", "-n", "-u"]
        return ["nsenter", "-t", str(self.agents[node].pid), *spaces, "--preserve-credentials", "--"]

    def _ip(self, node: int, *arguments: str) -> None:
        subprocess.run([*self._inside(node), "ip", *arguments], check=True)
