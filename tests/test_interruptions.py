"""Signals, kills and resumes: nothing is lost but the work since the last save."""

import copy
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, buffer_arrays, run_main, tensorboard_scalars
from tensorboard.summary.writer import event_file_writer
from torch.utils._pytree import tree_leaves

import actor_distill as distill
import collect_buffer as collect
import finetune_student as finetune
import ppo_atari_teacher as teacher

GAME = "PongNoFrameskip-v4"
BATCH = 64  # steps of an iteration with these flags
PPO = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 1, "eval_steps": 0}
PPO |= {"capacity": "low", "save_path": "x.pt"}
# five batches make an epoch of the 190 samples to learn from
DISTILL = {"buffer_path": "buffer.npz", "batch_size": 32, "eval_steps": 0}
DISTILL |= {"capacity": "low", "save_path": "x.pt"}


def read(path="x.pt"):
    return torch.load(path, weights_only=True)


def scalars(saved):
    return tensorboard_scalars(f"runs/{saved['run_name']}")


def same(first, second):
    """Whether two nested structures hold the same, tensors bit for bit."""
    leaves = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in leaves)


def run(module, flags, **more):
    """Run a script's `main` as in a process of its own: what it saves."""
    args = module.Args(**(flags | more))
    Path(f"{args.save_path}.lock").unlink(missing_ok=True)
    run_main(module, args)
    return read(args.save_path)


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

    def __init__(self, module, flags, *launcher):
        command = ["env", "--default-signal=INT,TERM", sys.executable, "-u", *launcher]
        command += [str(ROOT / f"{module.__name__}.py")]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        with open("out", "w") as out, open("err", "w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=ENVIRONMENT)
        self.deadline = time.monotonic() + 120

    def points(self):
        """The steps at which it has logged losses."""
        found = re.search(r"^run +(\S+)", Path("out").read_text(), re.MULTILINE)
        logged = tensorboard_scalars(found[1]) if found and Path(found[1]).exists() else {}
        return [step for step, _ in logged.get("losses/value_loss", [])]

    def end_when(self, condition, number):
        """Send a signal once that holds; returns the exit status and what stderr got."""
        try:
            while not condition():
                assert self.process.poll() is None, Path("err").read_text()
                assert time.monotonic() < self.deadline
                time.sleep(0.2)
            self.process.send_signal(number)
            return self.process.wait(timeout=60), Path("err").read_text()
        finally:
            self.process.kill()


@pytest.mark.parametrize(
    ("module", "number", "flags", "length"),
    [
        (teacher, signal.SIGTERM, PPO, "total_timesteps"),
        (finetune, signal.SIGINT, {**PPO, "student_path": "low.pt"}, "total_timesteps"),
        (distill, signal.SIGINT, DISTILL, "epochs"),
    ],
)
def test_a_resume_goes_on_where_a_signal_ended_a_training(module, number, flags, length):
    flags = {**flags, "save_path": "x y.pt"}
    running = Running(module, {**flags, length: 1_000_000})
    status, text = running.end_when(lambda: len(running.points()) > 1, number)
    pattern = r"^stopped (?:at step|after epoch) ([\d,]+); pass --resume to go on$"
    held = int(re.search(pattern, text, re.MULTILINE)[1].replace(",", ""))
    unit, one = ("last_epoch", 1) if module is distill else ("global_step", BATCH)
    assert status == 1 and "Traceback" not in text
    assert held == read("x y.pt")[unit] > 0
    assert {"x y.pt", "x y.pt.lock"} == {str(x) for x in Path().glob("x y.pt*")}
    assert run(module, flags, resume=True, **{length: held + one})[unit] == held + one


def test_one_process_goes_on_where_torchrun_was_ended():
    """Also with a batch that two processes cannot share equally."""
    flags = {**DISTILL, "batch_size": 31}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    running = Running(distill, flags | {"epochs": 1_000_000}, *torchrun)
    status, _ = running.end_when(running.points, signal.SIGTERM)
    held = read()["last_epoch"]
    assert status != 0 and held > 0
    assert run(distill, flags, epochs=held + 1, resume=True)["last_epoch"] == held + 1


def test_a_signal_ends_a_collection_with_the_shorter_buffer():
    flags = {"teacher_path": "low.pt", "buffer_path": "x.npz", "num_envs": 2, "eval_steps": 0}
    running = Running(collect, flags)
    begun = lambda: "collect:" in Path("err").read_text() and not time.sleep(1)
    status, _ = running.end_when(begun, signal.SIGTERM)
    *_, values, _, _ = distill.load_buffer("x.npz", GAME)
    assert status == 0 and 2 < len(values) < 540_000
    assert f"x.npz, {len(values):,} samples" in Path("out").read_text()


def test_a_kill_loses_no_more_than_the_interval_and_each_point_is_logged_once():
    flags = {**PPO, "checkpoint_interval": 3 * BATCH}
    running = Running(teacher, flags)
    unsaved = lambda: Path("x.pt").exists() and len(running.points()) % 3 == 2
    running.end_when(unsaved, signal.SIGKILL)
    saved, seen = read(), running.points()
    assert 0 <= seen[-1] - saved["global_step"] <= 3 * BATCH
    total = seen[-1] + BATCH
    assert run(teacher, flags, total_timesteps=total, resume=True)["run_name"] == saved["run_name"]
    assert running.points() == list(range(BATCH, total + 1, BATCH))


def test_checkpoints_come_as_often_as_the_interval_asks(monkeypatch):
    saved, save = [], teacher.save_checkpoint

    def record(path, checkpoint):
        saved.append(checkpoint["global_step"] // BATCH)
        save(path, checkpoint)

    monkeypatch.setattr(teacher, "save_checkpoint", record)
    intervals = {1: [1, 2, 3, 4, 5], 3 * BATCH - 1: [2, 4, 5], 3 * BATCH: [3, 5]}
    for interval, expected in intervals.items():
        saved.clear()
        flags = {"save_path": f"{interval}.pt", "checkpoint_interval": interval}
        run(teacher, PPO | flags, total_timesteps=5 * BATCH)
        assert saved == expected


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_stop_before_the_first_save_leaves_nothing_and_resume_begins_anew(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "ppo_loss", interrupt)
        with pytest.raises(SystemExit, match="stopped at step 0; pass --resume to go on"):
            run(teacher, PPO)
    monkeypatch.setattr(finetune, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="stopped at step 0; pass --resume to go on"):
        run(finetune, PPO, student_path="low.pt", eval_steps=1)
    assert not Path("x.pt").exists()
    assert run(teacher, PPO, total_timesteps=BATCH, resume=True)["global_step"] == BATCH


def test_a_stop_keeps_the_training_and_the_evaluation_of_its_weights(monkeypatch):
    monkeypatch.setattr(teacher, "evaluate", interrupt)
    flags = {**PPO, "total_timesteps": BATCH, "eval_steps": 1}
    with pytest.raises(SystemExit, match=f"stopped at step {BATCH}; pass --resume"):
        run(teacher, flags)
    saved = read()
    assert saved["global_step"] == BATCH and saved["evaluation"] is None
    monkeypatch.setattr(teacher, "evaluate", lambda *_: {"mean": 5.0})
    resumed = run(teacher, flags, resume=True)
    assert resumed["evaluation"] == {"mean": 5.0} and same(resumed["model"], saved["model"])
    for stopped, steps, evaluation in ("ppo_loss", 1, {"mean": 5.0}), ("evaluate", 2, None):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped at step"):
            patch.setattr(teacher, stopped, interrupt)
            run(teacher, flags, total_timesteps=2 * BATCH, resume=True)
        assert (read()["global_step"], read()["evaluation"]) == (steps * BATCH, evaluation)


@pytest.mark.parametrize("module", [distill, finetune])
def test_new_weights_do_not_keep_the_evaluation_of_the_old(module, monkeypatch):
    flags, length, one = (DISTILL, "epochs", 1)
    if module is finetune:
        flags, length, one = ({**PPO, "student_path": "low.pt"}, "total_timesteps", BATCH)
    flags = {**flags, "eval_steps": 1}
    monkeypatch.setattr(module, "evaluate", lambda *_: {"mean": 5.0})
    assert run(module, flags, **{length: one})["evaluation"] == {"mean": 5.0}
    monkeypatch.setattr(module, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="; pass --resume"):
        run(module, flags, resume=True, **{length: 2 * one})
    assert read()["global_step"] > 0 and read()["evaluation"] is None


SGD = {"optimizer": "sgd", "loss": "kl"}
EARLY_STOP = {**SGD, "anneal_lr": False, "early_stop_patience": 2, "epochs": 9}


@pytest.mark.parametrize("flags", [SGD, {"value_coef": 0.5}, EARLY_STOP])
def test_distillation_stopped_in_every_epoch_and_resumed_is_bit_identical(flags, monkeypatch):
    """Stopped in the middle of an epoch, it goes on from the end of the one before."""
    flags = {**DISTILL, "learning_rate": 0.01, "epochs": 5, **flags}
    whole = run(distill, flags, save_path="whole.pt", exp_name="whole")
    plain, calls, stops = distill.kl_divergence, [], []

    def stopping(*batch):
        calls.extend([1] * torch.is_grad_enabled())  # not in a validation
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(*batch)

    monkeypatch.setattr(distill, "kl_divergence", stopping)
    while not stops or stops[-1]:
        calls.clear()
        try:
            parts = run(distill, flags, resume=True)
            stops.append(None)
        except SystemExit as stop:
            stops.append(re.search(r"stopped after epoch (\d)", stop.code)[1])
    assert stops == [*(str(epoch) for epoch in range(1, whole["last_epoch"])), None]
    if "early_stop_patience" in flags:
        assert 1 < whole["epoch"] == whole["last_epoch"] - 2 < 7, "it stopped early"
        assert not same(whole["model"], whole["last_model"])
    else:
        assert whole["epoch"] == whole["last_epoch"] == 5
    for name in parts.keys() - {"args", "checkpoint", "run_name"}:
        assert same(whole[name], parts[name]), name
    curves = [scalars(saved) for saved in (whole, parts)]
    assert curves[0].pop("charts/SPS") != curves[1].pop("charts/SPS")
    assert curves[0] == curves[1] and len(curves[0]["validation/kl"]) == whole["last_epoch"]


def test_a_loaded_training_goes_on_bit_for_bit():
    """Also with contiguous moments, as a file written by other code may hold them.

    And from the state as it was when it was taken, whatever was trained between that and saving.
    """
    obs = torch.randint(256, (5, 16, 4, 84, 84), dtype=torch.uint8)

    def fresh():
        agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
        return agent, torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)

    def update(agent, optimizer, batches):
        for batch in batches:
            logits, values = agent(batch)
            optimizer.zero_grad()
            (values.square().mean() + logits[:, 0].mean()).backward()
            optimizer.step()

    agent, optimizer = fresh()
    update(agent, optimizer, obs[:3])
    state = copy.deepcopy({"model": agent.state_dict(), "optimizer": optimizer.state_dict()})
    update(agent, optimizer, obs[3:])
    for moments in state["optimizer"]["state"].values():
        moments |= {name: moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
    args = teacher.Args(capacity="low", env_id=GAME)
    about = {"phase": "ppo", "env_id": GAME, "capacity": "low", "args": vars(args)}
    teacher.save_checkpoint("x.pt", {**about, **state})
    resumed, resumed_optimizer = fresh()
    loaded = teacher.load_training("x.pt", "ppo", args)
    teacher.restore(loaded, resumed, resumed_optimizer)
    update(resumed, resumed_optimizer, obs[3:])
    assert same(resumed.state_dict(), agent.state_dict())
    assert same(loaded["optimizer"], state["optimizer"]), "what a stop would save now"


def test_a_resumed_ppo_plays_new_games_at_the_rate_that_is_left(monkeypatch):
    starts, seeds = [], teacher.game_seeds

    def record(*inputs):
        starts.append(seeds(*inputs).tolist())
        return np.array(starts[-1])

    monkeypatch.setattr(teacher, "game_seeds", record)
    run(teacher, PPO, total_timesteps=3 * BATCH, learning_rate=4e-4)
    saved = run(teacher, PPO, total_timesteps=4 * BATCH, learning_rate=2e-4, resume=True)
    assert not set(starts[0]) & set(starts[1])
    steps, rates = zip(*scalars(saved)["charts/learning_rate"], strict=True)
    np.testing.assert_allclose(rates, [4e-4, 8e-4 / 3, 4e-4 / 3, 5e-5], rtol=1e-6)
    assert [step // BATCH for step in steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("flag", [{"optimizer": "sgd"}, {"seed": 2}, {"validation_fraction": 0.1}])
def test_a_resume_as_another_training_is_refused(flag):
    """By a seed or share other than before, it would hold out samples that it has learned from."""
    run(distill, DISTILL, epochs=1)
    before = Path("x.pt").read_bytes()
    with pytest.raises(SystemExit, match=f"^x.pt: was begun with {next(iter(flag))} [^\\n]+$"):
        run(distill, DISTILL, epochs=2, resume=True, **flag)
    assert Path("x.pt").read_bytes() == before


def test_more_epochs_do_not_bring_back_eq_3(monkeypatch):
    """A fifth of two epochs is learned by Eq. 3, and none of the fifteen of a resume."""
    used = []

    def watched(name, loss):
        def call(*batch):
            divergence = loss(*batch)
            if divergence.requires_grad:
                divergence.register_hook(lambda _: used.append(name))
            return divergence

        return call

    for name in ("kl_divergence", "reverse_kl"):
        monkeypatch.setattr(distill, name, watched(name, getattr(distill, name)))
    run(distill, DISTILL, epochs=2)
    assert used == ["kl_divergence"] * 2 + ["reverse_kl"] * 8
    run(distill, DISTILL, epochs=15, resume=True)
    assert used[10:] == ["reverse_kl"] * 65


def test_a_finished_finetuning_needs_no_student_to_be_resumed():
    flags = {**PPO, "total_timesteps": BATCH, "student_path": "low.pt"}
    saved = run(finetune, flags)
    Path("low.pt").unlink()
    assert same(run(finetune, flags, resume=True), saved)
    assert run(finetune, flags, resume=True, total_timesteps=128)["global_step"] == 128


@pytest.mark.parametrize("module, updates, held", [(teacher, 6, 2 * BATCH), (distill, 10, 160)])
def test_a_divergence_in_the_last_update_is_not_saved(module, updates, held, monkeypatch):
    """What stays is the file of the iteration or epoch before."""
    step, steps = torch.optim.Adam.step, []

    def last_one_diverges(optimizer):
        steps.append(1)
        if len(steps) == updates:
            optimizer.param_groups[0]["lr"] = 1e30
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", last_one_diverges)
    flags = {**DISTILL, "epochs": 2}
    if module is teacher:
        flags = {**PPO, "total_timesteps": 3 * BATCH, "checkpoint_interval": 1}
    message = "diverged (at step 192|in epoch 2); lower --learning-rate"
    with pytest.raises(SystemExit, match=message):
        run(module, flags)
    assert len(steps) == updates and read()["global_step"] == held
    assert max(weight.abs().max() for weight in read()["model"].values()) < 10


def test_progress_bars_write_little_where_stderr_is_no_terminal(chain):
    """An update ten times a second, tqdm's default, would write over 1,000 characters a second."""
    for script, result in chain[1].items():
        assert "100%" in result.stderr
        assert len(result.stderr) < 1000, script
