"""Measure every phase beside its own floor on a CPU, in one run, and print one table.

    python benchmark/speed.py
    python benchmark/speed.py --processes 2
    python benchmark/speed.py --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python

A phase is timed inside the scripts' own code. Its floor is the least that this machine needs for
the same work: the games stepped with random actions, the network's forward pass on a batch in
place, one optimiser step on a batch in place. Machines are noisy, so a phase and its floors take
turns, every few steps, and the ratio to look at is the median over the repeats of one repeat's.
With `--cleanrl`, its `ppo_atari.py` runs in the same alternation (tried with its master branch,
torch 2.13.0, gymnasium 0.29.1, ale-py 0.9.1, stable-baselines3 2.3.2 and NumPy 1.26).
Writes `benchmark/results/speed.{md,json}`. With `--processes` it measures instead, in turns, whole
trainings by that many processes of torchrun with one thread each, and by one process with as many
threads, and writes `speed-processes.{md,json}`.
"""

import contextlib
import itertools
import json
import os
import platform
import resource
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


@dataclass
class Args:
    repeats: int = 3
    """repeats of each measurement; the medians are reported"""
    num_envs: int = 16
    """games played at once"""
    batch_size: int = 256
    """samples in a minibatch of the PPO update and in a batch of the distillation"""
    compile: bool = False
    """compile network and loss; the floors stay as they are"""
    bf16: bool = False
    """let networks in training compute in bfloat16; the floors stay as they are"""
    processes: int = 1
    """more than 1: compare so many processes with one process of so many threads, on a CPU"""
    cleanrl: str | None = None
    """folder of CleanRL, to measure its `ppo_atari.py` beside the teacher at its own flags"""
    cleanrl_python: str = sys.executable
    """Python that has what CleanRL needs"""
    buffer_path: str = str(ROOT / "pretrained" / GAME / "buffer.npz")
    """buffer to load and to distil from"""
    results: str = str(ROOT / "benchmark" / "results")
    """folder to write to"""


class Turns:
    """Divides time among a phase and its floors, which run between the steps of the phase.

    Args:
        floors: name to function that does some of the work and returns how much.
    """

    def __init__(self, floors):
        self.floors, self.since = floors, None
        self.spent, self.done = {}, {}
        self.on_floor = False

    def lap(self, name, amount, *floors):
        """Since the last lap `name` did `amount` of work; now let each of `floors` do some."""
        now = time.perf_counter()
        if self.since is not None:
            self.spent[name] = self.spent.get(name, 0) + now - self.since
            self.done[name] = self.done.get(name, 0) + amount
        self.since = now
        for floor in floors:
            self.on_floor = True
            amount = self.floors[floor]()
            self.on_floor = False
            self.lap(floor, amount)

    def forget(self):
        """What was measured until now was warm-up."""
        self.spent, self.done = {}, {}

    def rate(self, name):
        """Work per second of the time spent on it."""
        return self.done[name] / self.spent[name]


def agent_and_optimizer(capacity, device="cpu"):
    """A fresh network in the layout of the scripts, and their optimiser."""
    agent = teacher.Agent(capacity, NUM_ACTIONS).to(device, memory_format=torch.channels_last)
    return agent, torch.optim.Adam(agent.parameters(), lr=1e-5, eps=1e-5, fused=True)


def environment_alone(num_envs):
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


@contextlib.contextmanager
def quiet_folder():
    """A temporary working folder, with stdout and stderr thrown away."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
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


def ppo_script(
    args, num_envs, num_minibatches, epochs, iterations, turns, floors=(), update_floors=()
):
    """The teacher's own `main`, in laps "rollout" and "update"; its first iteration is warm-up.

    The rollout lasts from the last optimiser step of an iteration to the next call of `gae`, the
    update from there to its last optimiser step. `floors` are those of the rollout.
    """
    plain_gae, plain_envs = teacher.gae, teacher.AtariEnvs
    size = num_envs * 128 // num_minibatches

    def gae(*batch):
        turns.lap("rollout", 0)
        return plain_gae(*batch)

    def after_update(count):
        turns.lap("update", size, *update_floors)
        if count == epochs * num_minibatches:
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
        flags = teacher.Args(
            num_envs=num_envs,
            num_steps=128,
            num_minibatches=num_minibatches,
            update_epochs=epochs,
            total_timesteps=iterations * num_envs * 128,
            eval_steps=0,
            cuda=False,
            compile=args.compile,
            bf16=args.bf16,
        )
        teacher.main(flags)


def cleanrl_script(args, iterations=4):
    """CleanRL's `ppo_atari.py` on the same cores: whole steps/s, without its start."""
    code = (
        "import ale_py, runpy, sys\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = os.path.abspath(f"{args.cleanrl}/cleanrl/ppo_atari.py")
    flags = ["--env-id", GAME, "--total-timesteps", str(iterations * 1024), "--no-cuda"]
    environment = {**os.environ, "PYTHONPATH": os.path.abspath(args.cleanrl)}
    environment.pop("GOMP_SPINCOUNT", None)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [os.path.abspath(args.cleanrl_python), "-c", code, script, *flags],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        times = [time.perf_counter() for line in process.stdout if line.startswith("SPS")]
    if process.wait() or len(times) < 2:
        sys.exit(f"--cleanrl {args.cleanrl}: failed: {process.stderr.read()[-500:]}")
    return (len(times) - 1) * 1024 / (times[-1] - times[0])


class Enough(Exception):
    """Cuts a phase short."""


def playing(phase, capacity, num_envs, steps, turns=None, floors=(), device="cpu"):
    """`collect` or `play`, in laps of the phase's name: steps/s, the first eighth left out."""
    turns = turns or Turns({})
    agent, _ = agent_and_optimizer(capacity, device)

    def after_step(rounds):
        turns.lap(phase, num_envs, *(floors if rounds % 16 == 0 else ()))
        if rounds == max(2, steps // num_envs // 8):
            turns.forget()
        if rounds * num_envs >= steps:
            raise Enough

    envs = watched(teacher.AtariEnvs(ROM, num_envs, 0.0, life_loss=False), after_step)
    with quiet_folder(), contextlib.suppress(Enough):
        if phase == "collection":
            collect.collect(agent, envs, 2 * steps, 1, False, None, device)
        else:
            teacher.play(agent, envs, 10**9, 1, False, device)
    return turns.rate(phase)


def distillation(capacity, batches, args, turns, floors):
    """The loop of `actor_distill.py`'s own `main`, cut short, in laps; a quarter is warm-up."""

    def after_update(count):
        turns.lap("distillation", args.batch_size, *floors)
        if count == batches // 4:
            turns.forget()
        if count == batches:
            raise Enough

    with quiet_folder(), contextlib.suppress(Enough), after_updates(turns, after_update):
        flags = distill.Args(
            capacity=capacity,
            batch_size=args.batch_size,
            optimizer="adam",
            eval_steps=0,
            buffer_path=args.buffer_path,
            cuda=False,
            compile=args.compile,
            bf16=args.bf16,
        )
        distill.main(flags)


def plain_loop(args):
    """What a newcomer would write, a step a call: stacked observations, DataLoader, NCHW."""
    with np.load(args.buffer_path) as buffer:
        rows = buffer["stack_index"][: 32 * args.batch_size]
        obs = torch.from_numpy(buffer["frames"][rows])
        targets = torch.from_numpy(buffer["action_probs"][: len(rows)])
    agent = teacher.Agent("medium", NUM_ACTIONS)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5)
    data = torch.utils.data.TensorDataset(obs, targets)
    loader = torch.utils.data.DataLoader(data, args.batch_size, shuffle=True)
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


LOADING = """
import json, sys, time, tracemalloc
import numpy as np
sys.path.insert(0, sys.argv[1])
import actor_distill

def numpys():
    names = ("frames", "stack_index", "action_probs", "values", "episode_index")
    with np.load(sys.argv[2]) as arrays:
        return [arrays[name] for name in names]

def ours():
    return actor_distill.load_buffer(sys.argv[2], sys.argv[3])[:5]

rates = []
for load in (numpys, ours, numpys):
    start = time.perf_counter()
    size = sum(array.nbytes for array in load())
    rates.append(size / (time.perf_counter() - start) / 1e6)
tracemalloc.start()
ours()
print(json.dumps([*rates[1:], tracemalloc.get_traced_memory()[1] / size]))
"""


def loading(buffer_path):
    """MB/s of `load_buffer` and of `np.load`, and the peak memory of the former over its arrays."""
    command = [sys.executable, "-c", LOADING, str(ROOT), buffer_path, GAME]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def decision(capacity):
    """Microseconds from one observation to one action, one thread; multiply-adds; parameters."""
    agent, _ = agent_and_optimizer(capacity)
    obs = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8)
    multiply_adds = agent.actor.weight.numel()
    for layer, positions in {0: 20 * 20, 2: 9 * 9, 4: 7 * 7, 7: 1}.items():
        multiply_adds += agent.network[layer].weight.numel() * positions
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    with torch.inference_mode():
        for _ in range(600):
            start = time.perf_counter()
            agent(obs)[0].argmax(-1).item()
            times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    parameters = sum(parameter.numel() for parameter in agent.parameters())
    return 1e6 * statistics.median(times[100:]), multiply_adds, parameters


def whole_training(processes, threads, script, *flags):
    """Steps or samples a second that a script logs at its end, its start left out."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*command, ROOT / script, *flags, "--eval-steps=0", "--no-cuda"],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            cwd=folder,
            check=True,
            capture_output=True,
        )
        run = next(Path(folder, "runs").iterdir())
        return EventAccumulator(str(run)).Reload().Scalars("charts/SPS")[-1].value


def several_processes(args):
    """Whole trainings by `--processes` and by one process, in turns: a table, two files."""
    ppo = ["--num-steps=128", "--num-minibatches=8", "--update-epochs=2"]
    learn = ["--epochs=1", f"--buffer-path={args.buffer_path}", f"--batch-size={args.batch_size}"]
    phases = {
        "PPO, high": ("ppo_atari_teacher.py", "--total-timesteps=10_240", *ppo),
        "PPO, low": ("ppo_atari_teacher.py", "--total-timesteps=20_480", "--capacity=low", *ppo),
        "distillation, medium": ("actor_distill.py", *learn),
        "distillation, low": ("actor_distill.py", "--capacity=low", *learn),
    }
    measured, table = {name: [] for name in phases}, []
    for _ in range(args.repeats):
        for name, command in phases.items():
            one = whole_training(1, args.processes, *command)
            measured[name].append((one, whole_training(args.processes, 1, *command)))
    for name, pairs in measured.items():
        one, several = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        table.append((name, one, several, statistics.median(ratios), ratios[0], ratios[-1]))
    command = " ".join(["python", "benchmark/speed.py", *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}"
    result = {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine}
    result |= {"torch": torch.__version__, "flags": vars(args), "rates": measured}
    lines = [f"`{command}`, {result['date']}, {machine}, torch {torch.__version__}, medians."]
    n = args.processes
    lines += [
        "",
        f"| training | 1 process, {n} threads | {n} processes, 1 thread | ratio (range) |",
    ]
    lines.append("|---|---|---|---|")
    form = "| {} | {:,.0f} /s | {:,.0f} /s | {:.2f} ({:.2f} to {:.2f}) |"
    lines += [form.format(*row) for row in table]
    path = Path(args.results, "speed-processes")
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main(args):
    if args.processes > 1:
        return several_processes(args)
    started = time.time()
    teacher.set_up_torch(1, False)
    floors = {
        "env": environment_alone(args.num_envs),
        "forward": forward_alone("high", args.num_envs),
        "plain loop": plain_loop(args),
        **{c: update_alone(c, args.batch_size) for c in CAPACITIES},
    }
    for work in floors.values():
        work()
    measured, epochs, games = {}, 2, ("env", "forward")

    def add(name, rate, floor, unit="steps/s"):
        """One repeat's rate of a phase and of its floor."""
        measured.setdefault((name, unit), []).append((rate, floor))

    def in_turn(*rates):
        """The rate of doing the same work in each of several ways, one after another."""
        return 1 / sum(1 / rate for rate in rates)

    for repeat in range(1, args.repeats + 1):
        print(f"{time.time() - started:4.0f} s  repeat {repeat} of {args.repeats}", file=sys.stderr)
        turns, minibatches = Turns(floors), args.num_envs * 128 // args.batch_size
        ppo_script(args, args.num_envs, minibatches, epochs, 2, turns, games, ("high",))
        rollout, update = turns.rate("rollout"), turns.rate("update")
        play_floor, update_floor = in_turn(*map(turns.rate, games)), turns.rate("high")
        add("rollout, high", rollout, play_floor)
        add("PPO update, high", update, update_floor, "samples/s")
        whole_floor = in_turn(play_floor, update_floor / epochs)
        add(f"PPO whole, {epochs} epochs", in_turn(rollout, update / epochs), whole_floor)
        for phase in ("collection", "evaluation"):
            turns = Turns(floors)
            rate = playing(phase, "high", args.num_envs, 2048, turns, games)
            add(f"{phase}, high", rate, in_turn(*map(turns.rate, games)))
        for capacity in CAPACITIES:
            turns = Turns(floors)
            peers = (capacity, "plain loop") if capacity == "medium" else (capacity,)
            distillation(capacity, 24, args, turns, peers)
            rate = turns.rate("distillation")
            add(f"distillation, {capacity}", rate, turns.rate(capacity), "samples/s")
            if capacity == "medium":
                add("plain loop", rate, turns.rate("plain loop"), "samples/s")
        ours, numpys, peak = loading(args.buffer_path)
        add("loading a buffer", ours, numpys, "MB/s")
        if args.cleanrl:
            turns = Turns({})
            ppo_script(args, 8, 4, 4, 4, turns)
            rate = in_turn(turns.rate("rollout"), turns.rate("update") / 4)
            add("CleanRL", rate, cleanrl_script(args))

    table, peers = [], {}
    for (name, unit), pairs in measured.items():
        rate, floor = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(rate / floor for rate, floor in pairs)
        row = {"phase": name, "unit": unit, "rate": rate, "floor": floor, "ratio": ratio}
        table.append(row)
        if name in ("plain loop", "CleanRL"):
            peers[name] = row
    decisions = {c: decision(c) for c in CAPACITIES}
    result = {
        "command": " ".join(["python", "benchmark/speed.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.time() - started),
        "flags": vars(args),
        "table": table,
        "rates and floors of each repeat": {name: pairs for (name, _), pairs in measured.items()},
        "peak memory of loading over the arrays": peak,
        "decisions": decisions,
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    head = (
        "`{command}`, {date}, {cores} cores with {instructions}, {threads} torch threads, torch "
        "{torch}, medians of {flags[repeats]} repeats, {seconds} s."
    )
    lines = [head.format(**result), "", "| phase | rate | its floor | ratio |", "|---|---|---|---|"]
    form = "| {phase} | {rate:,.0f} {unit} | {floor:,.0f} | {ratio:.2f} |"
    lines += [form.format(**row) for row in table if row["phase"] not in peers]
    text = (
        f"Loading takes {peak:.2f} times the arrays' size at its peak. Medium distillation runs at "
        f"{peers['plain loop']['ratio']:.2f} times a plain PyTorch loop."
    )
    if args.cleanrl:
        text += (
            " With 8 games, 128 steps, 4 minibatches and 4 epochs, PPO runs at {rate:,.0f} steps/s "
            "and CleanRL's `ppo_atari.py` at {floor:,.0f}: {ratio:.2f} times as fast."
        ).format(**peers["CleanRL"])
    lines += ["", text, "", "| one decision, 1 thread | high | medium | low |", "|---|---|---|---|"]
    for i, label in enumerate(("µs", "multiply-adds", "parameters")):
        cells = " | ".join(f"{decisions[c][i]:,.0f}" for c in CAPACITIES)
        lines.append(f"| {label} | {cells} |")
    Path(args.results, "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(args.results, "speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
