"""Bad files, paths and flags: one line that names them and what helps; nothing is overwritten."""

import io
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
from conftest import ENVIRONMENT, ROOT, SCRIPTS, buffer_arrays, run_main

import actor_distill as distill
import collect_buffer as collect
import finetune_student as finetune
import ppo_atari_teacher as teacher

GAME, OTHER = "PongNoFrameskip-v4", "BreakoutNoFrameskip-v4"


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test has a current folder of its own."""
    monkeypatch.chdir(tmp_path)


def checkpoint(**changes):
    """A checkpoint's content, of a small untrained teacher."""
    content = {"phase": "ppo", "env_id": GAME, "capacity": "low", "global_step": 1, "args": {}}
    content |= {"model": teacher.Agent("low", 6).state_dict(), "evaluation": None}
    return content | {"checkpoint": "x.pt"} | changes


def torch_file(content):
    """The bytes that torch saves."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def buffer_file(**changes):
    """The bytes of a buffer with some arrays changed, or left out where None."""
    arrays, file = buffer_arrays() | changes, io.BytesIO()
    np.savez(file, **{name: x for name, x in arrays.items() if x is not None})
    return file.getvalue()


def changed(name, value):
    """A buffer's array with one row replaced."""
    array = buffer_arrays()[name].copy()
    array[7] = value
    return {name: array}


def flip(content, array):
    """A file with one bit flipped in an array that it holds."""
    position, content = content.index(np.asarray(array).tobytes()[:32]), bytearray(content)
    content[position] ^= 1
    return bytes(content)


GOOD, WEIGHTS = torch_file(checkpoint()), checkpoint()["model"]["network.7.weight"]
FLIPPED = flip(torch_file(checkpoint(model={"x": WEIGHTS})), WEIGHTS)
PICKLE, PLAYS = pickle.dumps(Bomb()), f"plays {OTHER}; pass that --env-id"
# what a file holds, None if it is missing, and what the message says about it
BAD_CHECKPOINTS = {
    "missing": (None, "No such file"),
    "empty": (b"", "no "),
    "text": (b"not found", "not a zip file|pickle"),
    "truncated": (GOOD[: len(GOOD) * 9 // 10], "not a zip file|corrupted"),
    "one flipped bit in a weight": (FLIPPED, "checksum"),
    "whole pickled module": (torch_file(teacher.Agent("low", 6)), "pickl"),
    "pickle that runs code": (torch_file(checkpoint(args=Bomb())), "pickl"),
    "bare pickle that runs code": (PICKLE, "not a zip file|pickle"),
    "tensor": (torch_file(torch.zeros(3)), "no "),
    "other library": (torch_file(torch.nn.Linear(3, 3).state_dict()), "no "),
    "other game": (torch_file(checkpoint(env_id=OTHER)), PLAYS),
    "missing layer": (torch_file(checkpoint(model={"actor.bias": torch.zeros(6)})), "no "),
}
FIT, META = "do not fit", buffer_arrays(env_id=OTHER)["meta"]
BAD_BUFFERS = {
    "missing": (None, "No such file"),
    "empty": (b"", "No data left"),
    "pickle": (PICKLE, "allow_pickle"),
    "truncated": (buffer_file()[:-1000], "not a zip file"),
    "one flipped bit in a frame": (flip(buffer_file(), buffer_arrays()["frames"]), "CRC"),
    "pickle in the archive": (buffer_file(values=np.array([Bomb()] * 20)), "allow_pickle"),
    "no description": (buffer_file(meta=None), "meta"),
    "no frames": (buffer_file(frames=None), "frames"),
    "other game": (buffer_file(meta=META), PLAYS),
    "frames of another size": (buffer_file(frames=np.zeros((21, 42, 42), np.uint8)), FIT),
    "frames of floats": (buffer_file(frames=np.zeros((21, 84, 84), np.float32)), FIT),
    "a value too few": (buffer_file(values=np.zeros(19, np.float32)), FIT),
    "index past the frames": (buffer_file(**changed("stack_index", 21)), FIT),
    "negative index": (buffer_file(**changed("stack_index", -1)), FIT),
    "probabilities that sum to 0.6": (buffer_file(**changed("action_probs", 0.1)), FIT),
    "NaN among the probabilities": (buffer_file(**changed("action_probs", np.nan)), FIT),
}
LOADS = [
    (BAD_CHECKPOINTS, "do this", lambda: teacher.load_checkpoint("x", GAME, "do this")),
    (BAD_CHECKPOINTS, "make one with `python ppo", lambda: collect.load_teacher("x", GAME, 6)),
    (BAD_BUFFERS, "make one with `python collect", lambda: distill.load_buffer("x", GAME)),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of foreign pickles
@pytest.mark.parametrize("files, advice, load", LOADS, ids=["checkpoint", "teacher", "buffer"])
def test_bad_files_are_refused_by_name_and_run_no_code(files, advice, load, subtests):
    for kind, (content, cause) in files.items():
        if content is not None:
            Path("x").write_bytes(content)
        with subtests.test(kind):
            with pytest.raises(SystemExit) as refusal:
                load()
            assert re.fullmatch(f"x: .*({cause}).*", refusal.value.code)  # on one line
            assert cause == PLAYS or f"; {advice}" in refusal.value.code
    os.remove("x")
    os.mkdir("x")
    with pytest.raises(SystemExit, match="^x: .*Is a directory.*; "):
        load()
    assert not Path("bomb").exists()


def test_the_dangers_in_these_files_are_real():
    torch.load(io.BytesIO(BAD_CHECKPOINTS["pickle that runs code"][0]), weights_only=False)
    assert Path("bomb").exists()
    found = torch.load(io.BytesIO(FLIPPED), weights_only=True)["model"]["x"]
    assert (found != WEIGHTS).sum() == 1


def test_checkpoints_that_do_not_fit_the_flags_are_refused():
    torch.save(checkpoint(capacity="medium"), "x.pt")
    with pytest.raises(SystemExit, match=r"x.pt: no checkpoint of this project.*size mismatch"):
        teacher.load_checkpoint("x.pt", GAME, "")
    torch.save(checkpoint(model=teacher.Agent("low", 4).state_dict()), "x.pt")
    with pytest.raises(SystemExit, match=r"x.pt: no teacher of Pong.*size mismatch"):
        collect.load_teacher("x.pt", GAME, 6)


def test_a_good_buffer_loads_equal():
    Path("x.npz").write_bytes(buffer_file())
    *found, meta = distill.load_buffer("x.npz", GAME)
    for array, expected in zip([*found, json.dumps(meta)], buffer_arrays().values(), strict=True):
        np.testing.assert_array_equal(array, expected)


# flags with which each script would soon write `out`, from small inputs in the current folder
OUTPUTS = {
    teacher: "--capacity low --num-steps 2 --total-timesteps 2 --save-path",
    collect: "--teacher-path in.pt --num-samples 16 --buffer-path",
    distill: "--capacity low --buffer-path in.npz --save-path",
    finetune: "--capacity low --num-steps 2 --total-timesteps 2 --student-path in.pt --save-path",
}


@pytest.fixture
def refusal(tmp_path):
    """Gives a script inputs in the current folder and a path to write; returns its last words."""
    torch.save(checkpoint(), "in.pt")
    Path("in.npz").write_bytes(buffer_file())

    def run(module, path, *flags):
        words = [*OUTPUTS[module].split(), path, "--num-envs", "1", "--eval-steps", "0", *flags]
        with pytest.raises(SystemExit) as exit_info:
            run_main(module, tyro.cli(module.Args, args=words))
        assert not Path("runs").exists(), "no log of a run that was refused"
        assert "\n" not in exit_info.value.code
        return exit_info.value.code

    return run


@pytest.mark.parametrize("module", OUTPUTS)
def test_what_exists_is_not_overwritten_unasked(module, refusal, tmp_path):
    Path("out.file").write_text("precious")
    message = refusal(module, "out.file")
    assert message == "out.file: exists already; pass --overwrite, or another path"
    assert Path("out.file").read_text() == "precious"
    Path("folder").mkdir()
    assert refusal(module, "folder", "--overwrite").startswith("folder: ")
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert names == {"in.pt", "in.npz", "out.file", "folder"}


@pytest.mark.parametrize("module", OUTPUTS)
def test_a_path_that_cannot_be_written_or_filled_in_is_refused_at_the_start(module, refusal):
    for path in ("in.npz/x", "/proc/no/x", "x" * 300):
        message = refusal(module, path)
        assert message.startswith(f"{path}: in use by another run, or not writable (")
    for path in ("{game}.pt", "{}", "{seed", "seed}", "{seed.pt}", "{seed[0]}"):
        assert refusal(module, path).startswith(f"{path}: no flag fits its braces (")
    if module is not teacher:
        flag = OUTPUTS[module].split()[-5 if module is collect else -3]
        assert refusal(module, "x", flag, "{game}").startswith("{game}: no flag fits its braces (")


def test_a_student_that_cannot_be_tuned_is_refused(refusal):
    assert refusal(finetune, "x", "--capacity", "medium") == "in.pt: pass its --capacity low"
    message = refusal(finetune, "x", "--student-path", "none.pt")
    assert message.startswith("none.pt: ") and message.endswith("; run actor_distill.py first")
    torch.save(checkpoint(args={"loss": "mse"}), "in.pt")
    message = refusal(finetune, "x")
    assert message.startswith("in.pt: has Q-values, no policy; distil with --loss kl")


def test_loss_and_temperature_are_known_when_a_path_is_filled_in(refusal):
    for name, flags in (("reverse_kl_1.0", []), ("kl_2.0", ["--loss=kl", "--temperature=2"])):
        Path(f"{name}.pt").touch()
        message = refusal(distill, "{loss}_{temperature}.pt", *flags)
        assert message.startswith(f"{name}.pt: exists already")


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"phase": "distilled"}, "holds no training of phase ppo; pass another path"),
        ({"optimizer": None}, "holds no training of phase ppo"),  # as files that ship
        ({"args": {"seed": 2}}, "was begun with seed 2; pass the same, or another path"),
        ({"args": {"capacity": "high"}}, "was begun with capacity high; pass the same, or"),
        ({"args": {"optimizer": "sgd"}}, "was begun with optimizer sgd; pass the same, or"),
        (None, "no checkpoint of this project"),
    ],
)
def test_only_a_training_of_the_same_kind_is_resumed(changes, cause, refusal):
    content = checkpoint(optimizer={}) | (changes or {})
    content["args"] = {"seed": 1, "capacity": "low"} | content["args"]
    content = {name: x for name, x in content.items() if x is not None}
    before = torch_file(content) if changes else buffer_file()
    Path("out.pt").write_bytes(before)
    assert refusal(teacher, "out.pt", "--resume").startswith(f"out.pt: {cause}")
    assert Path("out.pt").read_bytes() == before


def test_home_is_expanded_and_an_empty_path_refused(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/nobody")
    for module in OUTPUTS:
        names = [x for x in vars(module.Args()) if x.endswith("_path") or x == "eval_only"]
        assert len(names) > 1
        for name in names:
            flag = f"--{name.replace('_', '-')}"
            args = tyro.cli(module.Args, args=[flag, "~/x"])
            assert getattr(args, name) == "/home/nobody/x"
            with pytest.raises(SystemExit, match="2"):
                tyro.cli(module.Args, args=[flag, ""])
            assert name in capsys.readouterr().err


def test_of_two_runs_started_together_into_one_path_one_is_refused():
    """And a living run's path is refused to all, with `--resume` and `--overwrite` too."""
    flags = "--capacity low --num-envs 1 --num-steps 4 --checkpoint-interval 16 --save-path x.pt"
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
        while not Path("x.pt").exists():
            assert time.monotonic() < deadline and winner.poll() is None
            time.sleep(0.1)
        same = {"save_path": "x.pt", "capacity": "low", "seed": 1 + runs.index(winner)}
        for change in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(SystemExit, match="in use by another run"):
                run_main(teacher, teacher.Args(**same, **change))
        winner.terminate()
        assert "stopped at step" in winner.communicate()[1]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    about, _ = teacher.load_checkpoint("x.pt", GAME, "")
    assert about["args"]["seed"] == same["seed"]
    assert len(list(Path("runs").iterdir())) == 1
    teacher.lock_output("x.pt", True)  # free again


# an --exp-name becomes part of the name of a W&B artifact; one step's advantage has no spread
WRONG_FLAGS = {
    teacher: "num-envs=0 num-steps=1 seed=-1 gamma=1.1 learning-rate=nan capacity=huge "
    "checkpoint-interval=0 exp-name=lr=1 no-such-flag=3",
    collect: "num-samples=1 epsilon=2",
    distill: "epochs=0 temperature=0 validation-fraction=0.9 loss=l1",
    finetune: "num-steps=1",
}


def test_wrong_flags_are_named_with_status_2(subtests, capsys):
    for module, flags in WRONG_FLAGS.items():
        for flag in flags.split():
            with subtests.test(flag):
                with pytest.raises(SystemExit, match="^2$"):
                    tyro.cli(module.Args, args=[f"--{flag}"])
                assert flag.split("=")[0] in capsys.readouterr().err.replace("_", "-")
