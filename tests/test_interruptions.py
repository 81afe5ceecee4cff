"""Signals, kills, full disks, lost logs: nothing is lost but the work since the last save."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import actor_distill as distill
import collect_buffer as collect
import numpy as np
import ppo_atari_teacher as teacher
import pytest
import torch
from conftest import ROOT, SCRIPTS, run_main, run_script, unpacked
from test_ppo import tensorboard_scalars

GAME = "PongNoFrameskip-v4"
MEANINGS = ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
PPO = ("--num-envs 4 --num-steps 32 --num-minibatches 4 --update-epochs 1 --eval-steps 0 "
       "--checkpoint-interval 128 --total-timesteps 1000000").split()
FLAGS = {"ppo_atari_teacher.py": [*PPO, "--capacity", "low"],
         "collect_buffer.py": "--num-envs 4 --num-samples 200000".split(),
         "actor_distill.py": ("--capacity low --epochs 10000 --eval-steps 0 "
                              "--checkpoint-interval 1").split(),
         "finetune_student.py": PPO}
TRAININGS = [script for script in SCRIPTS if script != "collect_buffer.py"]


class Running:
    """A script running in the background, its output in files."""

    def __init__(self, folder, script, flags, output):
        self.output, self.errors = output.with_suffix(".out"), output.with_suffix(".err")
        with open(self.output, "wb") as out, open(self.errors, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / script), *map(str, flags)], cwd=folder, stdout=out,
                stderr=err, env={**os.environ, "COLUMNS": "200"})

    def wait_for(self, text, seconds=60):
        """Wait until the script has printed `text`, on stdout or stderr."""
        deadline = time.time() + seconds
        while text.encode() not in self.output.read_bytes() + self.errors.read_bytes():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.time() < deadline, f"no {text!r}"
            time.sleep(0.02)

    def end(self, number):
        """Send a signal, wait, and return the exit status and the seconds that it took."""
        start = time.time()
        self.process.send_signal(number)
        return self.process.wait(timeout=60), time.time() - start


def output_flag(script, path):
    return ["--buffer-path" if script == "collect_buffer.py" else "--save-path", path]


def progress(path):
    """How far a training's checkpoint has come: its steps or samples."""
    saved = torch.load(path, weights_only=True)
    return saved.get("last_epoch", saved["global_step"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", TRAININGS)
def test_a_signal_ends_a_training_that_the_printed_command_goes_on_with(
        chain, script, number, tmp_path):
    file = tmp_path / "x y.pt"  # the blank needs quotes in the printed command
    flags = [*FLAGS[script], *output_flag(script, file), "--checkpoint-interval", 10**9]
    run = Running(chain[0], script, flags, tmp_path / "log")
    run.wait_for(", held-out" if script == "actor_distill.py" else "step/s")
    time.sleep(random.Random(f"{script}{number}").uniform(3, 5))
    status, seconds = run.end(number)
    assert status == 128 + number
    assert run.errors.read_text().splitlines()[-1] == "stopped by a signal"
    assert seconds < 5
    saved = progress(file)
    held, command = re.search(r"stopped +.* holds (?:step|epoch) ([\d,]+); to go on:\n +(.*)",
                              run.errors.read_text()).groups()
    assert int(held.replace(",", "")) == saved > 0
    assert saved % 128 == 0 or script == "actor_distill.py"
    more = ["--epochs", saved + 1] if script == "actor_distill.py" else [
        "--total-timesteps", saved + 256]
    words = shlex.split(command)
    assert words[0] == "python" and words[-1] == "--resume"
    again = run_script(chain[0], script, *words[2:], *more)
    assert again.returncode == 0, again.stderr
    assert progress(file) == saved + (1 if script == "actor_distill.py" else 256)
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_that_also_ends_tee_saves_all_the_same(chain, script, tmp_path):
    """In a terminal, `script 2>&1 | tee log` gets Ctrl-C as a whole, and tee is gone first."""
    file = tmp_path / ("x.npz" if script == "collect_buffer.py" else "x.pt")
    flags = [*FLAGS[script], *output_flag(script, file), *(
        [] if script == "collect_buffer.py" else ["--checkpoint-interval", 10**9])]
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)],
                               cwd=chain[0], stdout=writer, stderr=writer)
    os.close(writer)
    seen, begun = b"", b", held-out" if script == "actor_distill.py" else b"/s"
    while begun not in seen:
        seen += os.read(reader, 4096)
    end = time.time() + 4
    while time.time() < end:
        os.read(reader, 4096)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    whole = distill.load_buffer if script == "collect_buffer.py" else teacher.load_checkpoint
    whole(file, GAME, MEANINGS if script == "collect_buffer.py" else 6, "")


def test_ctrl_c_during_the_imports_ends_quietly(tmp_path):
    for delay in (0.3, 0.8, 1.3):
        run = Running(tmp_path, SCRIPTS[0], ["--eval-only", "missing.pt"], tmp_path / "log")
        time.sleep(delay)
        status, _ = run.end(signal.SIGINT)
        assert "Traceback" not in run.errors.read_text()
        assert status in (-signal.SIGINT, 130, 2)


def test_a_signal_that_a_library_would_swallow_still_ends_the_script(tmp_path):
    """It comes while foreign code runs that swallows whatever is raised in it."""
    (tmp_path / "foreign.py").write_text(
        "import time\n"
        "def swallow(seconds):\n"
        "    end = time.time() + seconds\n"
        "    while time.time() < end:\n"
        "        try:\n"
        "            time.sleep(0.001)\n"
        "        except BaseException:\n"
        "            print('swallowed')\n")
    (tmp_path / "run.py").write_text(
        "import os, sys, threading\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import foreign, ppo_atari_teacher as teacher\n"
        "teacher.catch_stops()\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), 15)).start()\n"
        "try:\n"
        "    foreign.swallow(0.8)\n"
        "    while True:\n"
        "        teacher.game_seeds(1000, 1)\n"
        "except KeyboardInterrupt as stop:\n"
        "    sys.exit(128 + stop.args[0])\n")
    result = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True,
                            timeout=60)
    assert (result.returncode, result.stdout) == (143, ""), result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_collection_with_a_shorter_whole_buffer(chain, number, tmp_path):
    file = tmp_path / "x.npz"
    run = Running(chain[0], "collect_buffer.py",
                  [*FLAGS["collect_buffer.py"], "--buffer-path", file], tmp_path / "log")
    run.wait_for("step/s")
    time.sleep(2)
    status, seconds = run.end(number)
    assert status == 128 + number and seconds < 5
    buffer = distill.load_buffer(file, GAME, MEANINGS, "")
    assert 100 < len(buffer["values"]) == buffer["meta"]["steps"] < 200_000
    assert f"{len(buffer['values']):,} samples" in run.output.read_text()


def test_a_stopped_collection_equals_the_start_of_the_whole_one():
    """Stop after 30 whole steps of 7 games: every array is that of the longer recording.

    Of two groups of games the first is then a step ahead of the second.
    """
    class Stopping:
        def __init__(self, envs, steps):
            self.envs, self.left = envs, steps

        def __getattr__(self, name):
            return getattr(self.envs, name)

        def recv(self):
            if self.left == 0:
                raise KeyboardInterrupt(signal.SIGTERM)
            self.left -= 1
            return self.envs.recv()

    def record(steps, group=1):
        torch.manual_seed(0)
        groups = collect.make_envs("breakout", 7, False, 0.0, device="cuda")
        groups[group] = Stopping(groups[group][0], steps), groups[group][1]
        arrays, stopped = collect.collect(collect.Agent("low", 4), groups, 703, 1, False,
                                          lambda *end: None)
        return unpacked(arrays), stopped

    (whole, nothing), (short, stopped) = record(10**9), record(30)
    assert nothing is None and stopped.args == (signal.SIGTERM,)
    kept = np.concatenate([np.flatnonzero(whole["env_index"] == e)[:30 + (e < 4)]
                           for e in range(7)])
    for name in ("action_probs", "values", "actions", "rewards", "dones", "env_index"):
        np.testing.assert_array_equal(short[name], whole[name][kept])
    np.testing.assert_array_equal(short["frames"][short["stack_index"]],
                                  whole["frames"][whole["stack_index"][kept]])
    assert len(short["values"]) == 214
    assert len(short["frames"]) == 1 + 214 + 7, "each game was in the middle of a step"
    assert (np.diff(short["episode_index"], prepend=0) <= 1).all()
    with pytest.raises(KeyboardInterrupt):
        record(0, group=0)


def test_a_signal_after_the_last_step_of_a_collection_loses_nothing(monkeypatch):
    def record():
        torch.manual_seed(0)
        groups = collect.make_envs("breakout", 3, False, 0.0)
        return collect.collect(collect.Agent("low", 4), groups, 100, 1, False, lambda *end: None)

    plain, calls = collect.assemble, []

    def interrupted(*recorded):
        arrays = plain(*recorded)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt(signal.SIGINT)
        return arrays

    whole, _ = record()
    monkeypatch.setattr(collect, "assemble", interrupted)
    again, stopped = record()
    assert stopped.args == (signal.SIGINT,) and len(calls) == 2
    whole, again = unpacked(whole), unpacked(again)
    assert whole.keys() == again.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_exits_ends_as_one(number, tmp_path):
    """The timer that would repeat it has no handler any more then, and must not be set."""
    (tmp_path / "run.py").write_text(
        "import atexit, os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import ppo_atari_teacher as teacher\n"
        f"atexit.register(lambda: (os.kill(os.getpid(), {int(number)}), time.sleep(1)))\n"
        "teacher.catch_stops()\n")
    result = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True,
                            timeout=60)
    assert (result.returncode, result.stderr) == (-number, "")


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_has_stalled_loses_output_but_stops_nothing(blocking, chain, tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while os.write(writer, bytes(4096)):
            pass
    except BlockingIOError:
        os.set_blocking(writer, blocking)
    process = subprocess.Popen(
        [sys.executable, ROOT / SCRIPTS[0], *FLAGS[SCRIPTS[0]], "--save-path", tmp_path / "x.pt"],
        cwd=chain[0], stdout=writer, stderr=writer)
    deadline = time.time() + 60
    while not (tmp_path / "x.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    start = time.time()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143 and time.time() - start < 5
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("script, begun", [
    (SCRIPTS[0], "rollout"), (SCRIPTS[2], "sample/s"), (SCRIPTS[3], "evaluate")])
def test_a_stop_before_the_first_save_says_so(script, begun, chain, tmp_path):
    flags = {SCRIPTS[0]: ["--num-envs", 4], SCRIPTS[2]: ["--batch-size", 1, "--epochs", 5],
             SCRIPTS[3]: ["--num-envs", 4]}[script]
    run = Running(chain[0], script, [*flags, "--save-path", tmp_path / "x.pt"], tmp_path / "log")
    run.wait_for(begun)
    time.sleep(0.3)
    status, seconds = run.end(signal.SIGINT)
    assert status == 130 and seconds < 5
    text = run.errors.read_text()
    assert re.search(r"stopped +nothing is saved yet; to go on:\n +python .*x.pt\n", text), text
    assert not list(tmp_path.glob("*.pt"))


def test_a_finished_run_that_is_resumed_logs_its_evaluation_once(chain, tmp_path):
    flags = ["--capacity", "low", "--epochs", 1, "--num-envs", 2, "--eval-steps", 8, "--resume",
             "--save-path", tmp_path / "x.pt"]
    for epochs, points in ((1, 1), (1, 1), (2, 2)):
        result = run_script(chain[0], "actor_distill.py", *flags, "--epochs", epochs)
        assert result.returncode == 0, result.stderr
        run_name = torch.load(tmp_path / "x.pt", weights_only=True)["run_name"]
        scalars = tensorboard_scalars(chain[0] / "runs" / run_name)
        assert len({step for step, _ in scalars["eval/mean"]}) == points
        assert len(scalars["eval/mean"]) == points


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_signal_leaves_at_once(chain, script, tmp_path):
    file = tmp_path / ("x.npz" if script == "collect_buffer.py" else "x.pt")
    run = Running(chain[0], script, [*FLAGS[script], *output_flag(script, file)],
                  tmp_path / "log")
    run.wait_for("/s")
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    status, seconds = run.end(signal.SIGINT)
    assert status == 130 and seconds < 4
    if file.exists():
        whole = distill.load_buffer if script == "collect_buffer.py" else teacher.load_checkpoint
        whole(file, GAME, MEANINGS if script == "collect_buffer.py" else 6, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_before_anything_is_done_ends_quietly(chain, script, tmp_path):
    flags = [*FLAGS[script], *output_flag(script, tmp_path / "x")]
    run = Running(chain[0], script, flags, tmp_path / "log")
    time.sleep(random.Random(script).uniform(0.2, 2))
    status, seconds = run.end(signal.SIGTERM)
    assert status in (143, -signal.SIGTERM) and seconds < 5
    assert "Traceback" not in run.errors.read_text()


@pytest.mark.parametrize("script", TRAININGS)
def test_killed_trainings_lose_no_more_than_the_interval(chain, script, tmp_path):
    """Five kills -9 at random moments, each resumed; then the curve has every point, once."""
    file, moments = tmp_path / "x.pt", random.Random(script)
    flags = [*FLAGS[script], "--save-path", file, "--resume"]
    done = 0
    for kill in range(5):
        run = Running(chain[0], script, flags, tmp_path / f"log{kill}")
        run.wait_for("/s")
        time.sleep(moments.uniform(0, 3))
        # on a slow machine all kills may come before anything is saved; the last one does not
        deadline = time.monotonic() + 120
        while kill == 4 and not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL
        folder = chain[0] / re.search(r"^run +(\S+)", run.output.read_text() or "run  x", re.M)[1]
        if file.exists():
            assert progress(file) >= done, "a resumed training never goes back"
            done = progress(file)
            teacher.load_checkpoint(file, GAME, 6, "")
        logged = tensorboard_scalars(folder) if folder.is_dir() else {}
        seen = [step for step, _ in logged.get("charts/learning_rate", [(0, 0)])]
        unit = 128 if script != "actor_distill.py" else None
        if unit:
            assert max(seen) - done <= 128, "one interval may be lost, of one iteration"
    more = ["--epochs", done + 2] if script == "actor_distill.py" else [
        "--total-timesteps", done + 256]
    result = run_script(chain[0], script, *flags, *more)
    assert result.returncode == 0 and "resumed" in result.stdout, result.stderr
    saved = torch.load(file, weights_only=True)
    scalars = tensorboard_scalars(chain[0] / "runs" / saved["run_name"])
    steps = [step for step, _ in scalars["charts/learning_rate"]]
    unit = 128 if script != "actor_distill.py" else steps[0]
    assert steps == list(range(unit, saved["global_step"] + 1, unit))
    assert not list(tmp_path.glob(".*.tmp")), "what a kill left behind is swept"


def test_killed_collections_leave_no_broken_file(chain, tmp_path):
    file, moments = tmp_path / "x.npz", random.Random(4)
    flags = ["--num-envs", 4, "--num-samples", 3000, "--buffer-path", file, "--overwrite"]
    for kill in range(5):
        run = Running(chain[0], "collect_buffer.py", flags, tmp_path / f"log{kill}")
        run.wait_for("3000/3000" if kill > 2 else "collect")
        time.sleep(moments.uniform(0, 0.3))
        run.end(signal.SIGKILL)
        if file.exists():
            distill.load_buffer(file, GAME, MEANINGS, "")
    result = run_script(chain[0], "collect_buffer.py", *flags)
    assert result.returncode == 0, result.stderr
    assert len(distill.load_buffer(file, GAME, MEANINGS, "")["values"]) == 3000
    assert not list(tmp_path.glob(".*.tmp"))


def same(first, second):
    """Whether two nested structures hold the same, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("patience, optimizer", [
    (0, ["--optimizer", "adam", "--learning-rate", 3e-3]), (3, ["--optimizer", "sgd"])])
def test_distillation_resumed_at_every_epoch_is_bit_identical(chain, patience, optimizer,
                                                              tmp_path):
    def run(path, epochs, *flags):
        result = run_script(chain[0], "actor_distill.py", "--capacity", "low", "--epochs", epochs,
                            "--eval-steps", 0, "--save-path", path, "--value-coef", 0.5,
                            "--early-stop-patience", patience, *optimizer, *flags)
        assert result.returncode == 0, result.stderr
        return torch.load(path, weights_only=True)

    whole = run(tmp_path / "whole.pt", 4)
    for epochs in range(1, 5):
        parts = run(tmp_path / "parts.pt", epochs, "--resume")
    for name in ("model", "last_model", "optimizer", "validation", "epoch", "last_epoch", "rng",
                 "global_step"):
        assert same(whole[name], parts[name]), name
    first, second = (tensorboard_scalars(chain[0] / "runs" / saved["run_name"])
                     for saved in (whole, parts))
    assert first["validation/kl"] == second["validation/kl"] and first["losses/kl"] == second[
        "losses/kl"]


def test_distillation_stopped_in_mid_epoch_is_bit_identical(chain, tmp_path):
    flags = ("--capacity low --epochs 12 --eval-steps 0 --anneal-lr --batch-size 32 "
             "--checkpoint-interval 1000000000 --save-path").split()
    run = Running(chain[0], "actor_distill.py", [*flags, tmp_path / "parts.pt"], tmp_path / "log")
    run.wait_for(", held-out KL")  # in the bar, after a whole epoch
    time.sleep(0.3)
    assert run.end(signal.SIGTERM)[0] == 143
    assert 0 < progress(tmp_path / "parts.pt") < 12
    for flag, path in (("--resume", "parts.pt"), ("--overwrite", "whole.pt")):
        result = run_script(chain[0], "actor_distill.py", *flags, tmp_path / path, flag)
        assert result.returncode == 0, result.stderr
    whole, parts = (torch.load(tmp_path / name, weights_only=True)
                    for name in ("whole.pt", "parts.pt"))
    assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])


@pytest.mark.parametrize("flags, named", [
    (["--learning-rate", "0.01"], "--learning-rate 0.01"), (["--seed", "2"], "--seed 2"),
    (["--buffer-path", "other.npz"], "--buffer-path other.npz"),
    (["--temperature", "0.5"], "--temperature 0.5")])
def test_distillation_is_not_resumed_with_other_flags(chain, flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = dict(np.load(chain[0] / "buffers" / f"{GAME}.npz"))
    np.savez_compressed("one.npz", **arrays)
    np.savez_compressed("other.npz", **arrays | {"values": arrays["values"] + 1})
    start = ["--buffer-path", "one.npz", "--capacity", "low", "--eval-steps", "0", "--epochs"]
    assert run_script(tmp_path, "actor_distill.py", *start, 1).returncode == 0
    saved = Path("checkpoints", GAME, "distilled_low.pt").read_bytes()
    result = run_script(tmp_path, "actor_distill.py", *start, 2, "--resume", *flags)
    assert result.returncode == 2 and named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert Path("checkpoints", GAME, "distilled_low.pt").read_bytes() == saved


def test_ppo_resumes_its_random_state_and_moments(chain, tmp_path):
    """What does not depend on the games' state is that of the run that was stopped."""
    file = tmp_path / "x.pt"
    flags = [*PPO[:-1], 256, "--capacity", "low", "--save-path", file]
    assert run_script(chain[0], "ppo_atari_teacher.py", *flags).returncode == 0
    saved = torch.load(file, weights_only=True)
    agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1, eps=1e-5, fused=True)
    args = teacher.Args(**saved["args"])
    teacher.restore(file, saved, "ppo", args, agent, optimizer)
    state = teacher.training_state(agent, optimizer)
    assert same(state["model"], saved["model"]) and same(state["rng"], saved["rng"])
    assert same(state["optimizer"]["state"], saved["optimizer"]["state"])
    for parameter, moments in optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()


def test_finetuning_goes_on_by_the_printed_command_without_the_student(chain, tmp_path):
    student = tmp_path / "student.pt"
    result = run_script(chain[0], "actor_distill.py", "--capacity", "low", "--epochs", 1,
                        "--eval-steps", 0, "--save-path", student)
    assert result.returncode == 0, result.stderr
    run = Running(tmp_path, "finetune_student.py", [*PPO, "--student-path", student],
                  tmp_path / "log")
    file = tmp_path / f"checkpoints/{GAME}/finetuned_low.pt"
    deadline = time.time() + 60
    while not file.exists():
        assert run.process.poll() is None and time.time() < deadline, run.errors.read_text()
        time.sleep(0.05)
    assert run.end(signal.SIGINT)[0] == 130
    student.unlink()
    done = progress(file)
    (command,) = re.findall(r"to go on:\n +(.*)", run.errors.read_text())
    result = run_script(tmp_path, "finetune_student.py", *shlex.split(command)[2:],
                        "--total-timesteps", done + 128)
    assert result.returncode == 0, result.stderr
    assert progress(file) == done + 128


@pytest.mark.parametrize("weights", ["nan", "inf"])
def test_weights_that_are_not_finite_are_never_saved(weights, tmp_path, monkeypatch):
    """The last minibatch spoils the weights after a finite loss, as an infinite gradient does."""
    monkeypatch.chdir(tmp_path)
    plain, calls = teacher.ppo_update, []

    def spoiling(agent, *rest, **coefficients):
        statistics = plain(agent, *rest, **coefficients)
        calls.append(1)
        if len(calls) == 12:
            with torch.no_grad():
                agent.actor.bias[0] = float(weights)
        return statistics

    monkeypatch.setattr(teacher, "ppo_update", spoiling)
    args = teacher.Args(capacity="low", num_envs=2, num_steps=8, num_minibatches=4,
                        update_epochs=1, total_timesteps=160, checkpoint_interval=1, eval_steps=0)
    with pytest.raises(teacher.UsageError, match=r"step 48, .*ppo_low.pt holds step 32;"):
        run_main(teacher, args)
    saved, _ = teacher.load_checkpoint(f"checkpoints/{GAME}/ppo_low.pt", GAME, 6, "")
    assert saved["global_step"] == 32


@pytest.mark.parametrize("interval, expected", [
    (1, [1, 2, 3, 4, 5]), (32, [2, 4, 5]), (47, [2, 4, 5]), (48, [3, 5]), (10**9, [5])])
@pytest.mark.parametrize("module", [teacher, distill])
def test_no_more_than_the_interval_is_ever_unsaved(module, interval, expected, chain, tmp_path,
                                                   monkeypatch):
    """Five iterations of 16 steps each, or epochs of as many samples."""
    monkeypatch.chdir(tmp_path)
    saved = []
    monkeypatch.setattr(module, "save_checkpoint", lambda path, checkpoint: (
        saved.append(checkpoint["global_step"] // 16), Path(path).touch()))
    shared = dict(capacity="low", checkpoint_interval=interval, eval_steps=0, save_path="x.pt")
    if module is teacher:
        run_main(teacher, teacher.Args(**shared, num_envs=2, num_steps=8, num_minibatches=1,
                                       update_epochs=1, total_timesteps=80))
    else:
        split = distill.split_episodes
        monkeypatch.setattr(distill, "split_episodes", lambda *rest: (
            split(*rest)[0][:16], split(*rest)[1]))
        run_main(distill, distill.Args(**shared, epochs=5, buffer_path=str(
            chain[0] / f"buffers/{GAME}.npz")))
    assert saved == expected


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MB that really fills up."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)],
                             capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Take all that is free on a small disk."""
    try:
        with open(folder / "filler", "ab", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
    except OSError:
        pass


def test_a_collection_waits_for_room_on_a_full_disk(chain, small_disk, tmp_path):
    file = small_disk / "x.npz"
    flags = ["--num-envs", 4, "--num-samples", 400, "--buffer-path", file]
    for number in (None, signal.SIGTERM):
        fill(small_disk)
        run = Running(chain[0], "collect_buffer.py", flags, tmp_path / "log")
        run.wait_for("warning: not saved: [Errno 28]")
        if number:
            status, seconds = run.end(number)
            assert status == 143 and seconds < 5 and not file.exists()
        (small_disk / "filler").unlink()
        if not number:
            assert run.process.wait(timeout=60) == 0
            assert len(distill.load_buffer(file, GAME, MEANINGS, "")["values"]) == 400
            file.unlink()


@pytest.mark.parametrize("script", TRAININGS)
def test_a_full_disk_costs_a_line_and_no_more(chain, script, small_disk, tmp_path):
    file = small_disk / "x.pt"
    limits = ["--capacity", "low"] if script != "finetune_student.py" else []
    if not limits:  # the chain's student is too large for this disk
        small = tmp_path / "low.pt"
        run_script(chain[0], "actor_distill.py", *FLAGS["actor_distill.py"], "--epochs", 1,
                   "--save-path", small)
        limits = ["--student-path", small]
    run = Running(chain[0], script, [*FLAGS[script], *limits, "--save-path", file],
                  tmp_path / "log")
    run.wait_for("/s")
    while not file.exists():
        assert run.process.poll() is None, run.errors.read_text()
        time.sleep(0.01)
    while b"not saved: [Errno 28]" not in run.errors.read_bytes():
        assert run.process.poll() is None, run.errors.read_text()
        fill(small_disk)
    time.sleep(0.5)
    before = progress(file)
    lines = run.errors.read_bytes().count(b"not saved: [Errno 28]")
    while run.errors.read_bytes().count(b"not saved: [Errno 28]") < lines + 2:
        assert run.process.poll() is None, run.errors.read_text()
        time.sleep(0.05)
    assert progress(file) == before, "the previous checkpoint is untouched"
    (small_disk / "filler").unlink()
    deadline = time.time() + 30
    while progress(file) == before:
        assert time.time() < deadline and run.process.poll() is None, run.errors.read_text()
        time.sleep(0.1)
    assert run.end(signal.SIGTERM)[0] == 143
    assert "Traceback" not in run.errors.read_text()


def test_a_full_disk_at_the_moment_of_a_stop_still_says_what_there_is(chain, small_disk, tmp_path):
    file = small_disk / "x.pt"
    run = Running(chain[0], "ppo_atari_teacher.py",
                  [*FLAGS["ppo_atari_teacher.py"], "--save-path", file], tmp_path / "log")
    while b"not saved: [Errno 28]" not in run.errors.read_bytes():
        assert run.process.poll() is None, run.errors.read_text()
        if file.exists():
            fill(small_disk)
    assert run.end(signal.SIGINT)[0] == 130
    held = re.search(r"holds step ([\d,]+); to go on", run.errors.read_text())[1]
    assert int(held.replace(",", "")) == progress(file)


def test_a_full_disk_under_the_log_costs_a_warning(small_disk, monkeypatch, capsys):
    monkeypatch.chdir(small_disk)
    logger = teacher.Logger("x", teacher.Args(), "game")
    logger.log({"a": 1.0}, 1)
    fill(small_disk)
    for step in range(2, 400):
        logger.log({"a": 1.0, "b": 2.0}, step)
    Path("filler").unlink()
    time.sleep(1)  # TensorBoard reads event files of the same second in any order
    logger.log({"a": 1.0}, 400)
    logger.log({"a": 1.0}, 401)
    logger.close()
    assert capsys.readouterr().err.count("warning: tensorboard misses some of this run") == 1
    steps = [step for step, _ in tensorboard_scalars("runs/x")["a"]]
    assert steps[0] == 1 and steps[-1] == 401


def fake_wandb(fail_at, log, mode="online"):
    """A stand-in for the W&B package whose server goes away after `fail_at` calls of log."""
    def record(metrics):
        if len(log) >= fail_at:
            raise ConnectionError("the server is gone")
        log.append(metrics)

    def finish():
        raise ConnectionError("still gone")

    run = types.SimpleNamespace(id="abc", define_metric=lambda *x, **y: None, log=record,
                                finish=finish)
    calls = []
    setup = types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    return types.SimpleNamespace(setup=lambda: setup, calls=calls,
                                 init=lambda **flags: calls.append(flags) or run)


def test_wandb_that_fails_in_mid_run_costs_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mirrored = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(2, mirrored))
    logger = teacher.Logger("x", teacher.Args(track=True), "game")
    for step in range(1, 6):
        logger.log({"a": step}, step)
    logger.close()
    assert [x["a"] for x in mirrored] == [1, 2]
    assert capsys.readouterr().err.count("warning: wandb") == 1
    assert tensorboard_scalars("runs/x")["a"] == [(step, step) for step in range(1, 6)]


@pytest.mark.parametrize("mode, passed", [("online", {"id": "abc", "resume": "allow"}),
                                          ("offline", {})])
def test_a_resume_goes_on_in_the_same_wandb_run_online_only(mode, passed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wandb = fake_wandb(9, [], mode)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    first = teacher.Logger("x", teacher.Args(track=True), "game")
    assert first.wandb_id == ("abc" if mode == "online" else None)
    teacher.Logger("x", teacher.Args(track=True), "game", 100, "abc")
    one, two = wandb.calls
    assert {name: two[name] for name in ("id", "resume") if name in two} == passed
    assert one["group"] == two["group"] == "game" and "id" not in one


def test_wandb_that_cannot_be_reached_costs_one_warning(tmp_path):
    """The real package, told to be online, with a server that refuses every connection."""
    environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9",
                   "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5", "WANDB_SILENT": "true"}
    result = subprocess.run(
        [sys.executable, ROOT / "ppo_atari_teacher.py", *PPO[:-1], "256", "--capacity", "low",
         "--track"], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: wandb") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    assert [step for step, _ in tensorboard_scalars(folder)["losses/entropy"]] == [128, 256]
