"""The replay buffer against what the environment gave and what the teacher computed."""

import json
import textwrap

import numpy as np
import pytest
import torch
from conftest import opinionated_agent

import collect_buffer as collect

CPU = torch.device("cpu")


class Recorder(collect.AtariEnvs):
    """The games, with a copy of all that passes through them; `stop_at` is a step that stops."""

    stop_at = None

    def reset(self, **options):
        self.obs, info = super().reset(**options)
        self.log = []
        return self.obs.copy(), info

    def step(self, actions):
        if len(self.log) == self.stop_at:
            raise KeyboardInterrupt
        obs, forced = self.obs, self.forced
        self.obs, reward, terminated, truncated, info = super().step(actions)
        self.log.append((obs, forced, actions.copy(), reward.copy(), terminated | truncated))
        return self.obs.copy(), reward, terminated, truncated, info


class Writer:
    """Keeps what is logged."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)


def record(rom, num_envs, agent, num_samples, seed=1, greedy=False, epsilon=None, stop_at=None):
    """Arrays, the games' log, and what was logged of a collection."""
    envs, writer = Recorder(rom, num_envs, False, 0.0), Writer()
    envs.stop_at = stop_at
    arrays = collect.collect(agent, envs, num_samples, seed, greedy, epsilon, CPU, writer)
    return arrays, envs.log, writer.scalars


@pytest.fixture(scope="module", params=[None, 250], ids=["whole", "stopped"])
def recording(request):
    """Breakout, 3 games at once, 1,202 samples or until a Ctrl-C: arrays, log, agent, ends."""
    torch.manual_seed(0)
    agent = opinionated_agent(collect.Agent, "low", 4)
    with torch.no_grad():
        agent.actor.weight.mul_(4)
    return *record("breakout", 3, agent, 1202, 5, stop_at=request.param), agent, request.param


def samples(log, quotas):
    """(sample, slot, steps) in the buffer's order, slot after slot.

    `steps` are the entries of the log that belong to the sample: its own and forced ones after it.
    """
    found = []
    for e, quota in enumerate(quotas):
        slot = []
        for entry in log:
            obs, forced, action, reward, done = (x[e] for x in entry)
            if forced:
                slot[-1].append((obs, action, reward, done))
            elif len(slot) < quota:
                slot.append([(obs, action, reward, done)])
            else:
                break
        found += [(e, steps) for steps in slot]
    return [(i, e, steps) for i, (e, steps) in enumerate(found)]


def test_observations_are_rebuilt_byte_for_byte_over_lost_lives_and_ends(recording):
    arrays, log, _, _, stopped = recording
    rows = samples(log, (401, 401, 400))
    assert len(rows) == len(arrays["actions"]) and (len(rows) == 1202) == (stopped is None)
    assert not arrays["frames"][0].any()
    forced = sum(len(steps) - 1 for _, _, steps in rows)
    assert len(arrays["frames"]) <= 1 + len(rows) + forced, "each frame is stored once"
    assert forced > 10 and sum(done.sum() for *_, done in log) > 2
    for i, _, steps in rows:
        rebuilt = arrays["frames"][arrays["stack_index"][i]]
        assert rebuilt.tobytes() == steps[0][0].tobytes(), f"sample {i}"


def test_steps_are_recorded_as_played(recording):
    arrays, log, *_ = recording
    for i, e, steps in samples(log, (401, 401, 400)):
        assert arrays["env_index"][i] == e
        assert arrays["actions"][i] == steps[0][1]
        assert arrays["rewards"][i] == sum(reward for _, _, reward, _ in steps)
        assert arrays["dones"][i] == any(done for *_, done in steps)


def test_episodes_are_whole_games(recording):
    arrays, log, scalars, *_ = recording
    returns, episode, slot, open_game = [], [], None, False
    for _, e, steps in samples(log, (401, 401, 400)):
        if e != slot or not open_game:
            returns.append([0.0, False])
            slot, open_game = e, True
        returns[-1][0] += sum(reward for _, _, reward, _ in steps)
        episode.append(len(returns) - 1)
        if any(done for *_, done in steps):
            returns[-1][1], open_game = True, False
    np.testing.assert_array_equal(arrays["episode_index"], episode)
    expected = [total if whole else np.nan for total, whole in returns]
    np.testing.assert_array_equal(arrays["episode_returns"], np.float32(expected))
    finished = sorted(total for total, whole in returns if whole)
    assert 0 < len(finished) < len(returns)
    assert {name for name, *_ in scalars} == {"charts/episodic_return"}
    assert sorted(total for _, total, _ in scalars) == finished


def test_stored_outputs_are_the_teachers_and_actions_are_drawn_from_them(recording):
    arrays, _, _, agent, _ = recording
    obs = torch.from_numpy(arrays["frames"][arrays["stack_index"]])
    with torch.no_grad():
        outputs = [agent(chunk) for chunk in obs.split(256)]
    logits, values = (torch.cat(x) for x in zip(*outputs, strict=True))
    probs = arrays["action_probs"]
    assert probs.max() > 0.6, "the policy has opinions"
    np.testing.assert_allclose(probs, logits.softmax(-1), atol=1e-5)
    np.testing.assert_allclose(arrays["values"], values, atol=1e-4)
    counts = np.bincount(arrays["actions"], minlength=4)
    assert (abs(counts - probs.sum(0)) < 5 * np.sqrt((probs * (1 - probs)).sum(0))).all()


def test_what_a_forced_step_brings_belongs_to_the_step_before():
    class Script:
        """One game: a life is lost in steps 2 and 5, and every step n brings the reward n."""

        num_envs, action_meanings = 1, ["NOOP", "FIRE"]

        def reset(self, seed):
            self.number, self.forced = 0, np.zeros(1, bool)
            return np.zeros((1, 4, 84, 84), np.uint8), {}

        def step(self, actions):
            self.number += 1
            self.forced = np.array([self.number in (2, 5)])
            self.game_over = np.array([self.number == 6])  # in a forced step
            obs, reward = np.zeros((1, 4, 84, 84), np.uint8), np.array([float(self.number)])
            return obs, reward, self.game_over, np.zeros(1, bool), {}

    agent, writer = collect.Agent("low", 2), Writer()
    arrays = collect.collect(agent, Script(), 6, 1, False, None, CPU, writer)
    # steps 3 and 6 are forced
    assert arrays["rewards"].tolist() == [1, 2 + 3, 4, 5 + 6, 7, 8]
    assert arrays["dones"].tolist() == [False, False, False, True, False, False]
    assert writer.scalars == [("charts/episodic_return", 21, 4)]
    assert arrays["episode_returns"][0] == 21 and np.isnan(arrays["episode_returns"][1])


def test_greedy_takes_the_most_probable_action_and_rewards_are_raw():
    agent = opinionated_agent(collect.Agent, "low", 6)
    arrays, log, _ = record("up_n_down", 2, agent, 160, greedy=True)
    np.testing.assert_array_equal(arrays["actions"], arrays["action_probs"].argmax(1))
    rewards = [sum(reward for _, _, reward, _ in steps) for *_, steps in samples(log, (80, 80))]
    np.testing.assert_array_equal(arrays["rewards"], rewards)
    assert max(rewards) >= 100


def test_q_values_are_recorded_and_played_epsilon_greedily():
    agent = opinionated_agent(collect.Agent, "low", 6)
    arrays, *_ = record("pong", 4, agent, 600, epsilon=0.5)
    with torch.no_grad():
        q_values, _ = agent(torch.from_numpy(arrays["frames"][arrays["stack_index"]]))
    assert "action_probs" not in arrays
    np.testing.assert_allclose(arrays["q_values"], q_values, atol=1e-4)
    np.testing.assert_array_equal(arrays["values"], arrays["q_values"].max(1))
    # of the half that is drawn at random, 1 in 6 is the best action all the same
    others = np.bincount(arrays["actions"] - arrays["q_values"].argmax(1) + 6, minlength=12)
    others = (others[:6] + others[6:])[1:]
    assert abs(others.sum() - 250) < 5 * (600 * 5 / 12 * 7 / 12) ** 0.5, others
    assert (abs(others - 50) < 5 * 50**0.5).all(), others


def test_fewer_samples_than_games():
    arrays, *_ = record("pong", 4, collect.Agent("low", 6), 3)
    assert arrays["env_index"].tolist() == [0, 1, 2] == arrays["episode_index"].tolist()
    assert np.isnan(arrays["episode_returns"]).tolist() == [True] * 3


def test_seeds_give_different_games_and_the_same_seed_the_same():
    agent = collect.Agent("low", 6)
    first, again, other = (record("pong", 2, agent, 80, seed)[0] for seed in (1, 1, 2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["actions"] != other["actions"]).any()
    seeds = [set(collect.game_seeds(16, seed, purpose)) for seed in (1, 2) for purpose in (1, 2, 3)]
    assert len(set.union(*seeds)) == 6 * 16
    assert all(0 <= seed < 2**31 for seed in set.union(*seeds))


def test_file_holds_the_documented_arrays(chain):
    folder, _ = chain
    path = folder / "buffers" / "PongNoFrameskip-v4.npz"
    with np.load(path) as buffer:
        arrays = {name: buffer[name] for name in buffer}
    meta = json.loads(str(arrays.pop("meta")))
    n, episodes = meta["args"]["num_samples"], arrays["episode_index"].max() + 1
    documented = {
        "frames": ("uint8", (n + 1, 84, 84)),  # Pong has no lives, so that FIRE is never forced
        "stack_index": ("int32", (n, 4)),
        "action_probs": ("float32", (n, 6)),
        "values": ("float32", (n,)),
        "actions": ("uint8", (n,)),
        "rewards": ("float32", (n,)),
        "dones": ("bool", (n,)),
        "env_index": ("int32", (n,)),
        "episode_index": ("int32", (n,)),
        "episode_returns": ("float32", (episodes,)),
    }
    assert {name: (x.dtype.name, x.shape) for name, x in arrays.items()} == documented
    assert meta["env_id"] == "PongNoFrameskip-v4" and meta["steps"] == n
    assert meta["action_meanings"][:2] == ["NOOP", "FIRE"] and meta["targets"] == "action_probs"
    assert meta["teacher"]["checkpoint"] == "checkpoints/PongNoFrameskip-v4/ppo_high.pt"
    assert len(meta["teacher"]["sha256"]) == 64 and meta["teacher"]["evaluation"]["episodes"] > 1
    assert path.stat().st_size / n < 150, "bytes a frame on disk"
    at_full_size = sum(x.nbytes for x in arrays.values()) / n * 540_000
    assert at_full_size < 4e9, "memory for the default number of samples"


def test_the_docstrings_example_runs_and_reads_the_file_once(chain, monkeypatch):
    monkeypatch.chdir(chain[0])
    text = collect.__doc__[collect.__doc__.index("    with np.load") :].split("\n\n")[0]
    *load, look_up = textwrap.dedent(text).splitlines()
    names = {"np": np}
    exec("\n".join(load), names)  # noqa: S102
    del names["buffer"]  # the second sample is not read from the file
    for names["i"] in (3, -1):
        exec(look_up, names)  # noqa: S102
        assert (names["observation"].shape, names["observation"].dtype) == ((4, 84, 84), np.uint8)
        assert names["target"].shape == (6,) and abs(names["target"].sum() - 1) < 1e-5
