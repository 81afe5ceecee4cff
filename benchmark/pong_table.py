"""The paper's Table 3 from the runs of `benchmark/pong_table.sh`: reads result files, plays nothing.

    python benchmark/pong_table.py PongNoFrameskip-v4
    python benchmark/pong_table.py PongNoFrameskip-v4 BreakoutNoFrameskip-v4

Writes `benchmark/results/pong_table.md`; a run that is not there yet is a dash. Random and human scores
are those of DQN Zoo (github.com/google-deepmind/dqn_zoo), the paper's those of its Tables 1 and 3.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    games: tyro.conf.Positional[tuple[str, ...]]
    """gymnasium ids, as in the folders of the results"""
    results: str = "benchmark/results"
    """folder of the results"""


# random and human scores, and the paper's means: DQN, then the columns of Table 3
REFERENCE = {
    "BeamRider": (363.9, 16926.5, 8672.4, 7500, 7018, 6284, 5447, 6958, 5489, 5548),
    "Breakout": (1.7, 30.5, 303.9, 277, 166, 248, 309, 187, 201, 159),
    "Enduro": (0, 860.5, 475.6, 722, 827, 656, 733, 948, 611, 1013),
    "Freeway": (0, 29.6, 25.8, 34, 33, 34, 32, 34, 33, 33),
    "MsPacman": (307.3, 6951.6, 763.5, 3410, 4544, 3413, 5041, 2085, 3390, 3483),
    "Pong": (-20.7, 14.6, 16.2, 21, 21, 20, 19, 21, 19, 21),
    "Qbert": (163.9, 13455.0, 4589.8, 28367, 11646, 28554, 20572, 18502, 23019, 12152),
    "Riverraid": (1338.5, 17118.0, 4065.3, 13916, 15601, 13080, 13716, 9408, 11256, 15593),
    "Seaquest": (68.4, 42054.7, 2793.3, 2471, 1908, 2572, 3708, 2315, 2219, 3550),
    "SpaceInvaders": (148.0, 1668.7, 1449.7, 1653, 1624, 1432, 1569, 1312, 1382, 1288),
}
# row of the table: its runs' names without the seed, and its column in REFERENCE
ROWS = {
    "Teacher": ("teacher", 3),
    "Medium": ("direct_medium", 4),
    "Medium AD, 10 epochs": ("ad10_medium", 5),
    "Medium AD, 50 epochs": ("ad50_medium", 5),
    "Medium AD, 100 epochs": ("ad100_medium", 5),
    "Medium AD tuned": ("tuned_medium", 6),
    "Low": ("direct_low", 7),
    "Low AD, 10 epochs": ("ad10_low", 8),
    "Low AD, 50 epochs": ("ad50_low", 8),
    "Low AD, 100 epochs": ("ad100_low", 8),
    "Low AD tuned": ("tuned_low", 9),
}


def runs(folder, name):
    """The finished runs of a name, one for each seed: their eval.json, wall time and folder."""
    found = []
    for path in sorted(folder.glob(f"{name}_[0-9]*")) if name != "teacher" else [folder / name]:
        if (path / "run.json").exists():
            run = json.loads((path / "eval.json").read_text())
            found.append(run | json.loads((path / "run.json").read_text()) | {"folder": path})
    return found


def time_taken(runs, *parts):
    """Mean seconds of runs, each with all that it goes on from, evaluations included, as a cell.

    Args:
        runs: as of `runs`.
        parts: what to add up: "seconds", the wall time, or "user" and "system".
    """
    total = 0
    for run in runs:
        folder = run["folder"].parent
        while run:
            if "--eval-only" in run["command"] or not run.keys() >= set(parts):
                return "–"
            total += sum(run[part] for part in parts)
            run = run.get("after") and json.loads((folder / run["after"] / "run.json").read_text())
    return f"{total / len(runs):,.0f} s"


def held_out_kl(run):
    """The last `validation/kl` that a run's TensorBoard events hold, or None."""
    events = EventAccumulator(str(run["folder"]), size_guidance={"scalars": 0}).Reload()
    if "validation/kl" not in events.Tags()["scalars"]:
        return None
    return events.Scalars("validation/kl")[-1].value


def interquartile_mean(scores):
    """Mean of the middle half of the scores, floor(n / 4) left out at either end."""
    scores = np.sort(scores)
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean()


def interval(games, statistic, resamples=2000):
    """95% percentile bootstrap interval of a statistic, each game's returns resampled by itself.

    Args:
        games: a list of arrays, one for each stratum.
        statistic: maps such a list to a number.
    """
    rng = np.random.default_rng(0)
    values = [statistic([rng.choice(x, len(x)) for x in games]) for _ in range(resamples)]
    return np.percentile(values, (2.5, 97.5))


def cells(found, teacher, reference, column):
    """One game's cells of one row; several seeds' returns are taken together."""
    if not found:
        return ["–"] * 9 + [str(reference[column])]
    returns = np.concatenate([run["returns"] for run in found])
    games = [np.array(run["returns"]) for run in found]
    low, high = interval(games, lambda seeds: np.concatenate(seeds).mean())
    share = "–"
    if teacher is not None:
        share = f"{100 * (returns.mean() - reference[0]) / (teacher - reference[0]):.1f}%"
    kls = [kl for run in found if (kl := held_out_kl(run)) is not None]
    return [
        f"{returns.mean():.2f} ± {returns.std():.2f}",
        f"{returns.max():g}",
        str(len(returns)),
        str(len(found)),
        f"{low:.2f} to {high:.2f}",
        share,
        f"{np.mean(kls):.4f}" if kls else "–",
        time_taken(found, "seconds"),
        time_taken(found, "user", "system"),
        str(reference[column]),
    ]


def geometric_mean(values):
    """Of positive numbers; None if one is not."""
    return float(np.exp(np.mean(np.log(values)))) if values and min(values) > 0 else None


def main(args):
    columns = (
        "policy | mean ± std | max | games | seeds | 95% interval | way from random to teacher | "
        "held-out KL | wall time | processor time | paper's mean"
    )
    lines, means, returns = [], {row: [] for row in ROWS}, {row: [] for row in ROWS}
    for game in args.games:
        folder = Path(args.results, game, "table3")
        reference = REFERENCE[game.removesuffix("NoFrameskip-v4")]
        teacher = next((run["mean"] for run in runs(folder, "teacher")), None)
        lines += [f"### {game}", "", f"| {columns} |", "|" + "---|" * 11]
        for row, (name, column) in ROWS.items():
            found = runs(folder, name)
            lines.append(f"| {row} | {' | '.join(cells(found, teacher, reference, column))} |")
            if found:
                scores = np.concatenate([run["returns"] for run in found])
                means[row].append((scores.mean(), reference[2]))
                returns[row].append((scores - reference[0]) / (reference[1] - reference[0]))
        lines.append("")
    columns = (
        "policy | games | geometric mean, % of teacher | % of DQN | human-normalised interquartile "
        "mean | 95% interval"
    )
    lines += [f"| {columns} |", "|" + "---|" * 6]
    whole = [row for row in ROWS if len(means[row]) == len(args.games)]
    for row in whole:
        mean = geometric_mean([score for score, _ in means[row]])
        of_teacher, of_dqn = "–", "–"
        if mean is not None:
            of_dqn = f"{100 * mean / geometric_mean([dqn for _, dqn in means[row]]):.0f}%"
            top = geometric_mean([score for score, _ in means["Teacher"]])
            if "Teacher" in whole and top is not None:
                of_teacher = f"{100 * mean / top:.0f}%"

        # every game weighs the same, however many of its games were played
        def over_games(games):
            quantiles = np.linspace(0, 1, 101)
            return interquartile_mean(np.concatenate([np.quantile(x, quantiles) for x in games]))

        low, high = interval(returns[row], over_games)
        lines.append(
            f"| {row} | {len(means[row])} | {of_teacher} | {of_dqn} | "
            f"{over_games(returns[row]):.3f} | {low:.3f} to {high:.3f} |"
        )
    text = "\n".join(lines) + "\n"
    Path(args.results, "pong_table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
