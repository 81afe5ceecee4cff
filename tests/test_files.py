"""Bad flags and bad files: one line on stderr that names them, status 2, nothing written."""

import importlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import actor_distill as distill
import numpy as np
import ppo_atari_teacher as teacher
import pytest
import torch
import tyro
from conftest import SCRIPTS, SMALL_PPO, run_script

GAME = "PongNoFrameskip-v4"
MEANINGS = ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]


def checkpoint(**changes):
    agent = teacher.Agent("low", 6)
    return {"format_version": 1, "phase": "ppo", "env_id": GAME, "capacity": "low",
            "num_actions": 6, "global_step": 1, "model": agent.state_dict(), "args": {},
            "evaluation": None, **changes}


def saved(path, content):
    torch.save(content, path)
    return path


def broken_weights(**changes):
    return {**teacher.Agent("low", 6).state_dict(), **changes}


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


BAD_CHECKPOINTS = {
    "foreign dict": lambda: {"model": {}},
    "a tensor": lambda: torch.zeros(3),
    "later format": lambda: checkpoint(format_version=2),
    "other game": lambda: checkpoint(env_id="BreakoutNoFrameskip-v4"),
    "other number of actions": lambda: checkpoint(model=teacher.Agent("low", 4).state_dict()),
    "weights of another capacity": lambda: checkpoint(capacity="medium"),
    "unknown capacity": lambda: checkpoint(capacity="huge"),
    "unhashable capacity": lambda: checkpoint(capacity=[1]),
    "missing layer": lambda: checkpoint(model={}),
    "additional layer": lambda: checkpoint(model=broken_weights(more=torch.zeros(1))),
    "wrong shape": lambda: checkpoint(
        model=broken_weights(**{"actor.bias": torch.zeros(7)})),
    "no tensor": lambda: checkpoint(model=broken_weights(**{"actor.bias": "zero"})),
    "no state dict": lambda: checkpoint(model=5),
    "flags that are no dict": lambda: checkpoint(args=[]),
    "step that is no number": lambda: checkpoint(global_step="x"),
    "weight not finite": lambda: checkpoint(
        model=broken_weights(**{"critic.bias": torch.tensor([float("nan")])})),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_by_name(kind, tmp_path):
    path = saved(tmp_path / "x.pt", BAD_CHECKPOINTS[kind]())
    with pytest.raises(teacher.UsageError) as refusal:
        teacher.load_checkpoint(path, GAME, 6, "python make.py")
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_good_checkpoint_loads_equal(tmp_path):
    content = checkpoint()
    found, agent = teacher.load_checkpoint(saved(tmp_path / "x.pt", content), GAME, 6, "")
    assert found.keys() == content.keys()
    assert all(torch.equal(x, content["model"][name]) for name, x in agent.state_dict().items())


def test_damaged_checkpoints_are_refused(tmp_path):
    """Every truncation, and flipped bits all over the file: refused, or loaded as it was."""
    path = saved(tmp_path / "x.pt", checkpoint())
    content, reference = path.read_bytes(), checkpoint()["args"]
    original = torch.load(path, weights_only=True)["model"]
    rng = np.random.default_rng(0)
    damaged = [b"", *(content[:int(share * len(content))] for share in (0.01, 0.3, 0.9, 0.999))]
    for position in rng.integers(0, len(content), 40):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    refused = 0
    for text in damaged:
        path.write_bytes(text)
        try:
            _, agent = teacher.load_checkpoint(path, GAME, 6, "python make.py")
        except teacher.UsageError as refusal:
            assert str(path) in str(refusal)
            refused += 1
        else:
            state = agent.state_dict()
            assert all(torch.equal(state[name], original[name]) for name in original)
    assert refused > 40 and reference == {}


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path):
    target = tmp_path / "the-bomb-went-off"
    path = saved(tmp_path / "x.pt", checkpoint(args=Bomb(target)))
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Bomb(target)))
    for bomb in (path, tmp_path / "y.pt"):
        with pytest.raises(teacher.UsageError):
            teacher.load_checkpoint(bomb, GAME, 6, "python make.py")
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the bomb is a real one"


def buffer_arrays(**changes):
    probs = np.full((20, 6), 1 / 6, np.float32)
    index = np.arange(80, dtype=np.int32).reshape(20, 4) % 21
    meta = {"format_version": 1, "env_id": GAME, "action_meanings": MEANINGS,
            "preprocessing": teacher.preprocessing(), "teacher": {"evaluation": None}}
    meta.update(changes.pop("meta", {}))
    arrays = {"frames": np.zeros((21, 84, 84), np.uint8), "stack_index": index,
              "action_probs": probs, "values": np.zeros(20, np.float32),
              "episode_index": np.zeros(20, np.int32), "meta": np.array(json.dumps(meta))}
    return {name: x for name, x in (arrays | changes).items() if x is not None}


def with_row(array, row, value):
    array = array.copy()
    array[row] = value
    return array


GOOD = buffer_arrays()
BAD_BUFFERS = {
    "no frames": (buffer_arrays(frames=None), "frames"),
    "no meta": (buffer_arrays(meta_only=None) | {"meta": np.array("{")}, "damaged"),
    "meta is a list": (GOOD | {"meta": np.array("[]")}, "damaged"),
    "pickled meta": (GOOD | {"meta": np.array({"a": 1}, object)}, "damaged"),
    "no teacher": (buffer_arrays(meta={"teacher": {}}), "damaged"),
    "teacher's evaluation is a number": (buffer_arrays(meta={"teacher": {"evaluation": 5}}),
                                         "damaged"),
    "array without an axis": (buffer_arrays(stack_index=np.array(3, np.int32)), "stack_index"),
    "no samples": ({name: x if name in ("meta", "frames") else x[:0] for name, x in GOOD.items()},
                   "too few samples"),
    "other game": (buffer_arrays(meta={"env_id": "BreakoutNoFrameskip-v4"}), "Breakout"),
    "other actions": (buffer_arrays(meta={"action_meanings": MEANINGS[::-1]}), "action_meanings"),
    "other preprocessing": (buffer_arrays(meta={"preprocessing": {}}), "preprocessing"),
    "later format": (buffer_arrays(meta={"format_version": 2}), "format_version"),
    "float frames": (buffer_arrays(frames=np.zeros((21, 84, 84), np.float32)), "frames"),
    "small frames": (buffer_arrays(frames=np.zeros((21, 42, 42), np.uint8)), "frames"),
    "too few probabilities": (buffer_arrays(action_probs=GOOD["action_probs"][:-1]),
                              "action_probs"),
    "another number of actions": (buffer_arrays(action_probs=np.full((20, 4), 0.25, np.float32)),
                                  "action_probs"),
    "index past the frames": (buffer_arrays(stack_index=with_row(GOOD["stack_index"], 7, 21)),
                              "row 7"),
    "negative index": (buffer_arrays(stack_index=with_row(GOOD["stack_index"], 3, -1)), "row 3"),
    "NaN probability": (buffer_arrays(action_probs=with_row(GOOD["action_probs"], 9, np.nan)),
                        "row 9"),
    "probabilities of sum 0.5": (
        buffer_arrays(action_probs=with_row(GOOD["action_probs"], 4, 1 / 12)), "row 4"),
    "negative probability": (buffer_arrays(
        action_probs=with_row(GOOD["action_probs"], 5, [-0.5, 1.5, 0, 0, 0, 0])), "row 5"),
    "infinite value": (buffer_arrays(values=with_row(GOOD["values"], 2, np.inf)), "row 2"),
    "episodes out of order": (buffer_arrays(
        episode_index=with_row(GOOD["episode_index"], 6, -1)), "row 6"),
}


@pytest.mark.parametrize("kind", BAD_BUFFERS)
def test_bad_buffers_are_refused_by_name(kind, tmp_path):
    arrays, named = BAD_BUFFERS[kind]
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **arrays)
    with pytest.raises(distill.UsageError) as refusal:
        distill.load_buffer(path, GAME, MEANINGS, "python make.py")
    message = str(refusal.value)
    assert str(path) in message and named in message and "\n" not in message


def test_good_buffer_loads_equal(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", **GOOD)
    found = distill.load_buffer(tmp_path / "x.npz", GAME, MEANINGS, "")
    for name in ("frames", "stack_index", "action_probs", "values", "episode_index"):
        np.testing.assert_array_equal(found[name], GOOD[name])


def test_damaged_buffers_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **GOOD)
    content = path.read_bytes()
    for text in (b"", b"PK", content[:100], content[:len(content) // 2], content[:-10]):
        path.write_bytes(text)
        with pytest.raises(distill.UsageError, match="damaged"):
            distill.load_buffer(path, GAME, MEANINGS, "python make.py")
    np.save(tmp_path / "y.npy", np.zeros(3))
    with pytest.raises(distill.UsageError, match="damaged"):
        distill.load_buffer(tmp_path / "y.npy", GAME, MEANINGS, "python make.py")


@pytest.mark.parametrize("script, flags, named", [
    (SCRIPTS[0], "--env-id Nonsense", "--env-id Nonsense"),
    (SCRIPTS[0], "--env-id PongNoFrameskip-v0", "--env-id"),
    (SCRIPTS[0], "--num-envs 0", "--num-envs"),
    (SCRIPTS[0], "--learning-rate nan", "--learning-rate"),
    (SCRIPTS[0], "--num-minibatches 33", "--num-minibatches"),
    (SCRIPTS[0], "--total-timesteps 1000", "--total-timesteps"),
    (SCRIPTS[0], "--exp-name a/b --total-timesteps 32768", "--exp-name"),
    (SCRIPTS[0], "--eval-only missing.pt", "missing.pt"),
    (SCRIPTS[0], "--save-path .", "is a folder"),
    (SCRIPTS[0], "--save-path /proc/no/x.pt", "/proc/no/x.pt"),
    (SCRIPTS[0], "--save-path text.txt/x.pt", "text.txt/x.pt"),
    (SCRIPTS[0], f"--save-path {'x' * 250}.pt", "File name too long"),
    (SCRIPTS[0], "--save-path low.pt", "--overwrite"),
    (SCRIPTS[0], "--env-id Combat-v5", "--env-id Combat-v5"),
    (SCRIPTS[0], "--save-path distilled.pt --resume", "no ppo training"),
    (SCRIPTS[1], "--env-id Alien-v5", "python ppo_atari_teacher.py --env-id AlienNoFrameskip-v4"),
    (SCRIPTS[1], "--num-samples 0", "--num-samples"),
    (SCRIPTS[1], "--teacher-path text.txt", "text.txt"),
    (SCRIPTS[2], "--env-id Alien-v5", "python collect_buffer.py --env-id AlienNoFrameskip-v4"),
    (SCRIPTS[2], "--buffer-path text.txt", "text.txt"),
    (SCRIPTS[2], "--buffer-path good.npz --batch-size 1000", "--batch-size"),
    (SCRIPTS[2], "--validation-fraction 0.9", "--validation-fraction"),
    (SCRIPTS[2], "--eval-only low.pt --capacity high", "low.pt"),
    (SCRIPTS[2], "--env-id Breakout-v5 --eval-only low.pt", "--env-id PongNoFrameskip-v4"),
    (SCRIPTS[3], "--env-id Alien-v5",
     "python actor_distill.py --env-id AlienNoFrameskip-v4 --capacity medium"),
    (SCRIPTS[3], "--student-path low.pt --capacity medium", "low.pt"),
    (SCRIPTS[3], "--critic-warmup-updates -1", "--critic-warmup-updates"),
])
def test_bad_input_is_refused_before_anything_is_written(script, flags, named, tmp_path,
                                                          monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no checkpoint and no buffer")
    saved("low.pt", checkpoint())
    saved("distilled.pt", checkpoint(phase="distilled"))
    np.savez_compressed("good.npz", **GOOD)
    before = sorted(tmp_path.iterdir())
    module = importlib.import_module(script[:-3])
    with pytest.raises(module.UsageError) as refusal:
        module.main(tyro.cli(module.Args, args=flags.split()))
    message = str(refusal.value)
    assert named in message and "\n" not in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_refusal_is_one_line_on_stderr_with_status_2(script, tmp_path):
    result = run_script(tmp_path, script, "--env-id", "Pomg-v5")
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --env-id Pomg-v5: no such game; the closest names are "
                           "PongNoFrameskip-v4, ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flags_exit_with_status_2(script, tmp_path):
    result = run_script(tmp_path, script, "--no-such-flag", 3)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_atomic_write_leaves_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(OSError):
        with teacher.atomic_write(path) as file:
            file.write(b"half of the new")
            raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_training_that_diverges_stops_before_it_saves(tmp_path):
    result = run_script(tmp_path, SCRIPTS[0], *SMALL_PPO, "--capacity", "low", "--learning-rate",
                        "1000", "--max-grad-norm", "1e12", "--vf-coef", "1e6")
    assert result.returncode == 2 and "diverged" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.pt"))


def test_buffer_members_are_plain_npy_files(chain):
    with zipfile.ZipFile(chain[0] / "buffers" / f"{GAME}.npz") as archive:
        assert archive.testzip() is None
        assert all(name.endswith(".npy") for name in archive.namelist())
