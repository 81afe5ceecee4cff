"""Is a policy a better teacher than a Q-function, and by which loss? Distil from both, every way.

    python benchmark/losses.py --q-teacher checkpoints/PongNoFrameskip-v4/dqn.zip

Records the Q-network's play, distils a student from it and from the shipped policy's buffer by
each loss and temperature, and writes held-out agreement and score to
`benchmark/results/losses.json`, with a table beside it. What is in the file already is not made
again.
"""

import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    q_teacher: str
    """file of a Q-network that `collect_buffer.py` reads"""
    env_id: str = "PongNoFrameskip-v4"
    """its game, of which a policy's buffer ships"""
    num_samples: int = 50_000
    """samples to record; the shipped buffer has as many"""
    capacity: str = "medium"
    """size of the students"""
    epochs: int = 10
    """of each distillation"""
    eval_steps: int = 50_000
    """budget of each evaluation"""
    seed: int = 1
    """of each distillation"""
    output: str = "benchmark/results/losses.json"
    """file to write"""


WAYS = {
    "Q-network": (
        "--loss kl --temperature 0.01",
        "--loss kl --temperature 0.1",
        "--loss kl --temperature 1",
        "--loss nll --optimizer sgd",
        "--loss nll",
        "--loss mse",
        "--loss kl --temperature 0.01 --optimizer adam",
    ),
    "policy": ("--loss kl --temperature 1", "--loss kl --temperature 0.01", "--loss nll"),
}


def run(command):
    """Run one of the four scripts; its wall time in seconds."""
    print("$ python", command, flush=True)
    script, *flags = shlex.split(command)
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / script, *flags], check=True)
    return time.perf_counter() - start


def table(results):
    """Markdown: a row for each student, the teachers' scores beneath."""
    columns = "teacher | student by | held-out agreement | mean ± std | games | 95% interval"
    lines = [f"| {columns} | wall time |", "|---" * 7 + "|"]
    form = (
        "| {teacher} | `{flags}` | {validation[validation/agreement]:.1%} | {evaluation[mean]:.2f} "
        "± {evaluation[std]:.2f} | {evaluation[episodes]} | {evaluation[ci95][0]:.2f} to "
        "{evaluation[ci95][1]:.2f} | {seconds:.0f} s |"
    )
    lines += [*(form.format(**row) for row in results["students"]), ""]
    form = (
        "Teacher, {}: {mean:.2f} ± {std:.2f} over {episodes} games, 95% interval {ci95[0]:.2f} to "
        "{ci95[1]:.2f}.  "
    )
    lines += [form.format(name, **found) for name, found in results["teachers"].items()]
    return "\n".join(lines) + "\n"


def main(args):
    output = Path(args.output)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "epochs": args.epochs,
        "eval_steps": args.eval_steps,
        "teachers": {},
        "students": [],
    }
    if output.exists():
        results = json.loads(output.read_text())
    buffers = {
        "Q-network": f"buffers/{args.env_id}_q.npz",
        "policy": f"{ROOT}/pretrained/{args.env_id}/buffer.npz",
    }

    def save():
        output.write_text(json.dumps(results, indent=1) + "\n")
        head = "`{command}`, torch {torch}, {threads} threads, one seed, {epochs} epochs\n\n"
        output.with_suffix(".md").write_text(head.format(**results) + table(results))

    both = f"--env-id {args.env_id} --eval-steps {args.eval_steps} --seed {args.seed}"
    if not Path(buffers["Q-network"]).exists():
        run(
            f"collect_buffer.py {both} --num-samples {args.num_samples} --teacher-path "
            f"{shlex.quote(args.q_teacher)} --buffer-path {buffers['Q-network']}"
        )
    for teacher, path in buffers.items():
        with np.load(path) as buffer:
            meta = json.loads(str(buffer["meta"]))
        results["teachers"][teacher] = meta["teacher"]["evaluation"]
    made = {(row["teacher"], row["flags"]) for row in results["students"]}
    wanted = [(teacher, flags) for teacher, ways in WAYS.items() for flags in ways]
    for teacher, flags in wanted:
        if (teacher, flags) in made:
            continue
        path = "checkpoints/losses.pt"
        seconds = run(
            f"actor_distill.py {both} --capacity {args.capacity} --buffer-path "
            f"{shlex.quote(buffers[teacher])} --epochs {args.epochs} --save-path {path} "
            f"--overwrite {flags}"
        )
        student = torch.load(path, weights_only=True)
        row = {"teacher": teacher, "flags": flags, "seconds": seconds}
        row |= {name: student[name] for name in ("validation", "evaluation")}
        results["students"].append(row)
        save()
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args))
