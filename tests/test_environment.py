"""The games as the scripts make them."""

import numpy as np
import ppo_atari_teacher as teacher
import pytest
import torch


@pytest.mark.parametrize("env_id", ["MsPacmanNoFrameskip-v4", "ALE/MsPacman-v5", "MsPacman-v5"])
def test_three_ids_name_the_same_game(env_id):
    assert teacher.resolve_game(env_id) == ("MsPacmanNoFrameskip-v4", "ms_pacman")


@pytest.mark.parametrize("env_id, meant", [
    ("ms_pacman", "MsPacman"), ("ALE/Brekout-v5", "Breakout"), ("PongNoFrameskip-v0", "Pong"),
    ("ALE/PongNoFrameskip-v4", "Pong"), ("Pong", "Pong"), ("ALE/Combat-v5", "")])
def test_other_ids_are_refused_with_close_names(env_id, meant):
    with pytest.raises(teacher.UsageError, match=f"{meant}NoFrameskip-v4"):
        teacher.resolve_game(env_id)


@pytest.mark.parametrize("rom, num_actions", [("pong", 6), ("breakout", 4), ("ms_pacman", 9)])
def test_spaces(rom, num_actions):
    groups = teacher.make_envs(rom, 5, True, 0.0, device=torch.device("cuda:0"))
    assert [part for _, part in groups] == [slice(0, 3), slice(3, 5)]
    for (envs, part), size in zip(groups, (3, 2)):
        obs, _ = envs.reset(seed=teacher.game_seeds(5, 1, 1)[part])
        assert (obs.shape, obs.dtype) == ((size, 4, 84, 84), np.uint8)
        assert not obs[:, :3].any() and obs[:, 3].any(), "blank frames before a game's start"
        assert envs.single_action_space.n == num_actions
    for device, num_envs in (("cuda", 1), ("cpu", 1), ("cpu", 4)):
        (_, part), = teacher.make_envs(rom, num_envs, True, 0.0, device=device)
        assert part == slice(0, num_envs)


@pytest.mark.parametrize("life_loss", [True, False])
def test_lost_lives_end_episodes_in_training_only(life_loss):
    (envs, _), = teacher.make_envs("breakout", 4, life_loss, 0.0)
    _, info = envs.reset(seed=teacher.game_seeds(4, 1, 1))
    rng, lives, frame = np.random.default_rng(0), info["lives"], info["episode_frame_number"]
    lost, games = 0, 0
    for _ in range(400):
        _, _, terminated, truncated, info = envs.step(rng.integers(0, 4, 4))
        over = info["episode_frame_number"] < frame
        life = (info["lives"] < lives) & ~over
        np.testing.assert_array_equal(terminated, over | (life & life_loss))
        assert not truncated.any()
        lost, games = lost + life.sum(), games + over.sum()
        lives, frame = info["lives"], info["episode_frame_number"]
    assert lost > games > 2


def test_sticky_actions_change_the_game():
    def play(probability):
        (envs, _), = teacher.make_envs("breakout", 1, False, probability)
        envs.reset(seed=teacher.game_seeds(1, 1, 1))
        rng = np.random.default_rng(0)
        return np.concatenate([envs.step(rng.integers(0, 4, 1))[0] for _ in range(60)])

    np.testing.assert_array_equal(play(0.0), play(0.0))
    assert (play(0.0) != play(0.5)).any()
