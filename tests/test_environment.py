"""The games as the scripts make them, against ale-py's own."""

import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv

import ppo_atari_teacher as teacher

PAPER = {
    "noop_max": 30,
    "use_fire_reset": True,
    "frameskip": 4,
    "maxpool": True,
    "img_height": 84,
    "img_width": 84,
    "grayscale": True,
    "stack_num": 4,
    "episodic_life": False,
    "reward_clipping": False,
    "full_action_space": False,
    "autoreset_mode": "SameStep",
}


def test_three_ids_name_the_same_game_and_others_are_refused():
    for env_id in ("MsPacmanNoFrameskip-v4", "ALE/MsPacman-v5", "MsPacman-v5"):
        assert teacher.resolve_game(env_id) == ("MsPacmanNoFrameskip-v4", "ms_pacman")
    for env_id in ("ms_pacman", "ALE/Brekout-v5", "PongNoFrameskip-v0", "Pong", "CartPole-v1"):
        with pytest.raises(SystemExit, match=f"{env_id}: no such game; ids look like ALE/MsPacman"):
            teacher.resolve_game(env_id)


@pytest.mark.parametrize(
    "rom, life_loss, sticky, steps, max_frames, happens",
    [
        ("breakout", True, 0.0, 200, 108_000, {"lost", "forced", "ended"}),
        ("breakout", False, 0.25, 150, 400, {"lost", "forced", "truncated"}),
        ("ms_pacman", True, 0.0, 200, 108_000, {"lost"}),  # has no FIRE
        ("pong", True, 0.25, 80, 150, {"truncated"}),  # has no lives
    ],
)
def test_fire_is_pressed_after_each_lost_life_and_nothing_else_is_changed(
    rom, life_loss, sticky, steps, max_frames, happens, monkeypatch
):
    """Against ale-py's games, whose actions are replaced here, and whose own ends count."""
    make = AtariVectorEnv.__init__

    def make_shorter(games, *args, max_num_frames_per_episode, **options):
        assert max_num_frames_per_episode == 108_000
        make(games, *args, max_num_frames_per_episode=max_frames, **options)

    options = {"max_num_frames_per_episode": max_frames, "repeat_action_probability": sticky}
    bare = AtariVectorEnv(rom, 3, **PAPER, **options)
    monkeypatch.setattr(AtariVectorEnv, "__init__", make_shorter)
    envs = teacher.AtariEnvs(rom, 3, sticky, life_loss=life_loss)
    names = [action.name for action in bare.ale.get_action_set()]
    assert envs.action_meanings == names and envs.single_action_space.n == len(names)
    seeds = teacher.game_seeds(3, 1, 1)
    expected, info = bare.reset(seed=seeds)
    found, _ = envs.reset(seed=seeds)
    np.testing.assert_array_equal(found, expected)
    assert (found.shape, found.dtype) == ((3, 4, 84, 84), np.uint8)
    assert not found[:, :3].any() and found[:, 3].any(), "blank frames before a game's start"
    lives, new_life = info["lives"], np.zeros(3, bool)
    counts = dict.fromkeys(("lost", "forced", "ended", "truncated"), 0)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        press = new_life if "FIRE" in names else np.zeros(3, bool)
        np.testing.assert_array_equal(envs.forced, press)
        actions = rng.integers(0, len(names), 3)
        given = actions.copy()
        found = envs.step(given)
        np.testing.assert_array_equal(given, actions)  # the caller's array is left alone
        actions[press] = names.index("FIRE") if press.any() else 0
        obs, reward, over, truncated, info = bare.step(actions)
        life = (info["lives"] < lives) & ~over & ~truncated
        for one, other in zip(found, (obs, reward, over | (life & life_loss), truncated)):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(envs.game_over, over | truncated)
        new_life, lives = life & (info["lives"] > 0), info["lives"]
        for name, games in zip(counts, (life, press, over, truncated)):
            counts[name] += games.sum()
    assert {name for name, count in counts.items() if count > 1} == happens, counts


def test_only_a_lost_life_with_more_left_forces_fire(monkeypatch):
    """Not the loss of the last one, as a game may go on at 0, nor a new game's smaller count."""
    envs = teacher.AtariEnvs("breakout", 1, 0.0, life_loss=False)
    envs.reset(seed=np.array([1]))
    steps = [  # lives, frame of the game, whether FIRE follows, whether the game ended
        (5, 904, False, False),
        (4, 908, True, False),
        (4, 912, False, False),
        (6, 916, False, False),
        (5, 2, False, True),
        (1, 6, True, False),
        (0, 10, False, False),
        (0, 14, False, False),
        (5, 2, False, True),
    ]
    for lives, frame, forced, game_over in steps:
        info = {"lives": np.array([lives]), "episode_frame_number": np.array([frame])}
        step = None, np.zeros(1), np.zeros(1, bool), np.zeros(1, bool), info
        monkeypatch.setattr(AtariVectorEnv, "step", lambda envs, actions, step=step: step)
        envs.step(np.zeros(1, np.int64))
        assert (envs.forced[0], envs.game_over[0]) == (forced, game_over), (lives, frame)
