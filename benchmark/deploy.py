"""What a decision costs and scores: a teacher and its students by PyTorch, ONNX and 8-bit ONNX.

    python benchmark/deploy.py --env-id PongNoFrameskip-v4 --checkpoints high.pt medium.pt low.pt
    python benchmark/deploy.py --env-id ... --checkpoints ... --eval-steps 0     # time alone
    python benchmark/deploy.py                                                   # the table again

Needs `tools/requirements.txt` and matplotlib. The first checkpoint is the teacher, and the
observations are of its play: 500 calibrate the 8 bits, 2,000 others are compared. Everything runs
on one thread. Writes `benchmark/results/deploy/{env_id}.json`, and from the files of all games
`table.md` beside them and `benchmark/figures/deploy.png`.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import export_onnx

import collect_buffer as collect
from actor_distill import reverse_kl

CAPACITIES = ("high", "medium", "low")
FORMS = ("PyTorch", "ONNX", "ONNX, 8 bits")
COLOURS = {"high": "#d62728", "medium": "#9467bd", "low": "#1f77b4"}
MARKERS = {"PyTorch": "o", "ONNX": "s", "ONNX, 8 bits": "^"}


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game"""
    checkpoints: tuple[str, ...] = ()
    """the teacher, its medium and its low student; without them, only the table is made"""
    decisions: int = 3000
    """single decisions to time; 0 keeps the times that the file has"""
    eval_steps: int = 100_000
    """budget of each evaluation; 0 keeps the scores that the file has"""
    play: tuple[str, ...] = FORMS
    """which forms to evaluate; the scores of the others are those that the file has"""
    seed: int = 1
    """seed of the games and the actions"""
    results: str = str(ROOT / "benchmark" / "results" / "deploy")
    """folder of the results"""
    figures: str = str(ROOT / "benchmark" / "figures")
    """folder of the picture"""


def forms(agent, calibration, folder):
    """Name to policy and bytes: the agent itself and what `tools/export_onnx.py` makes of it."""
    exported = export_onnx.Exported(agent, False, False).eval()
    full, small = f"{folder}/full.onnx", f"{folder}/small.onnx"
    export_onnx.export(exported, full)
    export_onnx.quantise(full, small, calibration)
    torch.save(agent.state_dict(), f"{folder}/agent.pt")
    sizes = [os.path.getsize(path) for path in (f"{folder}/agent.pt", full, small)]
    policies = (agent, *(export_onnx.Session(Path(path).read_bytes()) for path in (full, small)))
    return {name: pair for name, *pair in zip(FORMS, policies, sizes, strict=True)}


def multiply_adds(agent):
    """Of one decision, the critic left out."""
    positions = {0: 20 * 20, 2: 9 * 9, 4: 7 * 7, 7: 1}
    layers = sum(agent.network[i].weight.numel() * n for i, n in positions.items())
    return layers + agent.actor.weight.numel()


@torch.inference_mode()
def times(policies, obs, decisions):
    """Per policy: µs a decision, median and 99th percentile, and decisions/s in batches of 16.

    The policies take turns, one decision each.
    """
    one = {name: [] for name in policies}
    many = {name: [] for name in policies}
    for i in range(decisions):
        for name, policy in policies.items():
            batch = obs[i % len(obs)][None]
            start = time.perf_counter()
            policy(batch)[0].argmax(-1).item()
            one[name].append(time.perf_counter() - start)
            if i % 16 == 0:
                batch = obs[i % (len(obs) - 16) :][:16]
                start = time.perf_counter()
                policy(batch)[0].argmax(-1).tolist()
                many[name].append(time.perf_counter() - start)
    return {
        name: {
            "us": 1e6 * np.median(one[name][decisions // 10 :]),
            "us_99": 1e6 * np.percentile(one[name][decisions // 10 :], 99),
            "batch_rate": 16 / np.median(many[name][len(many[name]) // 10 :]),
        }
        for name in policies
    }


@torch.inference_mode()
def compare(policy, obs, reference):
    """KL(policy || reference) in nats and share of equal best actions on observations."""
    theirs, ours = reference(obs)[0], policy(obs)[0]
    kl = reverse_kl(theirs.softmax(-1), ours).mean().item()
    return kl, (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()


def measure(args, before):
    """The figures of one game's checkpoints, with what is not measured taken from `before`."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    env_id, rom = collect.resolve_game(args.env_id)
    actions = len(collect.AtariEnvs(rom, 1, 0.0, life_loss=False).action_meanings)
    agents = [collect.load_teacher(path, env_id, actions) for path in args.checkpoints]
    teacher = agents[0][1]
    obs = export_onnx.real_observations(teacher, rom, None, env_id, 2500, args.seed)
    calibration, obs = obs[:500], torch.from_numpy(obs[500:])
    found = {}
    for capacity, (about, agent) in zip(CAPACITIES, agents, strict=False):
        with tempfile.TemporaryDirectory() as folder:
            made = forms(agent, calibration, folder)
        policies = {name: policy for name, (policy, _) in made.items()}
        measured = times(policies, obs, args.decisions) if args.decisions else {}
        for name, (policy, size) in made.items():
            row = before.get(capacity, {}).get(name, {}) | measured.get(name, {})
            row["bytes"], row["sha256"] = size, about["sha256"]
            row["parameters"] = sum(parameter.numel() for parameter in agent.parameters())
            row["multiply_adds"] = multiply_adds(agent)
            row["kl_own"], row["same_own"] = compare(policy, obs, agent)
            row["kl_teacher"], row["same_teacher"] = compare(policy, obs, teacher)
            if args.eval_steps and name in args.play:
                envs = collect.AtariEnvs(rom, 16, 0.0, life_loss=False)
                device = torch.device("cpu")
                returns, _ = collect.play(policy, envs, args.eval_steps, args.seed, False, device)
                row["score"] = collect.summarize(returns)
            found.setdefault(capacity, {})[name] = row
            print(capacity, name, {key: row[key] for key in row if key != "sha256"}, flush=True)
    return found


def scored(game):
    """Whether all of a game's rows have their times and scores."""
    rows = [row for forms in game["networks"].values() for row in forms.values()]
    return all({"us", "score"} <= row.keys() for row in rows)


def table(games):
    """Markdown of the rows of all games."""
    lines = []
    for env_id, game in games.items():
        lines += [f"### {env_id}", "", f"`{game['command']}`, {game['machine']}.", ""]
        columns = (
            "network | form | MB | parameters | multiply-adds | µs a decision (99th percentile) | "
            "decisions/s by 16 | KL(it ‖ its float network) | KL(it ‖ teacher) | score (95% interval)"
        )
        lines += [f"| {columns} |", "|" + "---|" * 10]
        for capacity, rows in game["networks"].items():
            for form, row in rows.items():
                score = row["score"]
                low, high = score["ci95"]
                cells = (
                    capacity,
                    form,
                    f"{row['bytes'] / 1e6:.2f}",
                    f"{row['parameters']:,}",
                    f"{row['multiply_adds']:,}",
                    f"{row['us']:.0f} ({row['us_99']:.0f})",
                    f"{row['batch_rate']:,.0f}",
                    f"{abs(row['kl_own']):.4f}",
                    f"{abs(row['kl_teacher']):.4f}",
                    f"{score['mean']:,.2f} ({low:,.2f} to {high:,.2f})",
                )
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def picture(games, path):
    """Score in % of the teacher over time a decision, and over bytes; one row of panels a game."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(games), 2, figsize=(8, 2.6 * len(games)), layout="constrained", squeeze=False
    )
    for (env_id, game), row in zip(games.items(), panels, strict=True):
        top = game["networks"]["high"]["PyTorch"]["score"]["mean"]
        for axes, key, label in zip(row, ("us", "bytes"), ("µs a decision", "MB"), strict=True):
            for capacity, networks in game["networks"].items():
                for form, found in networks.items():
                    mean, (low, high) = found["score"]["mean"], found["score"]["ci95"]
                    axes.errorbar(
                        found[key],
                        100 * mean / top,
                        yerr=[[100 * (mean - low) / top], [100 * (high - mean) / top]],
                        fmt=MARKERS[form],
                        color=COLOURS[capacity],
                        label=f"{capacity}, {form}",
                        markersize=5,
                        capsize=2,
                    )
            axes.set(xscale="log", xlabel=label, title=env_id.removesuffix("NoFrameskip-v4"))
            axes.minorticks_off()
            unit = 1e6 if key == "bytes" else 1
            ticks = (0.1, 0.2, 0.5, 1, 2, 5) if key == "bytes" else (200, 500, 1000, 2000)
            axes.set_xticks([unit * tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        row[0].set_ylabel("score, % of the teacher")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def main(args):
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    if args.checkpoints:
        path = results / f"{args.env_id}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        networks = measure(args, before.get("networks", {}))
        cpu = f"one core with {torch.backends.cpu.get_cpu_capability()}"
        flags = f"--env-id {args.env_id} --checkpoints {' '.join(args.checkpoints)}"
        game = {"command": f"python benchmark/deploy.py {flags}"}
        game |= {"machine": f"{time.strftime('%Y-%m-%d')}, {cpu}, torch {torch.__version__}"}
        game |= {"networks": networks}
        path.write_text(json.dumps(game, indent=1) + "\n")
    games = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    games = {name: game for name, game in games.items() if scored(game)}
    (results / "table.md").write_text(table(games))
    if games:
        picture(games, Path(args.figures) / "deploy.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
