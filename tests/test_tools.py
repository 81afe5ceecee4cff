"""The tools: videos show the games that are played, and exported policies are the policies."""

import json
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import onnx
import onnxruntime
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


def test_the_colored_games_are_those_that_are_played():
    """Over whole games with lost lives and forced FIRE: same rewards, same ends, same pictures."""
    envs = collect.AtariEnvs("breakout", 3, False, 0.0)
    twin = record_video.ColorTwin("breakout", envs)
    obs = twin.reset(collect.game_seeds(3, 1))
    ends = forced = rewards = 0
    for seed in range(400):
        actions = np.random.default_rng(seed).integers(4, size=3)
        forced += envs.forced.sum()
        gray, colored = twin.step(actions)
        obs, *result, info = gray
        for ours, theirs in zip(result, colored[1:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(info["lives"], colored[4]["lives"])
        ends += (result[1] | result[2]).sum()
        rewards += result[0].sum()
    assert ends >= 3 and forced > 9 and rewards > 2
    # what the emulator shows in colour is what the policies see in shades of grey
    luminance = twin.picture @ [0.299, 0.587, 0.114]
    areas = luminance.reshape(3, 14, 15, 16, 10).mean((2, 4))
    seen = obs[:, 3].reshape(3, 14, 6, 84).mean(2).reshape(3, 14, 84)
    seen = seen.repeat(16, 2).reshape(3, 14, 16, 84).mean(3)
    np.testing.assert_allclose(areas, seen, atol=6)


@pytest.mark.parametrize("path", ["pong.gif", "pong.mp4"])
def test_a_video_of_two_policies(path, capsys):
    torch.save(collect.Agent("low", 6).state_dict(), "low.pt")
    flags = {"checkpoints": (PONG, "low.pt"), "path": path, "seconds": 2, "scale": 2}
    run_main(record_video, record_video.Args(**flags))
    video = iio.imread(path)
    width, height = 2 * (2 * 160 + record_video.GAP), 2 * (210 + record_video.CAPTION)
    assert video.shape == (30, height, width, 3)
    assert (video[0] != video[-1]).any()
    assert f"wrote       {path}, 2.0 s" in capsys.readouterr().out
    assert not list(Path().glob("*.tmp*"))


def test_a_recording_holds_the_games_of_the_same_seed_and_their_scores():
    agents = [opinionated_agent(collect.Agent, "low", 4) for _ in range(2)]
    shown = list(record_video.record(agents, "breakout", 10_000, 0, 1, False))
    pictures, scores = zip(*shown, strict=True)
    assert 50 < len(shown) < 10_000, "ends with the longer game"
    assert (pictures[0][0] == pictures[0][1]).all(), "both start alike"
    assert (np.diff(scores, axis=0) >= 0).all()
    later = list(record_video.record(agents, "breakout", 1, 30, 1, False))
    np.testing.assert_array_equal(later[0][0], pictures[30])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"checkpoints": ("no.pt",)}, "no.pt: no teacher"),
        ({"checkpoints": (PONG,), "env_id": "Breakout-v5"}, "plays PongNoFrameskip-v4"),
        ({"checkpoints": (PONG,), "path": "x.avi"}, "x.avi: must end in .gif or .mp4"),
        ({"checkpoints": (PONG,), "seconds": 1, "path": "no/x.gif"}, "no/x.gif: cannot be written"),
    ],
)
def test_what_cannot_be_recorded_is_said_in_one_line(flags, message):
    with pytest.raises(SystemExit, match=message):
        run_main(record_video, record_video.Args(**flags))
    assert not list(Path().iterdir())


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    """A low student of Pong with opinions: its checkpoint and network."""
    torch.manual_seed(0)
    agent = opinionated_agent(collect.Agent, "low", 6)
    path = str(tmp_path_factory.mktemp("low") / "low.pt")
    about = {"phase": "distilled", "env_id": "PongNoFrameskip-v4", "capacity": "low", "args": {}}
    torch.save({**about, "global_step": 0, "model": agent.state_dict()}, path)
    return path, agent


def observations(count):
    """The first observations of the shipped buffer, uint8 [count, 4, 84, 84]."""
    frames, stack_index, *_ = distill.load_buffer(BUFFER, "PongNoFrameskip-v4")
    return frames[stack_index[:count]]


def test_an_exported_policy_is_the_policy(low):
    path, agent = low
    flags = {"checkpoint": path, "path": "x.onnx", "buffer_path": BUFFER, "all_outputs": True}
    run_main(export_onnx, export_onnx.Args(**flags, samples=100))
    session = onnxruntime.InferenceSession("x.onnx")
    assert [x.name for x in session.get_outputs()] == ["action_probs", "logits", "value"]
    obs = observations(37)
    with torch.inference_mode():
        logits, values = agent(torch.from_numpy(obs))
    for batch in (obs, obs[:1]):
        probs, theirs, value = session.run(None, {"obs": batch})
        np.testing.assert_allclose(probs, logits[: len(batch)].softmax(-1), atol=1e-5)
        np.testing.assert_allclose(theirs, logits[: len(batch)], atol=1e-3, rtol=1e-4)
        np.testing.assert_allclose(value, values[: len(batch)], atol=1e-4, rtol=1e-4)
    about = {x.key: x.value for x in onnx.load("x.onnx").metadata_props}
    assert (about["env_id"], about["capacity"]) == ("PongNoFrameskip-v4", "low")
    assert json.loads(about["action_meanings"])[:2] == ["NOOP", "FIRE"]
    assert len(about["checkpoint_sha256"]) == 64 and "84x84" in about["preprocessing"]


def test_eight_bits_change_little_and_play(low, capsys):
    path, agent = low
    flags = {"checkpoint": path, "int8": True, "path": "x.onnx", "eval": True, "eval_steps": 10}
    run_main(export_onnx, export_onnx.Args(**flags, num_envs=1, samples=100))
    model = onnx.load("x.onnx")
    assert any(x.data_type == onnx.TensorProto.UINT8 for x in model.graph.initializer)
    assert Path("x.onnx").stat().st_size < 0.2e6
    obs = torch.from_numpy(observations(200))
    session = export_onnx.Session("x.onnx")
    with torch.inference_mode():
        ours, theirs = agent(obs)[0], session(obs)[0]
    assert distill.kl_divergence(ours.softmax(-1), theirs).mean() < 0.05
    assert "evaluation  mean -2" in capsys.readouterr().out


def test_the_example_of_the_docs_plays_without_torch(low):
    path, _ = low
    flags = {"checkpoint": path, "int8": True, "path": "distilled_low.int8.onnx"}
    run_main(export_onnx, export_onnx.Args(**flags, buffer_path=BUFFER, samples=50))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    code = code.replace("< 32", "< 3")  # enough games to see that it plays
    code += "\nimport sys\nassert not {'torch', 'collect_buffer'} & set(sys.modules)\n"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    game, mean, *scores = re.findall(r"[^\s,\[\]]+", result.stdout)
    assert game == "PongNoFrameskip-v4" and len(scores) >= 3
    assert -21 <= float(mean) == pytest.approx(np.mean([float(x) for x in scores]))


def test_a_network_of_q_values_is_exported_as_such(low):
    path, agent = low
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "args": {"loss": "mse"}}, "q.pt")
    flags = {"checkpoint": "q.pt", "buffer_path": BUFFER, "samples": 50}
    run_main(export_onnx, export_onnx.Args(**flags))
    session = onnxruntime.InferenceSession("q.onnx")
    assert [x.name for x in session.get_outputs()] == ["q_values"]
    obs = observations(5)
    with torch.inference_mode():
        expected = agent(torch.from_numpy(obs))[0]
    found = session.run(None, {"obs": obs})[0]
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"checkpoint": "no.pt"}, "no.pt: no teacher"),
        ({"checkpoint": PONG, "env_id": "Breakout-v5"}, "plays PongNoFrameskip-v4"),
        ({"checkpoint": PONG, "buffer_path": PONG}, "ppo_high.pt: no buffer of this project"),
        ({"checkpoint": PONG, "buffer_path": BUFFER, "path": "no/x.onnx"}, "cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(flags, message):
    with pytest.raises(SystemExit, match=message):
        run_main(export_onnx, export_onnx.Args(**flags, samples=20))
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("tool", "library"), [("export_onnx", "onnxruntime"), ("record_video", "imageio")]
)
def test_a_missing_library_is_named(tool, library):
    code = f"""
import importlib.util, runpy
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name != "{library}" and found(name, *rest) or None
runpy.run_path("tools/{tool}.py", run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    expected = f"{library} is missing; pip install -r tools/requirements.txt\n"
    assert (result.returncode, result.stderr) == (1, expected)
