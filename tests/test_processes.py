"""Several processes of torchrun learn what one process learns, and write one file."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ENVIRONMENT, ROOT, buffer_arrays, run_main, tensorboard_scalars

import actor_distill as distill
import finetune_student as finetune
import ppo_atari_teacher as teacher

BUFFER = ROOT / "pretrained/PongNoFrameskip-v4/buffer.npz"
DISTILL = ["--capacity=low", "--eval-steps=0", "--epochs=1", "--batch-size=64", "--loss=kl"]
# in steps small enough for the order of a sum to stay a matter of rounding
SGD = ["--optimizer=sgd", "--learning-rate=0.001", "--no-anneal-lr"]
PPO = ["--capacity=low", "--num-envs=4", "--num-steps=32", "--num-minibatches=1"]
PPO += ["--update-epochs=2", "--eval-steps=0"]


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(module, rank, processes, port, flags):
    """A process that runs a script as torchrun would start it."""

    def run():
        names = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "localhost"
        run_main(module, tyro.cli(module.Args, args=flags))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def trained(module, *flags):
    """What one and two processes save, and what they log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    kinds = [(0, 1), (0, 2), (1, 2)]
    runs = [start(module, *x, port, [f"--save-path={x[1]}.pt", *flags]) for x in kinds]
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    saved = [torch.load(f"{n}.pt", weights_only=True) for n in (1, 2)]
    assert len(list(Path("runs").iterdir())) == 2, "one log a training, not one a process"
    return saved, [tensorboard_scalars(f"runs/{x['run_name']}") for x in saved]


@pytest.fixture
def part():
    """The first 8,000 samples of the shipped buffer, in `part.npz`: observations of some of them."""
    with np.load(BUFFER) as file:
        arrays = {name: file[name][:8000] for name in ("action_probs", "values", "episode_index")}
        arrays |= {"stack_index": np.clip(file["stack_index"][:8000], 0, 8000)}
        np.savez("part.npz", **arrays, frames=file["frames"][:8001], meta=file["meta"])
        return torch.from_numpy(file["frames"][arrays["stack_index"][::50]])


def furthest(saved):
    """The largest difference between two trainings' weights."""
    one, two = (x["model"] for x in saved)
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_two_processes_distil_as_one(part):
    saved, logs = trained(distill, "--buffer-path=part.npz", *DISTILL, *SGD)
    assert furthest(saved) < 1e-3
    assert saved[0]["global_step"] == saved[1]["global_step"]
    for name, value in saved[0]["validation"].items():
        assert saved[1]["validation"][name] == pytest.approx(value, abs=1e-3)
    for name in ("losses/kl", "losses/value_loss"):
        (step, one), (same_step, two) = logs[0][name][0], logs[1][name][0]
        assert step == same_step and two == pytest.approx(one, rel=1e-3)


def test_two_processes_distil_by_adam_to_the_same_policy(part):
    """Which amplifies what rounding does to small gradients."""
    flags = ["--value-coef=0.5", "--learning-rate=1e-3", *DISTILL]
    saved, _ = trained(distill, "--buffer-path=part.npz", *flags)
    logits = []
    for x in saved:
        agent = distill.Agent("low", 6)
        agent.load_state_dict(x["model"])
        logits.append(agent(part)[0].detach())
    assert distill.kl_divergence(logits[0].softmax(-1), logits[1]).mean() < 1e-3


@pytest.mark.parametrize("iterations, limit", [(1, 1e-5), (2, 1e-3)])
def test_two_processes_play_the_games_of_one_and_update_alike(iterations, limit):
    """With advantages normalised over both, as those of one half alone have another mean."""
    flags = ["--env-id=Breakout-v5", f"--total-timesteps={iterations * 128}"]
    saved, logs = trained(teacher, *flags, *PPO)
    assert 0 < furthest(saved) < limit
    torch.testing.assert_close(saved[0]["rng"]["torch"], saved[1]["rng"]["torch"])
    names = {name for name in logs[0] if name.startswith("losses/")}
    assert len(names) >= 6
    for name in names:
        for one, two in zip(logs[0][name], logs[1][name], strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("steps", [256, 384])
def test_two_processes_finetune_a_student_whose_critic_warms_up(steps):
    """In the first 256 steps, which are two updates of the critic in two processes as in one."""
    agent = distill.Agent("low", 6)
    about = {"phase": "distilled", "env_id": "PongNoFrameskip-v4", "capacity": "low", "args": {}}
    torch.save({**about, "model": agent.state_dict(), "teacher": None}, "student.pt")
    flags = ["--student-path=student.pt", "--critic-warmup-updates=2", f"--total-timesteps={steps}"]
    saved, _ = trained(finetune, *flags, *PPO)
    assert saved[0]["global_step"] == saved[1]["global_step"] == steps
    assert furthest(saved) < 1e-3
    for x in saved:
        assert torch.equal(x["model"]["actor.weight"], agent.actor.weight) == (steps == 256)


def test_one_process_goes_on_where_two_were_ended():
    """By the death of one of them, and by a signal to torchrun."""
    np.savez("buffer.npz", **buffer_arrays(4000))
    script = [str(ROOT / "actor_distill.py"), "--buffer-path=buffer.npz", *DISTILL, *SGD]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]

    def last_epoch(path):
        return torch.load(path, weights_only=True)["last_epoch"] if Path(path).exists() else 0

    for number in (signal.SIGKILL, signal.SIGTERM):
        before = last_epoch("x.pt")
        flags = ["--save-path=x.pt", "--epochs=1000", "--resume"]
        with open("log", "w") as log:
            command = [sys.executable, *torchrun, *script, *flags]
            run = subprocess.Popen(command, env=ENVIRONMENT, stderr=log)
        deadline = time.monotonic() + 100
        try:
            while last_epoch("x.pt") == before:
                assert time.monotonic() < deadline and run.poll() is None, Path("log").read_text()
                time.sleep(0.2)
            victim = run.pid
            if number == signal.SIGKILL:
                found = subprocess.run(
                    ["pgrep", "-P", str(run.pid)], capture_output=True, check=True
                )
                victim = int(found.stdout.split()[-1])
            os.kill(victim, number)
            assert run.wait(timeout=60) != 0
        finally:
            run.kill()
    held = last_epoch("x.pt")
    assert held > before
    for path in ("x.pt", "whole.pt"):
        flags = [f"--save-path={path}", f"--epochs={held + 2}", "--resume"]
        run_main(distill, tyro.cli(distill.Args, args=[*script[1:], *flags]))
    saved = [torch.load(path, weights_only=True) for path in ("x.pt", "whole.pt")]
    assert saved[0]["last_epoch"] == saved[1]["last_epoch"] == held + 2
    assert furthest(saved) < 1e-3


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (teacher, {"num_envs": 3}, "--num-envs must be a multiple of 2"),
        (
            teacher,
            {"num_envs": 2, "num_minibatches": 3, "num_steps": 128},
            "--num-minibatches must divide 128, a process's steps",
        ),
        (distill, {"batch_size": 63}, "--batch-size 63 must be a multiple of the 2"),
    ],
)
def test_what_does_not_divide_is_refused(module, flags, message, monkeypatch):
    monkeypatch.setattr(module, "set_up_torch", lambda *_: (torch.device("cpu"), 0, 2))
    if module is distill:
        flags["buffer_path"] = str(BUFFER)
    with pytest.raises(SystemExit, match=message):
        run_main(module, module.Args(**flags))
    assert not Path("checkpoints").exists() or not list(Path("checkpoints").glob("*/*.pt"))
