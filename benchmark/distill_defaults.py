"""Which optimiser, rate, batch size, schedule and data make the best student at equal cost?

    python benchmark/distill_defaults.py --env-id BreakoutNoFrameskip-v4 --capacity low --seconds 600
        --buffer-paths buffers/first.npz buffers/second.npz --fresh-path buffers/fresh.npz
        --settings batch_size=256,learning_rate=8e-3 batch_size=64,learning_rate=2e-3,shift=1

Fits a student per setting and seed to the same buffers, each for the same processor time, and
compares it with the teacher on a buffer of other games: a line of JSON each in
`benchmark/results/defaults/`, and a table of all that stands there. The learning rate's schedule
follows the share of the time that is used up. A setting names fields of `Setting`.
"""

import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that processor time is one core's time

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import actor_distill as distill


@dataclass
class Setting:
    optimizer: str = "adam"
    """adam or sgd"""
    batch_size: int = 64
    """samples a gradient step, from as many stretches of the buffer"""
    learning_rate: float = 2e-3
    """at its highest"""
    schedule: str = "linear"
    """linear or cosine fall to 0, or constant"""
    warmup: int = 300
    """gradient steps over which the rate rises"""
    average: float = 0.0
    """decay of the weights' moving average that is evaluated; 0 evaluates the last weights"""
    shift: int = 0
    """pixels by which a batch's pictures are moved at random, as in DrQ"""
    dropout: float = 0.0
    """share of the hidden layer that is left out"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    reverse: bool = False
    """minimise KL(student || teacher) instead of Eq. 3"""
    temperature: float = 1.0
    """divides the teacher's log-probabilities, as the flag of the script"""
    slots: int = 0
    """games' slots to learn from; 0 takes all"""
    samples: int = 0
    """samples to learn from, as many of each slot, from its start; 0 takes all"""


@dataclass
class Args:
    buffer_paths: tuple[str, ...]
    """buffers to learn from, one after another"""
    fresh_path: str
    """buffer of other games to compare on"""
    settings: tuple[str, ...] = ("",)
    """what differs from the defaults, as in `batch_size=256,shift=1`"""
    env_id: str = "PongNoFrameskip-v4"
    """game of the buffers"""
    capacity: str = "low"
    """size of the students"""
    seconds: float = 150.0
    """processor time of a student's training"""
    seeds: tuple[int, ...] = (1,)
    """seeds of weights and shuffles"""
    eval_steps: int = 0
    """budget of each student's evaluation"""
    results: str = "benchmark/results/defaults"
    """folder to write to"""


def parse(text):
    """A Setting from `name=value,name=value`."""
    fields = {field.name: field.type for field in dataclasses.fields(Setting)}
    pairs = [part.split("=") for part in text.split(",") if part]
    kinds = {"int": int, "float": float, "bool": lambda x: x == "1", "str": str}
    return Setting(
        **{k: (fields[k] if callable(fields[k]) else kinds[fields[k]])(v) for k, v in pairs}
    )


def load(paths, env_id):
    """Several buffers as one: tensors frames, stack_index, probs, values, and each sample's slot."""
    parts, frames, slots = [], 0, 0
    for path in paths:
        *arrays, _, _ = distill.load_buffer(path, env_id)
        with np.load(path) as file:
            slot = file["env_index"] + slots
        parts.append((arrays[0], arrays[1] + frames, *arrays[2:], slot))
        frames, slots = frames + len(arrays[0]), slot.max() + 1
    return [torch.from_numpy(np.concatenate(x)) for x in zip(*parts, strict=True)]


def batches_of(frames, stack_index, probs, values, *_):
    """`get_batch` of the script over these arrays."""

    def get_batch(rows):
        newest_last = [frames.index_select(0, index) for index in stack_index[rows].unbind(1)]
        return torch.stack(newest_last, -1).permute(0, 3, 1, 2), probs[rows], values[rows]

    return get_batch


def shifted(obs, pixels, rng):
    """A batch's pictures moved by up to so many pixels, the same for all; edges are repeated."""
    dx, dy = rng.integers(0, 2 * pixels + 1, 2)
    padded = F.pad(obs.float(), (pixels,) * 4, mode="replicate")
    return padded[:, :, dy : dy + 84, dx : dx + 84].byte()


def share_of_rate(setting, used, step):
    """The learning rate as a share of its highest, after a share `used` of the time."""
    falling = {"linear": 1 - used, "cosine": (1 + math.cos(math.pi * used)) / 2, "constant": 1.0}
    return min(falling[setting.schedule], (step + 1) / max(1, setting.warmup))


def fit(setting, capacity, arrays, seconds, seed):
    """A student after so much processor time: the network, samples seen, rows learned from."""
    torch.manual_seed(seed)
    probs, slot = arrays[2], arrays[4].numpy()
    targets = distill.make_targets(probs, False, "kl", setting.temperature)
    get_batch = batches_of(arrays[0], arrays[1], targets, arrays[3])
    agent = distill.Agent(capacity, probs.shape[1]).to(memory_format=torch.channels_last)
    weights = [x for name, x in agent.named_parameters() if "critic" not in name]
    if setting.optimizer == "adam":
        options = {"weight_decay": setting.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(weights, **options)
    else:
        optimizer = torch.optim.SGD(weights, momentum=0.9, fused=True)
    drop = agent.network[8].register_forward_hook(
        lambda _, __, x: F.dropout(x, setting.dropout) if setting.dropout else x
    )
    averages = [x.detach().clone() for x in weights]
    rows = np.flatnonzero(slot < (setting.slots or slot.max() + 1))
    if setting.samples:
        position = np.arange(len(rows)) - np.searchsorted(slot[rows], slot[rows])
        rows = rows[position < setting.samples // len(np.unique(slot[rows]))]
    strata = rows[: len(rows) // setting.batch_size * setting.batch_size]
    strata = strata.reshape(setting.batch_size, -1)
    rng, seen, step, used = np.random.default_rng(seed), 0, 0, 0.0
    start = time.process_time()
    while used < 1:
        for batch in torch.from_numpy(rng.permuted(strata, axis=1).T.copy()):
            used = (time.process_time() - start) / seconds
            if used >= 1:
                break
            rate = setting.learning_rate * share_of_rate(setting, used, step)
            optimizer.param_groups[0]["lr"] = rate
            obs, target, _ = get_batch(batch)
            logits, _ = agent(shifted(obs, setting.shift, rng) if setting.shift else obs)
            if setting.reverse:
                log_q = logits.log_softmax(-1)
                loss = (log_q.exp() * (log_q - (target + 1e-8).log())).sum(-1).mean()
            else:
                loss = distill.kl_divergence(target, logits).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen, step = seen + len(batch), step + 1
            if setting.average:
                decay = min(setting.average, (1 + step) / (10 + step))
                torch._foreach_lerp_(averages, [x.detach() for x in weights], 1 - decay)
    if setting.average:
        with torch.no_grad():
            for weight, mean in zip(weights, averages, strict=True):
                weight.copy_(mean)
    drop.remove()
    return agent, seen, rows


def measure(agent, arrays, fresh, rows, args, seed):
    """How far a student is from its teacher, on what it learned from and on other games."""
    rng = np.random.default_rng(0)
    result = {}
    for name, data, those in (("train", arrays, rows), ("fresh", fresh, np.arange(len(fresh[1])))):
        drawn = torch.from_numpy(rng.choice(those, min(20_000, len(those)), replace=False))
        found = distill.validate(agent, batches_of(*data), drawn)
        result |= {f"{name}/{key.removeprefix('validation/')}": x for key, x in found.items()}
    if args.eval_steps:
        envs = distill.AtariEnvs(distill.resolve_game(args.env_id)[1], 16, False, 0.0)
        returns, _ = distill.play(agent, envs, args.eval_steps, seed, False, torch.device("cpu"))
        result |= distill.summarize(returns)
    return result


def table(folder):
    """All results of a folder as Markdown, the best of each game and capacity first."""
    runs = [json.loads(x) for path in sorted(folder.glob("*.jsonl")) for x in path.open()]
    runs.sort(key=lambda x: (x["env_id"], x["capacity"], x["seconds"], x["fresh/kl"]))
    head = "game | student | setting | seed | samples | seen | s | KL, training | KL, fresh | "
    lines = [f"| {head}agreement | score (95% interval) |", "|---" * 11 + "|"]
    for x in runs:
        setting = ", ".join(f"{name} {value}" for name, value in x["setting"].items())
        score = "{mean:.0f} ({ci95[0]:.0f} to {ci95[1]:.0f})".format(**x) if "mean" in x else ""
        form = "| {env_id} | {capacity} | {0} | {seed} | {samples:,} | {seen:,} | {seconds:.0f} | "
        form += "{train/kl:.4f} | {fresh/kl:.4f} | {fresh/agreement:.1%} | {1} |"
        lines.append(form.format(setting, score, **x))
    return "\n".join(lines) + "\n"


def main(args):
    args.env_id, _ = distill.resolve_game(args.env_id)
    settings = [parse(text) for text in args.settings]
    arrays, fresh = load(args.buffer_paths, args.env_id), load((args.fresh_path,), args.env_id)
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        for seed in args.seeds:
            agent, seen, rows = fit(setting, args.capacity, arrays, args.seconds, seed)
            changed = {
                name: value
                for name, value in vars(setting).items()
                if value != getattr(Setting, name) or name in ("batch_size", "learning_rate")
            }
            about = {"env_id": args.env_id, "capacity": args.capacity, "seed": seed}
            about |= {"setting": changed, "seconds": args.seconds, "seen": seen}
            about |= {"samples": len(rows), "buffers": list(args.buffer_paths)}
            about |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
            about |= measure(agent, arrays, fresh, rows, args, seed)
            with (folder / f"{args.env_id}.jsonl").open("a") as file:
                file.write(json.dumps(about) + "\n")
            print(json.dumps(about))
    (folder / "table.md").write_text(table(folder))


if __name__ == "__main__":
    main(tyro.cli(Args))
