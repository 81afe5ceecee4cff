"""Teachers of CleanRL, Kostrikov's code and Stable-Baselines3, as their libraries compute them."""

import io
import json
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
import finetune_student as finetune

GAME, ACTIONS = "BreakoutNoFrameskip-v4", 4
BYTES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


def convolutions(c1, c2, c3, hidden):
    """What all of these agents begin with."""
    return [
        nn.Conv2d(4, c1, 8, 4),
        nn.ReLU(),
        nn.Conv2d(c1, c2, 4, 2),
        nn.ReLU(),
        nn.Conv2d(c2, c3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(c3 * 49, hidden),
        nn.ReLU(),
    ]


class CleanRLPPO(nn.Module):
    """The layers of CleanRL's `ppo_atari.py` under their names."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*convolutions(4, 6, 8, 24))
        self.actor, self.critic = nn.Linear(24, ACTIONS), nn.Linear(24, 1)

    def forward(self, obs):
        hidden = self.network(obs / 255.0)
        return self.actor(hidden), self.critic(hidden)[:, 0]


class CleanRLDQN(nn.Module):
    """The layers of CleanRL's `dqn_atari.py` under their names."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*convolutions(4, 6, 8, 24), nn.Linear(24, ACTIONS))

    def forward(self, obs):
        q_values = self.network(obs / 255.0)
        return q_values, q_values.amax(-1)


class Kostrikov(nn.Module):
    """The layers of pytorch-a2c-ppo-acktr-gail under their names."""

    def __init__(self):
        super().__init__()
        self.base, self.dist = nn.Module(), nn.Module()
        self.base.main = nn.Sequential(*convolutions(32, 64, 32, 512))
        self.base.critic_linear = nn.Linear(512, 1)
        self.dist.linear = nn.Linear(512, ACTIONS)

    def forward(self, obs):
        hidden = self.base.main(obs / 255.0)
        return self.dist.linear(hidden), self.base.critic_linear(hidden)[:, 0]


class Screen(gym.Env):
    """Noise to look at, for models of Stable-Baselines3."""

    def __init__(self, observation=BYTES, num_actions=ACTIONS):
        self.observation_space = observation
        self.action_space = gym.spaces.Discrete(num_actions)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


def sb3_ppo(policy="CnnPolicy", screen=None, **policy_kwargs):
    return PPO(policy, screen or Screen(), n_steps=8, batch_size=8, policy_kwargs=policy_kwargs)


def prefixed(prefix, model):
    return {prefix + name: x for name, x in model.state_dict().items()}


@pytest.fixture(scope="module")
def obs():
    """Real ones of Breakout under random actions, uint8 [64, 4, 84, 84]."""
    envs = collect.AtariEnvs("breakout", 2, False, 0.0)
    envs.reset(seed=np.array([1, 2]))
    actions = np.random.default_rng(0).integers(0, ACTIONS, (32, 2))
    return torch.from_numpy(np.concatenate([envs.step(action)[0] for action in actions]))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, obs):
    """By name: a file, and what its own library computes, outputs and values."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    torch.manual_seed(0)
    ppo, dqn, kostrikov = CleanRLPPO(), CleanRLDQN(), Kostrikov()
    with torch.no_grad():  # outputs that depend on the screen
        for layer in (ppo.actor, dqn.network[9], kostrikov.dist.linear):
            layer.weight.mul_(10)
    half = CleanRLPPO().half()
    for name, model, weights in (
        ("cleanrl_ppo", ppo, ppo.state_dict()),
        ("cleanrl_dqn", dqn, dqn.state_dict()),
        ("kostrikov", kostrikov, kostrikov.state_dict()),
        ("data_parallel", ppo, prefixed("module.", ppo)),
        ("compiled", ppo, prefixed("_orig_mod.", ppo)),
        ("both", dqn, prefixed("module._orig_mod.", dqn)),
        ("half", half, half.state_dict()),
    ):
        torch.save(weights, folder / name)  # no suffix: the content tells
        with torch.no_grad():
            found[name] = folder / name, *model.float()(obs.float())
    legacy = folder / "kostrikov_legacy"
    torch.save(kostrikov.state_dict(), legacy, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(legacy)
    found["kostrikov_legacy"] = legacy, *found["kostrikov"][1:]

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
    """Evaluated first, as its file holds no evaluation; its students have a share of that."""
    monkeypatch.chdir(tmp_path)
    # its best action may keep a ball in play for ever
    defaults = collect.AtariVectorEnv.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "max_num_frames_per_episode", 800)
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
    for loss in ("kl", "mse"):
        args = distill.Args(**small, **student, loss=loss, save_path=f"{loss}.pt")
        run_main(distill, args)
        saved = torch.load(f"{loss}.pt", weights_only=True)
        assert f"validation/{loss}" in saved["validation"]
        assert saved["evaluation"]["greedy"] is (loss == "mse")
        assert f"its teacher's {played['mean']:.2f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="mse.pt: has Q-values and no policy"):
        tiny = {"num_steps": 2, "num_minibatches": 1, "total_timesteps": 4}
        run_main(finetune, finetune.Args(**small, **tiny, student_path="mse.pt"))


def test_a_buffer_without_an_evaluation(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(teachers["kostrikov"][0])
    small = {"num_envs": 2, "num_samples": 4, "eval_steps": 0, "buffer_path": "{num_samples}.npz"}
    run_main(collect, collect.Args(env_id=GAME, teacher_path=path, **small))
    with np.load("4.npz") as buffer:
        assert json.loads(str(buffer["meta"]))["teacher"]["evaluation"] is None


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(SystemExit) as error:
        collect.load_teacher(path, GAME, ACTIONS)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "policy, screen, policy_kwargs, cause",
    [
        ("MlpPolicy", Screen(gym.spaces.Box(0, 1, (5,))), {}, "mlp_extractor.policy_net.0"),
        ("CnnPolicy", Screen(), {"net_arch": [64]}, "mlp_extractor.policy_net.0"),
        ("CnnPolicy", Screen(), {"share_features_extractor": False}, "vf_features_extractor.cnn.0"),
        ("CnnPolicy", Screen(num_actions=6), {}, r"actor.weight: .*\[6, 512\].*\[4, 512\]"),
        (
            "CnnPolicy",
            Screen(gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)),
            {},
            r"network.0.weight: .*\[32, 1, 8, 8\].*\[32, 4, 8, 8\]",
        ),
    ],
    ids=["mlp", "extra layers", "separate value", "other actions", "one frame"],
)
def test_other_policies_of_stable_baselines3_are_refused(
    policy, screen, policy_kwargs, cause, tmp_path
):
    sb3_ppo(policy, screen, **policy_kwargs).save(tmp_path / "model")
    assert re.search(cause, refusal(tmp_path / "model.zip"))


class Trap:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_other_files_are_refused_with_their_cause(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = teachers["sb3_dqn"][0].read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"policy.pth") + 100_000] ^= 1
    weights = CleanRLPPO().state_dict()
    recurrent = weights | {"lstm.weight_ih_l0": torch.zeros(4, 24)}
    missing = {name: x for name, x in weights.items() if name != "network.7.bias"}
    other_game = {"env_id": "PongNoFrameskip-v4", "model": weights}
    for cause, content in (
        ("damaged", b"garbage"),
        ("damaged: a checksum is wrong", bytes(flipped)),
        ("corrupted", good[: len(good) // 2]),
        ("pickled module instead of plain tensors", CleanRLPPO()),
        ("pickled module instead of plain tensors", {"x": Trap()}),
        ("its layers are actor, critic, lstm, network.0", recurrent),
        ("network.7.bias", missing),
        ("plays PongNoFrameskip-v4; pass that --env-id", other_game),
    ):
        if isinstance(content, bytes):
            (tmp_path / "teacher.pt").write_bytes(content)
        else:
            torch.save(content, "teacher.pt")
        assert cause in refusal("teacher.pt")
    assert not (tmp_path / "executed").exists()
    assert "Is a directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "missing.pt")


def test_the_pickled_rest_of_a_zip_is_never_read(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = io.BytesIO()
    torch.save(Trap(), trap)
    with zipfile.ZipFile(teachers["sb3_ppo"][0]) as old, zipfile.ZipFile("new.zip", "w") as new:
        new.writestr("policy.pth", old.read("policy.pth"))
        new.writestr("pytorch_variables.pth", trap.getvalue())
    collect.load_teacher("new.zip", GAME, ACTIONS)
    assert not (tmp_path / "executed").exists()
