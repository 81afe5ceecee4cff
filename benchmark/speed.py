"""Measure every phase beside its own floor, in one run, and print one table.

    python benchmark/speed.py
    python benchmark/speed.py --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python

A phase is timed inside the scripts' own code. Its floor is the least that this machine needs for
the same work: the games stepped with random actions, the network's forward pass on a batch in
place, one optimiser step on a batch in place. Machines are noisy, so a phase and its floors take
turns, every few steps, and the ratio to look at is the median over the repeats of one repeat's.
With `--cleanrl`, its `ppo_atari.py` runs in the same alternation (tried with its master branch,
torch 2.13.0, gymnasium 0.29.1, ale-py 0.9.1, stable-baselines3 2.3.2 and NumPy 1.26).
Writes `benchmark/results/speed.{md,json}`.
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
from typing import Literal

if __name__ == "__main__":  # as in the scripts, before torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import actor_distill as distill  # noqa: E402
import collect_buffer as collect  # noqa: E402
import ppo_atari_teacher as teacher  # noqa: E402

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
    device: Literal["cuda", "cpu"] = "cpu"
    """where the networks run"""
    bf16: bool = False
    """train in bfloat16, and the floors too"""
    compile: bool = False
    """compile network and loss; the floors stay as they are"""
    cleanrl: str | None = None
    """folder of CleanRL, to measure its `ppo_atari.py` beside the teacher at its own flags"""
    cleanrl_python: str = sys.executable
    """Python that has what CleanRL needs"""
    buffer_path: str = str(ROOT / "pretrained" / GAME / "buffer.npz")
    """buffer to load and to distil from"""


class Turns:
    """Divides time among a phase and its floors, which run between the steps of the phase.

    Args:
        floors: name to function that does some of the work and returns how much.
    """

    def __init__(self, floors):
        self.floors, self.since = floors, None
        self.spent, self.done = {}, {}

    def lap(self, name, amount, *floors):
        """Since the last lap `name` did `amount` of work; now let each of `floors` do some."""
        if floors and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.since is not None:
            self.spent[name] = self.spent.get(name, 0) + now - self.since
            self.done[name] = self.done.get(name, 0) + amount
        self.since = now
        for floor in floors:
            self.lap(floor, self.floors[floor]())

    def forget(self):
        """What was measured until now was warm-up."""
        self.spent, self.done = {}, {}

    def rate(self, name):
        """Work per second of the time spent on it."""
        return self.done[name] / self.spent[name]


def due(count, args, on_cpu):
    """Whether floors get a turn: every `on_cpu` steps on a CPU, every 64 on a GPU."""
    return count % (on_cpu if args.device == "cpu" else 64) == 0


def agent_and_optimizer(capacity, args):
    """A fresh network in the layout of the scripts, and their optimiser."""
    agent = teacher.Agent(capacity, NUM_ACTIONS).to(args.device, memory_format=torch.channels_last)
    return agent, torch.optim.Adam(agent.parameters(), lr=1e-5, eps=1e-5, fused=True)


def environment_alone(num_envs, args):
    """Step the games with random actions: a function that returns the steps it made."""
    groups = teacher.make_envs(ROM, num_envs, False, 0.0, device=args.device)
    for envs, part in groups:
        envs.reset(seed=teacher.game_seeds(num_envs, 1, 1)[part])
    actions = np.random.default_rng(0).integers(0, NUM_ACTIONS, (16, num_envs))

    def work():
        for action in actions:
            for envs, part in groups:
                envs.send(action[part])
            for envs, _ in groups:
                envs.recv()
        return actions.size

    return work


def forward_alone(capacity, num_envs, args):
    """Decide for all games: conversion, network and sampling, nothing else."""
    agent, _ = agent_and_optimizer(capacity, args)
    obs = torch.randint(0, 256, (num_envs, 4, 84, 84), dtype=torch.uint8, device=args.device)

    @torch.inference_mode()
    def work():
        for _ in range(16):
            teacher.sample_actions(agent(obs)[0]).cpu()
        return 16 * num_envs

    return work


def update_alone(capacity, batch_size, args):
    """Forward, backward and Adam on one float batch in place, by the plainest loss."""
    agent, optimizer = agent_and_optimizer(capacity, args)
    x = torch.rand(batch_size, 4, 84, 84, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)

    def work():
        for _ in range(1 if args.device == "cpu" else 100):
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                hidden = agent.network(x)
            hidden = hidden.float()
            loss = agent.actor(hidden).logsumexp(-1).mean() + agent.critic(hidden).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if args.device == "cpu":
            return batch_size
        torch.cuda.synchronize()
        return 100 * batch_size

    return work


@contextlib.contextmanager
def quiet_folder():
    """A temporary working folder, with stdout and stderr thrown away."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                yield Path(folder)
        finally:
            os.chdir(before)


def ppo_script(args, num_envs, num_minibatches, update_epochs, iterations, turns, game_floors=(),
               update_floors=()):
    """The teacher's own `main`, in laps "rollout" and "update"; its first iteration is warm-up.

    The rollout lasts from the last optimiser step of an iteration to the next call of `gae`, the
    update from there to its last optimiser step.
    """
    plain = {name: getattr(teacher, name) for name in ("gae", "ppo_update", "make_envs")}
    size, updates = num_envs * 128 // num_minibatches, 0

    def gae(*batch):
        turns.lap("rollout", 0)
        return plain["gae"](*batch)

    def ppo_update(*batch, **flags):
        nonlocal updates
        statistics = plain["ppo_update"](*batch, **flags)
        updates += 1
        turns.lap("update", size, *(update_floors if due(updates, args, 1) else ()))
        if updates == update_epochs * num_minibatches:
            turns.forget()
        return statistics

    def make_envs(*flags, **others):
        groups = plain["make_envs"](*flags, **others)
        envs, part = groups[-1]
        groups[-1] = Watched(envs, lambda rounds: turns.lap(
            "rollout", num_envs, *(game_floors if due(rounds, args, 16) else ()))), part
        return groups

    for function in (gae, ppo_update, make_envs):
        setattr(teacher, function.__name__, function)
    try:
        with quiet_folder(), contextlib.ExitStack() as at_exit:
            teacher.main(teacher.Args(
                num_envs=num_envs, num_steps=128, num_minibatches=num_minibatches,
                update_epochs=update_epochs, total_timesteps=iterations * num_envs * 128,
                eval_steps=0, device=args.device, bf16=args.bf16, compile=args.compile), at_exit)
    finally:
        for name, function in plain.items():
            setattr(teacher, name, function)


def cleanrl_script(args, iterations=4):
    """CleanRL's `ppo_atari.py` on the same device: whole steps/s, without its start."""
    code = ("import ale_py, runpy, sys\n"
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    flags = f"--env-id {GAME} --total-timesteps {iterations * 1024}".split()
    environment = {**os.environ, "PYTHONPATH": os.path.abspath(args.cleanrl)}
    environment.pop("GOMP_SPINCOUNT", None)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [os.path.abspath(args.cleanrl_python), "-c", code,
             os.path.abspath(f"{args.cleanrl}/cleanrl/ppo_atari.py"),
             *flags, *([] if args.device == "cuda" else ["--no-cuda"])],
            env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        times = [time.perf_counter() for line in process.stdout if line.startswith("SPS")]
    if process.wait() or len(times) < 2:
        sys.exit(f"--cleanrl {args.cleanrl}: failed: {process.stderr.read()[-500:]}")
    return (len(times) - 1) * 1024 / (times[-1] - times[0])


class Watched:
    """Games that call a function after each step, with the number of steps; none is under way."""

    def __init__(self, envs, after_step):
        self.envs, self.after_step, self.rounds = envs, after_step, 0

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def recv(self):
        result = self.envs.recv()
        self.rounds += 1
        self.after_step(self.rounds)
        return result


class Enough(Exception):
    """Cuts a phase short."""


def playing(phase, capacity, num_envs, steps, args, turns=None, floors=()):
    """`collect` or `play`, in laps of the phase's name: steps/s, the first eighth left out."""
    turns = turns or Turns({})
    agent, _ = agent_and_optimizer(capacity, args)
    groups = teacher.make_envs(ROM, num_envs, False, 0.0, device=args.device)
    envs, part = groups[-1]

    def after_step(rounds):
        turns.lap(phase, num_envs, *(floors if due(rounds, args, 16) else ()))
        if rounds == max(2, steps // num_envs // 8):
            turns.forget()
        if rounds * num_envs >= steps:
            raise Enough

    groups[-1] = Watched(envs, after_step), part
    with quiet_folder(), contextlib.suppress(Enough):
        if phase == "collection":
            collect.collect(agent, groups, 2 * steps, 1, False, lambda *end: None)
        else:
            teacher.play(agent, groups, 10**9, 1, False)
    return turns.rate(phase)


def distillation(capacity, batches, args, turns, floors):
    """The loop of `actor_distill.py`'s own `main`, cut short, in laps; a quarter is warm-up."""
    plain, calls = distill.distill_update, 0

    def distill_update(*batch):
        nonlocal calls
        sums = plain(*batch)
        calls += 1
        turns.lap("distillation", args.batch_size, *(floors if due(calls, args, 1) else ()))
        if calls == batches // 4:
            turns.forget()
        if calls == batches:
            raise Enough
        return sums

    validate = distill.validate
    distill.validate = lambda *batch: {f"validation/{name}": 1.0 for name in (
        "kl", "agreement", "entropy_gap", "value_loss")}
    distill.distill_update = distill_update
    try:
        with quiet_folder(), contextlib.suppress(Enough), contextlib.ExitStack() as at_exit:
            distill.main(distill.Args(
                capacity=capacity, batch_size=args.batch_size, optimizer="adam", eval_steps=0,
                buffer_path=args.buffer_path, device=args.device, bf16=args.bf16,
                compile=args.compile), at_exit)
    finally:
        distill.distill_update, distill.validate = plain, validate


def plain_loop(args):
    """What a newcomer would write, a step a call: stacked observations, DataLoader, NCHW."""
    with np.load(args.buffer_path) as buffer:
        rows = buffer["stack_index"][:32 * args.batch_size]
        obs = torch.from_numpy(buffer["frames"][rows])
        targets = torch.from_numpy(buffer["action_probs"][:len(rows)])
    agent = teacher.Agent("medium", NUM_ACTIONS).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5)
    data = torch.utils.data.TensorDataset(obs, targets)
    loader = torch.utils.data.DataLoader(data, args.batch_size, shuffle=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def work():
        x, target = next(batches)
        x, target = x.to(args.device), target.to(args.device)
        logits = agent.actor(agent.network(x.float() / 255))
        loss = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return len(x)

    return work


def loading(buffer_path):
    """MB/s of `load_buffer` and of `np.load`, and the peak memory of the former over its arrays."""
    code = ("import json, sys, time, tracemalloc; import numpy as np; "
            "sys.path.insert(0, sys.argv[1]); import actor_distill as d\n"
            "meta = json.loads(str(np.load(sys.argv[2])['meta']))\n"
            "names = ('frames', 'stack_index', 'action_probs', 'values', 'episode_index')\n"
            "def ours(): return d.load_buffer(\n"
            "    sys.argv[2], meta['env_id'], meta['action_meanings'], '')\n"
            "def numpys():\n"
            "    with np.load(sys.argv[2]) as a: return {n: a[n] for n in names}\n"
            "rates = []\n"
            "for load in (numpys, ours, numpys):\n"
            "    start = time.perf_counter(); b = load()\n"
            "    size = sum(b[n].nbytes for n in names)\n"
            "    rates.append(size / (time.perf_counter() - start) / 1e6); del b\n"
            "tracemalloc.start(); ours()\n"
            "print(json.dumps([*rates[1:], tracemalloc.get_traced_memory()[1] / size]))")
    result = subprocess.run([sys.executable, "-c", code, str(ROOT), buffer_path],
                            capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def decision(capacity):
    """Microseconds from one observation to one action, one thread; multiply-adds; parameters."""
    agent = teacher.Agent(capacity, NUM_ACTIONS).to(memory_format=torch.channels_last)
    obs = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8)
    multiply_adds = 0
    shape = {0: 20 * 20, 2: 9 * 9, 4: 7 * 7, 7: 1}
    for i, positions in shape.items():
        multiply_adds += agent.network[i].weight.numel() * positions
    multiply_adds += agent.actor.weight.numel()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            times = []
            for _ in range(600):
                start = time.perf_counter()
                agent(obs)[0].argmax(-1).item()
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1e6 * statistics.median(times[100:]), multiply_adds, sum(
        parameter.numel() for parameter in agent.parameters())


def main(args):
    started = time.time()
    teacher.set_up_torch(teacher.Args(device=args.device))
    floors = {"env": environment_alone(args.num_envs, args),
              "forward": forward_alone("high", args.num_envs, args), "plain loop": plain_loop(args)}
    floors |= {c: update_alone(c, args.batch_size, args) for c in CAPACITIES}
    for work in floors.values():
        work()
    measured, epochs, games = {}, 2, ("env", "forward")

    def add(name, rate, floor, unit="steps/s"):
        """One repeat's rate of a phase and of its floor."""
        measured.setdefault((name, unit), []).append((rate, floor))

    def in_turn(*rates):
        """The rate of doing the same work in each of several ways, one after another."""
        return 1 / sum(1 / rate for rate in rates)

    for repeat in range(args.repeats):
        print(f"repeat {repeat + 1} of {args.repeats}, at {time.time() - started:.0f} s",
              file=sys.stderr)
        turns = Turns(floors)
        ppo_script(args, args.num_envs, args.num_envs * 128 // args.batch_size, epochs, 2, turns,
                   games, ("high",))
        rollout, update = turns.rate("rollout"), turns.rate("update")
        play_floor, update_floor = in_turn(*map(turns.rate, games)), turns.rate("high")
        add("rollout, high", rollout, play_floor)
        add("PPO update, high", update, update_floor, "samples/s")
        add(f"PPO whole, {epochs} epochs", in_turn(rollout, update / epochs),
            in_turn(play_floor, update_floor / epochs))
        for phase in ("collection", "evaluation"):
            turns = Turns(floors)
            rate = playing(phase, "high", args.num_envs, 2048, args, turns, games)
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
            add("CleanRL", in_turn(turns.rate("rollout"), turns.rate("update") / 4),
                cleanrl_script(args, iterations=4))
    table = [{"phase": name, "unit": unit,
              "rate": statistics.median(rate for rate, _ in pairs),
              "floor": statistics.median(floor for _, floor in pairs),
              "ratio": statistics.median(rate / floor for rate, floor in pairs)}
             for (name, unit), pairs in measured.items()]
    peers = {row["phase"]: row for row in table if row["phase"] in ("plain loop", "CleanRL")}
    decisions = {c: decision(c) for c in CAPACITIES}
    result = {
        "command": " ".join(["python", "benchmark/speed.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.time() - started), "flags": vars(args), "table": table,
        "rates and floors of each repeat": {name: pairs for (name, _), pairs in measured.items()},
        "peak memory of loading over the arrays": peak, "decisions": decisions,
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    lines = [f"`{result['command']}`, {result['date']}, {result['cores']} cores with "
             f"{result['instructions']}, {result['threads']} torch threads, torch "
             f"{result['torch']}, medians of {args.repeats} repeats, {result['seconds']} s.", "",
             "| phase | rate | its floor | ratio |", "|---|---|---|---|"]
    lines += [f"| {row['phase']} | {row['rate']:,.0f} {row['unit']} | {row['floor']:,.0f} | "
              f"{row['ratio']:.2f} |" for row in table if row["phase"] not in peers]
    peer = ""
    if args.cleanrl:
        row = peers["CleanRL"]
        peer = (f" With 8 games, 128 steps, 4 minibatches and 4 epochs, PPO runs at "
                f"{row['rate']:,.0f} steps/s and CleanRL's `ppo_atari.py` at "
                f"{row['floor']:,.0f}: {row['ratio']:.2f} times as fast.")
    lines += ["", f"Loading takes {peak:.2f} times the arrays' size at its peak. "
              f"Medium distillation runs at {peers['plain loop']['ratio']:.2f} times a plain "
              f"PyTorch loop." + peer,
              "",
              "| one decision, 1 thread | high | medium | low |", "|---|---|---|---|"]
    for i, label in enumerate(("µs", "multiply-adds", "parameters")):
        lines.append(f"| {label} | " + " | ".join(f"{decisions[c][i]:,.0f}" for c in CAPACITIES)
                     + " |")
    results = ROOT / "benchmark" / "results"
    (results / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
