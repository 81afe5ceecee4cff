"""Which games the evaluation counts, and how it describes them."""

import itertools
import subprocess

import numpy as np
import ppo_atari_teacher as teacher
import pytest
import torch


class ScriptedGames:
    """Games of given lengths in the slots of one group; game k of slot e returns 100 e + k."""

    def __init__(self, lengths, part):
        self.lengths, self.first = lengths[part], part.start
        self.num_envs = len(self.lengths)

    def reset(self, seed):
        self.seeds = set(seed)
        self.played, self.number = [0] * self.num_envs, [0] * self.num_envs
        return np.zeros((self.num_envs, 4, 84, 84), np.uint8), {}

    def send(self, action):
        assert action.shape == (self.num_envs,)

    def recv(self):
        reward, ended = np.zeros(self.num_envs, np.int32), np.zeros(self.num_envs, bool)
        for e in range(self.num_envs):
            self.played[e] += 1
            if self.played[e] == self.lengths[e][self.number[e] % len(self.lengths[e])]:
                reward[e] = 100 * (self.first + e) + self.number[e]
                ended[e] = True
                self.played[e], self.number[e] = 0, self.number[e] + 1
        truncated = ended & (np.arange(self.num_envs) % 2 == 1)  # both kinds of end count
        obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        return obs, reward, ended & ~truncated, truncated, {}


@pytest.mark.parametrize("lengths, eval_steps", [
    ([[3, 3, 4, 5, 9], [25, 1, 1], [10, 10, 10], [1] * 40], 40),
    ([[3, 3, 4, 5, 9], [25, 1, 1], [10, 10, 10], [1] * 40], 37),  # the same quota, rounded up
    ([[7, 7, 7]], 14), ([[7, 7, 7]], 15), ([[5], [6], [900]], 1)])
def test_counts_the_games_begun_within_the_budget(lengths, eval_steps):
    agent = teacher.Agent("low", 6)
    quota = -(-eval_steps // len(lengths))
    expected = []
    for e, slot in enumerate(lengths):
        begins = [0, *itertools.accumulate(slot)]
        expected += [(100 * e + k, slot[k]) for k in range(len(slot)) if begins[k] < quota]
    middle = (len(lengths) + 1) // 2
    parts = [slice(0, middle), slice(middle, len(lengths))][:len(lengths)]
    groups = [(ScriptedGames(lengths, part), part) for part in parts]
    returns, games = teacher.play(agent, groups, eval_steps, 1, False)
    assert sorted(zip(returns, games)) == sorted(expected)
    assert len(set.union(*(games.seeds for games, _ in groups))) == len(lengths)


def test_real_games_are_whole_and_lost_lives_end_nothing():
    groups = teacher.make_envs("breakout", 3, False, 0.0)
    agent = teacher.Agent("low", 4)
    with torch.no_grad():
        agent.actor.bias[1] = 1.0
    returns, lengths = teacher.play(agent, groups, 600, 1, False)
    assert len(returns) >= 3
    assert min(lengths) > 60, "five lives take longer than this"


def test_evaluation_leaves_the_random_state_alone():
    groups = teacher.make_envs("breakout", 2, False, 0.0)
    agent = teacher.Agent("low", 4)
    with torch.no_grad():
        agent.actor.bias[1] = 1.0
    before = torch.get_rng_state()
    first = teacher.play(agent, groups, 10, 4, False)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert teacher.play(agent, groups, 10, 4, False) == first
    assert teacher.play(agent, groups, 10, 5, False) != first


def test_a_place_that_cannot_be_written_is_refused_before_a_game_is_played(tmp_path, monkeypatch):
    """And what a killed process left there is swept."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = tmp_path / f".eval.json.{dead.pid}.tmp"
    stale.touch()
    args = teacher.Args(num_envs=1, eval_steps=1, eval_greedy=True, device="cpu")
    identity = {"env_id": "PongNoFrameskip-v4", "phase": "ppo", "capacity": "low",
                "protocol": teacher.default_protocol()}
    monkeypatch.setattr(teacher, "play", lambda *rest: ([1.0], [5]))
    teacher.evaluate(teacher.Agent("low", 6), "pong", args, identity, tmp_path / "eval.json")
    assert not stale.exists() and (tmp_path / "eval.json").exists()
    monkeypatch.setattr(teacher, "play", None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(teacher.UsageError, match="folder: is a folder"):
        teacher.evaluate(teacher.Agent("low", 6), "pong", args, identity, tmp_path / "folder")


def test_summary_equals_values_worked_by_hand():
    # 9 games: floor(9 / 4) = 2 are left out on each side, of 30, 40, 50, 60, 70 the mean is 50
    summary = teacher.summarize([70, 10, 1000, 40, -500, 50, 60, 900, 30])
    assert (summary["iqm"], summary["max"], summary["episodes"]) == (50, 1000, 9)
    assert summary["mean"] == pytest.approx(1660 / 9)
    assert teacher.summarize([7.0]) == {"mean": 7, "std": 0, "max": 7, "episodes": 1, "iqm": 7,
                                        "ci95": [7, 7]}


def test_interval_agrees_with_the_normal_approximation():
    returns = np.random.default_rng(2).normal(100, 20, 400)
    summary = teacher.summarize(returns.tolist())
    assert summary["std"] == pytest.approx(np.sqrt(np.mean((returns - returns.mean()) ** 2)))
    half_width = 1.96 * summary["std"] / 400**0.5
    expected = [returns.mean() - half_width, returns.mean() + half_width]
    assert summary["ci95"] == pytest.approx(expected, abs=0.15 * half_width)


def test_temperature_divides_the_logits():
    """Actions against an independent count: softmax([2, 1, 0] / 0.5), and the best one near 0."""
    sent = []

    class Games(ScriptedGames):
        def send(self, action):
            sent.extend(action)

    class Policy(torch.nn.Linear):
        def forward(self, obs):
            return torch.tensor([2.0, 1.0, 0.0]).expand(len(obs), 3), torch.zeros(len(obs))

    for temperature, expected in ((0.5, np.exp([4, 2, 0]) / np.exp([4, 2, 0]).sum()),
                                  (1.0, np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum()),
                                  (1e-6, [1, 0, 0])):
        sent.clear()
        groups = [(Games([[500]] * 8, slice(0, 8)), slice(0, 8))]
        teacher.play(Policy(1, 1), groups, 4000, 1, False, temperature)
        np.testing.assert_allclose(np.bincount(sent, minlength=3) / len(sent), expected, atol=0.03)
