"""What a decision costs and scores: a teacher and its students by PyTorch, ONNX and 8-bit ONNX.

    python benchmark/deploy.py --env-id PongNoFrameskip-v4 --checkpoints high.pt medium.pt low.pt
    python benchmark/deploy.py                                                   # the table again

Needs `tools/requirements.txt` and matplotlib. The first checkpoint is the teacher, whose play gives
the observations: 500 calibrate the 8 bits, 2,000 others are compared. Runs on one thread. Writes
`benchmark/results/deploy/{env_id}.json`, and of all games `table.md` and `figures/deploy.png`.
"""

import json
import os
import sys
import tempfile
import time
import timeit
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

RESULTS, FIGURES = ROOT / "benchmark" / "results" / "deploy", ROOT / "benchmark" / "figures"
COLOURS = {"high": "#d62728", "medium": "#9467bd", "low": "#1f77b4"}
MARKERS = {"PyTorch": "o", "ONNX": "s", "ONNX, 8 bits": "^"}


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game"""
    checkpoints: tuple[str, ...] = ()
    """the teacher, its medium and its low student; without them, only the table is made"""
    eval_steps: int = 100_000
    """budget of each evaluation"""


def forms(agent, calibration, folder):
    """Name to policy and bytes: the agent itself and what `tools/export_onnx.py` makes of it."""
    exported = export_onnx.Exported(agent, False, False).eval()
    full, small = f"{folder}/full.onnx", f"{folder}/small.onnx"
    export_onnx.export(exported, full)
    export_onnx.quantise(full, small, calibration)
    torch.save(agent.state_dict(), f"{folder}/agent.pt")
    sizes = [os.path.getsize(path) for path in (f"{folder}/agent.pt", full, small)]
    policies = (agent, *(export_onnx.Session(Path(path).read_bytes()) for path in (full, small)))
    return {name: pair for name, *pair in zip(MARKERS, policies, sizes, strict=True)}


def multiply_adds(agent):
    """Of one decision, the critic left out."""
    positions = {0: 20 * 20, 2: 9 * 9, 4: 7 * 7, 7: 1}
    layers = sum(agent.network[i].weight.numel() * n for i, n in positions.items())
    return layers + agent.actor.weight.numel()


def chooser(policy, batch):
    """A function that decides on a batch, all outputs in place where it is an ONNX session."""
    if isinstance(policy, torch.nn.Module):
        return lambda: policy(batch)[0].argmax(-1).tolist()
    binding = policy.session.io_binding()
    binding.bind_cpu_input("obs", batch.numpy())
    binding.bind_output(policy.session.get_outputs()[0].name)

    def choose():
        policy.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0].argmax(-1).tolist()

    return choose


@torch.inference_mode()
def times(policies, obs, decisions=3000):
    """µs a decision, median and 99th percentile, and decisions/s in batches of 16, in turns."""
    one = {name: [] for name in policies}
    many = {name: [] for name in policies}
    for i in range(decisions):
        for name, policy in policies.items():
            batch = obs[i % (len(obs) - 16) :]
            for size, spent in ((1, one), (16, many))[: 2 if i % 16 == 0 else 1]:
                choose = chooser(policy, batch[:size])
                start = time.perf_counter()
                choose()
                spent[name].append(time.perf_counter() - start)
    return {
        name: {
            "us": 1e6 * np.median(one[name][decisions // 10 :]),
            "us_99": 1e6 * np.percentile(one[name][decisions // 10 :], 99),
            "batch_rate": 16 / np.median(many[name][len(many[name]) // 10 :]),
        }
        for name in policies
    }


@torch.inference_mode()
def peak():
    """Multiply-adds a second of one core: the best of 40 large convolutions in float32."""
    layer = torch.nn.Conv2d(64, 64, 3)
    x = torch.rand(64, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    seconds = min(timeit.repeat(lambda: layer(x), number=1, repeat=40))
    return layer(x).numel() * layer.weight[0].numel() / seconds


@torch.inference_mode()
def divergence(policy, obs, reference):
    """KL(policy || reference) on observations, in nats."""
    return reverse_kl(reference(obs)[0].softmax(-1), policy(obs)[0]).mean().item()


def measure(args):
    """The figures of one game's checkpoints."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    env_id, rom = collect.resolve_game(args.env_id)
    actions = len(collect.AtariEnvs(rom, 1, 0.0, life_loss=False).action_meanings)
    agents = [collect.load_teacher(path, env_id, actions) for path in args.checkpoints]
    for about, _ in agents:
        if about["args"].get("loss") == "mse":
            sys.exit(f"{about['checkpoint']}: has Q-values, and a divergence needs a policy")
    teacher = agents[0][1]
    obs = export_onnx.real_observations(teacher, rom, None, env_id, 2500, 1)
    calibration, obs = obs[:500], torch.from_numpy(obs[500:])
    found, policies_and_rows = {}, []
    for capacity, (_, agent) in zip(COLOURS, agents, strict=False):
        with tempfile.TemporaryDirectory() as folder:
            made = forms(agent, calibration, folder)
        policies = {name: policy for name, (policy, _) in made.items()}
        measured, floor = times(policies, obs), 1e6 * multiply_adds(agent) / peak()
        for name, (policy, size) in made.items():
            row = {
                **measured[name],
                "bytes": size,
                "parameters": sum(parameter.numel() for parameter in agent.parameters()),
                "multiply_adds": multiply_adds(agent),
                "us_floor": floor,
                "kl_own": divergence(policy, obs, agent),
                "kl_teacher": divergence(policy, obs, teacher),
            }
            found.setdefault(capacity, {})[name] = row
            policies_and_rows.append((policy, row))
    print("timed; what is left need not be quiet", flush=True)
    for policy, row in policies_and_rows:
        envs = collect.AtariEnvs(rom, 16, 0.0, life_loss=False)
        returns, _ = collect.play(policy, envs, args.eval_steps, 1, False, torch.device("cpu"))
        row["score"] = collect.summarize(returns)
    return found


def table(games):
    """Markdown of the rows of all games."""
    lines = []
    for env_id, game in games.items():
        lines += [f"### {env_id}", "", f"`{game['command']}`, {game['machine']}.", ""]
        columns = (
            "network | form | MB | parameters | multiply-adds | µs a decision (99th percentile) | "
            "floor | decisions/s by 16 | KL(it ‖ its float network) | KL(it ‖ teacher) "
            "| score (95% interval)"
        )
        lines += [f"| {columns} |", "|" + "---|" * 11]
        for capacity, rows in game["networks"].items():
            for form, row in rows.items():
                mean, (low, high) = row["score"]["mean"], row["score"]["ci95"]
                lines.append(
                    f"| {capacity} | {form} | {row['bytes'] / 1e6:.2f} | {row['parameters']:,} "
                    f"| {row['multiply_adds']:,} | {row['us']:.0f} ({row['us_99']:.0f}) "
                    f"| {row['us_floor']:.0f} | {row['batch_rate']:,.0f} "
                    f"| {abs(row['kl_own']):.4f} | {abs(row['kl_teacher']):.4f} "
                    f"| {mean:,.2f} ({low:,.2f} to {high:,.2f}) |"
                )
        lines.append("")
    return "\n".join(lines)


def picture(games, path):
    """Score in % of the teacher over time a decision, and over bytes; one row of panels a game."""
    import matplotlib.pyplot as plt

    size = {"figsize": (8, 2.6 * len(games)), "layout": "constrained", "squeeze": False}
    figure, panels = plt.subplots(len(games), 2, **size)
    axis = {"us": ("µs a decision", 1, (50, 100, 200, 500))}
    axis["bytes"] = ("MB", 1e6, (0.1, 0.2, 0.5, 1, 2, 5))
    for (env_id, game), row in zip(games.items(), panels, strict=True):
        top = game["networks"]["high"]["PyTorch"]["score"]["mean"]
        for axes, (key, (label, unit, ticks)) in zip(row, axis.items(), strict=True):
            for capacity, networks in game["networks"].items():
                for form, found in networks.items():
                    score = found["score"]
                    mean, low, high = (100 * x / top for x in (score["mean"], *score["ci95"]))
                    style = {"fmt": MARKERS[form], "color": COLOURS[capacity], "markersize": 5}
                    style |= {"label": f"{capacity}, {form}", "capsize": 2}
                    axes.errorbar(found[key], mean, yerr=[[mean - low], [high - mean]], **style)
            axes.set(xscale="log", xlabel=label, title=env_id.removesuffix("NoFrameskip-v4"))
            axes.minorticks_off()
            axes.set_xticks([unit * tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        row[0].set_ylabel("score, % of the teacher")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def main(args):
    if args.checkpoints:
        command = f"python benchmark/deploy.py --env-id {args.env_id} --checkpoints "
        cpu = f"one core with {torch.backends.cpu.get_cpu_capability()}"
        machine = f"{time.strftime('%Y-%m-%d')}, {cpu}, torch {torch.__version__}"
        game = {"command": command + " ".join(args.checkpoints), "machine": machine}
        game["networks"] = measure(args)
        (RESULTS / f"{args.env_id}.json").write_text(json.dumps(game, indent=1) + "\n")
    games = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    (RESULTS / "table.md").write_text(table(games))
    picture(games, FIGURES / "deploy.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
