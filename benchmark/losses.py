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
sys.path.insert(0, str(ROOT))
import actor_distill as distill  # noqa: E402
import collect_buffer as collect  # noqa: E402


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


WAYS = {"Q-network": ("--loss kl --temperature 0.01", "--loss kl --temperature 0.1",
                      "--loss kl --temperature 1", "--loss nll --optimizer sgd", "--loss nll",
                      "--loss mse", "--loss kl --temperature 0.01 --optimizer adam"),
        "policy": ("--loss kl --temperature 1", "--loss kl --temperature 0.01", "--loss nll")}


def run(command):
    """Run one of the four scripts; its wall time in seconds."""
    print("$ python", command, flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    return time.perf_counter() - start


def epsilon_greedy(agent, epsilon):
    """A policy whose softmax is the epsilon-greedy choice by the agent's Q-values, as recorded."""
    def act(obs):
        q, values = agent(obs)
        best = torch.nn.functional.one_hot(q.argmax(-1), q.shape[1])
        return (epsilon / q.shape[1] + (1 - epsilon) * best).log(), values
    act.parameters = agent.parameters
    return act


def q_teacher_score(args):
    """The Q-network's own evaluation, by the rule of `play`, and what kind of file it is."""
    env_id, rom = distill.resolve_game(args.env_id)
    (envs, _), = distill.make_envs(rom, 1, False, 0.0)
    num_actions = int(envs.single_action_space.n)
    description, agent = collect.load_foreign(args.q_teacher, env_id, num_actions)
    agent = agent.to(memory_format=torch.channels_last)
    groups = distill.make_envs(rom, 16, False, 0.0, description["protocol"])
    policy = epsilon_greedy(agent, 0.05)
    returns, _ = distill.play(policy, groups, args.eval_steps, args.seed, False)
    return distill.summarize(returns) | {"kind": description["phase"]}


def table(results):
    """Markdown: a row for each student, the teachers' scores beneath."""
    lines = ["| teacher | student by | held-out agreement | mean ± std | games | 95% interval | "
             "wall time |", "|---|---|---|---|---|---|---|"]
    for row in results["students"]:
        found, agreement = row["evaluation"], row["validation"]["validation/agreement"]
        lines.append(
            f"| {row['teacher']} | `{row['flags']}` | {agreement:.1%} | {found['mean']:.2f} ± "
            f"{found['std']:.2f} | {found['episodes']} | {found['ci95'][0]:.2f} to "
            f"{found['ci95'][1]:.2f} | {row['seconds']:.0f} s |")
    lines.append("")
    for name, found in results["teachers"].items():
        lines.append(f"Teacher, {name}: {found['mean']:.2f} ± {found['std']:.2f} over "
                     f"{found['episodes']} games, 95% interval {found['ci95'][0]:.2f} to "
                     f"{found['ci95'][1]:.2f}.  ")
    return "\n".join(lines) + "\n"


def main(args):
    output = Path(args.output)
    results = (json.loads(output.read_text()) if output.exists() else {
        "command": shlex.join(["python", *sys.argv]), "torch": torch.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "seed": args.seed,
        "epochs": args.epochs, "eval_steps": args.eval_steps, "teachers": {}, "students": []})
    q_buffer = f"buffers/{args.env_id}_q.npz"
    buffers = {"Q-network": q_buffer, "policy": f"pretrained/{args.env_id}/buffer.npz"}

    def save():
        output.write_text(json.dumps(results, indent=1) + "\n")
        output.with_suffix(".md").write_text(
            f"`{results['command']}`, torch {results['torch']}, {results['threads']} threads, one "
            f"seed, {results['epochs']} epochs\n\n" + table(results))

    if not Path(q_buffer).exists():
        run(f"collect_buffer.py --env-id {args.env_id} --num-samples {args.num_samples} "
            f"--teacher-path {shlex.quote(args.q_teacher)} --buffer-path {q_buffer}")
    if "Q-network" not in results["teachers"]:
        results["teachers"]["Q-network"] = q_teacher_score(args)
        with np.load(buffers["policy"]) as buffer:
            meta = json.loads(str(buffer["meta"]))
        results["teachers"]["policy"] = meta["teacher"]["evaluation"]
        save()
    for teacher, ways in WAYS.items():
        for flags in ways:
            if any((row["teacher"], row["flags"]) == (teacher, flags)
                   for row in results["students"]):
                continue
            path = "checkpoints/losses.pt"
            seconds = run(f"actor_distill.py --env-id {args.env_id} --capacity {args.capacity} "
                          f"--buffer-path {buffers[teacher]} --epochs {args.epochs} "
                          f"--seed {args.seed} --eval-steps {args.eval_steps} "
                          f"--save-path {path} --overwrite {flags}")
            student = torch.load(path, weights_only=True)
            results["students"].append({
                "teacher": teacher, "flags": flags, "seconds": seconds,
                "validation": student["validation"], "evaluation": student["evaluation"]})
            save()
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args))
