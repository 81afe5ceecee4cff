"""The replay buffer against what the environment gave and what the teacher computed."""

import json
import textwrap
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import opinionated_agent

import collect_buffer as collect

CPU = torch.device("cpu")


class Recorder(collect.AtariEnvs):
    """The games, with a copy of all that passes through them; `stop_at` is a step that stops."""

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


class Script:
    """Each game loses a life in steps 2 and 5, and ends with step 6, a forced one.

    Step n brings the reward n, and the screen after it has the brightness n.
    """

    action_meanings = ("NOOP", "FIRE")

    def __init__(self, num_envs, stop_at=None):
        self.num_envs, self.stop_at = num_envs, stop_at

    def reset(self, seed):
        self.number, self.forced = 0, np.zeros(self.num_envs, bool)
        return np.zeros((self.num_envs, 4, 84, 84), np.uint8), {}

    def step(self, actions):
        if self.number == self.stop_at:
            raise KeyboardInterrupt
        self.number += 1
        self.forced = np.full(self.num_envs, self.number in (2, 5))
        self.game_over = np.full(self.num_envs, self.number == 6)
        obs = np.full((self.num_envs, 4, 84, 84), self.number, np.uint8)
        reward, never = np.full(self.num_envs, float(self.number)), np.zeros(self.num_envs, bool)
        return obs, reward, self.game_over, never, {}


def writer():
    """Keeps what is logged, in `scalars`."""
    scalars = []
    return SimpleNamespace(scalars=scalars, add_scalar=lambda *scalar: scalars.append(scalar))


def record(rom, num_envs, agent, num_samples, seed=1, greedy=False, epsilon=None, stop_at=None):
    """A collection: its arrays, what was logged, and from the games the frame of each step, and
    what belongs to each sample, by the arrays' names: rewards and ends of forced steps after it.
    """
    envs, log = Recorder(rom, num_envs, 0.0, life_loss=False), writer()
    envs.stop_at = stop_at
    arrays = collect.collect(agent, envs, num_samples, seed, greedy, epsilon, CPU, log)
    frames, samples = [], []
    for e in range(num_envs):
        for entry in envs.log[: num_samples // num_envs]:
            obs, forced, action, reward, done = (x[e] for x in entry)
            frames.append(obs[3])
            if not forced:
                samples.append([e, obs, action, 0.0, False])
            samples[-1][3] += reward
            samples[-1][4] |= done
    names = ("env_index", "obs", "actions", "rewards", "dones")
    columns = map(np.array, zip(*samples, strict=True))
    samples = dict(zip(names, columns, strict=True))
    return SimpleNamespace(arrays=arrays, scalars=log.scalars, frames=frames, samples=samples)


@pytest.fixture(scope="module", params=[None, 250], ids=["whole", "stopped"])
def recording(request):
    """Breakout, 3 games at once, 400 steps of each (of 1,202) or until a Ctrl-C."""
    torch.manual_seed(0)
    agent = opinionated_agent(collect.Agent, "low", 4)
    with torch.no_grad():
        agent.actor.weight.mul_(4)
    found = record("breakout", 3, agent, 1202, 5, stop_at=request.param)
    found.agent, found.steps = agent, 3 * (request.param or 400)
    return found


def test_steps_are_recorded_as_played_over_lost_lives_and_ends(recording):
    """Observations to the byte; row i + 1 of the frames is that of step i, be it forced or not."""
    arrays, samples = recording.arrays, recording.samples
    assert len(recording.frames) == recording.steps
    np.testing.assert_array_equal(arrays["frames"], [np.zeros((84, 84)), *recording.frames])
    np.testing.assert_array_equal(arrays["frames"][arrays["stack_index"]], samples["obs"])
    for name in samples.keys() - {"obs"}:
        np.testing.assert_array_equal(arrays[name], samples[name])
    assert len(arrays["actions"]) < recording.steps - 10, "some steps were forced"
    assert samples["dones"].sum() > 2


def test_episodes_are_whole_games(recording):
    arrays, samples = recording.arrays, recording.samples
    rewards, dones = samples["rewards"], samples["dones"]
    slot_and_game = np.column_stack((samples["env_index"], np.cumsum(dones) - dones))
    _, episode = np.unique(slot_and_game, axis=0, return_inverse=True)
    np.testing.assert_array_equal(arrays["episode_index"], episode)
    games = [episode == game for game in range(episode.max() + 1)]
    whole = np.array([dones[game].any() for game in games])
    returns = np.float32([rewards[game].sum() for game in games])
    np.testing.assert_array_equal(arrays["episode_returns"], np.where(whole, returns, np.nan))
    assert 0 < whole.sum() < len(games)
    assert {name for name, *_ in recording.scalars} == {"charts/episodic_return"}
    assert sorted(total for _, total, _ in recording.scalars) == sorted(returns[whole])


def test_stored_outputs_are_the_teachers_and_actions_are_drawn_from_them(recording):
    arrays = recording.arrays
    obs = torch.from_numpy(arrays["frames"][arrays["stack_index"]])
    with torch.no_grad():
        outputs = [recording.agent(chunk) for chunk in obs.split(256)]
    logits, values = (torch.cat(x) for x in zip(*outputs, strict=True))
    probs = arrays["action_probs"]
    assert probs.max() > 0.6, "the policy has opinions"
    np.testing.assert_allclose(probs, logits.softmax(-1), atol=1e-5)
    np.testing.assert_allclose(arrays["values"], values, atol=1e-4)
    counts = np.bincount(arrays["actions"], minlength=4)
    assert (abs(counts - probs.sum(0)) < 5 * np.sqrt((probs * (1 - probs)).sum(0))).all()


def test_what_a_forced_step_brings_belongs_to_the_step_before():
    agent, log = collect.Agent("low", 2), writer()
    arrays = collect.collect(agent, Script(1), 8, 1, False, None, CPU, log)
    # steps 3 and 6 are forced
    assert arrays["rewards"].tolist() == [1, 2 + 3, 4, 5 + 6, 7, 8]
    assert arrays["dones"].tolist() == [False, False, False, True, False, False]
    assert log.scalars == [("charts/episodic_return", 21, 6)]
    assert arrays["episode_returns"][0] == 21 and np.isnan(arrays["episode_returns"][1])


@pytest.mark.parametrize("steps", [60, 57], ids=["whole", "stopped"])
def test_memory_is_taken_for_one_frame_a_step_and_the_blank_one(steps):
    """NumPy tells tracemalloc what it allocates."""
    agent, games = collect.Agent("low", 2), Script(16, stop_at=steps)
    tracemalloc.start()
    arrays = collect.collect(agent, games, 16 * 60, 1, False, None, CPU)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(arrays["frames"][:, 0, 0], [0, *list(range(steps)) * 16])
    assert peak < 1.25 * (1 + 16 * 60) * 84 * 84


@pytest.mark.parametrize("epsilon, outputs", [(None, "action_probs"), (0.5, "q_values")])
def test_greedy_takes_the_best_action_and_rewards_are_raw(epsilon, outputs):
    agent = opinionated_agent(collect.Agent, "low", 6)
    arrays = record("up_n_down", 2, agent, 160, greedy=True, epsilon=epsilon).arrays
    np.testing.assert_array_equal(arrays["actions"], arrays[outputs].argmax(1))
    assert max(arrays["rewards"]) >= 100


def test_q_values_are_recorded_and_played_epsilon_greedily():
    agent = opinionated_agent(collect.Agent, "low", 6)
    arrays = record("pong", 4, agent, 600, epsilon=0.5).arrays
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
    arrays = collect.collect(collect.Agent("low", 2), Script(4), 3, 1, False, None, CPU)
    assert arrays["env_index"].tolist() == [0, 1, 2, 3] == arrays["episode_index"].tolist()
    assert np.isnan(arrays["episode_returns"]).tolist() == [True] * 4


def test_seeds_give_different_games_and_the_same_seed_the_same():
    agent = collect.Agent("low", 6)
    first, again, other = (record("pong", 2, agent, 80, seed).arrays for seed in (1, 1, 2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["actions"] != other["actions"]).any()
    seeds = [collect.game_seeds(16, seed, purpose) for seed in (1, 2) for purpose in (1, 2, 3)]
    assert len(np.unique(seeds)) == 6 * 16
    assert 0 <= np.min(seeds) and np.max(seeds) < 2**31


def test_file_holds_the_documented_arrays(chain):
    folder, _ = chain
    path = folder / "buffers" / "PongNoFrameskip-v4.npz"
    with np.load(path) as buffer:
        arrays = {name: buffer[name] for name in buffer}
    meta = json.loads(str(arrays.pop("meta")))
    n = meta["args"]["num_samples"] // 2 * 2
    documented = {
        "frames": ("uint8", n + 1, 84, 84),
        "stack_index": ("int32", n, 4),  # Pong has no lives, so that FIRE is never forced
        "action_probs": ("float32", n, 6),
        "values": ("float32", n),
        "actions": ("uint8", n),
        "rewards": ("float32", n),
        "dones": ("bool", n),
        "env_index": ("int32", n),
        "episode_index": ("int32", n),
        "episode_returns": ("float32", arrays["episode_index"].max() + 1),
    }
    assert {name: (x.dtype.name, *x.shape) for name, x in arrays.items()} == documented
    assert meta["env_id"] == "PongNoFrameskip-v4"
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
