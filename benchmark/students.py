"""How much of a strong teacher its students keep: tables and pictures from the files of students.

    python benchmark/students.py             # the tables and pictures again, from the files
    python benchmark/students.py --add-to benchmark/results/students/qbert_acktr.json --samples 540_000
        --checkpoints low_1.pt low_2.pt --evaluations runs/low_1/eval.json runs/low_2/eval.json
        --fresh-path buffers/fresh.npz       # adds students to their teacher's file

`benchmark/results/students/` holds a file for each teacher: its evaluation, and its students, each
with what it learned from, how far it is from its teacher on a buffer of other games, and its own
evaluation. Only adding needs torch, only drawing matplotlib.
"""

import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent
COLORS = {"medium": "C4", "low": "C0"}
GAMES = {"Breakout": "C1", "Qbert": "C2", "Seaquest": "C9", "Pong": "C5"}
PROXIES = {
    "reverse_kl": "KL(student ‖ teacher), nats",
    "kl": "KL(teacher ‖ student), nats",
    "agreement": "same action best",
    "entropy_gap": "entropy less the teacher's, nats",
}


@dataclass
class Args:
    add_to: str = ""
    """teacher's file that gets the students below"""
    checkpoints: tuple[str, ...] = ()
    """students that `actor_distill.py` made"""
    evaluations: tuple[str, ...] = ()
    """`eval.json` of each"""
    fresh_path: str = ""
    """buffer of games that no student learned from"""
    samples: int = 540_000
    """samples in the buffer that they learned from"""
    num_envs: int = 128
    """games played at once for that buffer"""
    learned_on: str = ""
    """machine, and processor time if it is known"""
    figures: bool = True
    """draw the pictures too"""


def student(checkpoint, evaluation, fresh_path, samples, num_envs, learned_on):
    """What a teacher's file says of a student."""
    sys.path.insert(0, str(ROOT.parent))
    import distill_defaults
    import torch

    game = json.loads(Path(evaluation).read_text())
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    _, agent = distill_defaults.distill.load_checkpoint(checkpoint, saved["env_id"], "name another")
    fresh = distill_defaults.load((fresh_path,), saved["env_id"], "cpu")
    rows = np.arange(len(fresh[1]))
    names = ("seed", "loss", "epochs", "batch_size", "learning_rate", "optimizer")
    about = {"capacity": saved["capacity"], **{name: saved["args"].get(name) for name in names}}
    about |= {"samples": samples, "num_envs": num_envs, "seen": saved["global_step"]}
    about |= {"learned_on": learned_on}
    about |= {"validation": saved.get("validation", {})}
    about |= {"fresh": distill_defaults.compare(agent, fresh, rows)}
    kept = ("mean", "std", "max", "episodes", "ci95", "steps", "returns")
    return about | {name: game[name] for name in kept}


def share(students, teacher, draws=2000):
    """Mean of the students' means as a share of the teacher's, and its 95% interval.

    The interval is a bootstrap of seeds, of each seed's games and of the teacher's: lists of returns.
    """
    rng = np.random.default_rng(0)
    teacher, students = np.array(teacher), [np.array(x) for x in students]
    ratios = []
    for _ in range(draws):
        seeds = rng.integers(len(students), size=len(students))
        mean = np.mean([rng.choice(students[i], len(students[i])).mean() for i in seeds])
        ratios.append(mean / rng.choice(teacher, len(teacher)).mean())
    ratio = np.mean([x.mean() for x in students]) / teacher.mean()
    return (ratio, *np.percentile(ratios, (2.5, 97.5)))


def usual(students, capacity, loss):
    """The students of a capacity by one loss: most seeds of equal data, then most epochs."""
    groups = {}
    for x in students:
        if x["capacity"] == capacity and x["loss"] == loss:
            groups.setdefault((x["samples"], x["num_envs"], x["epochs"]), []).append(x)
    best = max(groups.values(), key=lambda of: (len(of), of[0]["epochs"]), default=[])
    return sorted(best, key=lambda x: x["seed"])


def table(teachers):
    """Markdown: a row for each teacher, capacity, and way of learning."""
    columns = (
        "teacher | its score | student | by | samples × epochs | each seed's score | mean | "
        "of its teacher (95% interval) | KL(student ‖ teacher) on fresh games | learned on"
    )
    lines = [f"| {columns} |", "|" + "---|" * 10]
    for x, capacity in itertools.product(teachers, COLORS):
        for way, loss in (("defaults", "reverse_kl"), ("paper's path", "kl")):
            students = usual(x["students"], capacity, loss)
            if not students:
                continue
            y = x["evaluation"]
            ratio, low, high = share([z["returns"] for z in students], y["returns"])
            digits = 2 if abs(y["mean"]) < 100 else 0
            means = [z["mean"] for z in students]
            machines = {z["learned_on"].split(",")[0]: z["learned_on"] for z in students}
            cells = (
                x["name"],
                f"{y['mean']:,.{digits}f} ± {y['std']:,.{digits}f}, {y['episodes']} games",
                capacity,
                way,
                f"{students[0]['samples']:,} × {students[0]['epochs']}",
                ", ".join(f"{z:,.{digits}f}" for z in means),
                f"{np.mean(means):,.{digits}f}",
                f"**{ratio:.0%}** ({low:.0%} to {high:.0%})",
                f"{np.mean([z['fresh']['reverse_kl'] for z in students]):.3f}",
                "; ".join(machines.values()),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ranks_agree(x, y):
    """Spearman's rank correlation of two lists."""
    return float(np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1])


def proxies(teachers, studies):
    """Of all students with a score: per teacher a list of (share of it, figures on fresh games)."""
    found = {}
    for x in teachers:
        of = found.setdefault(x["name"], [])
        of += [(z["mean"] / x["evaluation"]["mean"], z["fresh"]) for z in x["students"]]
        for z in studies.get(x["name"], []):
            if not z.get("mean"):  # not evaluated, or it plays one action alone
                continue
            fresh = {name: z[f"fresh/{name}"] for name in PROXIES}
            of.append((z["mean"] / x["evaluation"]["mean"], fresh))
    return {name: of for name, of in found.items() if len(of) >= 8}


def proxy_table(found):
    """Markdown: how well each figure orders the students of a teacher by their score."""
    head = "teacher | students | " + " | ".join(PROXIES.values())
    lines = [f"| {head} |", "|" + "---|" * (2 + len(PROXIES))]
    for name, of in found.items():
        shares = [y for y, _ in of]
        cells = []
        for key in PROXIES:
            values = [abs(z[key]) if key == "entropy_gap" else z[key] for _, z in of]
            cells.append(f"{ranks_agree(values, shares):+.2f}")
        lines.append(f"| {name} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def epochs_figure(teachers, path):
    """Score and distance from the teacher over the epochs: the shape of the paper's Fig. 3."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    shown = []
    for x in teachers:
        of = [z for z in x["students"] if z["loss"] == "reverse_kl"]
        samples = statistics.mode([z["samples"] for z in of] or [0])
        of = [z for z in of if z["samples"] == samples]
        if len({z["epochs"] for z in of}) >= 3:
            shown.append({**x, "students": of})
    figure, rows = plt.subplots(
        2,
        len(shown),
        figsize=(3 * len(shown), 5),
        layout="constrained",
        sharex="col",
        squeeze=False,
    )
    for x, (top, bottom) in zip(shown, rows.T, strict=True):
        y = x["evaluation"]
        top.axhspan(*(z / y["mean"] for z in y["ci95"]), color="C3", alpha=0.15)
        top.axhline(1, linestyle="--", linewidth=1, color="C3")
        for capacity, color in COLORS.items():
            of = [z for z in x["students"] if z["capacity"] == capacity]
            epochs = sorted({z["epochs"] for z in of})
            for z in of:
                at = z["epochs"] * (1.03 if capacity == "low" else 0.97)
                ends = [abs(end - z["mean"]) / y["mean"] for end in z["ci95"]]
                bars = {"yerr": [[ends[0]], [ends[1]]], "capsize": 2, "color": color}
                top.errorbar(
                    at, z["mean"] / y["mean"], fmt="o", markersize=3, linewidth=0.8, **bars
                )
                bottom.plot(at, z["fresh"]["reverse_kl"], "o", markersize=3, color=color)
            at_each = [[z for z in of if z["epochs"] == e] for e in epochs]
            shares = [np.mean([z["mean"] for z in group]) / y["mean"] for group in at_each]
            kl = [np.mean([z["fresh"]["reverse_kl"] for z in group]) for group in at_each]
            top.plot(epochs, shares, color=color, label=capacity)
            bottom.plot(epochs, kl, color=color)
        top.set_title(x["name"], fontsize=10)
        top.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        bottom.set(xscale="log", yscale="log", xlabel="epochs")
        bottom.set_xticks(epochs, map(str, epochs))
        bottom.minorticks_off()
        bottom.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
        bottom.yaxis.set_major_formatter("{x:g}")
    rows[0, 0].set_ylabel("score, of the teacher's")
    rows[1, 0].set_ylabel("KL, fresh games, nats")
    rows[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def proxies_figure(found, path):
    """Score over each figure that could tell when distillation is enough."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained", sharey=True)
    for (key, label), axes in zip(PROXIES.items(), panels, strict=True):
        for name, of in found.items():
            values = [z[key] for _, z in of]
            color = GAMES[name.split(",")[0]]
            axes.plot(values, [y for y, _ in of], "o", markersize=4, color=color, label=name)
        axes.set(xlabel=label, xscale="log" if "kl" in key else "linear")
    panels[0].set_ylabel("score, of the teacher's")
    panels[0].yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def samples_lines(teacher, study):
    """Distance from the teacher of `low` students by (samples, epochs); those of the study, too."""
    found = {}
    for z in study:
        plain = set(z["setting"]) <= {"batch_size", "learning_rate", "stride"} and not z["label"]
        if plain and (z["setting"]["batch_size"], z["seed"]) == (64, 1):
            at = (z["samples"], round(z["seen"] / z["samples"]))
            found.setdefault(at, []).append(z["fresh/reverse_kl"])
    for z in teacher["students"]:
        if (z["capacity"], z["loss"], z["num_envs"]) == ("low", "reverse_kl", 128):
            found.setdefault((z["samples"], z["epochs"]), []).append(z["fresh"]["reverse_kl"])
    return {at: np.mean(of) for at, of in sorted(found.items())}


def samples_figure(teachers, studies, path):
    """Distance from the teacher over the epochs, a line for each number of samples."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    shown = [x for x in teachers if x["name"] in studies]
    size = (1 + 3 * len(shown), 3.5)
    figure, panels = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    colors = {}
    for x, axes in zip(shown, panels[0], strict=True):
        found = samples_lines(x, studies[x["name"]])
        for samples in sorted({n for n, _ in found}):
            line = {epochs: kl for (n, epochs), kl in found.items() if n == samples}
            style = {"color": colors.setdefault(samples, f"C{len(colors)}"), "markersize": 4}
            axes.plot(line.keys(), line.values(), "o-", **style, label=f"{samples:,} samples")
        axes.set(xscale="log", yscale="log", xlabel="epochs", title=f"{x['name']}, low")
        ticks = sorted({epochs for _, epochs in found})
        axes.set_xticks(ticks, map(str, ticks))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    panels[0, 0].set_ylabel("KL, fresh games, nats")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def read(folder):
    """The teachers' files, in the order of their names, and by teacher the study's students."""
    teachers = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    studies = {}
    for path in sorted(folder.with_name("study").glob("*.jsonl")):
        for run in map(json.loads, path.open()):
            studies.setdefault(run["teacher"], []).append(run)
    return teachers, studies


def main(args):
    if args.add_to:
        path = Path(args.add_to)
        teacher = json.loads(path.read_text())
        for files in zip(args.checkpoints, args.evaluations, strict=True):
            about = (args.samples, args.num_envs, args.learned_on)
            found = student(*files, args.fresh_path, *about)
            teacher["students"].append(found)
            print(f"{files[0]}: {found['mean']:.2f}, {found['fresh']}")
        path.write_text(json.dumps(teacher) + "\n")
    folder = ROOT / "results" / "students"
    teachers, studies = read(folder)
    (folder / "table.md").write_text(table(teachers))
    found = proxies(teachers, studies)
    if found:
        (folder / "proxies.md").write_text(proxy_table(found))
    print(table(teachers), proxy_table(found), sep="\n")
    if args.figures and found:
        figures = ROOT / "figures"
        epochs_figure(teachers, figures / "students_epochs.png")
        proxies_figure(found, figures / "students_proxies.png")
        samples_figure(teachers, studies, figures / "students_samples.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
