"""Several processes of torchrun learn together, each from its own samples, and write one file."""

import multiprocessing
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import buffer_arrays, run_main, tensorboard_scalars
from torch.optim.optimizer import register_optimizer_step_pre_hook

import actor_distill as distill
import finetune_student as finetune
import ppo_atari_teacher as teacher

PPO = ["--capacity=low", "--num-steps=32", "--num-minibatches=2", "--update-epochs=3"]
# of five games each of two processes plays two
PPO += ["--num-envs=5", "--total-timesteps=256", "--max-grad-norm=1e9", "--save-path=x.pt"]
DISTILL = ["--capacity=low", "--buffer-path=buffer.npz", "--loss=kl", "--save-path=x.pt"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test has a current folder of its own, with a buffer and a small student in it."""
    monkeypatch.chdir(tmp_path)
    np.savez("buffer.npz", **buffer_arrays(400))
    about = {"phase": "distilled", "env_id": "PongNoFrameskip-v4", "capacity": "low", "args": {}}
    model = teacher.Agent("low", 6).state_dict()
    torch.save({**about, "global_step": 0, "model": model}, "low.pt")


def run(module, rank, port, flags):
    """Be one of two processes that torchrun starts, and write down what this one learns from."""
    names = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "MASTER_ADDR": "localhost"}
    os.environ.update({name: str(value) for name, value in names.items()})
    name = "kl_divergence" if module is distill else "ppo_loss"
    loss, forward = getattr(module, name), module.Agent.forward
    seen = {"batches": [], "losses": [], "weights": [], "gradients": []}

    def recorded_forward(agent, obs):
        seen["obs"] = obs
        return forward(agent, obs)

    def recorded_loss(*batch):
        outcome = loss(*batch)
        if torch.is_grad_enabled():
            detached = [x.detach() if torch.is_tensor(x) else x for x in batch]
            seen["batches"].append([seen["obs"], *detached])
            seen["losses"].append(torch.stack([x.detach() for x in outcome]))
        return outcome

    def record_update(optimizer, *_):
        weights = optimizer.param_groups[0]["params"]
        gradient = [torch.zeros_like(x) if x.grad is None else x.grad for x in weights]
        seen["weights"].append([x.detach().clone() for x in weights])
        seen["gradients"].append([x.clone() for x in gradient])

    setattr(module, name, recorded_loss)
    module.Agent.forward = recorded_forward
    register_optimizer_step_pre_hook(record_update)
    run_main(module, tyro.cli(module.Args, args=flags))
    torch.save(seen, f"seen{rank}")


def two_processes(module, *flags):
    """What each of two processes of a training has learned from."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=run, args=(module, rank, port, flags)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(Path("runs").iterdir())) == 1, "one log a training, not one a process"
    return [torch.load(f"seen{rank}", weights_only=True) for rank in (0, 1)]


def pictures(batches):
    """The different observations of some batches."""
    return {obs.numpy().tobytes() for obs, *_ in batches for obs in obs}


def check(seen, loss_of, updates, names):
    """What holds for every training by two processes; returns the checkpoint.

    The gradients are those that one process has on both minibatches by `loss_of`. The means of each
    `updates` are logged.
    """
    agent = teacher.Agent("low", 6)
    parameters = list(agent.parameters())
    for number, both in enumerate(zip(*(x["batches"] for x in seen), strict=True)):
        batch = [torch.cat(x) if torch.is_tensor(x[0]) else x[0] for x in zip(*both, strict=True)]
        weights, gradients = ([x[name][number] for x in seen] for name in ("weights", "gradients"))
        for parameter, weight, same in zip(parameters, *weights, strict=True):
            assert torch.equal(weight, same)
            parameter.data = weight
        loss = loss_of(agent, *batch)
        expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for wanted, *found in zip(expected, *gradients, strict=True):
            for gradient in found:
                torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)
    assert {str(path) for path in Path().glob("x.pt*")} == {"x.pt", "x.pt.lock"}
    saved = torch.load("x.pt", weights_only=True)
    scalars = tensorboard_scalars(f"runs/{saved['run_name']}")
    losses = torch.stack([torch.stack(x["losses"]) for x in seen]).mean(0)
    for i, part in enumerate(losses.split(updates)):
        means = part.view(len(part), len(names), -1).mean((0, 2))
        for name, mean in zip(names, means, strict=True):
            assert scalars[f"losses/{name}"][i][1] == pytest.approx(mean.item(), rel=1e-4, abs=1e-6)
    return saved


def check_ppo(seen, updates):
    """The same for PPO, whose processes play different games."""

    def loss_of(agent, obs, logits, values, *rollout):
        policy_loss, value_loss, entropy, *_ = teacher.ppo_loss(*agent(obs), *rollout)
        return policy_loss - 0.01 * entropy + 0.5 * value_loss

    first, second = (pictures(x["batches"]) for x in seen)
    assert len(first & second) < len(first) / 2
    names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
    return check(seen, loss_of, updates, names)


def resume(module, *flags):
    """What one process makes of what two have begun."""
    run_main(module, tyro.cli(module.Args, args=[*flags, "--resume"]))
    return torch.load("x.pt", weights_only=True)


def test_two_processes_distil():
    def loss_of(agent, obs, targets, logits):
        return distill.kl_divergence(targets, agent(obs)[0]).mean()

    flags = [*DISTILL, "--epochs=2", "--eval-steps=0"]
    seen = two_processes(distill, *flags)
    saved = check(seen, loss_of, [5, 5], ["kl"])
    # an epoch is five batches of 64 of the 380 samples, which the processes share
    assert saved["global_step"] == 2 * 320
    for epoch in (slice(5), slice(5, 10)):
        first, second = (pictures(x["batches"][epoch]) for x in seen)
        assert not first & second and len(first) == len(second) == 160
    resumed = resume(distill, *flags, "--epochs=3")
    assert resumed["global_step"] == 3 * 320 and resumed["run_name"] == saved["run_name"]


def test_two_processes_train_a_teacher():
    """Process 0 alone plays the evaluation."""
    flags = ["--eval-steps=1", "--env-id=Breakout-v5"]
    saved = check_ppo(two_processes(teacher, *PPO, *flags), [6, 6])
    assert saved["global_step"] == 256 and saved["evaluation"]["steps"] > 0


def test_two_processes_finetune_a_student():
    """Both fit the same critic, to the returns of both."""
    flags = [*PPO, "--student-path=low.pt", "--eval-steps=0"]
    flags += ["--kl-coef=0", "--ent-coef=0.01", "--vf-coef=0.5"]
    seen = two_processes(finetune, *flags)
    saved = check_ppo(seen, [6, 6])
    student = torch.load("low.pt", weights_only=True)["model"]
    assert torch.equal(seen[0]["weights"][0][8], student["actor.weight"])
    assert not torch.equal(seen[0]["weights"][0][10], student["critic.weight"])
    resumed = resume(finetune, *flags, "--num-envs=4", "--total-timesteps=384")
    assert [saved["global_step"], resumed["global_step"]] == [256, 384]


@pytest.mark.parametrize("module", [teacher, finetune])
def test_fewer_games_than_processes(module):
    """Each process plays one, as ale-py crashes without a game."""
    flags = ["--capacity=low", "--num-envs=1", "--num-steps=8", "--num-minibatches=2"]
    flags += ["--total-timesteps=16", "--save-path=x.pt", "--eval-steps=0"]
    flags += ["--student-path=low.pt"] if module is finetune else []
    for seen in two_processes(module, *flags):
        assert len(seen["obs"]) == 1  # what the network saw last, of all games of the process


@pytest.mark.parametrize("module", [teacher, distill, finetune])
@pytest.mark.parametrize("device, backends", [("cpu", {"gloo"}), ("cuda", {"nccl"})])
def test_gradients_are_averaged_where_they_are(module, device, backends, monkeypatch):
    """torch alone would choose by the machine: NCCL with --no-cuda too, which has no CPU tensors.

    The critic's fit sums on the CPU.
    """
    started = []

    def init_process_group(backend=None, **_):
        started.append(backend)
        raise InterruptedError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(module, "set_up_torch", lambda seed, cuda: torch.device(device))
    with pytest.raises(InterruptedError):
        module.main(module.Args())
    expected = {*backends, "gloo"} if module is finetune else backends
    assert set(re.findall(r"nccl|gloo", str(started[0]))) == expected


@pytest.mark.parametrize("module", [teacher, distill, finetune])
def test_of_two_processes_one_evaluates(module):
    two_processes(module, "--eval-only=low.pt", "--eval-steps=1", "--num-envs=1", "--eval-greedy")
