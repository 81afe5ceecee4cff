"""Which batch size, learning rate, optimiser and schedule should `actor_distill.py` default to?

    python benchmark/distill_defaults.py --seconds 15   # the shipped Pong buffer, medium students
    python benchmark/distill_defaults.py --seconds 60 --finalists

Fits one student per setting to the same buffer, each for the same wall time of training, and writes
the held-out KL that it reaches. The students take turns of one second, so that a machine that slows
down slows all of them; validation is not counted. The learning rate of a decaying schedule falls
with the share of the time that is used up.
"""

import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import actor_distill as distill


@dataclass
class Args:
    buffer_path: str = "pretrained/PongNoFrameskip-v4/buffer.npz"
    """buffer to learn from"""
    env_id: str = "PongNoFrameskip-v4"
    """its game"""
    capacity: str = "medium"
    """size of the students"""
    seconds: float = 60.0
    """wall time of training for each setting"""
    finalists: bool = False
    """compare only the few settings that are worth a longer run"""
    seed: int = 1
    """seed of the weights, the held-out share and the shuffles"""
    output: str | None = None
    """file to write, a table goes beside it as `.md`; default in `benchmark/results/`"""


RATES = (3e-4, 1e-3, 2e-3, 4e-3)
SETTINGS = [
    *(("Adam", batch, rate, "constant") for batch in (32, 64, 128, 256) for rate in RATES),
    ("Adam", 64, 1e-3, "linear"),
    ("Adam", 64, 2e-3, "linear"),
    ("Adam", 128, 2e-3, "linear"),
    ("Adam", 64, 1e-3, "cosine"),
    ("AdamW", 64, 1e-3, "constant"),
    ("RMSprop", 64, 1e-3, "constant"),
    *(("SGD", batch, rate, "constant") for batch in (32, 64, 128) for rate in (0.01, 0.03, 0.1)),
]
FINALISTS = [
    ("Adam", 32, 2e-3, "constant"),
    ("Adam", 64, 1e-3, "constant"),
    ("SGD", 32, 0.03, "constant"),
    ("SGD", 64, 0.03, "constant"),
    ("SGD", 64, 0.03, "linear"),
]
OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"fused": True}),
    "AdamW": (torch.optim.AdamW, {"fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.95, "eps": 1e-5}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
}
SCHEDULES = {
    "constant": lambda used: 1.0,
    "linear": lambda used: 1 - used,
    "cosine": lambda used: (1 + math.cos(math.pi * used)) / 2,
}


class Student:
    """One setting: a network, its optimiser, its shuffled stream of samples and its clock."""

    def __init__(self, setting, num_actions, train_rows, args):
        name, self.batch_size, self.rate, self.schedule = self.setting = setting
        self.train_rows, self.args = train_rows, args
        torch.manual_seed(args.seed)
        agent = distill.Agent(args.capacity, num_actions)
        self.agent = agent.to(memory_format=torch.channels_last)
        optimizer, options = OPTIMIZERS[name]
        self.optimizer = optimizer(self.agent.parameters(), self.rate, **options)
        self.seconds, self.samples, self.batches = 0.0, 0, self.stream()

    def stream(self):
        epoch = 0
        while True:
            epoch += 1
            order = np.random.default_rng((self.args.seed, 5, epoch)).permutation(self.train_rows)
            yield from torch.from_numpy(order).split(self.batch_size)

    def train(self, get_batch, turn):
        """Train for `turn` seconds."""
        start = now = time.perf_counter()
        while now - start < turn:
            used = min(1.0, (self.seconds + now - start) / self.args.seconds)
            self.optimizer.param_groups[0]["lr"] = self.rate * SCHEDULES[self.schedule](used)
            rows = next(self.batches)
            update = (distill.batch_loss, *get_batch(rows), 0.0)
            distill.distill_update(self.agent, self.optimizer, *update)
            self.samples += len(rows)
            now = time.perf_counter()
        self.seconds += now - start


def main(args):
    env_id, _ = distill.resolve_game(args.env_id)
    *buffer, episode_index, _ = distill.load_buffer(args.buffer_path, env_id)
    train_rows, held_out = distill.split_episodes(episode_index, 0.05, args.seed)
    held_out = torch.from_numpy(distill.unseen(*buffer[:2], train_rows, held_out))
    frames, stack_index, probs, values = map(torch.from_numpy, buffer)

    def get_batch(rows):
        newest_last = [frames.index_select(0, index) for index in stack_index[rows].unbind(1)]
        return torch.stack(newest_last, -1).permute(0, 3, 1, 2), probs[rows], values[rows]

    num_actions = probs.shape[1]
    settings = FINALISTS if args.finalists else SETTINGS
    students = [Student(setting, num_actions, train_rows, args) for setting in settings]
    students[0].train(get_batch, 2.0)  # warm-up, forgotten at once
    students[0] = Student(settings[0], num_actions, train_rows, args)
    while any(student.seconds < args.seconds for student in students):
        for student in students:
            if student.seconds < args.seconds:
                student.train(get_batch, min(1.0, args.seconds - student.seconds))
        at = f"{students[-1].seconds:.0f} of {args.seconds:.0f} s for each of {len(students)}"
        print(f"\r{at} settings", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    rows = []
    names = ("optimizer", "batch_size", "learning_rate", "schedule")
    for student in students:
        row = dict(zip(names, student.setting, strict=True))
        row |= {"seconds": student.seconds, "samples": student.samples}
        row["epochs"] = student.samples / len(train_rows)
        rows.append(row | distill.validate(student.agent, get_batch, held_out))
    uniform = distill.kl_divergence(probs[held_out], torch.zeros(len(held_out), num_actions))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "command": " ".join(("python", *sys.argv)),
        "capacity": args.capacity,
        "uniform_kl": uniform.mean().item(),
        "held_out": len(held_out),
        "runs": rows,
    }
    name = "distill_finalists.json" if args.finalists else "distill_defaults.json"
    output = Path(args.output or f"benchmark/results/{name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1))
    columns = "optimiser | batch | learning rate | schedule | epochs | held-out KL | agreement"
    lines = [f"| {columns} |", "|---" * 7 + "|"]
    form = (
        "| {optimizer} | {batch_size} | {learning_rate:g} | {schedule} | {epochs:.1f} | "
        "{validation/kl:.4f} | {validation/agreement:.1%} |"
    )
    lines += [form.format(**row) for row in sorted(rows, key=lambda row: row["validation/kl"])]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
