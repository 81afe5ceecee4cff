"""Bad files, paths and flags: one line that names them and what helps; nothing is overwritten."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ENVIRONMENT,
    ROOT,
    SCRIPTS,
    buffer_arrays,
    run_main,
    run_script,
)

import actor_distill as distill
import collect_buffer as collect
import finetune_student as finetune
import ppo_atari_teacher as teacher

GAME = "PongNoFrameskip-v4"


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def checkpoint(**changes):
    """A checkpoint's content, of a small untrained teacher."""
    content = {"phase": "ppo", "env_id": GAME, "capacity": "low", "global_step": 1, "args": {}}
    content |= {"model": teacher.Agent("low", 6).state_dict(), "evaluation": None}
    return content | {"checkpoint": "x.pt"} | changes


def saved(content, path="x.pt"):
    """Save `content` in the current folder as torch does; returns the path."""
    torch.save(content, path)
    return path


def damage(path, where):
    """Flip a bit of the byte at `where`, counted from the start or found by its neighbours."""
    content = bytearray(Path(path).read_bytes())
    position = content.index(where) if isinstance(where, bytes) else where
    content[position] ^= 1
    Path(path).write_bytes(content)


def flip_a_weight(path):
    content = checkpoint()
    saved(content, path)
    damage(path, content["model"]["network.7.weight"].numpy().tobytes()[:32])
    with pytest.MonkeyPatch.context() as patch:  # such a file loads, but for the checksum
        patch.setattr(teacher.zipfile, "is_zipfile", lambda path: False)
        _, agent = teacher.load_checkpoint(path, GAME, "")
        assert not torch.equal(agent.network[7].weight, content["model"]["network.7.weight"])


def truncate(path):
    saved(checkpoint(), path)
    os.truncate(path, os.path.getsize(path) * 9 // 10)


def other_layers():
    """A state dict of a network that no script of this project reads."""
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)).state_dict()


# how to make a file, and what the message says about it
BAD_CHECKPOINTS = {
    "missing": (lambda path: None, "No such file"),
    "folder": (os.mkdir, "Is a directory"),
    "empty": (lambda path: Path(path).touch(), "no "),
    "text": (lambda path: Path(path).write_text("not found"), "pickl"),
    "truncated": (truncate, "x.pt: "),
    "one flipped bit in a weight": (flip_a_weight, "checksum"),
    "whole pickled module": (lambda path: saved(teacher.Agent("low", 6), path), "pickl"),
    "pickle that runs code": (
        lambda path: saved(checkpoint(args=Bomb("bomb")), path),
        "pickl",
    ),
    "bare pickle that runs code": (
        lambda path: Path(path).write_bytes(pickle.dumps(Bomb("bomb"))),
        "pickl",
    ),
    "tensor": (lambda path: saved(torch.zeros(3), path), "no "),
    "other library": (lambda path: saved(other_layers(), path), "no "),
    "other game": (
        lambda path: saved(checkpoint(env_id="BreakoutNoFrameskip-v4"), path),
        "plays BreakoutNoFrameskip-v4; pass that --env-id",
    ),
    "missing layer": (
        lambda path: saved(checkpoint(model={"actor.bias": torch.zeros(6)}), path),
        "no ",
    ),
}


def in_new_folder(name, tmp_path, monkeypatch):
    """Make a folder the current one."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of foreign pickles
def test_bad_checkpoints_are_refused_by_name_and_run_no_code(subtests, tmp_path, monkeypatch):
    for kind, (make, cause) in BAD_CHECKPOINTS.items():
        in_new_folder(kind, tmp_path, monkeypatch)
        make("x.pt")
        for load in (
            lambda: teacher.load_checkpoint("x.pt", GAME, "do this"),
            lambda: collect.load_teacher("x.pt", GAME, 6),
        ):
            with subtests.test(kind):
                with pytest.raises(SystemExit) as refusal:
                    load()
                message = refusal.value.code
                assert message.startswith("x.pt: ") and cause in message and "\n" not in message
                assert re.search("; (do this|pass|make one with) ", message + " ")
        assert not Path("bomb").exists()


def test_the_bombs_of_these_tests_are_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.load(saved(checkpoint(args=Bomb("bomb"))), weights_only=False)
    assert Path("bomb").exists()


def test_checkpoints_that_do_not_fit_the_flags_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(checkpoint(capacity="medium"))
    with pytest.raises(SystemExit, match=r"x.pt: no checkpoint of this project.*size mismatch"):
        teacher.load_checkpoint("x.pt", GAME, "")
    saved(checkpoint(model=teacher.Agent("low", 4).state_dict()))
    with pytest.raises(SystemExit, match=r"x.pt: no teacher of Pong.*size mismatch"):
        collect.load_teacher("x.pt", GAME, 6)
    saved(checkpoint(args={"loss": "mse"}))
    args = finetune.Args(student_path="x.pt", num_steps=2, num_minibatches=1, total_timesteps=32)
    with pytest.raises(SystemExit, match=r"x.pt: has Q-values and no policy; distil with --loss"):
        run_main(finetune, args)


def test_a_state_dict_in_half_precision_is_a_good_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {name: x.half() for name, x in teacher.Agent("low", 6).state_dict().items()}
    about, agent = collect.load_teacher(saved(model), GAME, 6)
    assert about["phase"] == "CleanRL PPO" and about["env_id"] == GAME
    for name, x in agent.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, model[name].float())


def spoil(**changes):
    """A writer of a buffer with some arrays changed, or left out where None."""

    def write(path):
        arrays = buffer_arrays() | changes
        np.savez(path, **{name: x for name, x in arrays.items() if x is not None})

    return write


def changed(name, row, value):
    """A buffer's array with one row replaced."""
    array = buffer_arrays()[name].copy()
    array[row] = value
    return {name: array}


def flip_a_pixel(path):
    spoil()(path)
    damage(path, buffer_arrays()["frames"].tobytes()[:32])


def cut_short(path):
    spoil()(path)
    os.truncate(path, os.path.getsize(path) // 2)


BAD_BUFFERS = {
    "missing": (lambda path: None, "No such file"),
    "folder": (os.mkdir, "Is a directory"),
    "empty": (lambda path: Path(path).touch(), "No data left"),
    "pickle": (lambda path: Path(path).write_bytes(pickle.dumps(Bomb("bomb"))), "allow_pickle"),
    "truncated": (cut_short, "not a zip file"),
    "one flipped bit in a frame": (flip_a_pixel, "CRC"),
    "pickle in the archive": (spoil(values=np.array([Bomb("bomb")] * 20)), "allow_pickle"),
    "one array of another program": (lambda path: np.savez(path, np.zeros(3)), "meta"),
    "no frames": (spoil(frames=None), "frames"),
    "other game": (
        spoil(meta=buffer_arrays(env_id="BreakoutNoFrameskip-v4")["meta"]),
        "plays BreakoutNoFrameskip-v4; pass that --env-id",
    ),
    "frames of another size": (spoil(frames=np.zeros((21, 42, 42), np.uint8)), "do not fit"),
    "frames of floats": (spoil(frames=np.zeros((21, 84, 84), np.float32)), "do not fit"),
    "a value too few": (spoil(values=np.zeros(19, np.float32)), "do not fit"),
    "index past the frames": (spoil(**changed("stack_index", 7, 21)), "do not fit"),
    "negative index": (spoil(**changed("stack_index", 7, -1)), "do not fit"),
    "probabilities that sum to 0.6": (spoil(**changed("action_probs", 4, 0.1)), "do not fit"),
    "NaN among the probabilities": (spoil(**changed("action_probs", 4, np.nan)), "do not fit"),
}


def test_bad_buffers_are_refused_by_name_and_run_no_code(subtests, tmp_path, monkeypatch):
    for kind, (make, cause) in BAD_BUFFERS.items():
        in_new_folder(kind, tmp_path, monkeypatch)
        make("x.npz")
        with subtests.test(kind):
            with pytest.raises(SystemExit) as refusal:
                distill.load_buffer("x.npz", GAME)
            message = refusal.value.code
            assert message.startswith("x.npz: ") and cause in message and "\n" not in message
            assert f"make one with `python collect_buffer.py --env-id {GAME}`" in message
        assert not Path("bomb").exists()


def test_a_good_buffer_loads_equal(tmp_path):
    arrays = buffer_arrays()
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    *found, meta = distill.load_buffer(tmp_path / "x.npz", GAME)
    names = ("frames", "stack_index", "action_probs", "values", "episode_index")
    for name, array in zip(names, found, strict=True):
        np.testing.assert_array_equal(array, arrays[name])
    assert meta == json.loads(str(arrays["meta"]))


def test_a_refusal_is_one_line_on_stderr_and_a_status(tmp_path):
    Path(tmp_path, "x.pt").write_bytes(b"PK")
    result = run_script(tmp_path, "finetune_student.py", "--student-path", "x.pt")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("x.pt: ")
    assert line.endswith(f"; make one with `python actor_distill.py --env-id {GAME}`")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


# flags with which each script would soon write `out`, from small inputs in the current folder
OUTPUTS = {
    teacher: "--save-path out --total-timesteps 2048 --eval-steps 0",
    collect: "--teacher-path in.pt --buffer-path out --num-samples 16 --eval-steps 0",
    distill: "--buffer-path in.npz --save-path out --eval-steps 0",
    finetune: "--student-path in.pt --save-path out --total-timesteps 2048 --eval-steps 0",
}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A current folder with a teacher and a buffer; returns a call of a script with `out` there."""
    monkeypatch.chdir(tmp_path)
    saved(checkpoint(), "in.pt")
    np.savez_compressed("in.npz", **buffer_arrays())

    def refusal(module, out, *flags):
        words = [str(out) if word == "out" else word for word in OUTPUTS[module].split()]
        with pytest.raises(SystemExit) as exit_info:
            run_main(module, tyro.cli(module.Args, args=[*words, "--num-envs", "1", *flags]))
        return exit_info.value.code

    return refusal


@pytest.mark.parametrize("module", OUTPUTS)
def test_what_exists_is_not_overwritten_unasked(module, inputs, tmp_path):
    Path("out.file").write_text("precious")
    message = inputs(module, "out.file")
    assert message == "out.file: exists already; pass --overwrite, or another path"
    assert Path("out.file").read_text() == "precious"
    Path("folder").mkdir()
    assert inputs(module, "folder", "--overwrite").startswith("folder: ")
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert names == {"in.pt", "in.npz", "out.file", "folder"}, "no log of a run that was refused"


@pytest.mark.parametrize("module", OUTPUTS)
def test_a_place_that_cannot_be_written_is_refused_at_the_start(module, inputs):
    for place in ("in.npz/x", "/proc/no/x", "x" * 300):
        message = inputs(module, place)
        assert (
            message.startswith(f"{place}: in use by another run, or not writable (")
            and "\n" not in message
        )
    assert not Path("runs").exists()


@pytest.mark.parametrize("flags", [["--capacity", "low"], ["--capacity", "medium"]])
def test_only_a_training_of_the_same_kind_is_resumed(flags, inputs):
    content = checkpoint(phase="distilled" if "low" in flags else "ppo")
    before = Path(saved(content, "out.pt")).read_bytes()
    message = inputs(teacher, "out.pt", "--resume", *flags)
    assert message.startswith("out.pt: holds no training of kind ('ppo', ")
    assert message.endswith("; pass another path")
    assert Path("out.pt").read_bytes() == before
    before = Path("in.npz").read_bytes()
    assert inputs(distill, "in.npz", "--resume").startswith("in.npz: no checkpoint of this project")
    assert Path("in.npz").read_bytes() == before


def test_home_is_expanded_and_an_empty_path_refused(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/nobody")
    flags = {
        teacher: ("save_path", "eval_only"),
        collect: ("teacher_path", "buffer_path"),
        distill: ("buffer_path", "save_path", "eval_only"),
        finetune: ("student_path", "save_path", "eval_only"),
    }
    for module, names in flags.items():
        for name in names:
            flag = f"--{name.replace('_', '-')}"
            args = tyro.cli(module.Args, args=[flag, "~/x"])
            assert getattr(args, name) == "/home/nobody/x"
            with pytest.raises(SystemExit, match="2"):
                tyro.cli(module.Args, args=[flag, ""])
            assert name in capsys.readouterr().err


def test_of_two_runs_started_together_into_one_path_one_is_refused(tmp_path, monkeypatch):
    """And a living run's path is refused to all, with `--resume` and `--overwrite` too."""
    monkeypatch.chdir(tmp_path)
    flags = "--capacity low --num-envs 2 --num-steps 8 --num-minibatches 1 --save-path x.pt"
    flags += " --checkpoint-interval 16"
    runs = []
    try:
        for seed in (1, 2):
            command = [sys.executable, ROOT / SCRIPTS[0], *flags.split(), "--seed", str(seed)]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            runs.append(subprocess.Popen(command, env=ENVIRONMENT, **streams))
        deadline = time.monotonic() + 120
        while all(run.poll() is None for run in runs):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        loser, winner = sorted(runs, key=lambda run: run.poll() is None)
        printed, refusal = loser.communicate()
        assert (printed, loser.returncode, refusal.count("\n")) == ("", 1, 1)
        assert refusal.startswith("x.pt: in use by another run, ")
        for module in OUTPUTS:
            with pytest.raises(SystemExit, match="in use by another run"):
                module.claim("x.pt", True)
        for change in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(SystemExit, match="in use by another run"):
                run_main(teacher, teacher.Args(save_path="x.pt", **change))
        while not Path("x.pt").exists():
            assert time.monotonic() < deadline and winner.poll() is None
            time.sleep(0.1)
        winner.terminate()
        assert "stopped at step" in winner.communicate()[1]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    about, _ = teacher.load_checkpoint("x.pt", GAME, "")
    assert about["args"]["seed"] == 1 + runs.index(winner)
    assert len(list(Path("runs").iterdir())) == 1
    teacher.claim("x.pt", True)  # free again


def test_wrong_flags_are_named_with_status_2(subtests, capsys):
    wrong = [
        (teacher, "--num-envs 0"),
        (teacher, "--num-steps 1"),  # its advantages would have no spread
        (teacher, "--seed -1"),
        (teacher, "--gamma 1.1"),
        (teacher, "--learning-rate nan"),
        (teacher, "--capacity huge"),
        (teacher, "--checkpoint-interval 0"),
        (teacher, "--exp-name lr=1"),  # no name of a W&B artifact
        (teacher, "--no-such-flag 3"),
        (collect, "--num-samples 1"),
        (collect, "--epsilon 2"),
        (distill, "--epochs 0"),
        (distill, "--temperature 0"),
        (distill, "--validation-fraction 0.9"),
        (distill, "--loss l1"),
        (finetune, "--num-steps 1"),
        (finetune, "--critic-warmup-updates -1"),
    ]
    for module, flags in wrong:
        with subtests.test(flags):
            with pytest.raises(SystemExit, match="^2$"):
                tyro.cli(module.Args, args=flags.split())
            assert flags.split()[0][2:] in capsys.readouterr().err.replace("_", "-")


def test_a_rollout_that_does_not_divide_is_refused(inputs):
    for module in (teacher, finetune):
        for name, value in (("num-minibatches", "33"), ("total-timesteps", "2047")):
            message = inputs(module, "out.pt", f"--{name}", value)
            expected = {
                "num-minibatches": "--num-minibatches must divide 2048, a process's steps",
                "total-timesteps": "--num-envs must be a multiple of 1, --total-timesteps 2,048+",
            }[name]
            assert message == expected
    assert not Path("out.pt.lock").exists() and not Path("runs").exists()
