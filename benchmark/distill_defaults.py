"""Which optimiser, rate, batch size, schedule and data make the best student at equal cost?

    python benchmark/distill_defaults.py --env-id BreakoutNoFrameskip-v4 --capacity low --seconds 600
        --buffer-paths buffers/first.npz buffers/second.npz --fresh-path buffers/fresh.npz
        --settings batch_size=256,learning_rate=8e-3 batch_size=64,learning_rate=2e-3,shift=1

Fits a student per setting and seed to the same buffers, each for the same processor time or the same
number of samples, and compares it with the teacher on a buffer of other games: a line of JSON each
in `benchmark/results/study/`, and tables of all that stands there. The learning rate's schedule
follows the share of the training that is done. A setting names fields of `Setting`.
"""

import dataclasses
import json
import math
import os
import statistics
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
    warmup: float = 0.02
    """share of the training over which the rate rises"""
    average: float = 0.0
    """decay of the weights' moving average that is evaluated; 0 evaluates the last weights"""
    shift: int = 0
    """pixels by which each picture is moved at random, as in DrQ"""
    dropout: float = 0.0
    """share of the hidden layer that is left out"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    reverse: float = 1.0
    """share of KL(student || teacher) in the loss; the rest is Eq. 3"""
    temperature: float = 1.0
    """divides the teacher's log-probabilities, as the flag of the script"""
    slots: int = 0
    """games' slots to learn from; 0 takes all"""
    samples: int = 0
    """samples to learn from, as many of each slot, from its start; 0 takes all"""
    stride: int = 1
    """learn from every so manieth sample"""
    sampling: str = "uniform"
    """draw samples uniformly, or in proportion to 0.1 + the teacher's entropy (unsure) or to 0.1 +
    its largest entropy less that (sure)"""


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
    teacher: str = ""
    """name of the teacher of the buffers, as in `benchmark/results/students/`"""
    label: str = ""
    """what is unusual about the buffers, for the tables"""
    capacity: str = "low"
    """size of the students"""
    seconds: float = 150.0
    """processor time of a student's training"""
    seen: int = 0
    """samples of a student's training, counted as often as they are seen, in place of `seconds`"""
    cuda: bool = True
    """use a GPU where there is one"""
    checkpoints: str = ""
    """folder for the students, as `actor_distill.py --eval-only` reads them; empty saves none"""
    seeds: tuple[int, ...] = (1,)
    """seeds of weights and shuffles"""
    eval_steps: int = 0
    """budget of each student's evaluation"""
    results: str = "benchmark/results/study"
    """folder to write to"""


def parse(text):
    """A Setting from `name=value,name=value`."""
    kinds = {field.name: field.type for field in dataclasses.fields(Setting)}
    pairs = [part.split("=") for part in text.split(",") if part]
    return Setting(**{name: kinds[name](value) for name, value in pairs})


def changed(setting):
    """The fields of a Setting that are not the defaults, and always batch size and rate."""
    return {
        name: value
        for name, value in vars(setting).items()
        if value != getattr(Setting, name) or name in ("batch_size", "learning_rate")
    }


def load(paths, env_id, device):
    """Several buffers as one: tensors frames, stack_index, probs, values, and each sample's slot."""
    parts, frames, slots = [], 0, 0
    for path in paths:
        *arrays, _, _ = distill.load_buffer(path, env_id)
        with np.load(path) as file:
            slot = file["env_index"] + slots
        parts.append((arrays[0], arrays[1] + frames, *arrays[2:], slot))
        frames, slots = frames + len(arrays[0]), slot.max() + 1
    joined = [x[0] if len(x) == 1 else np.concatenate(x) for x in zip(*parts, strict=True)]
    return [torch.from_numpy(x).to(device) for x in joined]


def batches_of(frames, stack_index, probs, values, *_):
    """`get_batch` of the script over these arrays."""

    def get_batch(rows):
        newest_last = [frames.index_select(0, index) for index in stack_index[rows].unbind(1)]
        return torch.stack(newest_last, -1).permute(0, 3, 1, 2), probs[rows], values[rows]

    return get_batch


def shifted(obs, pixels):
    """Pictures moved by up to so many pixels, each by its own way; edges are repeated."""
    batch, size = len(obs), obs.shape[-1]
    padded = F.pad(obs.float(), (pixels,) * 4, mode="replicate").byte()
    begin = torch.randint(2 * pixels + 1, (2, batch, 1), device=obs.device)
    y, x = begin + torch.arange(size, device=obs.device)
    each = torch.arange(batch, device=obs.device).view(-1, 1, 1)
    moved = padded.permute(0, 2, 3, 1)[each, y.unsqueeze(2), x.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2)


def share_of_rate(setting, done):
    """The learning rate as a share of its highest, after a share `done` of the training."""
    falling = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return min(falling[setting.schedule], done / setting.warmup if setting.warmup else 1.0)


def choose(setting, slot):
    """The rows that a setting learns from, of samples in these slots."""
    rows = np.flatnonzero(slot < (setting.slots or slot.max() + 1))
    if setting.samples:
        position = np.arange(len(rows)) - np.searchsorted(slot[rows], slot[rows])
        rows = rows[position < setting.samples // len(np.unique(slot[rows]))]
    return rows[:: setting.stride]


def epoch_of(setting, rows, probs, rng):
    """Batches of rows, int64 [K, B]: every row once, or as many drawn by how sure the teacher is."""
    batch = min(setting.batch_size, len(rows))
    size = len(rows) // batch * batch
    if setting.sampling == "uniform":
        return rng.permuted(rows[:size].reshape(batch, -1), axis=1).T
    entropy = -probs.xlogy(probs).sum(-1).cpu().numpy()[rows]
    weight = 0.1 + (entropy if setting.sampling == "unsure" else entropy.max() - entropy)
    return rng.choice(rows, (size // batch, batch), p=weight / weight.sum())


def fit(setting, capacity, arrays, seed, seconds=0.0, seen=0):
    """A student after so many samples, or so much processor time: network, samples seen, rows."""
    torch.manual_seed(seed)
    probs, slot = arrays[2], arrays[4].cpu().numpy()
    device = probs.device
    targets = distill.make_targets(probs, False, "kl", setting.temperature)
    get_batch = batches_of(arrays[0], arrays[1], targets, arrays[3])
    agent = distill.Agent(capacity, probs.shape[1]).to(device, memory_format=torch.channels_last)
    weights = [x for name, x in agent.named_parameters() if "critic" not in name]
    if setting.optimizer == "adam":
        options = {"weight_decay": setting.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(weights, **options)
    else:
        optimizer = torch.optim.SGD(weights, momentum=0.9, fused=True)

    def divergence(probs, logits):
        reverse, forward = (f(probs, logits) for f in (distill.reverse_kl, distill.kl_divergence))
        return setting.reverse * reverse + (1 - setting.reverse) * forward

    drop = agent.network[8].register_forward_hook(
        lambda _, __, x: F.dropout(x, setting.dropout) if setting.dropout else x
    )
    averages = [x.detach().clone() for x in weights]
    rows = choose(setting, slot)
    rng, count, step, done = np.random.default_rng(seed), 0, 0, 0.0
    start = time.process_time()
    while done < 1:
        for batch in torch.from_numpy(epoch_of(setting, rows, probs, rng).copy()).to(device):
            done = count / seen if seen else (time.process_time() - start) / seconds
            if done >= 1:
                break
            optimizer.param_groups[0]["lr"] = setting.learning_rate * share_of_rate(setting, done)
            obs, *others = get_batch(batch)
            obs = shifted(obs, setting.shift) if setting.shift else obs
            loss = divergence(others[0], agent(obs)[0]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count, step = count + len(batch), step + 1
            if setting.average:
                decay = min(setting.average, (1 + step) / (10 + step))
                torch._foreach_lerp_(averages, [x.detach() for x in weights], 1 - decay)
    if setting.average:
        with torch.no_grad():
            for weight, mean in zip(weights, averages, strict=True):
                weight.copy_(mean)
    drop.remove()
    return agent, count, rows


def compare(agent, arrays, rows):
    """How far a student is from its teacher on up to 20,000 of these samples, by name."""
    drawn = np.random.default_rng(0).choice(rows, min(20_000, len(rows)), replace=False)
    drawn, get_batch = torch.from_numpy(drawn).to(arrays[1].device), batches_of(*arrays)
    divergences = {"kl": distill.kl_divergence, "reverse_kl": distill.reverse_kl}
    found = distill.validate(agent, get_batch, drawn, divergences)
    names = ("kl", "reverse_kl", "agreement", "entropy_gap")
    return {name: found[f"validation/{name}"] for name in names}


def table(folder):
    """All results of a folder as Markdown, the best of each game and capacity first."""
    runs = [json.loads(x) for path in sorted(folder.glob("*.jsonl")) for x in path.open()]
    runs.sort(key=lambda x: (x["env_id"], x["capacity"], x["seconds"], x["fresh/kl"]))
    head = "game | student | setting | seed | samples | seen | s | KL, training | KL, fresh | "
    lines = [f"| {head}agreement | score (95% interval) |", "|---" * 11 + "|"]
    for x in runs:
        setting = ", ".join(f"{name} {value}" for name, value in x["setting"].items())
        setting += f", {x['label']}" if x.get("label") else ""
        score = "{mean:.0f} ({ci95[0]:.0f} to {ci95[1]:.0f})".format(**x) if "mean" in x else ""
        form = "| {env_id} | {capacity} | {0} | {seed} | {samples:,} | {seen:,} | {seconds:.0f} | "
        form += "{train/kl:.4f} | {fresh/kl:.4f} | {fresh/agreement:.1%} | {1} |"
        lines.append(form.format(setting, score, **x))
    return "\n".join(lines) + "\n"


def overview(folder):
    """The same with a row for each setting and a column for each game, as Markdown.

    Of the first seed's runs that see as many samples as most do.
    """
    runs = [json.loads(x) for path in sorted(folder.glob("*.jsonl")) for x in path.open()]
    seen = statistics.mode(round(x["seen"], -4) for x in runs)
    runs = [x for x in runs if round(x["seen"], -4) == seen and x["seed"] == 1]
    games = sorted({x["env_id"] for x in runs})
    found = {}
    for x in runs:
        other = {k: v for k, v in x["setting"].items() if v != getattr(Setting, k)}
        setting = ", ".join(f"{name} {value}" for name, value in other.items()) or "all defaults"
        setting += f", {x['label']}" if x.get("label") else ""
        score = f"; {x['mean']:,.0f}" if "mean" in x else ""
        cell = f"{x['fresh/reverse_kl']:.4f}{score}"
        found.setdefault(setting, {})[x["env_id"]] = (x["fresh/reverse_kl"], cell)
    columns = [game.removesuffix("NoFrameskip-v4") for game in games]
    lines = [f"| setting | {' | '.join(columns)} |", "|---" * (1 + len(games)) + "|"]
    for setting, of in sorted(found.items(), key=lambda x: x[1].get(games[0], (9, ""))[0]):
        cells = [of.get(game, (0, "–"))[1] for game in games]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(args):
    args.env_id, rom = distill.resolve_game(args.env_id)
    device = distill.set_up_torch(1, args.cuda)
    settings = [parse(text) for text in args.settings]
    arrays = load(args.buffer_paths, args.env_id, device)
    fresh = load((args.fresh_path,), args.env_id, device)
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    for text, setting in zip(args.settings, settings, strict=True):
        for seed in args.seeds:
            start = time.process_time()
            budget = (args.seconds, args.seen)
            agent, seen, rows = fit(setting, args.capacity, arrays, seed, *budget)
            about = {"env_id": args.env_id, "teacher": args.teacher, "label": args.label}
            about |= {"capacity": args.capacity, "seed": seed}
            about |= {"setting": changed(setting), "seconds": time.process_time() - start}
            about |= {"seen": seen, "samples": len(rows), "buffers": list(args.buffer_paths)}
            about |= {"device": device.type, "torch": torch.__version__}
            about |= {"date": time.strftime("%Y-%m-%d")}
            everywhere = np.arange(len(fresh[1]))
            for name, data, those in (("train", arrays, rows), ("fresh", fresh, everywhere)):
                found = compare(agent, data, those)
                about |= {f"{name}/{key}": value for key, value in found.items()}
            if args.eval_steps:
                envs = distill.AtariEnvs(rom, 16, 0.0, life_loss=False)
                returns, _ = distill.play(agent, envs, args.eval_steps, seed, False, device)
                about |= distill.summarize(returns)
            if args.checkpoints:
                path = Path(args.checkpoints, f"{args.env_id}_{args.capacity}_{text}_{seed}.pt")
                path.parent.mkdir(parents=True, exist_ok=True)
                saved = {"env_id": args.env_id, "phase": "distilled", "capacity": args.capacity}
                saved |= {"args": vars(args), "global_step": seen, "model": agent.state_dict()}
                torch.save(saved, path)
            with (folder / f"{args.env_id}.jsonl").open("a") as file:
                file.write(json.dumps(about) + "\n")
            print(json.dumps(about), flush=True)
    (folder / "table.md").write_text(table(folder))
    (folder / "overview.md").write_text(overview(folder))


if __name__ == "__main__":
    main(tyro.cli(Args))
