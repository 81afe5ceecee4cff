"""Teachers of CleanRL and Stable-Baselines3, read as their libraries compute them."""

import io
import json
import pickle
import sys
import zipfile
from collections import deque

import actor_distill as distill
import collect_buffer as collect
import finetune_student as finetune
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from ale_py.vector_env import AtariVectorEnv
from conftest import ROOT, run_main, run_script, unpacked
from gymnasium.vector import AutoresetMode
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations
from test_buffer import Recorder

sys.path.insert(0, str(ROOT / "benchmark"))
from q_teacher import VectorGames  # noqa: E402

GAME, ACTIONS = "BreakoutNoFrameskip-v4", 4
WIDE, NARROW = (32, 64, 64, 512), (4, 6, 8, 24)
FIRE = {"fire_on_life_loss": True, "repeat_first_frame": True, "restart_stack": True,
        "greedy": False}


class CleanRL(nn.Module):
    """The layers of CleanRL's Atari agents under their names: PPO's two heads, or DQN's one."""

    def __init__(self, kind, widths, num_actions=ACTIONS):
        super().__init__()
        c1, c2, c3, hidden = widths
        layers = [nn.Conv2d(4, c1, 8, 4), nn.ReLU(), nn.Conv2d(c1, c2, 4, 2), nn.ReLU(),
                  nn.Conv2d(c2, c3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(c3 * 49, hidden),
                  nn.ReLU()]
        if kind == "dqn":
            layers.append(nn.Linear(hidden, num_actions))
        else:
            self.actor, self.critic = nn.Linear(hidden, num_actions), nn.Linear(hidden, 1)
        self.network, self.kind = nn.Sequential(*layers), kind

    def forward(self, obs):
        hidden = self.network(obs / 255.0)
        return hidden if self.kind == "dqn" else (self.actor(hidden), self.critic(hidden)[:, 0])


def observations(count=64):
    """Real ones of Breakout under random actions, uint8 [count, 4, 84, 84]."""
    (envs, _), = collect.make_envs("breakout", 1, False, 0.0)
    envs.reset(seed=np.array([1]))
    found = []
    for action in np.random.default_rng(0).integers(0, ACTIONS, count):
        envs.send(np.array([action]))
        found.append(envs.recv()[0][0].copy())
    envs.close()
    return torch.from_numpy(np.stack(found))


def train(model, obs, steps=300):
    """A few hundred steps towards outputs that depend on the screen."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    wanted = nn.functional.one_hot(obs.float().mean((1, 2, 3)).mul(97).long() % ACTIONS, ACTIONS)
    for i in range(steps):
        rows = torch.arange(8 * i, 8 * i + 8) % len(obs)
        out = model(obs[rows].float())
        logits, value = out if isinstance(out, tuple) else (out, out.sum(-1))
        loss = (3 * wanted[rows] - logits).square().mean() + (value - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def obs():
    return observations()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, obs):
    """A file of each accepted kind, and what its own library computes."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    torch.manual_seed(0)
    for kind, widths in (("ppo", WIDE), ("ppo", NARROW), ("dqn", WIDE), ("dqn", NARROW)):
        model = train(CleanRL(kind, widths), obs)
        path = folder / f"cleanrl_{kind}_{widths[0]}"  # no suffix: the content tells
        torch.save(model.state_dict(), path)
        with torch.no_grad():
            out = model(obs.float())
        probs_or_q, values = (out, out.amax(-1)) if kind == "dqn" else (out[0].softmax(-1), out[1])
        found[path.name] = path, probs_or_q, values
    small = {"features_extractor_kwargs": {"features_dim": 96}}
    for name, policy_kwargs in (("shared", {}), ("separate", {"share_features_extractor": False})):
        model = PPO("CnnPolicy", VectorGames("breakout", 4, 1), n_steps=32, batch_size=64, seed=1,
                    learning_rate=1e-3, policy_kwargs=policy_kwargs | small).learn(384)
        model.save(folder / f"sb3_ppo_{name}")
        with torch.no_grad():
            probs = model.policy.get_distribution(obs).distribution.probs
            values = model.policy.predict_values(obs)[:, 0]
        found[f"sb3_ppo_{name}"] = folder / f"sb3_ppo_{name}.zip", probs, values
    model = DQN("CnnPolicy", VectorGames("breakout", 4, 1), buffer_size=2000, learning_starts=64,
                learning_rate=1e-3, seed=1, train_freq=1, policy_kwargs=small).learn(384)
    model.save(folder / "sb3_dqn")
    with torch.no_grad():
        q = model.q_net(obs)
    found["sb3_dqn"] = folder / "sb3_dqn.zip", q, q.amax(-1)
    return found


KINDS = {"cleanrl_ppo_32": ("CleanRL PPO", "high"), "cleanrl_ppo_4": ("CleanRL PPO", "4-6-8-24"),
         "cleanrl_dqn_32": ("CleanRL DQN", "high"), "cleanrl_dqn_4": ("CleanRL DQN", "4-6-8-24"),
         "sb3_ppo_shared": ("Stable-Baselines3 PPO", "32-64-64-96"),
         "sb3_ppo_separate": ("Stable-Baselines3 PPO", "32-64-64-96"),
         "sb3_dqn": ("Stable-Baselines3 DQN", "32-64-64-96")}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_the_teachers_own_library(name, teachers, obs):
    path, expected, values = teachers[name]
    description, agent = collect.load_foreign(path, GAME, ACTIONS)
    assert (description["phase"], description["capacity"]) == KINDS[name]
    agent = agent.to(memory_format=torch.channels_last)
    with torch.no_grad():
        outputs, found = agent(obs)
    outputs = outputs if "dqn" in name else outputs.softmax(-1)
    assert expected.std(0).max() > 1e-4, "the teacher's outputs depend on what it sees"
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_modules_are_taken_off(prefix, teachers, tmp_path):
    path, *_ = teachers["cleanrl_ppo_4"]
    weights = {prefix + name: x for name, x in torch.load(path, weights_only=True).items()}
    torch.save(weights, tmp_path / "wrapped.pt")
    _, wrapped = collect.load_foreign(tmp_path / "wrapped.pt", GAME, ACTIONS)
    _, plain = collect.load_foreign(path, GAME, ACTIONS)
    assert all((x == y).all() for x, y in zip(wrapped.parameters(), plain.parameters()))


def collect_args(folder, teacher, **changes):
    return collect.Args(**{"env_id": GAME, "teacher_path": str(teacher), "num_envs": 4,
                           "num_samples": 1500, "buffer_path": str(folder / "buffer.npz"),
                           "device": "cpu", **changes})


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_goes_through_collection_distillation_and_evaluation(
        name, teachers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, *_ = teachers[name]
    run_main(collect, collect_args(tmp_path, path))
    assert f"teacher     {KINDS[name][0]}" in capsys.readouterr().out
    q_network = "dqn" in name
    with np.load("buffer.npz") as buffer:
        meta = json.loads(str(buffer["meta"]))
        stacks = buffer["frames"][buffer["stack_index"]]
        assert ("q_values" in buffer, "action_probs" in buffer) == (q_network, not q_network)
        stored, values = buffer["q_values" if q_network else "action_probs"], buffer["values"]
        actions = buffer["actions"]
    assert stored.dtype == np.float32 and stored.shape == (1500, ACTIONS)
    assert meta["targets"] == ("q_values" if q_network else "action_probs")
    assert meta["protocol"]["fire_on_life_loss"] is True
    assert meta["protocol"]["repeat_first_frame"] is name.startswith("cleanrl")
    assert meta["epsilon"] == (0.05 if q_network else None)
    _, agent = collect.load_foreign(path, GAME, ACTIONS)
    with torch.no_grad():
        outputs, expected_values = agent(torch.from_numpy(stacks))
    outputs = outputs if q_network else outputs.softmax(-1)
    np.testing.assert_allclose(stored, outputs, atol=1e-4)
    np.testing.assert_allclose(values, expected_values, atol=1e-4)
    if q_network:
        np.testing.assert_array_equal(values, stored.max(1))
        # 1 in 20 actions is drawn at random, of which 1 in 4 is the best one all the same
        share = (actions != stored.argmax(1)).mean()
        assert abs(share - 0.05 * 0.75) < 5 * (0.0375 / 1500) ** 0.5

    for loss in ("kl", "mse", "nll") if q_network else ("kl", "nll"):
        run_main(distill, distill.Args(
            env_id=GAME, buffer_path="buffer.npz", capacity="low", epochs=1, eval_steps=40,
            loss=loss, num_envs=2, device="cpu", overwrite=True, save_path="student.pt",
            exp_name=loss))
        student, _ = distill.load_checkpoint("student.pt", GAME, ACTIONS, "")
        result, = (json.loads(file.read_text())
                   for file in tmp_path.glob(f"runs/*__{loss}__*/eval.json"))
        assert result["protocol"] == student["protocol"] == meta["protocol"] | {
            "greedy": loss == "mse"}
        assert result["greedy"] is (loss == "mse") and result["episodes"] >= 2
        assert f"validation/{loss}" in student["validation"]
        assert ("validation/entropy_gap" in student["validation"]) == (loss != "mse")
    if name == "cleanrl_ppo_32":
        run_main(distill, distill.Args(env_id=GAME, eval_only="student.pt", eval_steps=20,
                                       num_envs=2, device="cpu", exp_name="again"))
        again, = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*__again__*/*.json"))
        assert again["protocol"]["fire_on_life_loss"] is True


@pytest.mark.parametrize("game, press, steps", [("breakout", 1, 400), ("ms_pacman", 0, 900)])
def test_a_stack_begins_as_in_the_sources_wrappers(game, press, steps):
    """Against the bare emulator, SB3's stacking, CleanRL's deque and envpool's, which runs on.

    FIRE, or NOOP in a game without it, is pressed by hand.
    """
    bare = AtariVectorEnv(game, 3, autoreset_mode=AutoresetMode.SAME_STEP,
                          reward_clipping=False, **collect.preprocessing())
    num_actions = int(bare.single_action_space.n)
    all_envs = blank, repeated, running = [
        collect.make_envs(game, 3, False, 0.0, FIRE | {
            "repeat_first_frame": repeat, "restart_stack": restart})[0][0]
        for repeat, restart in ((False, True), (True, True), (True, False))]
    seeds = collect.game_seeds(3, 1)
    frame, info = bare.reset(seed=seeds)
    frame = frame[:, 3:]
    sb3 = StackedObservations(3, 4, gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), "first")
    expected_blank = sb3.reset(frame)
    cleanrl, envpool = ([deque([x[0]] * 4, maxlen=4) for x in frame] for _ in range(2))
    found = [envs.reset(seed=seeds)[0] for envs in all_envs]
    lives, lost, presses, ends = info["lives"].copy(), np.zeros(3, bool), 0, 0
    rng = np.random.default_rng(0)
    for _ in range(steps):
        np.testing.assert_array_equal(found[0], expected_blank)
        np.testing.assert_array_equal(found[1], [np.stack(x) for x in cleanrl])
        np.testing.assert_array_equal(found[2], [np.stack(x) for x in envpool])
        for envs in all_envs:
            np.testing.assert_array_equal(envs.new_life, lost)
        action = rng.integers(0, num_actions, 3)
        for envs in all_envs:
            envs.send(action)
        bare.send(np.where(lost, press, action))
        found = [envs.recv()[0] for envs in all_envs]
        frame, _, terminated, _, info = bare.recv()
        frame = frame[:, 3:]
        begins = lost | terminated
        presses, ends = presses + lost.sum(), ends + terminated.sum()
        expected_blank, _ = sb3.update(
            frame, begins, [{"terminal_observation": x} for x in frame])
        for e in range(3):
            cleanrl[e].extend([frame[e, 0]] * (4 if begins[e] else 1))
            envpool[e].extend([frame[e, 0]] * (4 if terminated[e] else 1))
        lost = (info["lives"] < lives) & ~terminated
        lives = info["lives"].copy()
    assert presses > (10 if press else 4) and ends > (2 if press else 0)


def test_without_the_protocol_the_games_are_untouched():
    bare = AtariVectorEnv("breakout", 2, autoreset_mode=AutoresetMode.SAME_STEP,
                          reward_clipping=False, **collect.preprocessing())
    (games, _), = collect.make_envs("breakout", 2, False, 0.0)
    seeds = collect.game_seeds(2, 1)
    pairs = [(bare.reset(seed=seeds)[0], games.reset(seed=seeds)[0])]
    for action in np.random.default_rng(0).integers(0, ACTIONS, (300, 2)):
        for envs in (bare, games):
            envs.send(action)
        pairs.append((bare.recv()[0], games.recv()[0]))
        assert not games.new_life.any()
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


class Idle(nn.Module):
    """A policy that only ever does nothing, and never presses FIRE."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, obs):
        logits = torch.tensor([30.0, 0, 0, 0]).expand(len(obs), ACTIONS)
        return logits, logits[:, 0]


def test_games_end_only_where_fire_is_pressed():
    ends = {True: [], False: []}
    for fire in (True, False):
        groups = collect.make_envs("breakout", 2, False, 0.0, FIRE | {"fire_on_life_loss": fire})
        collect.collect(Idle(), groups, 1000, 1, False, lambda *end: ends[fire].append(end))
    assert len(ends[True]) >= 4 and not ends[False]
    groups = distill.make_envs("breakout", 2, False, 0.0, FIRE)
    assert len(distill.play(Idle(), groups, 300, 1, False)[0]) >= 2


@pytest.mark.parametrize("game, repeat, restart", [
    ("breakout", True, True), ("breakout", False, True), ("space_invaders", True, True),
    ("breakout", True, False), ("breakout", False, False), ("ms_pacman", True, False)])
def test_pressed_steps_are_not_recorded_and_all_others_are(game, repeat, restart):
    """Also where the recording is cut short, after 1,200 of its 2,500 samples."""
    protocol = FIRE | {"repeat_first_frame": repeat, "restart_stack": restart}
    groups = []
    device = "cpu" if repeat else "cuda"  # one group of games or two
    for envs, part in collect.make_envs(game, 3, False, 0.0, protocol, device):
        recorder = Recorder(envs)
        recorder.pressed, send = [], recorder.send

        def send_and_note(action, recorder=recorder, send=send):
            recorder.pressed.append(recorder.new_life.copy())
            send(action)

        recorder.send = send_and_note
        groups.append((recorder, part))
    agent = collect.Agent("low", int(envs.single_action_space.n))
    recv, cut_short = recorder.recv, not repeat or game == "ms_pacman"

    def receive_or_stop():
        if cut_short and len(recorder.log) == 400:
            raise KeyboardInterrupt(2)
        return recv()

    recorder.recv = receive_or_stop
    arrays, stopped = collect.collect(agent, groups, 2500, 1, False, lambda *end: None)
    arrays = unpacked(arrays)
    assert (stopped is not None) == cut_short == (len(arrays["actions"]) < 2500)
    presses = 0
    for envs, part in groups:
        for e in range(part.start, part.stop):
            rows = np.flatnonzero(arrays["env_index"] == e)
            row, rewards, dones = -1, np.zeros(len(rows)), np.zeros(len(rows), bool)
            for (obs, action, reward, done), pressed in zip(envs.log, envs.pressed):
                i = e - part.start
                if not pressed[i]:
                    row += 1
                    if row == len(rows):
                        break
                    at = rows[row]
                    rebuilt = arrays["frames"][arrays["stack_index"][at]]
                    np.testing.assert_array_equal(rebuilt, obs[i])
                    assert arrays["actions"][at] == action[i]
                presses += pressed[i]
                rewards[row] += reward[i]
                dones[row] |= done[i]
            assert row >= len(rows) - 1
            np.testing.assert_array_equal(arrays["rewards"][rows], rewards)
            np.testing.assert_array_equal(arrays["dones"][rows], dones)
    assert presses > (2 if game == "ms_pacman" else 5)
    # the observation of each pressed step is kept where later stacks show it
    unfinished = 3 if cut_short else 0
    assert restart == (len(arrays["frames"]) <= len(arrays["actions"]) + 1 + unfinished)
    returns = np.bincount(arrays["episode_index"], arrays["rewards"])
    known = ~np.isnan(arrays["episode_returns"])
    assert known.any() or game == "ms_pacman"
    np.testing.assert_array_equal(arrays["episode_returns"][known], returns[known])


def test_which_changes_of_the_lives_are_a_new_life(monkeypatch):
    """Not the last one's loss, as a game may go on for a while at 0, and not a new game's count."""
    (games, _), = collect.make_envs("breakout", 1, False, 0.0, FIRE)
    games.reset(seed=np.array([1]))
    obs, steps = np.zeros((1, 4, 84, 84), np.uint8), iter([
        # lives, frame of the game, whether a new life begins, age of the stack
        (5, 904, False, 1), (4, 908, True, 2), (4, 912, False, 0), (6, 916, False, 1),
        (5, 2, False, 0),
        (1, 6, True, 1), (0, 10, False, 0), (0, 14, False, 1), (5, 2, False, 0)])
    for lives, frame, new_life, age in steps:
        info = {"lives": np.array([lives]), "episode_frame_number": np.array([frame])}
        nothing = np.zeros(1), np.zeros(1, bool), np.zeros(1, bool)
        monkeypatch.setattr(AtariVectorEnv, "recv", lambda envs: (obs.copy(), *nothing, info))
        games.recv()
        assert (games.new_life[0], games.age[0]) == (new_life, age), (lives, frame)


def test_what_a_pressed_step_brings_belongs_to_the_step_before():
    class Script:
        """One game: a life is lost in steps 2 and 5, and every step n brings the reward n."""

        repeat_first_frame, restart_stack = False, True
        single_action_space = gym.spaces.Discrete(2)

        def reset(self, seed):
            self.step, self.age, self.new_life = 0, np.zeros(1, int), np.zeros(1, bool)
            return np.zeros((1, 4, 84, 84), np.uint8), {}

        def send(self, action):
            self.step += 1

        def recv(self):
            self.new_life = np.array([self.step in (2, 5)])
            ended = np.array([self.step == 6])  # in a pressed step
            return (np.zeros((1, 4, 84, 84), np.uint8), np.array([float(self.step)]), ended,
                    np.zeros(1, bool), {})

    ends = []
    arrays, _ = collect.collect(collect.Agent("low", 2), [(Script(), slice(0, 1))], 6, 1, False,
                                lambda *end: ends.append(end))
    # steps 3 and 6 are pressed
    assert arrays["rewards"].tolist() == [1, 2 + 3, 4, 5 + 6, 7, 8]
    assert arrays["dones"].tolist() == [False, False, False, True, False, False]
    assert ends == [(4, 21.0, 6)] and arrays["episode_returns"][0] == 21


def test_flag_and_game_without_fire(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, *_ = teachers["cleanrl_ppo_4"]
    run_main(collect, collect_args(tmp_path, path, num_samples=40, fire_on_life_loss="off"))
    with np.load("buffer.npz") as buffer:
        assert json.loads(str(buffer["meta"]))["protocol"]["fire_on_life_loss"] is False


def test_envpool_is_a_flag_of_cleanrls_policies(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, *_ = teachers["cleanrl_ppo_4"]
    run_main(collect, collect_args(tmp_path, path, envpool=True))
    with np.load("buffer.npz") as buffer:
        assert json.loads(str(buffer["meta"]))["protocol"] == FIRE | {"restart_stack": False}
        assert len(buffer["frames"]) > 1501 and buffer["stack_index"].max() > 1500
    args = dict(env_id=GAME, buffer_path="buffer.npz", capacity="low", epochs=1, eval_steps=20,
                num_envs=2, device="cpu", save_path="student.pt")
    run_main(distill, distill.Args(**args))
    student, _ = distill.load_checkpoint("student.pt", GAME, ACTIONS, "")
    assert student["protocol"]["restart_stack"] is False
    for name in ("cleanrl_dqn_4", "sb3_ppo_shared"):
        with pytest.raises(collect.UsageError, match="--envpool: .*leave the flag out"):
            run_main(collect, collect_args(tmp_path, teachers[name][0], envpool=True,
                                           overwrite=True))


def test_finetuning_follows_the_protocol_and_learns_nothing_from_pressed_steps(
        teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agent = finetune.Agent("low", ACTIONS)
    torch.save({"format_version": 1, "phase": "distilled", "env_id": GAME, "capacity": "low",
                "num_actions": ACTIONS, "global_step": 0, "args": {}, "model": agent.state_dict(),
                "evaluation": None, "protocol": FIRE, "teacher": None}, "student.pt")
    update, seen, sent = finetune.ppo_update, [], []

    def spy(agent, optimizer, loss_function, *batch, **more):
        seen.append(batch[3])  # the advantages
        return update(agent, optimizer, loss_function, *batch, **more)

    send = finetune.Games.send
    monkeypatch.setattr(finetune, "ppo_update", spy)
    monkeypatch.setattr(finetune.Games, "send", lambda envs, action: (
        sent.append(envs.new_life.copy()), send(envs, action)))
    run_main(finetune, finetune.Args(
        env_id=GAME, student_path="student.pt", save_path="tuned.pt", num_envs=4, num_steps=200,
        total_timesteps=800, num_minibatches=4, update_epochs=1, eval_steps=0, device="cpu"))
    pressed = sum(int(x.sum()) for x in sent)
    assert pressed > 5 and int((torch.cat(seen) == 0).sum()) == pressed
    tuned, _ = finetune.load_checkpoint("tuned.pt", GAME, ACTIONS, "")
    assert tuned["protocol"] == FIRE


def refused(folder, content, *flags, game=GAME):
    """The one line with which collect_buffer.py refuses a file of this content."""
    (folder / "teacher.pt").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(collect.UsageError) as error:
            run_main(collect, collect_args(folder, "teacher.pt", env_id=game, **dict(flags)))
    assert not (folder / "buffer.npz").exists()
    message = str(error.value)
    assert "teacher.pt" in message and "\n" not in message
    return message


def saved(weights):
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


class Screen(gym.Env):
    """A game of noise, for policies that this project does not read."""

    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


BYTES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


@pytest.mark.parametrize("policy, observation, action, options, found", [
    ("MlpPolicy", gym.spaces.Box(0, 1, (5,)), gym.spaces.Discrete(4), {}, "MlpPolicy"),
    ("CnnPolicy", BYTES, gym.spaces.Box(-1, 1, (2,)), {}, "continuous actions"),
    ("CnnPolicy", BYTES, gym.spaces.Discrete(4), {"net_arch": [64]}, "mlp_extractor"),
    ("CnnPolicy", gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), gym.spaces.Discrete(4), {},
     "4 frames of 84x84"),
    ("CnnPolicy", gym.spaces.Box(0, 255, (4, 96, 96), np.uint8), gym.spaces.Discrete(4), {},
     "4 frames of 84x84"),
    ("CnnPolicy", BYTES, gym.spaces.Discrete(6), {}, "with 6 actions, while"),
])
def test_other_policies_of_stable_baselines3_are_refused(
        policy, observation, action, options, found, tmp_path):
    model = PPO(policy, Screen(observation, action), n_steps=8, batch_size=8, policy_kwargs=options)
    model.save(tmp_path / "model")
    assert found in refused(tmp_path, (tmp_path / "model.zip").read_bytes())


def test_an_mlp_q_network_is_refused(tmp_path):
    DQN("MlpPolicy", Screen(gym.spaces.Box(0, 1, (5,)), gym.spaces.Discrete(4)),
        buffer_size=10).save(tmp_path / "model")
    assert "MlpPolicy" in refused(tmp_path, (tmp_path / "model.zip").read_bytes())


def zipped(policy, how=zipfile.ZIP_STORED, **others):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in {"policy.pth": policy, **others}.items():
            archive.writestr(name, content)
    return file.getvalue()


class Trap:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_foreign_and_hostile_files_are_refused_in_one_line(teachers, tmp_path):
    weights = CleanRL("ppo", NARROW).state_dict()
    recurrent = weights | {"lstm.weight_ih_l0": torch.zeros(4, 24)}
    unknown = {"body.0.weight": torch.zeros(4, 4, 8, 8)}
    missing = {name: x for name, x in weights.items() if name != "network.7.bias"}
    flax = b"\x93\x81\xa6params\x81\xa6Conv_0\x81\xa6kernel" + bytes(500)
    good = teachers["sb3_dqn"][0].read_bytes()
    cases = {
        "recurrent": saved(recurrent), "layers 'body.0';": saved(unknown), "JAX": flax,
        "network.7": saved(missing), "no state dict but a list": saved([1, 2]),
        "damaged": good[:len(good) // 2], "MlpPolicy": saved({"x": torch.zeros(3)}),
        "BadZipFile": b"", "ValueError": zipped(bytes(50_000_000), zipfile.ZIP_DEFLATED),
        "UnpicklingError": saved(Trap()),
        "not finite": saved(weights | {"actor.bias": torch.full((ACTIONS,), float("nan"))}),
        "than float32": saved({name: x.double() for name, x in weights.items()}),
        "with 4 actions, while": saved(weights)}
    for found, content in cases.items():
        game = "PongNoFrameskip-v4" if "actions" in found else GAME
        assert found in refused(tmp_path, content, game=game), found
    stretched = {name: torch.zeros(1).expand(x.shape) for name, x in CleanRL(
        "ppo", WIDE).state_dict().items()}
    assert "larger than the file" in refused(tmp_path, saved(stretched))
    assert "\x1b" not in refused(tmp_path, saved({"\x1b[31mred": torch.zeros(1, 1, 1, 1)}))
    for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # these inflate without a limit
        assert "ValueError" in refused(tmp_path, zipped(bytes(1000), how, pad=bytes(2000)))
    flipped = bytearray(good)
    flipped[good.index(b"policy.pth") + 2_000_000] ^= 1
    assert "damaged" in refused(tmp_path, bytes(flipped))
    assert "UnpicklingError" in refused(tmp_path, zipped(saved(Trap())))
    assert not (tmp_path / "executed").exists()


def test_the_pickled_rest_of_a_zip_is_never_read(teachers, tmp_path):
    path, expected, _ = teachers["sb3_ppo_shared"]
    with zipfile.ZipFile(path) as archive:
        policy = archive.read("policy.pth")
    trap = pickle.dumps(Trap())
    content = zipped(policy, data=trap, **{"pytorch_variables.pth": trap})
    (tmp_path / "teacher.zip").write_bytes(content)
    assert collect.load_foreign(tmp_path / "teacher.zip", GAME, ACTIONS) is not None
    assert not (tmp_path / "executed").exists()


def own_checkpoint(**changes):
    agent = finetune.Agent("low", ACTIONS)
    return {"format_version": 1, "phase": "ppo", "env_id": GAME, "capacity": "low",
            "num_actions": ACTIONS, "global_step": 0, "args": {}, "model": agent.state_dict(),
            "evaluation": None, **changes}


def test_own_checkpoints_are_not_taken_for_others(tmp_path):
    torch.save(own_checkpoint(checkpoint="kernel/params.pt"), tmp_path / "teacher.pt")
    assert collect.load_foreign(tmp_path / "teacher.pt", GAME, ACTIONS) is None
    assert "do not fit" in refused(tmp_path, saved(own_checkpoint(capacity=(8, 16, 16, 128))))
    stretched = {name: torch.zeros(1).expand(x.shape) for name, x in finetune.Agent(
        "high", ACTIONS).state_dict().items()}
    assert "do not fit" in refused(
        tmp_path, saved(own_checkpoint(capacity="high", model=stretched)))


def test_odd_tensors_give_one_line_too(tmp_path):
    weights = CleanRL("ppo", NARROW).state_dict()
    weights["actor.weight"] = weights["actor.weight"].to_sparse_csr()
    torch.save(weights, tmp_path / "sparse.pt")
    result = run_script(tmp_path, "collect_buffer.py", "--env-id", GAME, "--teacher-path",
                        "sparse.pt")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr


def test_greedy_q_networks_and_games_without_fire_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(CleanRL("dqn", NARROW, 9).state_dict(), "dqn")
    changes = {"env_id": "MsPacmanNoFrameskip-v4", "num_samples": 200, "greedy": True}
    run_main(collect, collect_args(tmp_path, "dqn", **changes))
    with np.load("buffer.npz") as buffer:
        meta = json.loads(str(buffer["meta"]))
        np.testing.assert_array_equal(buffer["actions"], buffer["q_values"].argmax(1))
    assert meta["epsilon"] == 0 and meta["protocol"]["fire_on_life_loss"] is True
    with pytest.raises(collect.UsageError, match="--epsilon 0.5"):
        run_main(collect, collect_args(tmp_path, "dqn", epsilon=0.5, overwrite=True, **changes))


def test_students_of_q_values_are_sampled_where_a_temperature_is_given(
        teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(collect, collect_args(tmp_path, teachers["cleanrl_dqn_4"][0], num_samples=300))
    args = dict(env_id=GAME, num_envs=2, device="cpu", eval_steps=20)
    run_main(distill, distill.Args(buffer_path="buffer.npz", loss="mse", epochs=1, capacity="low",
                                   save_path="student.pt", exp_name="best", **args))
    run_main(distill, distill.Args(eval_only="student.pt", eval_temperature=0.01,
                                   exp_name="sampled", **args))
    (best,), (sampled,) = ([json.loads(file.read_text()) for file in tmp_path.glob(
        f"runs/*__{name}__*/eval.json")] for name in ("best", "sampled"))
    assert (best["greedy"], sampled["greedy"], sampled["temperature"]) == (True, False, 0.01)
    with pytest.raises(distill.UsageError, match="--eval-temperature 0.5: --eval-greedy"):
        run_main(distill, distill.Args(eval_only="student.pt", eval_temperature=0.5,
                                       eval_greedy=True, **args))


def test_share_is_not_comparable_between_protocols():
    evaluation = {"mean": 10.0, "greedy": False, "repeat_action_probability": 0.0}
    own = evaluation | {"protocol": collect.default_protocol()}
    assert "not comparable" not in distill.share_of_teacher(own, {"evaluation": evaluation})
    assert "protocol differs" in distill.share_of_teacher(
        own | {"protocol": FIRE}, {"evaluation": evaluation})


def test_a_finetuning_goes_on_by_the_protocol_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = dict(env_id=GAME, student_path="student.pt", save_path="tuned.pt", num_envs=2,
                num_steps=16, num_minibatches=2, update_epochs=1, eval_steps=0, device="cpu")
    torch.save(own_checkpoint(protocol=FIRE), "student.pt")
    run_main(finetune, finetune.Args(total_timesteps=32, **args))
    torch.save(own_checkpoint(), "student.pt")
    run_main(finetune, finetune.Args(total_timesteps=64, resume=True, **args))
    tuned, _ = finetune.load_checkpoint("tuned.pt", GAME, ACTIONS, "")
    assert tuned["protocol"] == FIRE and tuned["global_step"] == 64


def test_a_distillation_from_before_the_losses_goes_on(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(collect, collect_args(tmp_path, teachers["cleanrl_ppo_4"][0], num_samples=200))
    args = dict(env_id=GAME, buffer_path="buffer.npz", save_path="student.pt", eval_steps=0,
                capacity="low", device="cpu")
    run_main(distill, distill.Args(epochs=1, **args))
    old = torch.load("student.pt", weights_only=True)
    del old["args"]["loss"], old["protocol"]
    torch.save(old, "student.pt")
    run_main(distill, distill.Args(epochs=2, resume=True, **args))
    assert torch.load("student.pt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("name, flags, line", [
    ("cleanrl_ppo_4", "--epsilon 0.1", "--epsilon 0.1: "),
    ("cleanrl_dqn_4", "--epsilon 1.5", "--epsilon 1.5: must be 0 to 1"),
])
def test_epsilon_belongs_to_q_networks(name, flags, line, teachers, tmp_path):
    result = run_script(tmp_path, "collect_buffer.py", "--env-id", GAME, "--teacher-path",
                        teachers[name][0], *flags.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {line}") and len(result.stderr.splitlines()) == 1


def test_losses_that_do_not_fit_the_buffer(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, loss, temperature in (("cleanrl_ppo_4", "mse", None), ("cleanrl_dqn_4", "nll", 0.1)):
        run_main(collect, collect_args(tmp_path, teachers[name][0], num_samples=200,
                                       overwrite=True))
        with pytest.raises(distill.UsageError, match="--loss mse: buffer.npz|--temperature 0.1"):
            run_main(distill, distill.Args(env_id=GAME, buffer_path="buffer.npz", loss=loss,
                                           temperature=temperature, device="cpu"))
    run_main(distill, distill.Args(env_id=GAME, buffer_path="buffer.npz", loss="mse", epochs=1,
                                   eval_steps=0, save_path="student.pt", device="cpu"))
    with pytest.raises(finetune.UsageError, match="no policy for PPO"):
        run_main(finetune, finetune.Args(env_id=GAME, student_path="student.pt", device="cpu"))
    with pytest.raises(collect.UsageError, match="imitates Q-values"):
        run_main(collect, collect_args(tmp_path, "student.pt", overwrite=True))


@pytest.mark.parametrize("change", [
    {"targets": "logits"}, {"protocol": {"silent": True}}, {"protocol": 3},
    {"protocol": FIRE | {"greedy": "yes"}}])
def test_a_buffers_meta_is_checked(change, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(collect, collect_args(tmp_path, teachers["cleanrl_dqn_4"][0], num_samples=100))
    with np.load("buffer.npz") as buffer:
        arrays = dict(buffer)
    meta = json.loads(str(arrays["meta"]))
    names = meta["action_meanings"]
    np.savez("same.npz", **arrays)
    assert distill.load_buffer("same.npz", GAME, names, "")["q_values"].shape == (100, ACTIONS)
    np.savez("other.npz", **arrays | {"meta": np.array(json.dumps(meta | change))})
    with pytest.raises(distill.UsageError, match="other.npz"):
        distill.load_buffer("other.npz", GAME, names, "")
    arrays["q_values"][7, 1] = np.inf
    np.savez("infinite.npz", **arrays)
    with pytest.raises(distill.UsageError, match="q_values is invalid, first in row 7"):
        distill.load_buffer("infinite.npz", GAME, names, "")
