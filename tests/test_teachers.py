"""Teachers of CleanRL, Kostrikov's code and Stable-Baselines3, as their libraries compute them."""

import io
import json
import os
import re
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import run_main
from stable_baselines3 import DQN, PPO
from torch import nn

import actor_distill as distill
import collect_buffer as collect

GAME, ACTIONS = "BreakoutNoFrameskip-v4", 4
FOUR, ONE = (gym.spaces.Box(0, 255, (frames, 84, 84), np.uint8) for frames in (4, 1))


def modules(c1, c2, c3, hidden):
    """What the agents of CleanRL and Kostrikov consist of: body, policy or Q-values, value."""
    body = [
        *(nn.Conv2d(4, c1, 8, 4), nn.ReLU()),
        *(nn.Conv2d(c1, c2, 4, 2), nn.ReLU()),
        *(nn.Conv2d(c2, c3, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(c3 * 49, hidden), nn.ReLU()),
    ]
    actor = nn.Linear(hidden, ACTIONS)
    actor.weight.data *= 10  # outputs that depend on the screen
    return nn.Sequential(*body), actor, nn.Linear(hidden, 1)


def state_dict(modules, *names):
    """The weights of modules under the names that a library gives them."""
    named = zip(names, modules, strict=False)  # Q-networks have no value
    return {f"{name}.{x}": w for name, module in named for x, w in module.state_dict().items()}


class Screen(gym.Env):
    """Noise to look at, for models of Stable-Baselines3."""

    def __init__(self, observation=FOUR, num_actions=ACTIONS):
        self.observation_space = observation
        self.action_space = gym.spaces.Discrete(num_actions)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


def sb3_ppo(policy="CnnPolicy", screen=None, **policy_kwargs):
    return PPO(policy, screen or Screen(), n_steps=8, batch_size=8, policy_kwargs=policy_kwargs)


@pytest.fixture(scope="module")
def obs():
    """Real ones of Breakout under random actions, uint8 [64, 4, 84, 84]."""
    envs = collect.AtariEnvs("breakout", 2, 0.0, life_loss=False)
    envs.reset(seed=np.array([1, 2]))
    actions = np.random.default_rng(0).integers(0, ACTIONS, (32, 2))
    return torch.from_numpy(np.concatenate([envs.step(action)[0] for action in actions]))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, obs):
    """By name: a file, and what its own library computes, outputs and values."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    torch.manual_seed(0)
    ppo, dqn, rounded = (modules(4, 6, 8, 24) for _ in range(3))
    rounded = [module.half().float() for module in rounded]
    kostrikov = modules(32, 64, 32, 512)
    cleanrl = ("network", "actor", "critic")
    ppo_weights, dqn_weights = state_dict(ppo, *cleanrl), state_dict(dqn, "network", "network.9")
    half = {name: x.half() for name, x in state_dict(rounded, *cleanrl).items()}
    old = state_dict(kostrikov, "base.main", "dist.linear", "base.critic_linear")
    for name, (body, actor, critic), weights in (
        ("cleanrl_ppo", ppo, ppo_weights),
        ("cleanrl_dqn", dqn, dqn_weights),
        ("kostrikov", kostrikov, old),
        ("kostrikov_legacy", kostrikov, old),
        ("data_parallel", ppo, {f"module.{x}": ppo_weights[x] for x in ppo_weights}),
        ("compiled", ppo, {f"_orig_mod.{x}": ppo_weights[x] for x in ppo_weights}),
        ("both", dqn, {f"module._orig_mod.{x}": dqn_weights[x] for x in dqn_weights}),
        ("half", rounded, half),
        ("with_flags", dqn, {"model": dqn_weights, "args": {"seed": 1}}),
    ):
        path, legacy = folder / name, name == "kostrikov_legacy"  # as of torch before 1.6
        torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
        assert zipfile.is_zipfile(path) != legacy
        with torch.no_grad():
            hidden = body(obs / 255.0)
            found[name] = path, actor(hidden), critic(hidden)[:, 0]

    small = {"features_extractor_kwargs": {"features_dim": 96}}
    ppo = sb3_ppo(**small)
    dqn = DQN("CnnPolicy", Screen(), buffer_size=10, policy_kwargs=small)
    with torch.no_grad():
        ppo.policy.action_net.weight.mul_(300)
        dqn.q_net.q_net[0].weight.mul_(10)
        outputs = ppo.policy.get_distribution(obs).distribution.logits
        found["sb3_ppo"] = folder / "sb3_ppo.zip", outputs, ppo.policy.predict_values(obs)[:, 0]
        found["sb3_dqn"] = folder / "sb3_dqn.zip", dqn.q_net(obs), None
    ppo.save(folder / "sb3_ppo")
    dqn.save(folder / "sb3_dqn")
    return found


@pytest.mark.parametrize(
    "name, kind, capacity",
    [
        ("cleanrl_ppo", "CleanRL PPO", "4-6-8-24"),
        ("cleanrl_dqn", "CleanRL DQN", "4-6-8-24"),
        ("kostrikov", "Kostrikov", "32-64-32-512"),
        ("kostrikov_legacy", "Kostrikov", "32-64-32-512"),
        ("sb3_ppo", "Stable-Baselines3 PPO", "32-64-64-96"),
        ("sb3_dqn", "Stable-Baselines3 DQN", "32-64-64-96"),
        ("data_parallel", "CleanRL PPO", "4-6-8-24"),
        ("compiled", "CleanRL PPO", "4-6-8-24"),
        ("both", "CleanRL DQN", "4-6-8-24"),
        ("half", "CleanRL PPO", "4-6-8-24"),
        ("with_flags", "CleanRL DQN", "4-6-8-24"),
    ],
)
def test_outputs_are_those_of_the_teachers_own_library(name, kind, capacity, teachers, obs):
    path, expected, values = teachers[name]
    teacher, agent = collect.load_teacher(path, GAME, ACTIONS)
    assert (teacher["phase"], teacher["capacity"]) == (kind, capacity)
    assert (teacher["args"].get("loss") == "mse") == ("DQN" in kind)
    with torch.no_grad():
        outputs, found = agent.to(memory_format=torch.channels_last)(obs)
    if "DQN" not in kind:
        outputs, expected = outputs.softmax(-1), expected.softmax(-1)
        torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-5)
    assert expected.std(0).max() > 1e-4, "the teacher's outputs depend on what it sees"
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=0)


def test_a_q_network_goes_through_the_chain(teachers, tmp_path, monkeypatch, capsys):
    """Evaluated first, as its file holds no evaluation; a greedy student is compared with that."""
    monkeypatch.chdir(tmp_path)
    make = collect.AtariVectorEnv.__init__

    def make_shorter(games, *args, **options):  # the best action may keep a ball in play for ever
        make(games, *args, **options | {"max_num_frames_per_episode": 800})

    monkeypatch.setattr(collect.AtariVectorEnv, "__init__", make_shorter)
    path = teachers["sb3_dqn"][0]
    small = {"env_id": GAME, "num_envs": 2, "eval_steps": 20, "cuda": False}
    recorded = {"teacher_path": str(path), "buffer_path": "buffer.npz", "num_samples": 400}
    run_main(collect, collect.Args(**small, **recorded))
    with np.load("buffer.npz") as buffer:
        meta = json.loads(str(buffer["meta"]))
        stacks = torch.from_numpy(buffer["frames"][buffer["stack_index"]])
        q_values, actions = buffer["q_values"], buffer["actions"]
    with torch.no_grad():
        expected = DQN.load(path).q_net(stacks)
    np.testing.assert_allclose(q_values, expected, atol=1e-4)
    # 1 in 20 actions is drawn at random, of which 1 in 4 is the best one all the same
    share = (actions != q_values.argmax(1)).mean()
    assert 0 < share < 0.0375 + 5 * (0.0375 / 400) ** 0.5
    assert meta["targets"] == "q_values"
    (played,) = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*/eval.json"))
    assert len(played.pop("returns")) == len(played.pop("lengths")) == played["episodes"] >= 2
    assert meta["teacher"]["evaluation"] == played and played["greedy"] is True

    student = {"buffer_path": "buffer.npz", "capacity": "low", "epochs": 1}
    for loss, compared in (("kl", "not compared"), ("mse", f"teacher's {played['mean']:.2f}")):
        run_main(distill, distill.Args(**small, **student, loss=loss, save_path=f"{loss}.pt"))
        saved = torch.load(f"{loss}.pt", weights_only=True)
        assert f"validation/{loss}" in saved["validation"]
        assert saved["evaluation"]["greedy"] is (loss == "mse")
        assert compared in capsys.readouterr().out.splitlines()[-1]
    assert saved["args"]["loss"] == "mse"  # by which fine-tuning refuses it


def test_a_buffer_without_an_evaluation(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"num_envs": 2, "num_samples": 4, "eval_steps": 0, "buffer_path": "x.npz"}
    path = str(teachers["kostrikov"][0])
    run_main(collect, collect.Args(env_id=GAME, teacher_path=path, **small))
    *_, meta = distill.load_buffer("x.npz", GAME)
    assert meta["teacher"]["evaluation"] is None


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(SystemExit) as error:
        collect.load_teacher(path, GAME, ACTIONS)
    assert re.fullmatch(f"{path}: .*", error.value.code)
    return error.value.code


@pytest.mark.parametrize(
    "policy, screen, policy_kwargs, cause",
    [
        ("MlpPolicy", Screen(gym.spaces.Box(0, 1, (5,))), {}, "mlp_extractor.policy_net.0"),
        ("CnnPolicy", Screen(), {"net_arch": [64]}, "mlp_extractor.policy_net.0"),
        ("CnnPolicy", Screen(), {"share_features_extractor": False}, "vf_features_extractor.cnn.0"),
        ("CnnPolicy", Screen(num_actions=6), {}, r"actor.weight: .*\[6, 512\].*\[4, 512\]"),
        ("CnnPolicy", Screen(ONE), {}, r"network.0.weight: .*\[32, 1, 8, 8\].*\[32, 4, 8, 8"),
    ],
    ids=["mlp", "extra layers", "separate value", "other actions", "one frame"],
)
def test_other_policies_of_stable_baselines3_are_refused(
    policy, screen, policy_kwargs, cause, tmp_path
):
    sb3_ppo(policy, screen, **policy_kwargs).save(tmp_path / "model")
    assert re.search(cause, refusal(tmp_path / "model.zip"))


def test_other_files_are_refused_with_their_cause(teachers, tmp_path):
    """Those of any origin, damaged ones among them, are in `test_files.py`."""
    path = tmp_path / "teacher.pt"
    flipped = bytearray(teachers["sb3_dqn"][0].read_bytes())
    flipped[flipped.index(b"policy.pth") + 100_000] ^= 1
    path.write_bytes(flipped)
    assert "damaged: a checksum is wrong" in refusal(path)
    weights = torch.load(teachers["cleanrl_ppo"][0])
    torch.save(weights | {"lstm.weight_ih_l0": torch.zeros(4, 24)}, path)
    assert "its layers are actor, critic, lstm, network.0" in refusal(path)
    del weights["network.7.bias"]
    torch.save(weights, path)
    assert "network.7.bias" in refusal(path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_the_pickled_rest_of_a_zip_is_never_read(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = io.BytesIO()
    torch.save(Trap(), trap)
    with zipfile.ZipFile(teachers["sb3_ppo"][0]) as old, zipfile.ZipFile("new.zip", "w") as new:
        new.writestr("policy.pth", old.read("policy.pth"))
        new.writestr("pytorch_variables.pth", trap.getvalue())
    collect.load_teacher("new.zip", GAME, ACTIONS)
    assert not (tmp_path / "executed").exists()
