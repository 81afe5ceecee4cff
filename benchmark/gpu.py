"""How fast the four scripts run on a GPU, with and without `--compile`: whole runs, one after another.

    python benchmark/gpu.py
    python benchmark/gpu.py --only "PPO.*"

Every case that learns is a script's own `main`, with its own logging and saving. Its rate is the
slope of the logged steps over the time at which TensorBoard wrote them, the first third of a run
left out, in which CUDA starts and `--compile` compiles. Writes `benchmark/results/gpu.{md,json}`.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import actor_distill as distill
import collect_buffer as collect
import finetune_student as finetune
import ppo_atari_teacher as teacher

GAME = "PongNoFrameskip-v4"
POLICY = ROOT / "pretrained" / GAME / "ppo_high.pt"
BUFFER = POLICY.with_name("buffer.npz")


@dataclass
class Args:
    only: str = ".*"
    """pattern of the cases to run"""
    scale: float = 1.0
    """length of the runs, for a trial on a CPU"""
    results: str = str(ROOT / "benchmark" / "results")
    """folder to write to"""


def cases(scale):
    """Name to module and flags."""

    def ppo(games, iterations, minibatches):
        iterations = max(3, round(scale * iterations))
        flags = {"num_envs": games, "num_steps": 128, "num_minibatches": minibatches}
        steps = iterations * games * 128
        return flags | {"update_epochs": 4, "total_timesteps": steps}

    def learn(capacity, batch_size, epochs):
        flags = {"capacity": capacity, "batch_size": batch_size}
        return flags | {"epochs": max(3, round(scale * epochs)), "buffer_path": str(BUFFER)}

    def record(games, samples):
        return {"games": games, "samples": round(scale * samples)}

    return {
        "distillation, medium, batches of 64": (distill, learn("medium", 64, 12)),
        "distillation, low, batches of 64": (distill, learn("low", 64, 12)),
        "distillation, medium, batches of 1024": (distill, learn("medium", 1024, 60)),
        "PPO, high, 16 games, minibatches of 256": (teacher, ppo(16, 18, 8)),
        "PPO, high, 128 games, minibatches of 1024": (teacher, ppo(128, 8, 16)),
        "fine-tuning, high, 16 games, minibatches of 256": (
            finetune,
            ppo(16, 18, 8) | {"student_path": str(POLICY)},
        ),
        "collection, high, 16 games": (collect, record(16, 50_000)),
        "collection, high, 128 games": (collect, record(128, 300_000)),
    }


def measured(script, flags):
    """Steps or samples a second that one run makes."""
    if script is collect:
        return recorded(**flags)
    torch._dynamo.reset()
    before = set(Path("runs").glob("*"))
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        script.main(script.Args(**flags, overwrite=True))
    (run,) = set(Path("runs").glob("*")) - before
    events = EventAccumulator(str(run)).Reload().Scalars("charts/SPS")
    steps, times = np.array([(event.step, event.wall_time) for event in events]).T
    late = steps >= steps[-1] / 3
    steps, times = steps[late], times[late]
    return (steps[-1] - steps[0]) / (times[-1] - times[0])


def recorded(games, samples):
    """Steps a second of `collect`; the file, whose compression is a matter of the CPU, is left out."""
    device = collect.set_up_torch(1, True)
    _, agent = teacher.load_checkpoint(str(POLICY), GAME, "")
    agent = agent.to(device, memory_format=torch.channels_last)
    envs = collect.AtariEnvs("pong", games, 0.0, life_loss=False)
    start = time.time()
    collect.collect(agent, envs, samples, 1, False, None, device)
    return samples / (time.time() - start)


def main(args):
    rates, results = {}, Path(args.results).resolve()
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, (script, flags) in cases(args.scale).items():
            if script is not collect:
                flags = flags | {"eval_steps": 0}
            for compiles in (False, True)[: 1 + (script is not collect)]:
                if re.fullmatch(args.only, f"{name}{' --compile' * compiles}"):
                    options = {}
                    if script is not collect:  # a process keeps its claim on a path until it ends
                        options = {"compile": compiles, "save_path": f"{len(rates)}{compiles}.pt"}
                    start = time.time()
                    rates.setdefault(name, {})[compiles] = measured(script, flags | options)
                    took, rate = time.time() - start, rates[name][compiles]
                    print(
                        f"{name}{' --compile' * compiles}: {rate:,.0f} /s, {took:.0f} s", flush=True
                    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    command = " ".join(["python", "benchmark/gpu.py", *sys.argv[1:]])
    head = f"`{command}`, {time.strftime('%Y-%m-%d')}, {gpu}, {os.cpu_count()} cores with "
    head += f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, one run each."
    lines = [head, "", "| whole run | steps or samples/s | with `--compile` |", "|---|---|---|"]
    for name, pair in rates.items():
        cells = (f"{pair[key]:,.0f}" if key in pair else "–" for key in (False, True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    Path(results, "gpu.md").write_text("\n".join(lines) + "\n")
    Path(results, "gpu.json").write_text(json.dumps({"head": head, "rates": rates}, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
