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
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import speed
import torch
import tyro
from speed import distill, teacher

COLORS = {"high": "C3", "medium": "C4", "low": "C0"}


@dataclass
class Args:
    seconds: float = 1.5
    """length of one measurement, about"""
    cuda: bool = True
    """use a GPU where there is one"""
    buffer_path: str = str(speed.ROOT / "pretrained" / speed.GAME / "buffer.npz")
    """buffer whose observations are trained on"""
    results: str = str(speed.ROOT / "benchmark" / "results")
    """folder for the tables"""
    figures: str = str(speed.ROOT / "benchmark" / "figures")
    """folder for the picture"""


def until(seconds, work):
    """Call `work()`, which returns how much it did, for `seconds`: the rate per second."""
    done, elapsed, start = 0, 0, time.perf_counter()
    while elapsed < seconds:
        done += work()
        elapsed = time.perf_counter() - start
    return done / elapsed


def training(kind, capacity, batch_size, buffer, device):
    """A function that gathers a batch and takes one optimiser step of PPO or of distillation."""
    agent, optimizer = speed.agent_and_optimizer(capacity, device)
    frames, stack_index, probs, values = buffer
    actions, logprobs = probs.argmax(-1), probs.clamp_min(1e-6).log().amax(-1)

    def shuffled():
        while True:
            order = torch.randperm(len(values), device=device)
            yield from order[: len(order) // batch_size * batch_size].split(batch_size)

    batches = shuffled()

    def work():
        rows = next(batches)
        stacks = [frames.index_select(0, index) for index in stack_index[rows].unbind(1)]
        obs = torch.stack(stacks, -1).permute(0, 3, 1, 2)
        logits, found = agent(obs)
        if kind == "ppo":
            batch = [x[rows] for x in (actions, logprobs, values, values, values)]
            policy_loss, value_loss, entropy, *_ = teacher.ppo_loss(
                logits, found, *batch, 0.1, True
            )
            loss = policy_loss - 0.01 * entropy + 0.5 * value_loss
        else:
            loss = distill.kl_divergence(probs[rows], logits).mean()
        optimizer.zero_grad()
        loss.backward()
        if kind == "ppo":
            torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return batch_size

    for _ in range(3):
        work()
    return work


def main(args):
    started = time.time()
    device = teacher.set_up_torch(1, args.cuda)
    with np.load(args.buffer_path) as arrays:
        names = ("frames", "stack_index", "action_probs", "values")
        buffer = [torch.from_numpy(arrays[name]).to(device) for name in names]
    games, batches = [2**i for i in range(8)], [2**i for i in range(5, 13)]
    rates = {"play": {}, "ppo": {}, "distil": {}}

    def measure(kind, capacity, size):
        print(f"{time.time() - started:4.0f} s  {kind} {capacity} {size}", file=sys.stderr)
        if kind == "play":
            pilot = speed.playing("evaluation", capacity, size, 24 * size, device=device)
            steps = max(24 * size, round(pilot * args.seconds))
            rate = speed.playing("evaluation", capacity, size, steps, device=device)
        else:
            rate = until(args.seconds, training(kind, capacity, size, buffer, device))
        rates[kind].setdefault(capacity, {})[size] = rate

    for capacity in speed.CAPACITIES:
        for size in games:
            measure("play", capacity, size)
        for kind in ("ppo", "distil"):
            for size in batches:
                measure(kind, capacity, size)
    collection = speed.playing("collection", "high", 16, 16 * 200, device=device)

    def train(capacity, steps):
        """Hours of PPO at the paper's setting: 10 epochs of minibatches of 1024."""
        return steps * (1 / rates["play"][capacity][16] + 10 / rates["ppo"][capacity][1024]) / 3600

    samples = 0.95 * 540_000
    hours = {
        "teacher (high), 75M steps": train("high", 75e6),
        "medium trained directly, 75M steps": train("medium", 75e6),
        "low trained directly, 75M steps": train("low", 75e6),
        "buffer of 540,000 samples": 540_000 / collection / 3600,
    }
    for capacity in ("medium", "low"):
        for epochs in (10, 400):
            seconds = epochs * samples / rates["distil"][capacity][32]
            hours[f"{capacity} distilled, {epochs} epochs, batch 32"] = seconds / 3600
        hours[f"{capacity} fine-tuned, 20M steps"] = train(capacity, 20e6)
    for capacity in speed.CAPACITIES:
        seconds = 1e6 / rates["play"][capacity][16]
        hours[f"one evaluation of 1M steps, {capacity}"] = seconds / 3600

    machine = (
        f"{time.strftime('%Y-%m-%d')}, {device}, {os.cpu_count()} cores with "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}"
    )
    command = " ".join(["python", "benchmark/cost.py", *sys.argv[1:]])
    lines = [f"`{command}`, {machine}, one measurement each, {time.time() - started:.0f} s.", ""]
    for kind, sizes, label in (
        ("play", games, "steps/s of playing, games at once"),
        ("ppo", batches, "samples/s of PPO's update, batch"),
        ("distil", batches, "samples/s of distillation, batch"),
    ):
        lines.append(f"| {label} | {' | '.join(map(str, sizes))} |")
        lines.append("|---" * (len(sizes) + 1) + "|")
        for capacity, found in rates[kind].items():
            best = max(found.values())
            cells = [f"**{x:,.0f}**" if x == best else f"{x:,.0f}" for x in found.values()]
            lines.append(f"| {capacity} | {' | '.join(cells)} |")
        lines.append("")
    pipeline = (
        "The paper's pipeline for one game, computed from these rates (16 games, 10 epochs of "
        "minibatches of 1,024), not run:"
    )
    lines += [pipeline, "", "| phase | hours |", "|---|---|"]
    lines += [f"| {phase} | {x:,.2f} |" for phase, x in hours.items()]
    result = {"command": command, "machine": machine, "rates": rates}
    result |= {"collection": collection, "hours": hours}
    Path(args.results, "cost.md").write_text("\n".join(lines) + "\n")
    Path(args.results, "cost.json").write_text(json.dumps(result, indent=1) + "\n")

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axes, kind, title, label, unit in zip(
        panels,
        ("play", "ppo", "distil"),
        ("playing", "PPO update", "distillation"),
        ("games at once", "minibatch", "batch"),
        ("steps/s", "samples/s", "samples/s"),
        strict=True,
    ):
        for capacity, found in rates[kind].items():
            style = {"color": COLORS[capacity], "label": capacity, "markersize": 3}
            axes.plot(list(found), list(found.values()), "o-", **style)
        axes.set(xscale="log", yscale="log", xlabel=label, title=title, ylabel=unit)
        axes.set_xticks(list(found), list(map(str, found)), fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    figure.savefig(Path(args.figures, "cost.png"), dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
