"""The tools: videos show the games that are played, and exported policies are the policies."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT, opinionated_agent, run_main

import collect_buffer as collect
from tools import record_video

PONG = str(ROOT / "pretrained/PongNoFrameskip-v4/ppo_high.pt")


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
