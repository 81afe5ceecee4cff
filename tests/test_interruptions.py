"""Signals, kills and resumes: nothing is lost but the work since the last save."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ENVIRONMENT, ROOT, buffer_arrays, run_main, tensorboard_scalars
from tensorboard.summary.writer import event_file_writer

import actor_distill as distill
import collect_buffer as collect
import finetune_student as finetune
import ppo_atari_teacher as teacher

GAME = "PongNoFrameskip-v4"
BATCH = 64  # steps of an iteration with these flags
PPO = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 1, "eval_steps": 0}


def words(**flags):
    """Flags as words of a command line."""
    pairs = ([f"--{name.replace('_', '-')}", str(value)] for name, value in flags.items())
    return [word for pair in pairs for word in pair]


def read(path="x.pt"):
    return torch.load(path, weights_only=True)


def same(first, second):
    """Whether two nested structures hold the same, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def run_in_parts(module, *runs):
    """Run a script's `main` several times into the same path, as if in a process each."""
    for args in runs:
        Path(f"{args.save_path}.lock").unlink(missing_ok=True)
        run_main(module, args)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test has a current folder of its own, with a small student and a buffer in it."""
    monkeypatch.chdir(tmp_path)
    model = teacher.Agent("low", 6).state_dict()
    about = {"phase": "distilled", "env_id": GAME, "capacity": "low", "args": {}, "model": model}
    about |= {"global_step": 0, "checkpoint": "low.pt", "evaluation": {"mean": 1.0}}
    torch.save(about, "low.pt")
    np.savez("buffer.npz", **buffer_arrays(200))
    # files of the same second are read in the order of this number's digits: 10 before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


class Running:
    """A script in the background, whatever signals the caller ignores; its output in files."""

    def __init__(self, module, *flags, nohup=False):
        command = ["env", "--default-signal=INT,TERM,HUP", *["nohup"][: int(nohup)]]
        command += [sys.executable, "-u", str(ROOT / f"{module.__name__}.py"), *flags]
        with open("out", "w") as out, open("err", "w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=ENVIRONMENT)
        self.deadline = time.monotonic() + 120

    def wait_until(self, condition):
        while not condition():
            assert self.process.poll() is None, Path("err").read_text()
            assert time.monotonic() < self.deadline
            time.sleep(0.2)

    def points(self):
        """The steps at which it has logged losses."""
        found = re.search(r"^run +(\S+)", Path("out").read_text(), re.MULTILINE)
        scalars = tensorboard_scalars(found[1]) if found and Path(found[1]).exists() else {}
        return [step for step, _ in scalars.get("losses/value_loss", [])]

    def end(self, number):
        """Send a signal; returns the exit status and what stderr got."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60), Path("err").read_text()


@pytest.mark.parametrize(
    ("module", "number", "flags", "more"),
    [
        (teacher, signal.SIGTERM, {**PPO, "capacity": "low"}, "total_timesteps"),
        (finetune, signal.SIGHUP, {**PPO, "student_path": "low.pt"}, "total_timesteps"),
        (distill, signal.SIGINT, {"buffer_path": "buffer.npz", "capacity": "low"}, "epochs"),
    ],
)
def test_a_resume_goes_on_where_a_signal_ended_a_training(module, number, flags, more):
    path, nohup = "x y.pt", module is teacher
    flags = words(**flags, save_path=path, **{more: 1_000_000})
    run = Running(module, *flags, nohup=nohup)
    try:
        run.wait_until(lambda: len(run.points()) > 1)
        if nohup:
            seen = len(run.points())
            run.process.send_signal(signal.SIGHUP)
            run.wait_until(lambda: len(run.points()) > seen + 1)
        status, text = run.end(number)
    finally:
        run.process.kill()
    pattern = r"^stopped (?:at step|after epoch) ([\d,]+); pass --resume to go on$"
    held = int(re.search(pattern, text, re.MULTILINE)[1].replace(",", ""))
    assert status == 1 and "Traceback" not in text
    assert held == read(path)["last_epoch" if module is distill else "global_step"] > 0
    assert {"x y.pt", "x y.pt.lock"} == {str(x) for x in Path().glob("x y.pt*")}

    end = held + (1 if module is distill else BATCH)
    run_main(
        module,
        tyro.cli(module.Args, args=[*flags, "--resume", *words(**{more: end}), "--eval-steps=0"]),
    )
    assert read(path)["last_epoch" if module is distill else "global_step"] == end


def test_a_signal_ends_a_collection_with_the_shorter_buffer():
    run = Running(collect, *words(teacher_path="low.pt", buffer_path="x.npz", num_envs=2))
    try:
        run.wait_until(lambda: "collect:" in Path("err").read_text())
        time.sleep(1)
        status, _ = run.end(signal.SIGTERM)
    finally:
        run.process.kill()
    *_, values, _, meta = distill.load_buffer("x.npz", GAME)
    assert status == 0 and 2 < len(values) < 540_000
    assert meta["steps"] == len(values)
    assert f"x.npz, {len(values):,} samples" in Path("out").read_text()


class Stopping:
    """Games whose step raises KeyboardInterrupt after some steps, and that count forced ones."""

    def __init__(self, envs, steps):
        self.envs, self.left, self.recorded = envs, steps, np.zeros(envs.num_envs, int)

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def step(self, actions):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.recorded += ~self.envs.forced
        return self.envs.step(actions)


def test_a_stopped_collection_equals_the_start_of_the_longer_one():
    def record(steps):
        envs = Stopping(collect.AtariEnvs("breakout", 5, False, 0.0), steps)
        torch.manual_seed(0)
        play_style = (1, False, None, torch.device("cpu"))
        return collect.collect(collect.Agent("low", 4), envs, 603, *play_style), envs.recorded

    whole, _ = record(10**9)
    short, recorded = record(80)
    assert len(whole["actions"]) == 603 and 0 < recorded.sum() < 5 * 80, "some were forced"
    np.testing.assert_array_equal(np.bincount(short["env_index"]), recorded)
    slots = [np.flatnonzero(whole["env_index"] == e)[:n] for e, n in enumerate(recorded)]
    kept = np.concatenate(slots)
    for name in ("action_probs", "values", "actions", "rewards", "dones", "env_index"):
        np.testing.assert_array_equal(short[name], whole[name][kept])
    observations = whole["frames"][whole["stack_index"][kept]]
    np.testing.assert_array_equal(short["frames"][short["stack_index"]], observations)
    for slot in slots:  # games are numbered on from one slot to the next
        numbers = short["episode_index"][np.searchsorted(kept, slot)]
        expected = whole["episode_index"][slot]
        np.testing.assert_array_equal(numbers - numbers[0], expected - expected[0])
    assert len(short["episode_returns"]) == short["episode_index"][-1] + 1


def test_a_kill_loses_no_more_than_the_interval_and_each_point_is_logged_once():
    flags = {**PPO, "capacity": "low", "save_path": "x.pt", "checkpoint_interval": 3 * BATCH}
    run = Running(teacher, *words(**flags))
    try:
        run.wait_until(lambda: Path("x.pt").exists() and len(run.points()) % 3 == 2)
        run.end(signal.SIGKILL)
    finally:
        run.process.kill()
    saved, seen = read(), run.points()
    assert 0 <= seen[-1] - saved["global_step"] <= 3 * BATCH
    total = seen[-1] + BATCH
    run_main(teacher, teacher.Args(**flags, total_timesteps=total, resume=True))
    assert read()["run_name"] == saved["run_name"]
    assert run.points() == list(range(BATCH, total + 1, BATCH))


def test_checkpoints_come_as_often_as_the_interval_asks(monkeypatch):
    def record(_, checkpoint):
        saved.append(checkpoint["global_step"] // BATCH)

    steps = range(BATCH, 6 * BATCH, BATCH)
    monkeypatch.setattr(teacher, "train", lambda *_: ((step, []) for step in steps))
    monkeypatch.setattr(teacher, "save_checkpoint", record)
    intervals = {1: [1, 2, 3, 4, 5], 3 * BATCH - 1: [2, 4, 5], 3 * BATCH: [3, 5], 10**9: [5]}
    for interval, expected in intervals.items():
        saved = []
        path = f"{interval}.pt"
        flags = {**PPO, "capacity": "low", "save_path": path, "checkpoint_interval": interval}
        run_main(teacher, teacher.Args(**flags))
        assert sorted(set(saved)) == expected


def test_a_stop_before_the_first_save_leaves_nothing_and_resume_begins_anew(monkeypatch):
    args = {**PPO, "capacity": "low", "total_timesteps": BATCH, "save_path": "x.pt"}
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "ppo_update", interrupt)
        with pytest.raises(SystemExit, match="stopped at step 0; pass --resume to go on"):
            run_main(teacher, teacher.Args(**args))
    assert not Path("x.pt").exists()
    run_in_parts(teacher, teacher.Args(**args, resume=True))
    assert read()["global_step"] == BATCH


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_stop_in_the_evaluation_keeps_the_training(monkeypatch):
    args = {**PPO, "capacity": "low", "total_timesteps": BATCH, "save_path": "x.pt"}
    args["eval_steps"] = 1
    monkeypatch.setattr(teacher, "evaluate", interrupt)
    with pytest.raises(SystemExit, match=f"stopped at step {BATCH}; pass --resume"):
        run_main(teacher, teacher.Args(**args))
    saved = read()
    assert saved["global_step"] == BATCH and "evaluation" not in saved
    monkeypatch.setattr(teacher, "evaluate", lambda *_: {"mean": 5.0})
    run_in_parts(teacher, teacher.Args(**args, resume=True))
    assert read()["evaluation"] == {"mean": 5.0} and same(read()["model"], saved["model"])


def test_a_stop_in_the_evaluation_before_finetuning_leaves_nothing(monkeypatch):
    about = {"phase": "distilled", "env_id": GAME, "capacity": "low", "args": {}}
    teacher.save_checkpoint("low.pt", {**about, "model": teacher.Agent("low", 6).state_dict()})
    monkeypatch.setattr(finetune, "evaluate", interrupt)
    args = {**PPO, "eval_steps": 1, "total_timesteps": BATCH}
    with pytest.raises(SystemExit, match="stopped at step 0; pass --resume"):
        run_main(finetune, finetune.Args(**args, student_path="low.pt", save_path="x.pt"))
    assert not Path("x.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "sgd"},
        {"optimizer": "adam", "value_coef": 0.5},
        {"optimizer": "sgd", "anneal_lr": False, "early_stop_patience": 2},
    ],
)
def test_distillation_stopped_in_every_epoch_and_resumed_is_bit_identical(flags, monkeypatch):
    """Stopped in the middle of an epoch, it goes on from the end of the one before."""
    args = {**flags, "buffer_path": "buffer.npz", "capacity": "low", "eval_steps": 0, "epochs": 5}
    args |= {
        "loss": "kl",
        "batch_size": 32,
        "learning_rate": 1e-3 if flags["optimizer"] == "adam" else 0.01,
    }
    run_main(distill, distill.Args(**args, save_path="whole.pt", exp_name="whole"))
    plain, calls, stops = distill.distill_update, [], []

    def stopping(*rest):
        calls.append(1)
        if len(calls) == 8:  # five batches make an epoch
            raise KeyboardInterrupt
        return plain(*rest)

    monkeypatch.setattr(distill, "distill_update", stopping)
    while not stops or stops[-1]:
        calls.clear()
        try:
            run_in_parts(distill, distill.Args(**args, save_path="parts.pt", resume=True))
            stops.append(None)
        except SystemExit as stop:
            stops.append(re.search(r"stopped after epoch (\d)", stop.code)[1])
    whole, parts = read("whole.pt"), read("parts.pt")
    assert stops == [*(str(epoch) for epoch in range(1, whole["last_epoch"])), None]
    if "early_stop_patience" in flags:
        assert 1 < whole["epoch"] == whole["last_epoch"] - 2 < 3, "it stopped early"
        assert not same(whole["model"], whole["last_model"])
    else:
        assert whole["epoch"] == whole["last_epoch"] == 5
    for name in parts.keys() - {"args", "checkpoint", "run_name"}:
        assert same(whole[name], parts[name]), name
    curves = [tensorboard_scalars(f"runs/{saved['run_name']}") for saved in (whole, parts)]
    assert curves[0].pop("charts/SPS") != curves[1].pop("charts/SPS")
    assert curves[0] == curves[1] and len(curves[0]["validation/kl"]) == whole["last_epoch"]


def test_ppo_goes_on_with_the_same_moments_and_random_state():
    """After a restart, the next update is the one that would have come without."""
    generator = torch.Generator().manual_seed(1)
    obs = torch.randint(256, (3, 16, 4, 84, 84), dtype=torch.uint8, generator=generator)
    actions = torch.randint(6, (16,), generator=generator)
    minibatch = [actions, *torch.randn(4, 16, generator=generator)]

    def fresh():
        agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
        return agent, torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)

    def update(agent, optimizer, i):
        coefficients = (0.1, True, 0.01, 0.5)
        rest = (teacher.minibatch_loss, obs[i], minibatch, coefficients, 0.5)
        teacher.ppo_update(agent, optimizer, *rest)

    agent, optimizer = fresh()
    for i in range(2):
        update(agent, optimizer, i)
    about = {"phase": "ppo", "capacity": "low", "env_id": GAME, "args": {}}
    teacher.save_checkpoint("x.pt", about | teacher.training_state(agent, optimizer))
    drawn = torch.randn(3)
    update(agent, optimizer, 2)

    _, optimizer_again = fresh()
    saved, agent_again = teacher.load_checkpoint("x.pt", GAME, "")
    agent_again = agent_again.to(memory_format=torch.channels_last)
    optimizer_again = torch.optim.Adam(agent_again.parameters(), lr=1, eps=1e-5, fused=True)
    teacher.restore(saved, "ppo", teacher.Args(capacity="low"), agent_again, optimizer_again)
    assert torch.equal(torch.randn(3), drawn)
    update(agent_again, optimizer_again, 2)
    assert same(agent_again.state_dict(), agent.state_dict())


def test_a_resume_says_what_differs_and_the_learning_rate_it_goes_on_with(capsys):
    args = {**PPO, "capacity": "low", "save_path": "x.pt"}
    run_in_parts(teacher, teacher.Args(**args, total_timesteps=3 * BATCH, learning_rate=4e-4))
    assert "learning rate 0.0004" in capsys.readouterr().out
    more = {"total_timesteps": 4 * BATCH, "learning_rate": 2e-4, "resume": True}
    run_in_parts(teacher, teacher.Args(**args, **more))
    text = capsys.readouterr().out
    assert re.findall("^resumed +(.*)$", text, re.MULTILINE) == [
        "with --total-timesteps 256; it was 192",
        "with --learning-rate 0.0002; it was 0.0004",
    ]
    assert "step 192, learning rate 5e-05\n" in text, "a quarter of it is left"
    rates = tensorboard_scalars(f"runs/{read()['run_name']}")["charts/learning_rate"]
    np.testing.assert_allclose([x for _, x in rates], [4e-4, 8e-4 / 3, 4e-4 / 3, 5e-5], rtol=1e-6)
    assert [step // BATCH for step, _ in rates] == [1, 2, 3, 4]


def test_a_training_that_diverges_stops_before_it_saves():
    args = {**PPO, "capacity": "low", "save_path": "x.pt", "total_timesteps": 4 * BATCH}
    args |= {"learning_rate": 1e6, "max_grad_norm": 1e12, "vf_coef": 1e6, "anneal_lr": False}
    with pytest.raises(SystemExit, match=r"diverged at step \d+; lower --learning-rate"):
        run_main(teacher, teacher.Args(**args))
    assert not Path("x.pt").exists()


def test_progress_bars_write_little_where_stderr_is_no_terminal(chain):
    """An update ten times a second, tqdm's default, would write over 1,000 characters a second."""
    for script, result in chain[1].items():
        assert "100%" in result.stderr
        assert len(result.stderr) < 1000, script
