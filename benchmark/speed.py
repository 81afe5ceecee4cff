"""Measure every phase beside the least that the machine needs for it, and beside its peers.

    python benchmark/speed.py                  # phases on a CPU
    python benchmark/speed.py --bf16 --cleanrl ../cleanrl --cleanrl-python ../clenv/bin/python
    python benchmark/speed.py --processes 2    # whole runs of two processes and of one
    python benchmark/speed.py --gpu            # whole runs on a GPU, with and without --compile
    python benchmark/speed.py --repeats 0      # the tables of all that was measured

A phase runs in the scripts' own code. Its floor is the least work of this kind: games stepped with
random actions, the network's forward pass, one optimiser step, each on a batch in place. Machines
are noisy, so a phase and its floor take turns every few steps, whole runs take turns in each
repeat, and the ratio shown is the median of the repeats' ratios. CleanRL is its `ppo_atari.py`
(tried: master, torch 2.13.0, gymnasium 0.29.1, ale-py 0.9.1, stable-baselines3 2.3.2, NumPy 1.26).
Prints a table, and adds a line to `benchmark/results/speed.jsonl`.
"""

import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # as in the scripts, before torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import actor_distill as distill
import collect_buffer as collect
import ppo_atari_teacher as teacher

GAME, ROM, NUM_ACTIONS = "PongNoFrameskip-v4", "pong", 6
CAPACITIES = ("high", "medium", "low")
BUFFER = ROOT / "pretrained" / GAME / "buffer.npz"
PPO = "ppo_atari_teacher.py --num-steps=128 --num-minibatches=8 --update-epochs=2"
DISTIL = "actor_distill.py --epochs=3 --batch-size=256"
FINETUNE = f"finetune_student.py --capacity=high --student-path={BUFFER.with_name('ppo_high.pt')}"
ON_CPU = {
    "PPO, high": f"{PPO} --total-timesteps=10_240",
    "PPO, low": f"{PPO} --total-timesteps=20_480 --capacity=low",
    "distillation, medium": DISTIL,
    "distillation, low": f"{DISTIL} --capacity=low",
}
SMALL = "--num-steps=128 --num-minibatches=8 --update-epochs=4 --total-timesteps=18_432"
LARGE = "--num-steps=128 --num-minibatches=16 --update-epochs=4 --total-timesteps=98_304"
ON_GPU = {
    "PPO, high, 16 games, minibatches of 256": f"ppo_atari_teacher.py {SMALL}",
    "PPO, high, 128 games, minibatches of 1,024": f"ppo_atari_teacher.py {LARGE} --num-envs=128",
    "fine-tuning, high, 16 games, minibatches of 256": f"{FINETUNE} {SMALL}",
    "distillation, medium, batches of 64": "actor_distill.py --epochs=12",
    "distillation, medium, batches of 1,024": "actor_distill.py --epochs=60 --batch-size=1024",
}


@dataclass
class Args:
    repeats: int = 3
    """repeats of each measurement, of which medians are shown; 0 shows the tables of the file"""
    num_envs: int = 16
    """games played at once, by the phases"""
    batch_size: int = 256
    """samples in a minibatch of PPO and in a batch of distillation, of the phases"""
    compile: bool = False
    """compile network and loss; the floors stay as they are"""
    bf16: bool = False
    """measure what trains in bfloat16 too, in the same turns"""
    phases: bool = True
    """measure each phase beside its floor, and not only what has a peer"""
    cleanrl: str | None = None
    """folder of CleanRL, to measure its `ppo_atari.py` beside PPO with the same hyperparameters"""
    cleanrl_python: str = sys.executable
    """Python that has what CleanRL needs"""
    processes: int = 1
    """more than 1: whole runs of so many processes beside one with as many threads, on a CPU"""
    gpu: bool = False
    """whole runs on a GPU"""
    results: str = str(ROOT / "benchmark" / "results" / "speed.jsonl")
    """file to add a line to"""


class Turns:
    """Divides time among a phase and its floors, which run between the steps of the phase.

    `floors` maps a name to a function that does some of the work and returns how much.
    """

    def __init__(self, floors):
        self.floors, self.since, self.laps, self.on_floor = floors, None, {}, False

    def lap(self, name, amount, *floors):
        """Since the last lap `name` did `amount` of work; now let each of `floors` do some."""
        now = time.perf_counter()
        if self.since is not None:
            spent, done = self.laps.get(name, (0, 0))
            self.laps[name] = spent + now - self.since, done + amount
        self.since = now
        for floor in floors:
            self.on_floor = True
            amount = self.floors[floor]()
            self.on_floor = False
            self.lap(floor, amount)

    def forget(self):
        """What was measured until now was warm-up."""
        self.laps = {}

    def rate(self, name):
        """Work per second of the time spent on it."""
        spent, done = self.laps[name]
        return done / spent


def in_turn(*rates):
    """The rate of doing the same work in each of several ways, one after another."""
    return 1 / sum(1 / rate for rate in rates)


def agent_and_optimizer(capacity, device="cpu"):
    """A fresh network in the layout of the scripts, and their optimiser."""
    agent = teacher.Agent(capacity, NUM_ACTIONS).to(device, memory_format=torch.channels_last)
    return agent, torch.optim.Adam(agent.parameters(), lr=1e-5, eps=1e-5, fused=True)


def games_alone(num_envs):
    """Step the games with random actions: a function that returns the steps it made."""
    envs = teacher.AtariEnvs(ROM, num_envs, 0.0, life_loss=False)
    envs.reset(seed=teacher.game_seeds(num_envs, 1, 1))
    actions = np.random.default_rng(0).integers(0, NUM_ACTIONS, (16, num_envs))

    def work():
        for action in actions:
            envs.step(action)
        return actions.size

    return work


def forward_alone(capacity, num_envs):
    """Decide for all games: conversion, network and sampling, nothing else."""
    agent, _ = agent_and_optimizer(capacity)
    obs = torch.randint(0, 256, (num_envs, 4, 84, 84), dtype=torch.uint8)

    @torch.inference_mode()
    def work():
        for _ in range(16):
            teacher.sample_actions(agent(obs)[0])
        return 16 * num_envs

    return work


def update_alone(capacity, batch_size):
    """Forward, backward and Adam on one float batch in place, by the plainest loss."""
    agent, optimizer = agent_and_optimizer(capacity)
    x = torch.rand(batch_size, 4, 84, 84).contiguous(memory_format=torch.channels_last)

    def work():
        hidden = agent.network(x)
        loss = agent.actor(hidden).logsumexp(-1).mean() + agent.critic(hidden).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return batch_size

    return work


def plain_loop(batch_size):
    """What a newcomer would write, a step a call: stacked observations, DataLoader, NCHW."""
    with np.load(BUFFER) as buffer:
        rows = buffer["stack_index"][: 32 * batch_size]
        obs = torch.from_numpy(buffer["frames"][rows])
        targets = torch.from_numpy(buffer["action_probs"][: len(rows)])
    agent = teacher.Agent("medium", NUM_ACTIONS)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5)
    data = torch.utils.data.TensorDataset(obs, targets)
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def work():
        x, target = next(batches)
        logits = agent.actor(agent.network(x.float() / 255))
        loss = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(x)

    return work


class Enough(Exception):
    """Cuts a phase short."""


@contextlib.contextmanager
def quiet_folder():
    """A temporary working folder, with stdout and stderr thrown away, that `Enough` leaves."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
        contextlib.suppress(Enough),
    ):
        yield


@contextlib.contextmanager
def after_updates(turns, function):
    """Call a function with their number after the optimiser steps that no floor makes."""
    numbers = itertools.count(1)

    def hook(*_):
        if not turns.on_floor:
            function(next(numbers))

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def watched(envs, after_step):
    """The same games, which call a function after each step with the number of steps until then."""
    step, rounds = envs.step, itertools.count(1)

    def step_and_tell(actions):
        result = step(actions)
        after_step(next(rounds))
        return result

    envs.step = step_and_tell
    return envs


def ppo(options, num_envs, minibatches, epochs, iterations, turns, floors=(), update_floors=()):
    """The teacher's own `main`, in laps "rollout" and "update"; its first iteration is warm-up.

    The rollout lasts from the last optimiser step of an iteration to the next call of `gae`, the
    update from there to its last optimiser step. `floors` are those of the rollout.
    """
    plain_gae, plain_envs = teacher.gae, teacher.AtariEnvs

    def gae(*batch):
        turns.lap("rollout", 0)
        return plain_gae(*batch)

    def after_update(count):
        turns.lap("update", num_envs * 128 // minibatches, *update_floors)
        if count == epochs * minibatches:
            turns.forget()

    def after_step(rounds):
        turns.lap("rollout", num_envs, *(floors if rounds % 16 == 0 else ()))

    def envs(*flags, **more):
        return watched(plain_envs(*flags, **more), after_step)

    with (
        quiet_folder(),
        after_updates(turns, after_update),
        mock.patch.multiple(teacher, gae=gae, AtariEnvs=envs),
    ):
        shape = {"num_envs": num_envs, "num_steps": 128, "num_minibatches": minibatches}
        length = {"update_epochs": epochs, "total_timesteps": iterations * num_envs * 128}
        teacher.main(teacher.Args(**shape, **length, **options))
    return turns.rate("rollout"), turns.rate("update")


def playing(phase, num_envs, turns, floors=(), rounds=128, device="cpu"):
    """`collect` or `play` by `high`, in laps of the phase's name; the first eighth is warm-up."""
    agent, _ = agent_and_optimizer("high", device)

    def after_step(done):
        turns.lap(phase, num_envs, *(floors if done % 16 == 0 else ()))
        if done == rounds // 8:
            turns.forget()
        if done == rounds:
            raise Enough

    envs = watched(teacher.AtariEnvs(ROM, num_envs, 0.0, life_loss=False), after_step)
    with quiet_folder():
        if phase == "collection":
            collect.collect(agent, envs, 2 * rounds * num_envs, 1, False, None, device)
        else:
            teacher.play(agent, envs, 10**9, 1, False, device)
    return turns.rate(phase)


def distillation(options, capacity, batch_size, turns, floors):
    """`actor_distill.py`'s own `main` for 32 batches, in laps; a quarter is warm-up."""

    def after_update(count):
        turns.lap("distillation", batch_size, *floors)
        if count == 8:
            turns.forget()
        if count == 32:
            raise Enough

    with quiet_folder(), after_updates(turns, after_update):
        distill.main(distill.Args(capacity=capacity, batch_size=batch_size, **options))
    return turns.rate("distillation")


def cleanrl(args, iterations=4):
    """CleanRL's `ppo_atari.py` on the same cores: whole steps/s, without its first iteration."""
    code = "import ale_py, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    script = os.path.abspath(f"{args.cleanrl}/cleanrl/ppo_atari.py")
    flags = ["--env-id", GAME, "--total-timesteps", str(iterations * 1024), "--no-cuda"]
    environment = {**os.environ, "PYTHONPATH": os.path.abspath(args.cleanrl)}
    environment.pop("GOMP_SPINCOUNT", None)  # CleanRL sets none
    times, printed = [], []
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [os.path.abspath(args.cleanrl_python), "-u", "-c", code, script, *flags],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            printed.append(line)
            if line.startswith("SPS"):
                times.append(time.perf_counter())
    if process.wait() or len(times) < 2:
        sys.exit(f"--cleanrl {args.cleanrl}: failed: {''.join(printed)[-500:]}")
    return (len(times) - 1) * 1024 / (times[-1] - times[0])


def side_by_side(args, add):
    """Phases, floors and peers on a CPU."""
    teacher.set_up_torch(1, False)
    games, epochs = ("games", "forward"), 2
    shape = (args.num_envs, args.num_envs * 128 // args.batch_size, epochs, 2)
    options = {"eval_steps": 0, "cuda": False, "compile": args.compile}
    forms = {"": options, ", bf16": {**options, "bf16": True}} if args.bf16 else {"": options}
    floors = {
        "games": games_alone(args.num_envs),
        "forward": forward_alone("high", args.num_envs),
        "plain loop": plain_loop(args.batch_size),
        **{capacity: update_alone(capacity, args.batch_size) for capacity in CAPACITIES},
    }
    for work in floors.values():
        work()
    for _ in range(args.repeats):
        for form, options in forms.items() if args.phases else ():
            turns = Turns(floors)
            play, update = ppo(options, *shape, turns, games, ("high",))
            least, floor = in_turn(*map(turns.rate, games)), turns.rate("high")
            add(f"rollout, high{form}", "steps/s", play, "floor", least)
            add(f"PPO update, high{form}", "samples/s", update, "floor", floor)
            play, least = in_turn(play, update / epochs), in_turn(least, floor / epochs)
            add(f"PPO whole, {epochs} epochs{form}", "steps/s", play, "floor", least)
        for phase in ("collection", "evaluation") if args.phases else ():
            turns = Turns(floors)
            rate = playing(phase, args.num_envs, turns, games)
            add(f"{phase}, high", "steps/s", rate, "floor", in_turn(*map(turns.rate, games)))
        for capacity in CAPACITIES if args.phases else ("medium",):
            peers = ["plain loop"] if capacity == "medium" else []
            for form, options in forms.items():
                turns = Turns(floors)
                rate = distillation(options, capacity, args.batch_size, turns, [capacity, *peers])
                what = f"distillation, {capacity}{form}"
                add(what, "samples/s", rate, "floor", turns.rate(capacity))
                for peer in peers:
                    add(what, "samples/s", rate, peer, turns.rate(peer))
        if args.cleanrl:
            rates = [ppo(options, 8, 4, 4, 4, Turns({})) for options in forms.values()]
            theirs = cleanrl(args)
            for form, (play, update) in zip(forms, rates, strict=True):
                rate = in_turn(play, update / 4)
                add(f"PPO, high, 8 games{form}", "steps/s", rate, "CleanRL", theirs)


def whole_run(command, processes=1, threads=None):
    """Steps or samples a second of a script's own run, its first third left out."""
    python, environment = [sys.executable], dict(os.environ)
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    script, *flags = command.split()
    words = [*python, ROOT / script, *flags, "--eval-steps=0"]
    with tempfile.TemporaryDirectory() as folder:
        options = {"cwd": folder, "env": environment, "text": True, "capture_output": True}
        run = subprocess.run(words, check=False, **options)
        if run.returncode:
            sys.exit(f"{command}: failed: {run.stderr[-500:]}")
        (events,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(events)).Reload().Scalars("charts/SPS")
    steps, times = np.array([(event.step, event.wall_time) for event in events]).T
    late = steps >= steps[-1] / 3
    return np.ptp(steps[late]) / np.ptp(times[late])


def whole_runs(args, add):
    """On a GPU plain and with flags; on a CPU by several processes of one thread, and by one."""
    flags = [" --compile", " --bf16", " --bf16 --compile"] if args.bf16 else [" --compile"]
    for name, command in (ON_GPU if args.gpu else ON_CPU).items():
        unit = "samples/s" if "distil" in name else "steps/s"
        for _ in range(args.repeats):
            if args.gpu:
                plain = whole_run(command)
                for more in flags:
                    add(f"{name},{more}", unit, whole_run(command + more), "plain", plain)
            else:
                n = args.processes
                one = whole_run(f"{command} --no-cuda", 1, n)
                several = whole_run(f"{command} --no-cuda", n, 1)
                add(f"{name}, {n} processes", unit, several, f"1 process, {n} threads", one)
    if args.gpu:
        device = teacher.set_up_torch(1, True)
        for games, _ in itertools.product((16, 128), range(args.repeats)):
            rate = playing("collection", games, Turns({}), rounds=2000, device=device)
            add(f"collection, high, {games} games", "steps/s", rate)


def table(result):
    """Markdown of a line of the file: medians, and of the ratios the range too."""
    lines = [f"`{result['command']}`, {result['machine']}. {result.get('note', '')}", ""]
    lines += ["| measured | rate | beside | its rate | ratio |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        cells = [row["what"], f"{statistics.median(row['rates']):,.0f} {row['unit']}"]
        if row["beside"]:
            ratios = [a / b for a, b in zip(row["rates"], row["its rates"], strict=True)]
            cells += [row["beside"], f"{statistics.median(row['its rates']):,.0f}"]
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
            cells.append(f"{statistics.median(ratios):.2f} {spread}".strip())
        lines.append(f"| {' | '.join([*cells, '', '', ''][:5])} |")
    return "\n".join([*lines, ""])


def main(args):
    if not args.repeats:
        lines = Path(args.results).read_text().splitlines()
        return print("\n".join(table(json.loads(line)) for line in lines))
    if args.gpu and not torch.cuda.is_available():
        sys.exit("--gpu: torch finds no GPU")
    rows = {}

    def add(what, unit, rate, beside=None, its_rate=None):
        """One repeat's rate of what is measured, and of what it is measured beside."""
        about = {"what": what, "unit": unit, "beside": beside, "rates": [], "its rates": []}
        row = rows.setdefault((what, beside), about)
        row["rates"].append(float(rate))
        row["its rates"] += [float(its_rate)] if beside else []
        print(f"{what}: {rate:,.0f} {unit}, {beside}: {its_rate or 0:,.0f}", file=sys.stderr)

    (whole_runs if args.gpu or args.processes > 1 else side_by_side)(args, add)
    machine = f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores with "
    machine += f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, Python "
    machine += f"{platform.python_version()}, repeats: {args.repeats}"
    machine += f", {torch.cuda.get_device_name()}" if args.gpu else ""
    result = {"command": " ".join(["python", "benchmark/speed.py", *sys.argv[1:]])}
    result |= {"machine": machine, "rows": list(rows.values())}
    with open(args.results, "a") as file:
        file.write(json.dumps(result) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
