"""Starts the processes of a job, and ends all of them whatever happens."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cluster"
FAULTY = Path(__file__).with_name("faulty_train.py")


def load_example() -> ModuleType:
    """``examples/cluster/train.py`` as a module."""
    spec = importlib.util.spec_from_file_location("cluster_train", EXAMPLE / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    """One thread, loopback only, nothing left of another launcher or seed."""
    left = ("SLURM_", "TORCHELASTIC_", "PL_", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left)}
    fixed = {
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_ADDR": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**kept, **fixed, **{k: str(v) for k, v in more.items()}}


def run(commands: list[tuple[list[str], dict[str, str]]], timeout: float = 120) -> str:
    """Run commands side by side until all are done; returns what they printed.

    Raises:
        AssertionError: if one fails or is not done in time; with what all of them printed.
    """
    with ExitStack() as stack:
        # Files, since a pipe stays open as long as any process that holds it.
        files = [stack.enter_context(TemporaryFile("w+")) for _ in commands]
        jobs = [
            subprocess.Popen(
                [str(part) for part in command],
                env=env,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for (command, env), file in zip(commands, files, strict=True)
        ]
        end = time.monotonic() + timeout
        try:
            while any(job.poll() is None for job in jobs) and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            codes = [job.poll() for job in jobs]
            for job in jobs:
                end_tree(job)
        for file in files:
            file.seek(0)
        printed = "\n-----\n".join(file.read() for file in files)
    assert codes == [0] * len(jobs), f"exit codes {codes} (None: not done in time):\n{printed}"
    return printed


def end_tree(job: subprocess.Popen) -> None:
    """Kill a process and all that it started, workers in sessions of their own included."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    children: dict[int, list[int]] = {}
    for line in listed.stdout.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    doomed = [job.pid]
    for pid in doomed:
        doomed += children.get(pid, [])
    if job.poll() is not None:
        # Its number may belong to another process by now.
        doomed.remove(job.pid)
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.wait()
