"""The real servers: how each is found, configured and started."""
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import relay

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
TARGET = HERE.parents[1] / "target"
# Pinned: a new release may see requests otherwise, and is then looked at.
PACKAGES = ["gunicorn==27.0.1", "waitress==3.0.2"]
STARTS_WITHIN = 20


class Unavailable(Exception):
    """A server that cannot be had here, and why."""


class Server:
    """A running server; `address` is where it listens."""

    def __init__(self, name, directory):
        self.name = name
        self.directory = Path(directory)
        self.process = None
        self.recorder = None
        self.address = None
        self.record = self.directory / "record"

    async def start(self):
        port = free_port()
        if self.name in ("nginx", "haproxy"):
            self.recorder = relay.Recorder()
            command = self.front(port, (await self.recorder.start())[1])
        else:
            command = COMMANDS[self.name](port, self.record)
        self.address = ("127.0.0.1", port)
        with open(self.directory / "log", "w") as log:
            environment = {**os.environ, "RECORD": str(self.record), "PYTHONPATH": str(PEERS)}
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + STARTS_WITHIN
        while not accepts(self.address):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{self.name} did not start: {(self.directory / 'log').read_text()}")
            time.sleep(0.05)

    def front(self, port, recorder):
        name = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}[self.name]
        text = (PEERS / name).read_text()
        user = "user root;" if os.getuid() == 0 else ""
        for key, value in {"directory": self.directory, "port": port, "recorder": recorder, "user": user}.items():
            text = text.replace("{%s}" % key, str(value))
        path = self.directory / name
        path.write_text(text)
        if self.name == "nginx":
            return [find("nginx"), "-p", str(self.directory), "-e", str(self.directory / "nginx.log"), "-c", str(path)]
        return [find("haproxy"), "-db", "-f", str(path)]

    def entries(self):
        return self.recorder.entries if self.recorder else relay.read_entries(self.record)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def node(port, record):
    return [find("node"), str(PEERS / "node.js"), str(port), str(record)]


def http_server(port, record):
    return [sys.executable, str(PEERS / "http_server.py"), str(port), str(record)]


def gunicorn(port, _record):
    return [
        str(python_servers() / "gunicorn"), "--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--threads", "16", "--keep-alive", "300",
        "--worker-connections", "4096", "wsgi:application",
    ]


def waitress(port, _record):
    return [
        str(python_servers() / "waitress-serve"), f"--listen=127.0.0.1:{port}", "--threads=16", "--connection-limit=4096", "--channel-timeout=300",
        "wsgi:application",
    ]


COMMANDS = {"node": node, "http.server": http_server, "gunicorn": gunicorn, "waitress": waitress}
NAMES = ["nginx", "haproxy", *COMMANDS]


def check(name):
    """Raises `Unavailable` where the server cannot be had."""
    if name in ("nginx", "haproxy", "node"):
        find(name)
    elif name in ("gunicorn", "waitress"):
        python_servers()


def find(name):
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not path:
        raise Unavailable(f"no {name} here (Debian: apt-get install nginx haproxy nodejs)")
    return path


def python_servers():
    """The folder of the executables of `PACKAGES`, installed once from PyPI into target/."""
    environment = TARGET / "differential" / "python"
    done = environment / "complete"
    if not done.exists() or done.read_text() != "\n".join(PACKAGES):
        for command in [
            [sys.executable, "-m", "venv", "--clear", str(environment)],
            [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
        ]:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if result.returncode:
                raise Unavailable(f"cannot be installed from PyPI: {(result.stdout + result.stderr).strip()[-300:]}")
        done.write_text("\n".join(PACKAGES))
    return environment / "bin"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(address):
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0
