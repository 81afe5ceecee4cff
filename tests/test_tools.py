"""The tools: videos show the games that are played, and exported policies are the policies."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import onnx
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, opinionated_agent, run_main

import actor_distill as distill
import collect_buffer as collect
from tools import export_onnx, record_video

PONG = str(ROOT / "pretrained/PongNoFrameskip-v4/ppo_high.pt")
BUFFER = str(ROOT / "pretrained/PongNoFrameskip-v4/buffer.npz")


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(agent, path, **args):
    """Save a low student of Pong that was trained by `args`."""
    about = {"phase": "distilled", "env_id": "PongNoFrameskip-v4", "capacity": "low", "args": args}
    torch.save({**about, "model": agent.state_dict()}, path)


@pytest.mark.parametrize("rom", ["breakout", "asterix"])
def test_the_colored_games_are_those_that_are_played(rom):
    """Over whole games, one with forced FIRE, one without: same rewards, ends and pictures."""
    envs = collect.AtariEnvs(rom, 3, 0.0, life_loss=False)
    twin = record_video.ColorTwin(rom, envs)
    twin.reset(collect.game_seeds(3, 1))
    ends = forced = rewards = 0
    for seed in range(400):
        actions = np.random.default_rng(seed).integers(4, size=3)
        forced += envs.forced.sum()
        (obs, *result, info), (_, *theirs, their_info) = twin.step(actions)
        np.testing.assert_array_equal([*result, info["lives"]], [*theirs, their_info["lives"]])
        ends += (result[1] | result[2]).sum()
        rewards += result[0].sum()
    assert ends >= 2 and rewards > 2 and (forced > 9) == (rom == "breakout")
    # what the emulator shows in colour is what the policies see in shades of grey
    luminance = twin.picture @ [0.299, 0.587, 0.114]
    areas = luminance.reshape(3, 14, 15, 16, 10).mean((2, 4))
    seen = obs[:, 3].reshape(3, 14, 6, 84).mean(2)
    seen = seen.repeat(16, 2).reshape(3, 14, 16, 84).mean(3)
    np.testing.assert_allclose(areas, seen, atol=6)


@pytest.mark.parametrize("path, greedy", [("pong.gif", False), ("pong.mp4", True)])
def test_a_video_of_a_policy_beside_q_values(path, greedy, monkeypatch):
    """A policy samples unless it is told not to; Q-values always play their best action."""
    played, twin = [], record_video.ColorTwin
    step = twin.step
    monkeypatch.setattr(twin, "step", lambda self, x: played.append(x) or step(self, x))
    agent = collect.Agent("low", 6)
    agent.actor.bias.data[3] = 1  # the best action everywhere, of probability 0.35
    save(agent, "policy.pt")
    save(agent, "q.pt", loss="mse")
    Path(path).touch()
    flags = {"checkpoints": ("policy.pt", "q.pt"), "path": path, "greedy": greedy, "skip": 2}
    run_main(record_video, record_video.Args(**flags, seconds=2, scale=2, overwrite=True))
    policy, q_values = (np.array(played) == 3).mean(0)
    assert q_values == 1
    assert policy == 1 if greedy else 0.2 < policy < 0.5
    video = iio.imread(path)
    width, height = 2 * (2 * 160 + record_video.GAP), 2 * (210 + record_video.CAPTION)
    assert video.shape == (30, height, width, 3)
    assert (video[0] != video[-1]).any()
    if path == "pong.gif":
        assert sum(iio.immeta(path, index=i)["duration"] for i in range(30)) == 2000, "milliseconds"


def test_a_recording_holds_the_games_of_the_same_seed_and_their_scores():
    agents = [opinionated_agent(collect.Agent, "low", 4) for _ in range(2)]
    shown = list(record_video.record(agents, "breakout", 10_000, 0, 1, [False, False]))
    pictures, scores = zip(*shown, strict=True)
    assert 50 < len(shown) < 10_000, "ends with the longer game"
    assert (pictures[0][0] == pictures[0][1]).all(), "both start alike"
    assert (np.diff(scores, axis=0) >= 0).all()
    later = list(record_video.record(agents, "breakout", 1, 30, 1, [False, False]))
    np.testing.assert_array_equal(later[0][0], pictures[30])


@pytest.mark.parametrize("q_values", [False, True])
def test_an_exported_network_is_the_network(q_values, monkeypatch):
    """It is compared on its own play: a policy samples, Q-values play epsilon-greedily."""
    played, play = {}, collect.collect
    monkeypatch.setattr(collect, "collect", lambda *x: played.update(play(*x)) or played)
    agent = opinionated_agent(collect.Agent, "low", 6)
    save(agent, "x.pt", loss="mse" if q_values else "kl")
    Path("x.onnx").touch()
    flags = {"checkpoint": "x.pt", "all_outputs": True, "samples": 40, "overwrite": True}
    run_main(export_onnx, export_onnx.Args(**flags))
    obs = played["frames"][played["stack_index"]]
    with torch.inference_mode():
        logits, values = agent(torch.from_numpy(obs))
    best = (logits.argmax(-1).numpy() == played["actions"]).mean()
    low, high = (0.93, 0.99) if q_values else (0.1, 0.5)  # 1 - 0.05 * 5 / 6 is 0.958
    assert low < best < high

    session = export_onnx.Session("x.onnx").session
    first = "q_values" if q_values else "action_probs"
    assert [x.name for x in session.get_outputs()] == [first, "logits", "value"]
    outputs = (logits if q_values else logits.softmax(-1), logits, values)
    for size in (37, 1):
        found = session.run(None, {"obs": obs[:size]})
        for ours, theirs, atol in zip(outputs, found, (1e-5, 1e-3, 1e-4), strict=True):
            np.testing.assert_allclose(theirs, ours[:size], atol=atol, rtol=1e-4)
    about = {x.key: x.value for x in onnx.load("x.onnx").metadata_props}
    assert (about["env_id"], about["capacity"]) == ("PongNoFrameskip-v4", "low")
    assert json.loads(about["action_meanings"])[:2] == ["NOOP", "FIRE"]
    assert len(about["checkpoint_sha256"]) == 64 and "84x84" in about["preprocessing"]


def test_eight_bits_change_little_and_play_without_torch(capsys):
    """By the project's rule, and in the example of the docs."""
    agent = opinionated_agent(collect.Agent, "low", 6)
    save(agent, "distilled_low.pt")
    flags = {"checkpoint": "distilled_low.pt", "int8": True, "buffer_path": BUFFER, "samples": 100}
    run_main(export_onnx, export_onnx.Args(**flags, eval=True, eval_steps=10, num_envs=1))
    assert "evaluation  mean -2" in capsys.readouterr().out
    path = "distilled_low.int8.onnx"
    model = onnx.load(path)
    assert any(x.data_type == onnx.TensorProto.UINT8 for x in model.graph.initializer)
    assert Path(path).stat().st_size < 0.2e6
    frames, stack_index, *_ = distill.load_buffer(BUFFER, "PongNoFrameskip-v4")
    obs = torch.from_numpy(frames[stack_index[:200]])
    with torch.inference_mode():
        ours, theirs = agent(obs)[0], export_onnx.Session(path)(obs)[0]
    assert distill.kl_divergence(ours.softmax(-1), theirs).mean() < 0.05

    text = (ROOT / "docs/deploy.md").read_text()
    code, bound = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("16", "2").replace("< 32", "< 2")  # enough games to see that it plays
    code += bound.replace("distilled_low.onnx", path)
    code += "\nassert np.array_equal(action_probs, session.run(None, {'obs': obs})[0])"
    code += "\nimport sys\nassert not {'torch', 'collect_buffer'} & set(sys.modules)\n"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    game, mean, *scores = re.findall(r"[^\s,\[\]]+", result.stdout)
    assert game == "PongNoFrameskip-v4" and len(scores) >= 2
    assert -21 <= float(mean) == pytest.approx(np.mean([float(x) for x in scores]))


@pytest.mark.parametrize(
    "tool, flags, message",
    [
        (record_video, {"path": "x.avi"}, "x.avi: must end in .gif or .mp4"),
        (record_video, {"env_id": "Breakout-v5", "path": "x.gif"}, "plays PongNoFrameskip-v4"),
        (record_video, {"path": "x.gif", "skip": 9999}, "x.gif: exists already; pass --overwrite"),
        (export_onnx, {"env_id": "Breakout-v5", "path": "x.onnx"}, "plays PongNoFrameskip-v4"),
        (export_onnx, {"path": "x.onnx", "buffer_path": "no.npz"}, "x.onnx: exists already; pass"),
    ],
)
def test_a_refusal_comes_before_the_work_and_keeps_the_file(tool, flags, message):
    """The flags of a file that exists would end the work too, by other messages."""
    checkpoint = {"checkpoints": (PONG,)} if tool is record_video else {"checkpoint": PONG}
    Path(flags["path"]).write_text("kept")
    with pytest.raises(SystemExit, match=message):
        run_main(tool, tool.Args(**checkpoint, **flags))
    assert Path(flags["path"]).read_text() == "kept"


@pytest.mark.parametrize("tool, library", [("export_onnx", "onnx"), ("record_video", "imageio")])
def test_a_missing_library_is_named(tool, library, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"^{library} is missing; pip install -r tools/"):
        runpy.run_path(str(ROOT / f"tools/{tool}.py"))
