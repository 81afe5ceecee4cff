"""Interrupt a PPO training and a distillation at random, for as long as told, and see what is lost.

    python benchmark/soak.py --minutes 30

Both scripts are started with `--resume` again and again, and after a random time get SIGKILL,
SIGTERM or SIGINT. After every end the checkpoint is read and compared with what TensorBoard says
was reached. In about a third of the time both run once more without any interruption, to the same
step, and the two are compared: the steps of the curves, and for the distillation (which is
deterministic) every bit of the weights. Writes `benchmark/results/soak.{md,json}`.
"""

import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ppo_atari_teacher import load_checkpoint

GAME = "PongNoFrameskip-v4"
KINDS = {
    "ppo_atari_teacher.py": {
        "flags": "--capacity low --num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 1 "
        "--no-anneal-lr --eval-steps 0 --checkpoint-interval 1024",
        "total": "--total-timesteps",
        "unit": 256,  # steps of an iteration
        "interval": 4,
    },
    "actor_distill.py": {  # of a buffer of 6,000 samples
        "flags": "--capacity low --buffer-path buffer.npz --eval-steps 0 --learning-rate 1e-4",
        "total": "--epochs",
        "unit": 1,
        "interval": 1,
    },
}


@dataclass
class Args:
    minutes: float = 30
    """how long the whole takes, about; 3 or more"""
    seed: int = 1
    """of the moments and the signals"""
    longest: float = 25
    """longest time in seconds between a start and its interruption"""
    results: str = str(ROOT / "benchmark" / "results")
    """folder to write to"""


def steps_logged(folder, unit):
    """The steps of the curve, in units of an iteration or an epoch."""
    if not folder.is_dir():
        return []
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    if "charts/epoch" in tags:
        return [round(event.value) for event in events.Scalars("charts/epoch")]
    if "charts/learning_rate" in tags:
        return [event.step // unit for event in events.Scalars("charts/learning_rate")]
    return []


def memory(pid):
    """Resident memory of a process in MB, 0 if it is gone."""
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3
    return 0


def start(folder, script, *flags):
    """Start a script in `folder`, with its output in a file there."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def done(saved, unit):
    """Iterations or epochs that a checkpoint holds."""
    return saved["last_epoch"] if "last_epoch" in saved else saved["global_step"] // unit


def interrupt(script, kind, folder, seconds, moments, longest):
    """Start, interrupt and resume for `seconds`; returns a row of the table and the progress."""
    file, flags = folder / "x.pt", [*kind["flags"].split(), "--save-path", "x.pt", "--resume"]
    counts = {signal.SIGKILL: 0, signal.SIGTERM: 0, signal.SIGINT: 0}
    damaged, lost, reached, slowest, wrong = 0, [], 0, 0.0, 0
    deadline = time.time() + seconds
    while time.time() < deadline:
        process = start(folder, script, *flags, kind["total"], 10**6 * kind["unit"])
        time.sleep(moments.uniform(1, longest))
        number = moments.choice(list(counts))
        process.send_signal(number)
        began = time.time()
        status = process.wait()
        slowest = max(slowest, time.time() - began)
        counts[number] += 1
        # before the training begins, the signal itself or Python's KeyboardInterrupt ends it
        wrong += status not in (1, -number, -signal.SIGINT)
        if not file.exists():
            continue
        try:
            saved, _ = load_checkpoint(file, GAME, "")
        except SystemExit:
            damaged += 1
            continue
        logged = steps_logged(folder / "runs" / saved["run_name"], kind["unit"])
        reached = max(reached, done(saved, kind["unit"]))
        lost.append(max(logged, default=0) - done(saved, kind["unit"]))
    row = {
        "script": script,
        "minutes": round(seconds / 60, 1),
        "kills": counts[signal.SIGKILL],
        "SIGTERM": counts[signal.SIGTERM],
        "SIGINT": counts[signal.SIGINT],
        "starts": sum(counts.values()),
        "other exit statuses": wrong,
        "files damaged": damaged,
        "interval, in iterations or epochs": kind["interval"],
        "most lost, in iterations or epochs": max(lost, default=0),
        "slowest end, s": round(slowest, 1),
    }
    return row, reached


def finish(script, kind, folder, path, target):
    """Run to `target` in one go: the checkpoint, its curve, and the memory each second in MB."""
    flags = [*kind["flags"].split(), "--save-path", path, "--resume"]
    process = start(folder, script, *flags, kind["total"], target * kind["unit"])
    sizes = []
    while process.poll() is None:
        time.sleep(1)
        sizes.append(memory(process.pid))
    assert process.returncode == 0, (folder / "log").read_text()[-500:]
    saved = torch.load(folder / path, weights_only=True)
    curve = steps_logged(folder / "runs" / saved["run_name"], kind["unit"])
    return saved, curve, [size for size in sizes if size]


def main(args):
    moments, rows = random.Random(args.seed), []
    for script, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            collection = ("--num-samples", 6000, "--num-envs", 4, "--buffer-path", "buffer.npz")
            start(folder, "collect_buffer.py", *collection).wait()
            seconds = args.minutes * 60 / 3
            row, reached = interrupt(script, kind, folder, seconds, moments, args.longest)
            target = reached + 2 * kind["interval"]
            broken, curve, _ = finish(script, kind, folder, "x.pt", target)
            whole, straight, sizes = finish(script, kind, folder, "whole.pt", target)
            settled = sizes[len(sizes) // 4 :]
            same = all(torch.equal(x, whole["model"][name]) for name, x in broken["model"].items())
            row |= {
                "iterations or epochs": target,
                "same step count": broken["global_step"] == whole["global_step"],
                "curve has every point once": curve == straight == list(range(1, target + 1)),
                "same weights, bit for bit": same if "epoch" in broken else "the games differ",
                "MB of the whole run, at a quarter and at its end": [
                    round(settled[0]),
                    round(settled[-1]),
                ],
                "temporary files left": len(list(folder.glob("*.tmp"))),
            }
            rows.append(row)
            print(json.dumps(row, indent=1), flush=True)
    command = f"python benchmark/soak.py --minutes {args.minutes:g} --seed {args.seed}"
    result = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    table = ["`{command}`, {date}, {cores} cores, torch {torch}".format(**result), ""]
    for name in rows[0]:
        cells = [str(row[name]) for row in rows]
        table.append(f"| {'' if name == 'script' else name} | {' | '.join(cells)} |")
        table += ["|---" * 3 + "|"] if name == "script" else []
    Path(args.results, "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(args.results, "soak.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main(tyro.cli(Args))
