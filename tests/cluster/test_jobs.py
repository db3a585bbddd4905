"""The cluster example as torchrun and SLURM start it, with a fault in the middle of an epoch.

All runs are on two processes, two epochs of 19 steps, with checkpoints every 5 steps and between
epochs. What stays at the end are those after steps 19, 30, 35 and 38.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_reg.testing.snapshot import equal
from tests.cluster.launch import EXAMPLE, FAULTY, environment, free_port, run

SETTINGS = ["--epochs", "2", "--save_every", "5", "--timeout", "20"]
AFTER = ("step=30.ckpt", "step=35.ckpt", "step=38.ckpt")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and shell scripts")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True, map_location="cpu")


def assert_same_training(one: Path, other: Path, names: tuple[str, ...] = AFTER) -> None:
    """Weights, optimizer, sample memory and random states of every later checkpoint."""
    for name in names:
        first, second = load(one / name), load(other / name)
        for what in ("state_dict", "optimizer_states", "lightning_reg.exact_resume"):
            assert equal(first[what], second[what]), f"{what} of {name}"
        memory = first["callbacks"]["EarlyLearning"]
        assert equal(memory, second["callbacks"]["EarlyLearning"]), f"memory of {name}"
        assert memory["memory"]["seen"].sum() > 600


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Two nodes of one process each: two torchrun agents that meet over the network."""
    folder = tmp_path_factory.mktemp("two_nodes")
    env = environment(NODES=2, DEVICES=1, PORT=free_port(), RESTARTS=0)
    command = ["bash", EXAMPLE / "torchrun.sh", "--accelerator", "cpu", "--folder", folder]
    printed = run([([*command, *SETTINGS], env)] * 2)
    assert "Starting with 2 processes" in printed
    return folder


def test_two_nodes_train_one_model(unbroken):
    assert sorted(p.name for p in unbroken.glob("*.ckpt")) == ["step=19.ckpt", *AFTER]
    state = load(unbroken / "step=38.ckpt")
    # Each sample was seen by one of the two, and both know of all.
    assert state["callbacks"]["EarlyLearning"]["memory"]["seen"].all()
    assert len(state["lightning_reg.exact_resume"]) == 2


def test_a_killed_rank_changes_nothing(unbroken, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--local-addr", "127.0.0.1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--monitor-interval", "0.1", FAULTY]
    command += ["--fault", "SIGKILL", "--devices", "2", "--num_nodes", "1", "--folder", tmp_path]
    # As torchrun.sh sets it.
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    printed = run([([*command, *SETTINGS], env)])
    assert "Restoring states from the checkpoint path at" in printed
    assert f"{tmp_path}/step=25.ckpt" in printed
    assert_same_training(unbroken, tmp_path)


def test_a_preempted_slurm_job_saves_and_goes_on(unbroken, tmp_path):
    env = slurm(tmp_path)
    folder = tmp_path / "runs" / "digits"
    script = ["bash", EXAMPLE / "slurm.sbatch", *SETTINGS]
    run([(script, env)])
    # Rank 1 alone got the signal, in the middle of step 27; both stopped after step 30.
    assert load(folder / "preempted.ckpt")["global_step"] == 30
    assert not (folder / "step=35.ckpt").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    printed = run([(script, {**env, "SLURM_RESTART_COUNT": "1"})])
    assert f"{folder}/preempted.ckpt" in printed
    assert_same_training(unbroken, folder, AFTER[1:])


def slurm(folder: Path) -> dict[str, str]:
    """The environment of a job of two tasks on this machine, with `srun` and `scontrol` of ours."""
    programs = folder / "bin"
    programs.mkdir()
    # Puts the faulty program in the place of the example; the rest of the line is the script's.
    (programs / "srun").write_text(
        f"""#!/usr/bin/env bash
[ "$2 $3" = "python examples/cluster/train.py" ] || exit 9
shift 3
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task {sys.executable} {FAULTY} --fault SIGUSR1 "$@" &
    tasks+=($!)
done
for task in "${{tasks[@]}}"; do wait "$task" || exit $?; done
"""
    )
    (programs / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" >> {folder}/requeued\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return environment(
        PATH=f"{programs}:{os.environ['PATH']}",
        MASTER_PORT=free_port(),
        SLURM_JOB_ID=77,
        SLURM_JOB_NAME="digits",
        SLURM_JOB_NUM_NODES=1,
        SLURM_NODEID=0,
        SLURM_NODELIST="127.0.0.1",
        SLURM_NTASKS=2,
        SLURM_NTASKS_PER_NODE=2,
        SLURM_RESTART_COUNT=0,
        SLURM_SUBMIT_DIR=folder,
    )


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_sound_and_run_the_one_program(script):
    text = (EXAMPLE / script).read_text()
    assert "/train.py" in text
    subprocess.run(["bash", "-n", EXAMPLE / script], check=True)


def test_the_manifest_runs_the_one_program_with_matching_numbers():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((EXAMPLE / "pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    container = worker["template"]["spec"]["containers"][0]
    command = container["command"]
    assert (job["kind"], container["name"], command[0]) == ("PyTorchJob", "pytorch", "torchrun")
    assert (EXAMPLE.parents[1] / command[3]).samefile(EXAMPLE / "train.py")
    processes = container["resources"]["limits"]["nvidia.com/gpu"]
    assert {f"--devices={processes}", f"--nproc-per-node={processes}"} <= set(command)
    assert f"--num_nodes={worker['replicas']}" in command
    policy = job["spec"]["elasticPolicy"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert any(command[-1].removeprefix("--folder=").startswith(path) for path in mounts)
