"""Run a server process on loopback: start, wait, always end it. When it fails, the error has the tail of its output."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HOST = "127.0.0.1"
NUM_TAIL_LINES = 40


class ServerError(RuntimeError):
    """The server ended, did not become healthy in time, or refused a request; the tail of its output is included."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: where it listens, without a slash at the end.
        process: the process started.
    """

    url: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def get(self, path: str, timeout_s: float = 60.0) -> str:
        """Body of a GET request. Raises ServerError."""
        return self._request(urllib.request.Request(self.url + path), timeout_s)

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 300.0) -> Any:
        """JSON answer to a JSON request. Raises ServerError."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        return json.loads(self._request(request, timeout_s))

    def tail(self) -> str:
        """The last lines it printed."""
        lines = Path(self.output.name).read_bytes().decode("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-NUM_TAIL_LINES:])

    def _request(self, request: urllib.request.Request, timeout_s: float) -> str:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.read().decode("utf-8")
        except urllib.error.HTTPError as error:
            refusal = error.read().decode("utf-8", errors="replace")
            raise ServerError(f"{request.full_url} answered {error.code}: {refusal}\n{self.tail()}") from None
        except OSError as error:
            raise ServerError(f"{request.full_url} did not answer ({error})\n{self.tail()}") from None


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(
    command: Sequence[str | Path],
    port: int,
    health_path: str = "/health",
    env: Mapping[str, str] | None = None,
    timeout_s: float = 180.0,
) -> Iterator[Server]:
    """Run `command`, which serves on 127.0.0.1:`port`, until the block ends.

    Args:
        command: program and arguments, with host and port among them.
        port: see `free_port`.
        health_path: answers 200 once the server is ready.
        env: variables set beside the present ones.
        timeout_s: how long it may take to become healthy, in seconds.

    Raises:
        ServerError: it ended before, or was not healthy in time.
    """
    with tempfile.NamedTemporaryFile(prefix="server-", suffix=".log") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | dict(env or {}),
            start_new_session=True,  # so that its children end with it
        )
        server = Server(f"http://{HOST}:{port}", process, output)
        try:
            _wait_until_healthy(server, health_path, timeout_s)
            yield server
        finally:
            _end(process)


def _wait_until_healthy(server: Server, health_path: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise ServerError(f"the server ended with code {server.process.returncode}\n{server.tail()}")
        try:
            with urllib.request.urlopen(server.url + health_path, timeout=5.0):
                return
        except OSError:  # refused, or 503 while it loads
            time.sleep(0.1)
    raise ServerError(f"the server was not healthy after {timeout_s:g} s\n{server.tail()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process and its children to end; kill them after five seconds."""
    for sent, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
