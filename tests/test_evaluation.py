"""Which games the evaluation counts, and how it describes them."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import opinionated_agent, tensorboard_scalars

import actor_distill as distill
import finetune_student as finetune
import ppo_atari_teacher as teacher

CPU = torch.device("cpu")


class ScriptedGames:
    """Games of given lengths, a list for each slot; game k of slot e returns 100 e + k."""

    def __init__(self, lengths):
        self.lengths, self.num_envs = lengths, len(lengths)

    def reset(self, seed):
        self.seeds, self.actions = set(seed), []
        self.played, self.number = [0] * self.num_envs, [0] * self.num_envs
        return np.zeros((self.num_envs, 4, 84, 84), np.uint8), {}

    def step(self, actions):
        assert actions.shape == (self.num_envs,)
        self.actions += actions.tolist()
        reward, ended = np.zeros(self.num_envs, np.int32), np.zeros(self.num_envs, bool)
        for e in range(self.num_envs):
            self.played[e] += 1
            if self.played[e] == self.lengths[e][self.number[e] % len(self.lengths[e])]:
                reward[e], ended[e] = 100 * e + self.number[e], True
                self.played[e], self.number[e] = 0, self.number[e] + 1
        truncated = ended & (np.arange(self.num_envs) % 2 == 1)  # both kinds of end count
        obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        return obs, reward, ended & ~truncated, truncated, {}


def policy(*logits):
    """An agent that always has these logits."""
    return lambda obs: (torch.tensor(logits).expand(len(obs), -1), torch.zeros(len(obs)))


@pytest.mark.parametrize(
    "lengths, eval_steps",
    [
        ([[3, 3, 4, 5, 9], [25, 1, 1], [10, 10, 10], [1] * 40], 40),
        ([[3, 3, 4, 5, 9], [25, 1, 1], [10, 10, 10], [1] * 40], 37),  # the same quota, rounded up
        ([[7, 7, 7]], 14),
        ([[7, 7, 7]], 15),
        ([[5], [6], [900]], 1),
    ],
)
def test_counts_the_games_begun_within_the_budget(lengths, eval_steps):
    quota = -(-eval_steps // len(lengths))
    expected = []
    for e, slot in enumerate(lengths):
        begins = [0, *itertools.accumulate(slot)]
        expected += [(100 * e + k, slot[k]) for k in range(len(slot)) if begins[k] < quota]
    games = ScriptedGames(lengths)
    returns, played = teacher.play(policy(0.0, 0.0), games, eval_steps, 1, False, CPU)
    assert sorted(zip(returns, played, strict=True)) == sorted(expected)
    assert len(games.seeds) == len(lengths)


@pytest.mark.parametrize("greedy", [False, True])
def test_actions_are_sampled_or_the_best(greedy):
    games = ScriptedGames([[500]] * 8)
    teacher.play(policy(2.0, 1.0, 0.0), games, 4000, 1, greedy, CPU)
    expected = [1, 0, 0] if greedy else np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum()
    found = np.bincount(games.actions, minlength=3) / len(games.actions)
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_real_games_are_whole_and_repeat_with_the_seed():
    envs = teacher.AtariEnvs("breakout", 2, 0.0, life_loss=False)
    before = torch.get_rng_state()
    first = teacher.play(policy(0.0, 0.0, 0.0, 0.0), envs, 10, 4, False, CPU)
    assert torch.equal(before, torch.get_rng_state()), "the random state is left alone"
    assert len(first[0]) == 2 and min(first[1]) > 60, "five lives take longer than this"
    torch.rand(5)
    assert teacher.play(policy(0.0, 0.0, 0.0, 0.0), envs, 10, 4, False, CPU) == first
    assert teacher.play(policy(0.0, 0.0, 0.0, 0.0), envs, 10, 5, False, CPU) != first


def test_summary_equals_values_worked_by_hand():
    summary = teacher.summarize([70, 10, 1000, 40, -500, 50, 60, 900, 30])
    assert (summary["max"], summary["episodes"]) == (1000, 9)
    assert summary["mean"] == pytest.approx(1660 / 9)
    one_game = {"mean": 7, "std": 0, "max": 7, "episodes": 1, "ci95": None}
    assert teacher.summarize([7.0]) == one_game


def test_interval_agrees_with_the_normal_approximation():
    returns = np.random.default_rng(2).normal(100, 20, 400)
    summary = teacher.summarize(returns.tolist())
    assert summary["std"] == pytest.approx(np.sqrt(np.mean((returns - returns.mean()) ** 2)))
    half_width = 1.96 * summary["std"] / 400**0.5
    expected = [returns.mean() - half_width, returns.mean() + half_width]
    assert summary["ci95"] == pytest.approx(expected, abs=0.15 * half_width)


@pytest.mark.parametrize("module", [teacher, distill, finetune])
def test_eval_only_plays_the_checkpoint_and_by_the_flags_that_are_given(
    module, tmp_path, monkeypatch
):
    """A single game, of another game and size than the defaults, and nothing else is written."""
    monkeypatch.chdir(tmp_path)
    agent = opinionated_agent(teacher.Agent, "low", 4)
    about = {"env_id": "BreakoutNoFrameskip-v4", "phase": "ppo", "capacity": "low", "args": {}}
    torch.save({**about, "global_step": 77, "model": agent.state_dict()}, "x.pt")
    flags = {"env_id": "Breakout-v5", "num_envs": 1, "eval_steps": 1, "seed": 3}
    flags |= {"eval_only": "x.pt", "eval_greedy": True, "repeat_action_probability": 0.5}
    module.main(module.Args(**flags))
    envs = teacher.AtariEnvs("breakout", 1, 0.5, life_loss=False)
    returns, lengths = teacher.play(agent, envs, 1, 3, True, CPU)
    (file,) = tmp_path.glob("runs/*/eval.json")
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["x.pt"]
    result = json.loads(file.read_text())
    assert (result["returns"], result["lengths"]) == (returns, lengths) and result["ci95"] is None
    scalars = tensorboard_scalars(file.parent)
    assert scalars == {"eval/mean": [(77, returns[0])], "eval/std": [(77, 0)]}
