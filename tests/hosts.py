"""Two hosts on this machine: network namespaces, each with its own address, name and /etc/hosts, and a link between."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from script_helpers import MARK, environment, without_mpi4py

NAMES = ("nodea", "nodeb")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _ip(*words, check=True):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class TwoHosts:
    """A context manager; leaving it ends whatever still runs on the hosts, and removes them.

    As on a fresh Debian, each host's own name stands for 127.0.1.1 on it, and for its address on the other.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        mark = uuid.uuid4().hex[:8]
        self.namespaces = {name: f"{name}-{mark}" for name in NAMES}

    def __enter__(self):
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("two hosts on one machine need Linux and root")
        missing = [program for program in ("ip", "unshare") if not shutil.which(program)]
        if missing:
            pytest.skip(f"two hosts on one machine need the program {missing[0]} (iproute2, util-linux)")
        try:
            self._build()
        except OSError as error:
            self.__exit__()
            pytest.skip(f"network namespaces are not permitted here: {error}")
        return self

    def _build(self):
        a, b = self.namespaces.values()
        for namespace in (a, b):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("link", "add", "wire0", "netns", a, "type", "veth", "peer", "name", "wire0", "netns", b)
        for here, (name, namespace) in enumerate(self.namespaces.items()):
            _ip("-n", namespace, "address", "add", f"{ADDRESSES[here]}/24", "dev", "wire0")
            _ip("-n", namespace, "link", "set", "wire0", "up")
            etc = Path("/etc/netns") / namespace  # ip netns exec lays its files over those in /etc
            etc.mkdir(parents=True)
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", f"{ADDRESSES[1 - here]} {NAMES[1 - here]}"]
            (etc / "hosts").write_text("\n".join(lines) + "\n")
            (self.folder / f"on_{name}").write_text(
                f"#!/bin/sh\nexec ip netns exec {namespace} unshare --uts "
                f'sh -c \'hostname {name}; exec "$@"\' sh "$@"\n'
            )
            (self.folder / f"on_{name}").chmod(0o755)
        # Called as ssh is: options, a host, the words of a command that a shell there puts together.
        ssh = self.folder / "ssh"
        ssh.write_text(
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\n'
            f'exec {shlex.quote(str(self.folder))}/on_$host sh -c "$*"\n'
        )
        ssh.chmod(0o755)

    def __exit__(self, *exc):
        for namespace in self.namespaces.values():
            self.kill(namespace)
            _ip("netns", "delete", namespace, check=False)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()  # if it is empty

    def pids(self, namespace):
        return [int(pid) for pid in _ip("netns", "pids", namespace, check=False).split()]

    def kill(self, namespace):
        for pid in self.pids(namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self):
        """Take the link down."""
        _ip("-n", self.namespaces["nodeb"], "link", "set", "wire0", "down")

    def start(self, host, argv, *, cwd, env=None):
        """The started process of a command on a host, as script_helpers.start has it."""
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            [str(self.folder / f"on_{host}"), *map(str, argv)], cwd=cwd, env={**(env or environment()), MARK: mark},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        process.mark = mark
        return process

    def mpiexec(self, script, *args, cwd):
        """[mpiexec's process]: one rank on each host."""
        env = environment()
        mpiexec = shutil.which("mpiexec", path=env["PATH"])
        hosts = ["-launcher", "ssh", "-launcher-exec", self.folder / "ssh", "-hosts", ",".join(NAMES), "-n", "2"]
        return [self.start("nodea", [mpiexec, *hosts, sys.executable, script, *args], cwd=cwd, env=env)]

    def torchrun(self, script, *args, cwd, backend="static"):
        """The processes of torchrun on each host: one rank each."""
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        env = without_mpi4py(environment())
        processes = []
        for number, name in enumerate(NAMES):
            meet = {
                "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "nodea:29400", "--rdzv-id", "test"],
                "static": ["--node-rank", number, "--master-addr", "nodea", "--master-port", "29400"],
            }[backend]
            processes.append(self.start(name, [*run, *meet, script, *args], cwd=cwd, env=env))
        return processes
