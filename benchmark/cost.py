"""What a game costs: rates over the number of games and the batch size, and the paper's pipeline.

    python benchmark/cost.py

Measures this project's own functions on Pong, once each and in one run, and computes from the rates
how long each phase of the paper's pipeline takes on this machine. Writes
`benchmark/results/cost.{md,json}` and `benchmark/figures/cost.png`. Needs matplotlib.
"""

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import speed
import torch
import tyro

sys.path.insert(0, str(speed.ROOT))
import actor_distill as distill  # noqa: E402
import ppo_atari_teacher as teacher  # noqa: E402

COLORS = {"high": "C3", "medium": "C4", "low": "C0"}


@dataclass
class Args:
    seconds: float = 1.5
    """length of one measurement, about"""
    device: Literal["cuda", "cpu"] = "cpu"
    """where the networks run"""
    bf16: bool = False
    """train in bfloat16"""
    buffer_path: str = str(speed.ROOT / "pretrained" / speed.GAME / "buffer.npz")
    """buffer whose observations are trained on"""


def until(seconds, work):
    """Call `work()`, which returns how much it did, for `seconds`: the rate per second."""
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not done:
        done += work()
    return done / elapsed if elapsed >= seconds else done / (time.perf_counter() - start)


def training(kind, capacity, batch_size, buffer, args):
    """A function that gathers a batch and does one `ppo_update` or `distill_update` with it."""
    agent, optimizer = speed.agent_and_optimizer(capacity, args)
    agent.bf16 = args.bf16
    frames, stack_index, probs, values = buffer
    actions = probs.argmax(-1)
    logprobs = probs.clamp_min(1e-6).log().amax(-1)
    rows_left = iter(())

    def work():
        nonlocal rows_left
        rows = next(rows_left, None)
        if rows is None:
            order = torch.randperm(len(values), device=values.device)
            rows_left = iter(order[:len(order) // batch_size * batch_size].split(batch_size))
            rows = next(rows_left)
        stacks = [frames.index_select(0, index) for index in stack_index[rows].unbind(1)]
        obs = torch.stack(stacks, -1).permute(0, 3, 1, 2)
        if kind == "ppo":
            teacher.ppo_update(
                agent, optimizer, teacher.minibatch_loss, obs, actions[rows], logprobs[rows],
                values[rows], values[rows], values[rows], max_grad_norm=0.5, clip_coef=0.1,
                clip_vloss=True, ent_coef=0.01, vf_coef=0.5)
        else:
            distill.distill_update(agent, optimizer, distill.batch_loss, obs, probs[rows],
                                   values[rows], 0.0)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return batch_size

    for _ in range(3):
        work()
    return work


def main(args):
    started = time.time()
    teacher.set_up_torch(teacher.Args(device=args.device))
    with np.load(args.buffer_path) as arrays:
        buffer = [torch.from_numpy(arrays[name]).to(args.device)
                  for name in ("frames", "stack_index", "action_probs", "values")]
    games, batches = [2**i for i in range(8)], [2**i for i in range(5, 13)]
    rates = {"play": {}, "ppo": {}, "distil": {}}

    def measure(kind, capacity, size):
        print(f"{time.time() - started:4.0f} s  {kind} {capacity} {size}", file=sys.stderr)
        if kind == "play":
            pilot = speed.playing("evaluation", capacity, size, 24 * size, args)
            steps = max(24 * size, round(pilot * args.seconds))
            rate = speed.playing("evaluation", capacity, size, steps, args)
        else:
            rate = until(args.seconds, training(kind, capacity, size, buffer, args))
        rates[kind].setdefault(capacity, {})[size] = rate
        return rate

    for capacity in speed.CAPACITIES:
        for size in games:
            measure("play", capacity, size)
        for kind in ("ppo", "distil"):
            for size in batches:
                measure(kind, capacity, size)
    collection = speed.playing("collection", "high", 16, 16 * 200, args)

    def train(capacity, steps):
        """Hours of PPO at the paper's setting: 10 epochs of minibatches of 1024."""
        return steps * (1 / rates["play"][capacity][16] + 10 / rates["ppo"][capacity][1024]) / 3600

    samples = 0.95 * 540_000
    cost = [("teacher (high), 75M steps", train("high", 75e6)),
            ("medium trained directly, 75M steps", train("medium", 75e6)),
            ("low trained directly, 75M steps", train("low", 75e6)),
            ("buffer of 540,000 samples", 540_000 / collection / 3600)]
    for capacity in ("medium", "low"):
        for epochs in (10, 400):
            hours = epochs * samples / rates["distil"][capacity][32] / 3600
            cost.append((f"{capacity} distilled, {epochs} epochs, batch 32", hours))
        cost.append((f"{capacity} fine-tuned, 20M steps", train(capacity, 20e6)))
    for capacity in speed.CAPACITIES:
        cost.append((f"one evaluation of 1M steps, {capacity}",
                     1e6 / rates["play"][capacity][16] / 3600))

    machine = (f"{time.strftime('%Y-%m-%d')}, {args.device}, {os.cpu_count()} cores with "
               f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, Python "
               f"{platform.python_version()}")
    command = " ".join(["python", "benchmark/cost.py", *sys.argv[1:]])
    lines = [f"`{command}`, {machine}, one measurement each, {time.time() - started:.0f} s.", ""]
    for kind, label in (("play", "steps/s of playing, games at once"),
                        ("ppo", "samples/s of PPO's update, batch"),
                        ("distil", "samples/s of distillation, batch")):
        sizes = games if kind == "play" else batches
        lines += [f"| {label} | " + " | ".join(map(str, sizes)) + " |",
                  "|---" * (len(sizes) + 1) + "|"]
        for capacity in speed.CAPACITIES:
            best = max(rates[kind][capacity].values())
            lines.append(f"| {capacity} | " + " | ".join(
                f"**{rate:,.0f}**" if rate == best else f"{rate:,.0f}"
                for rate in rates[kind][capacity].values()) + " |")
        lines.append("")
    lines += ["The paper's pipeline for one game, computed from these rates (16 games, 10 epochs "
              "of minibatches of 1,024), not run:", "", "| phase | hours |", "|---|---|"]
    lines += [f"| {phase} | {hours:,.2f} |" for phase, hours in cost]
    results = speed.ROOT / "benchmark" / "results"
    (results / "cost.md").write_text("\n".join(lines) + "\n")
    (results / "cost.json").write_text(json.dumps(
        {"command": command, "machine": machine, "rates": rates, "collection": collection,
         "hours": dict(cost)}, indent=1) + "\n")

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axes, (kind, title, label) in zip(panels, (
            ("play", "playing", "games at once"), ("ppo", "PPO update", "minibatch"),
            ("distil", "distillation", "batch"))):
        for capacity, found in rates[kind].items():
            axes.plot(list(found), list(found.values()), "o-", color=COLORS[capacity],
                      label=capacity, markersize=3)
        axes.set(xscale="log", yscale="log", xlabel=label, title=title,
                 ylabel="steps/s" if kind == "play" else "samples/s")
        axes.set_xticks(list(found), list(map(str, found)), fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    figure.savefig(speed.ROOT / "benchmark" / "figures" / "cost.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
