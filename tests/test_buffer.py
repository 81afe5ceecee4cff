"""The replay buffer against what the environment gave and what the teacher computed."""

import itertools
import json
import struct
import zipfile
import zlib

import collect_buffer as collect
import numpy as np
import pytest
import torch
from conftest import opinionated_agent, unpacked


class Recorder:
    """An AtariVectorEnv that keeps a copy of all that passes through it."""

    def __init__(self, envs):
        self.envs, self.log = envs, []
        self.num_envs, self.single_action_space = envs.num_envs, envs.single_action_space
        self.repeat_first_frame, self.restart_stack = envs.repeat_first_frame, envs.restart_stack

    @property
    def age(self):
        return self.envs.age

    @property
    def new_life(self):
        return self.envs.new_life

    def reset(self, seed):
        self.seeds = set(seed)
        self.obs, info = self.envs.reset(seed=seed)
        return self.obs.copy(), info

    def send(self, action):
        self.action = action.copy()
        self.envs.send(action)

    def recv(self):
        obs, reward, terminated, truncated, info = self.envs.recv()
        self.log.append((self.obs, self.action, reward.copy(), terminated | truncated))
        self.obs = obs.copy()
        return obs, reward, terminated, truncated, info


def record(*games):
    """The groups of `make_envs(*games)` with a Recorder around each."""
    return [(Recorder(envs), part) for envs, part in collect.make_envs(*games)]


def joined(groups):
    """What the Recorders logged, step by step, over all games; the last step may lack some."""
    logs = itertools.zip_longest(*(envs.log for envs, _ in groups))
    return [[np.concatenate(x) for x in zip(*filter(None, step))] for step in logs]


@pytest.fixture(scope="module")
def recording():
    """Breakout, 7 games at once, 2,403 steps, recorded both ways: (arrays, log, agent, ends)."""
    torch.manual_seed(0)
    groups = record("breakout", 7, False, 0.0, None, "cuda")  # in two groups, as for a GPU
    agent = opinionated_agent(collect.Agent, "low", 4)
    with torch.no_grad():
        agent.actor.bias[1] = 2  # press FIRE often, so that games end
    ends = []
    arrays, _ = collect.collect(agent, groups, 2403, 5, False, lambda *end: ends.append(end))
    return unpacked(arrays), joined(groups), agent, ends


def samples(log, num_samples=2403, num_envs=7):
    """(sample, slot, step) in the buffer's order: slot after slot, the first ones a step longer."""
    i = 0
    for e in range(num_envs):
        for t in range(num_samples // num_envs + (e < num_samples % num_envs)):
            yield i, e, t
            i += 1


def test_observations_are_rebuilt_byte_for_byte(recording):
    arrays, log, _, _ = recording
    assert not arrays["frames"][0].any()
    assert len(arrays["frames"]) == 2404, "each frame is stored once"
    assert sum(done.sum() for _, _, _, done in log) > 7, "games ended in between"
    for i, e, t in samples(log):
        rebuilt = arrays["frames"][arrays["stack_index"][i]]
        assert rebuilt.tobytes() == log[t][0][e].tobytes(), f"sample {i}"


def test_steps_are_recorded_as_played(recording):
    arrays, log, _, _ = recording
    for i, e, t in samples(log):
        assert arrays["env_index"][i] == e
        assert arrays["actions"][i] == log[t][1][e]
        assert arrays["rewards"][i] == log[t][2][e]
        assert arrays["dones"][i] == log[t][3][e]


def test_rewards_are_raw():
    groups = record("up_n_down", 3, False, 0.0)
    agent = collect.Agent("low", groups[0][0].single_action_space.n)
    arrays, _ = collect.collect(agent, groups, 300, 1, False, lambda *end: None)
    log = joined(groups)
    assert len(set.union(*(envs.seeds for envs, _ in groups))) == 3
    for i, e, t in samples(log, 300, 3):
        assert arrays["rewards"][i] == log[t][2][e]
    assert arrays["rewards"].max() >= 10


def test_episodes_are_whole_games(recording):
    arrays, log, _, ends = recording
    returns, episode, total, open_game, seen = [], [], 0.0, False, []
    previous = None
    for i, e, t in samples(log):
        if e != previous or not open_game:
            if open_game:
                returns.append(np.nan)
            total, previous, open_game = 0.0, e, True
            seen.append(i)
        episode.append(len(seen) - 1)
        total += log[t][2][e]
        if log[t][3][e]:
            returns.append(total)
            open_game = False
    if open_game:
        returns.append(np.nan)
    np.testing.assert_array_equal(arrays["episode_index"], episode)
    np.testing.assert_array_equal(arrays["episode_returns"], np.float32(returns))
    assert np.isnan(returns).any() and not np.isnan(returns).all()
    finished = sorted(r for r in returns if not np.isnan(r))
    assert sorted(total for _, total, _ in ends) == finished


def test_stored_outputs_are_the_teachers_on_the_rebuilt_observations(recording):
    arrays, _, agent, _ = recording
    obs = torch.from_numpy(arrays["frames"][arrays["stack_index"]])
    with torch.no_grad():
        outputs = [agent(chunk) for chunk in obs.split(256)]
    logits, values = (torch.cat(x) for x in zip(*outputs))
    assert logits.softmax(-1).max() > 0.6, "the policy has opinions"
    np.testing.assert_allclose(arrays["action_probs"], logits.softmax(-1), atol=1e-5)
    np.testing.assert_allclose(arrays["values"], values, atol=1e-4)


def test_actions_are_drawn_from_the_stored_probabilities(recording):
    arrays = recording[0]
    expected = arrays["action_probs"].sum(0)
    counts = np.bincount(arrays["actions"], minlength=4)
    spread = np.sqrt((arrays["action_probs"] * (1 - arrays["action_probs"])).sum(0))
    assert (abs(counts - expected) < 5 * spread).all()


def test_greedy_takes_the_most_probable_action():
    agent = opinionated_agent(collect.Agent, "low", 6)
    groups = collect.make_envs("pong", 2, False, 0.0)
    arrays, _ = collect.collect(agent, groups, 40, 1, True, lambda *end: None)
    np.testing.assert_array_equal(arrays["actions"], arrays["action_probs"].argmax(1))


@pytest.mark.parametrize("num_envs", [4, 9])
def test_fewer_samples_than_games(num_envs):
    groups = collect.make_envs("pong", num_envs, False, 0.0)
    arrays, _ = collect.collect(collect.Agent("low", 6), groups, 3, 1, False, lambda *end: None)
    assert arrays["env_index"].tolist() == [0, 1, 2] == arrays["episode_index"].tolist()
    assert np.isnan(arrays["episode_returns"]).tolist() == [True] * 3


def test_seeds_give_different_games_and_the_same_seed_the_same():
    def play(seed):
        torch.manual_seed(0)
        agent = collect.Agent("low", 6)
        groups = collect.make_envs("pong", 4, False, 0.0)
        return unpacked(collect.collect(agent, groups, 200, seed, False, lambda *end: None)[0])

    first, again, other = play(1), play(1), play(2)
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
    n, episodes = 4001, arrays["episode_index"].max() + 1
    documented = {
        "frames": ("uint8", (n + 1, 84, 84)), "stack_index": ("int32", (n, 4)),
        "action_probs": ("float32", (n, 6)), "values": ("float32", (n,)),
        "actions": ("uint8", (n,)), "rewards": ("float32", (n,)), "dones": ("bool", (n,)),
        "env_index": ("int32", (n,)), "episode_index": ("int32", (n,)),
        "episode_returns": ("float32", (episodes,))}
    meta = json.loads(str(arrays.pop("meta")))
    assert {name: (x.dtype.name, x.shape) for name, x in arrays.items()} == documented
    assert meta["env_id"] == "PongNoFrameskip-v4" and meta["format_version"] == 1
    assert meta["action_meanings"][:2] == ["NOOP", "FIRE"]
    assert meta["teacher"]["path"] == "checkpoints/PongNoFrameskip-v4/ppo_high.pt"
    assert len(meta["teacher"]["sha256"]) == 64 and meta["teacher"]["evaluation"]["episodes"] >= 4
    assert {"steps", "capacity", "seed", "versions", "preprocessing"} <= meta.keys()
    assert path.stat().st_size / n < 150, "bytes a frame on disk"
    at_full_size = sum(x.nbytes for x in arrays.values()) / n * 540_000
    assert at_full_size < 4e9, "memory for the default number of samples"


def test_checksums_of_texts_in_a_row_are_that_of_the_whole():
    text = np.random.default_rng(0).bytes(70_000)
    for length in (0, 1, 7, 8, 4096, 69_999, 70_000):
        first, second = text[:70_000 - length], text[70_000 - length:]
        assert collect.crc32_combine(
            zlib.crc32(first), zlib.crc32(second), length) == zlib.crc32(text)


def test_an_error_while_frames_are_compressed_is_raised():
    frame = np.zeros((1, 84, 84), np.uint8)
    for last in (False, True):
        store = collect.FrameStore(1)
        store.compressors[0] = None
        store.add([0], frame)
        with pytest.raises(AttributeError):
            store.close() if last else store.add([0], frame)


def test_compressed_frames_are_an_ordinary_member_of_a_zip_file(tmp_path):
    """For NumPy, and for readers that go by the header before the member, as on a pipe."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 2, (20, 84, 84), np.uint8)
    frames *= random.integers(0, 256, (20, 1, 1), np.uint8)
    store = collect.FrameStore(4)  # the third stretch stays empty
    order = [0, 0, 0, 1, 3, 1, 3, 3, 1, 1, 0, 3, 3, 3, 1, 1, 1, 0, 0, 1]
    for start in range(0, 20, 5):
        store.add(order[start:start + 5], frames[start:start + 5])
    store.close()
    values = np.arange(5, dtype=np.float32)
    for _ in range(2):  # a signal may make it begin again
        collect.save_buffer(tmp_path / "x.npz", {
            "values": values, "frames": store, "more": values}, {"steps": 5})
    with np.load(tmp_path / "x.npz") as saved:
        assert list(saved) == ["values", "frames", "more", "meta"]
        assert json.loads(str(saved["meta"])) == {"steps": 5}
        np.testing.assert_array_equal(saved["frames"], frames[np.argsort(order, kind="stable")])
        np.testing.assert_array_equal(saved["more"], values)
        assert store.nbytes == frames.nbytes
    content = (tmp_path / "x.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
        info = archive.getinfo("frames.npy")
        signature, _, flags, method, _, _, crc, _, _, name, extra = struct.unpack_from(
            "<4s5H3L2H", content, info.header_offset)
        sizes = struct.unpack_from("<2H2Q", content, info.header_offset + 30 + name)
    assert (signature, flags, method, crc) == (b"PK\3\4", 0, zipfile.ZIP_DEFLATED, info.CRC)
    assert extra == 20 and sizes == (1, 16, info.file_size, info.compress_size)
