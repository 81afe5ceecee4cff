"""The network against the paper's counts, CleanRL's names, and a plain forward pass."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from ppo_atari_teacher import Agent, sample_actions


@pytest.mark.parametrize(
    "capacity, weights", [("high", 1_683_456), ("medium", 422_912), ("low", 106_752)]
)
def test_weights_are_as_many_as_table_2_says_and_have_cleanrls_names(capacity, weights):
    found = Agent(capacity, 6).state_dict()
    body = ("network.0", "network.2", "network.4", "network.7")
    names = {f"{x}.{part}" for x in (*body, "actor", "critic") for part in ("weight", "bias")}
    assert found.keys() == names
    assert sum(found[f"{layer}.weight"].numel() for layer in body) == weights


@pytest.mark.parametrize("smooth", [False, True])
def test_outputs_and_gradients_are_those_of_plain_convolutions(smooth):
    """In the plain order of memory, with every pixel divided by 255; both layouts of the bytes.

    Gradients are compared with a smooth function in place of ReLU, whose own jumps where rounding
    changes a sign.
    """
    agent = Agent("medium", 9).to(memory_format=torch.channels_last)
    activation = F.softplus if smooth else F.relu
    for i in (1, 3, 6, 8) if smooth else ():
        assert isinstance(agent.network[i], torch.nn.ReLU)
        agent.network[i] = torch.nn.Softplus()
    obs = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    w = {x: y.detach().contiguous().clone().requires_grad_() for x, y in agent.named_parameters()}
    x = obs.float() / 255
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.conv2d(x, w[f"network.{layer}.weight"], w[f"network.{layer}.bias"], stride)
        x = activation(x)
    x = activation(x.flatten(1) @ w["network.7.weight"].T + w["network.7.bias"])
    expected_logits = x @ w["actor.weight"].T + w["actor.bias"]
    expected_values = (x @ w["critic.weight"].T + w["critic.bias"])[:, 0]
    logits_weights, values_weights = torch.randn(5, 9), torch.randn(5)
    ((expected_logits * logits_weights).sum() + expected_values @ values_weights).backward()
    for layout in (torch.contiguous_format, torch.channels_last):
        logits, values = agent(obs.contiguous(memory_format=layout))
        assert values.shape == (5,)
        torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, expected_values, atol=1e-5, rtol=1e-5)
        if not smooth:
            continue
        agent.zero_grad()
        ((logits * logits_weights).sum() + values @ values_weights).backward()
        for name, parameter in agent.named_parameters():
            torch.testing.assert_close(parameter.grad, w[name].grad, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # the losses need more digits
        assert {x.dtype for x in agent(obs)} == {torch.float32}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_of_large_batches_is_kept(tmp_path):
    """A batch of 1024 is 115 MB of floats, 28,000 pages: not to be fetched in every update."""
    code = """
import resource, torch, ppo_atari_teacher as teacher
teacher.set_up_torch(1, False)
agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
obs = torch.zeros(1024, 4, 84, 84, dtype=torch.uint8)
faults = []
for _ in range(8):
    agent.zero_grad()
    agent(obs)[0].sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(sorted(b - a for a, b in zip(faults, faults[1:]))[3])
"""
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    printed = subprocess.check_output([sys.executable, "-c", code], **options)
    assert int(printed) < 2800  # the median: a heap may still grow once or twice


def test_initial_weights_are_orthogonal_with_the_stated_gains():
    agent = Agent("medium", 6)
    body = [(agent.network[i], 2**0.5) for i in (0, 2, 4, 7)]
    for layer, gain in (*body, (agent.actor, 0.01), (agent.critic, 1)):
        rows = layer.weight.flatten(1)
        torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
        assert not layer.bias.any()


def test_sampled_actions_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5])
    draws = sample_actions(logits.expand(200_000, 4), torch.Generator().manual_seed(7))
    shares = torch.bincount(draws, minlength=4) / len(draws)
    # five standard errors of a share of 0.5 among 200,000 draws are 0.0056
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.0056, rtol=0)
