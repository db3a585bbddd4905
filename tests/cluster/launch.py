"""Starts the processes of a job, and ends all of them whatever happens."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
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


def run(commands: list[tuple[list[str], dict[str, str]]], timeout: float = 150) -> str:
    """Run commands side by side until all are done; returns what they printed.

    Raises:
        AssertionError: if one fails or is not done in time; with what all of them printed.
    """
    jobs = [
        subprocess.Popen(
            [str(part) for part in command],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, env in commands
    ]
    end = time.monotonic() + timeout
    printed, late = [], False
    try:
        for job in jobs:
            try:
                printed.append(job.communicate(timeout=max(0.1, end - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                late = True
                break
    finally:
        for job in jobs:
            # The session holds the workers, too.
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    if late:
        printed = [job.communicate()[0] for job in jobs]
    text = "\n-----\n".join(printed)
    codes = [job.returncode for job in jobs]
    assert not late, f"not done in {timeout} s:\n{text}"
    assert not any(codes), f"exit codes {codes}:\n{text}"
    return text
