"""Hosts to ssh to, on one machine: namespaces for network, processes, mounts and name, an sshd in
each, one cable between each two neighbours. The kernel removes all of it, whatever runs in there,
once its first process is gone, and that one goes with this process."""

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PORT = 2222
SSHD = """
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PermitUserRC no
PidFile none
"""
# The first process of a host. Nothing that it mounts is seen outside.
START = """
set -e
mount -t tmpfs none /run
mkdir /run/sshd
hostname "$1"
mount --bind "$2/hosts.$1" /etc/hosts
# What a person's shell does at its start is no part of this.
[ ! -f "$4/.bashrc" ] || mount --bind /dev/null "$4/.bashrc"
ip link set lo up
exec "$3" -D -e -f "$2/sshd_config" 2>"$2/sshd.$1.log"
"""
PR_SET_PDEATHSIG = 1


def why_not() -> str | None:
    """What is missing for hosts on this machine."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for tool in ("ip", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (see .ci/run)"
    if sshd() is None:
        return "sshd is not installed (see .ci/run)"
    words = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc"]
    tried = subprocess.run([*words, "ip", "link", "add", "type", "veth"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


def sshd() -> str | None:
    # Not on every user's path, and it starts by its full name only.
    return shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


class Hosts:
    """`node1` and `node2`, at 10.77.0.1 and .2; `nobody` has an address and no machine."""

    names = ("node1", "node2")

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("key", "host_key"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(words, check=True)
        for own in self.names:
            # As Debian does it: a machine's own name leads to itself alone.
            addresses = {name: f"10.77.0.{i}" for i, name in enumerate(self.names, 1)}
            addresses |= {"localhost": "127.0.0.1", own: "127.0.1.1", "nobody": "10.77.0.99"}
            lines = [f"{address} {name}\n" for name, address in addresses.items()]
            (folder / f"hosts.{own}").write_text("".join(lines))
        (folder / "sshd_config").write_text(SSHD.format(port=PORT, folder=folder))
        self.started: list[subprocess.Popen] = []
        try:
            self.firsts = [self.start(name) for name in self.names]
            self.cable()
            self.wait_for_sshd()
        except BaseException:
            self.end()
            raise

    def start(self, name: str) -> int:
        """The pid, from outside, of the first process of a new host."""
        words = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc"]
        words += ["--kill-child", "bash", "-c", START, name, name, str(self.folder)]
        words += [sshd(), pwd.getpwuid(0).pw_dir]
        started = subprocess.Popen(
            words, preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        )
        self.started.append(started)
        while not (children := psutil.Process(started.pid).children()):
            assert started.poll() is None, "unshare ended"
            time.sleep(0.01)
        return children[0].pid

    def cable(self) -> None:
        one, two = self.firsts
        self.inside(one, f"ip link add eth0 type veth peer name eth0 netns {two}", pid=False)
        for i, first in enumerate(self.firsts, 1):
            self.inside(first, f"ip addr add 10.77.0.{i}/24 dev eth0")
            self.inside(first, "ip link set eth0 up")

    def wait_for_sshd(self) -> None:
        until = time.monotonic() + 30
        for name in self.names:
            while subprocess.run(self.ssh(name, "true"), capture_output=True).returncode:
                assert time.monotonic() < until, (self.folder / f"sshd.{name}.log").read_text()
                time.sleep(0.2)

    def on(self, host: int, *command: str, pid: bool = True) -> list[str]:
        """The command, on host 0 or 1."""
        spaces = ["--net", "--mount", "--uts", *(["--pid"] if pid else [])]
        return ["nsenter", "--target", str(self.firsts[host]), *spaces, "--", *command]

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """The cable out of the second host, and in again at the end."""
        self.inside(self.firsts[1], "ip link set eth0 down")
        try:
            yield
        finally:
            self.inside(self.firsts[1], "ip link set eth0 up")
            # For some seconds the kernel may still hold the other host for gone.
            self.wait_for_sshd()

    def inside(self, first: int, command: str, pid: bool = True) -> None:
        words = self.on(self.firsts.index(first), *command.split(), pid=pid)
        subprocess.run(words, check=True)

    @property
    def ssh_args(self) -> str:
        return (
            f"-F none -i {self.folder}/key -o StrictHostKeyChecking=accept-new "
            f"-o UserKnownHostsFile={self.folder}/known_hosts -o GlobalKnownHostsFile=none"
        )

    def ssh(self, name: str, command: str) -> list[str]:
        words = ["ssh", "-p", str(PORT), *self.ssh_args.split(), "-o", "BatchMode=yes"]
        return self.on(0, *words, name, command)

    def at_work(self, word: str) -> list[psutil.Process]:
        """Processes on the hosts with this word in their command line."""
        here = {spaces(first) for first in self.firsts}
        found = [p for p in psutil.process_iter(["cmdline"]) if spaces(p.pid) in here and alive(p)]
        return [p for p in found if any(word in part for part in p.info["cmdline"] or [])]

    def end(self) -> None:
        for started in self.started:
            started.kill()
            started.wait()


def spaces(pid: int) -> str | None:
    """Which list of processes it is in; None where it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
