"""The paper's Tables 1 and 3 over ten games, from the runs of `benchmark/games.sh`: plays nothing.

    python benchmark/table3.py
    pip install -r benchmark/requirements.txt && python benchmark/table3.py --aggregates

Writes `benchmark/results/games.md`: per game the rows of Table 3, a run that is not there yet being
a dash. With `--aggregates` also pictures: the curves of training and of distillation, a heat map of
the table, and for each capacity, over the games that have all of its rows, `games_aggregates.md` and
performance profiles by rliable (Agarwal et al. 2021, arXiv:2108.13264). Random and human scores are
those of DQN Zoo (github.com/google-deepmind/dqn_zoo), the paper's those of its Tables 1 and 3. Shares
and geometric means are of scores, as in the paper; Pong's, which begin at -21, count from -20.7, a
random player's.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass
class Args:
    aggregates: bool = False
    """also draw the pictures, and make the table over all games, by rliable"""
    results: str = "benchmark/results"
    """folder of the results"""
    figures: str = "benchmark/figures"
    """folder of the pictures"""


# random and human scores, and the paper's means: DQN, then the columns of Table 3
REFERENCE = {
    "Breakout": (1.7, 30.5, 303.9, 277, 166, 248, 309, 187, 201, 159),
    "SpaceInvaders": (148.0, 1668.7, 1449.7, 1653, 1624, 1432, 1569, 1312, 1382, 1288),
    "Qbert": (163.9, 13455.0, 4589.8, 28367, 11646, 28554, 20572, 18502, 23019, 12152),
    "Seaquest": (68.4, 42054.7, 2793.3, 2471, 1908, 2572, 3708, 2315, 2219, 3550),
    "MsPacman": (307.3, 6951.6, 763.5, 3410, 4544, 3413, 5041, 2085, 3390, 3483),
    "BeamRider": (363.9, 16926.5, 8672.4, 7500, 7018, 6284, 5447, 6958, 5489, 5548),
    "Enduro": (0, 860.5, 475.6, 722, 827, 656, 733, 948, 611, 1013),
    "Riverraid": (1338.5, 17118.0, 4065.3, 13916, 15601, 13080, 13716, 9408, 11256, 15593),
    "Freeway": (0, 29.6, 25.8, 34, 33, 34, 32, 34, 33, 33),
    "Pong": (-20.7, 14.6, 16.2, 21, 21, 20, 19, 21, 19, 21),
}
# row of the table: its runs' names without the seed, and its column in REFERENCE
ROWS = {
    "Teacher": ("teacher", 3),
    "Medium": ("direct_medium_*", 4),
    "Medium AD": ("ad_medium_*", 5),
    "Medium AD tuned": ("tuned_medium_*", 6),
    "Low": ("direct_low_*", 7),
    "Low AD": ("ad_low_*", 8),
    "Low AD tuned": ("tuned_low_*", 9),
}


def runs(folder, pattern):
    """The evaluations of a row's runs, one for each seed."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{pattern}/eval.json"))]


def mean_interval(found, resamples=2000):
    """95% percentile bootstrap interval of the mean over seeds of a seed's mean over games.

    Seeds are resampled, and the games within each; of a single seed, its games alone.
    """
    rng = np.random.default_rng(0)
    returns = [np.array(run["returns"]) for run in found]
    draws = rng.integers(len(returns), size=(resamples, len(returns)))
    means = [
        np.mean([rng.choice(returns[i], len(returns[i])).mean() for i in draw]) for draw in draws
    ]
    return np.percentile(means, (2.5, 97.5))


def points(score, reference):
    """A score, or in Pong, where it can be below 0, what it is above a random player's."""
    return score - min(0, reference[0])


def cells(found, teacher, reference, column):
    """One game's cells of one row."""
    if not found:
        return ["–"] * 6 + [f"{reference[column]:,}"]
    seeds = [run["mean"] for run in found]
    low, high = mean_interval(found)
    return [
        f"{np.mean(seeds):,.2f}",
        f"{max(run['max'] for run in found):,.0f}",
        ", ".join(f"{mean:,.2f}" for mean in seeds),
        str(sum(run["episodes"] for run in found)),
        f"{low:,.2f} to {high:,.2f}",
        f"{points(np.mean(seeds), reference) / points(teacher, reference):.0%}",
        f"{reference[column]:,}",
    ]


def games_table(results):
    """Markdown: for each game the rows of Table 3."""
    columns = (
        "policy | mean | high score | each seed's mean | games | 95% interval | of its teacher "
        "| paper's mean"
    )
    lines = []
    for game, reference in REFERENCE.items():
        folder = Path(results, f"{game}NoFrameskip-v4", "games")
        teacher = next((run["mean"] for run in runs(folder, "teacher")), None)
        lines += [f"### {game}", "", f"| {columns} |", "|" + "---|" * 8]
        for row, (pattern, column) in ROWS.items():
            row_cells = cells(runs(folder, pattern), teacher, reference, column)
            lines.append(f"| {row} | {' | '.join(row_cells)} |")
        lines.append("")
    return "\n".join(lines)


def seed_means(results, capacity):
    """Row to game to the mean of each of its seeds, of the teacher and one capacity.

    Over the games in which each of these rows is there.
    """
    rows = [row for row in ROWS if row.split()[0] in ("Teacher", capacity)]
    found = {}
    for game in REFERENCE:
        folder = Path(results, f"{game}NoFrameskip-v4", "games")
        means = {row: [x["mean"] for x in runs(folder, ROWS[row][0])] for row in rows}
        if all(means.values()):
            for row in rows:
                found.setdefault(row, {})[game] = means[row]
    return found


def geometric_mean(scores):
    """Over games, of each game's mean over the `scores` of its seeds."""
    above = [points(np.mean(score), REFERENCE[game]) for game, score in scores.items()]
    return np.exp(np.mean(np.log(above)))


def panels(results, picture, patterns, read, xlabel, ylabel, **style):
    """A panel for each game with the curves of the runs that `patterns` (label to names) finds.

    `read` makes x and y of what `curve.json` holds.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 5, figsize=(15, 5.5), layout="constrained", sharex=True)
    for panel, game in zip(axes.flat, REFERENCE, strict=True):
        folder = Path(results, f"{game}NoFrameskip-v4", "games")
        for (label, pattern), color in zip(patterns.items(), ("C0", "C4", "C3"), strict=False):
            for path in sorted(folder.glob(f"{pattern}/curve.json")):
                panel.plot(*read(json.loads(path.read_text())), color=color, label=label)
                label = None
        panel.set(title=game, **style)
    for panel in axes[1]:
        panel.set_xlabel(xlabel)
    for panel in axes[:, 0]:
        panel.set_ylabel(ylabel)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(picture, dpi=100)


def curves_figure(results, picture):
    """Returns over direct training by capacity in every game: the shape of the paper's Fig. 2."""
    patterns = {"low": "direct_low_*", "medium": "direct_medium_*", "high, the teacher": "teacher"}

    def read(curve):
        # a mean is missing where no game has ended yet
        return np.array(curve["steps"]) / 1e6, np.array(curve["return"], float)

    panels(results, picture, patterns, read, "million steps", "mean return, last 100 games")


def epochs_figure(results, picture):
    """Held-out distance over the epochs, a line for each seed; the paper's Fig. 3 plots scores."""

    def read(curve):
        distances = curve["validation/reverse_kl"]
        return range(1, len(distances) + 1), distances

    patterns = {"low": "ad_low_*", "medium": "ad_medium_*"}
    ylabel = "held-out KL(student ‖ teacher)"
    panels(results, picture, patterns, read, "epochs", ylabel, ylim=(0, None))


def heat_map(results, picture):
    """The table as a picture: each policy's mean over seeds, of its teacher's."""
    import matplotlib.pyplot as plt

    shares = np.full((len(ROWS) - 1, len(REFERENCE)), np.nan)
    for column, (game, reference) in enumerate(REFERENCE.items()):
        folder = Path(results, f"{game}NoFrameskip-v4", "games")
        teacher = runs(folder, "teacher")
        for row, (pattern, _) in enumerate(list(ROWS.values())[1:]):
            found = runs(folder, pattern)
            if teacher and found:
                mean = np.mean([x["mean"] for x in found])
                shares[row, column] = points(mean, reference) / points(
                    teacher[0]["mean"], reference
                )
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    image = axes.imshow(shares, cmap="RdBu", vmin=0, vmax=2, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            color = "w" if abs(share - 1) > 0.6 else "k"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(REFERENCE)), REFERENCE, rotation=30, ha="right")
    axes.set_yticks(range(len(ROWS) - 1), list(ROWS)[1:])
    figure.colorbar(
        image, extend="max", label="of the teacher's score", format=lambda x, _: f"{x:.0%}"
    )
    figure.savefig(picture, dpi=110)


def aggregates(found, picture):
    """Markdown over all games, by rliable, and the picture of the performance profiles."""
    import matplotlib.pyplot as plt
    from rliable import library, metrics, plot_utils

    games = list(found["Teacher"])
    random, human = (np.array([REFERENCE[g][i] for g in games]) for i in range(2))
    seeds = {row: min(map(len, means.values())) for row, means in found.items()}
    normalised = {}
    for row, means in found.items():
        # a single seed counts as often as others' seeds do, so that each row is trimmed alike
        scores = [np.resize(means[game][: seeds[row]], max(seeds.values())) for game in games]
        normalised[row] = (np.transpose(scores) - random) / (human - random)

    def middle(scores):
        return np.array([metrics.aggregate_iqm(scores)])

    middles, intervals = library.get_interval_estimates(normalised, middle, reps=2000)
    columns = (
        "policy | seeds | interquartile mean, human-normalised (95% interval) | geometric mean, % of "
        "the teacher | % of DQN"
    )
    lines = [f"{len(games)} games: {', '.join(games)}.", "", f"| {columns} |", "|" + "---|" * 5]
    of_dqn = geometric_mean({game: REFERENCE[game][2] for game in games})
    top = geometric_mean(found["Teacher"])
    for row, means in found.items():
        mean = geometric_mean(means)
        low, high = intervals[row][:, 0]
        interval = f" ({low:.3f} to {high:.3f})" if seeds[row] > 1 else ""
        cells_ = f"{seeds[row]} | {middles[row][0]:.3f}{interval} | {100 * mean / top:.0f}%"
        lines.append(f"| {row} | {cells_} | {100 * mean / of_dqn:.0f}% |")
    thresholds = np.linspace(0, max(scores.max() for scores in normalised.values()), 81)
    profiles, bands = library.create_performance_profile(normalised, thresholds, reps=2000)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    plot_utils.plot_performance_profiles(
        profiles, thresholds, bands, xlabel="human-normalised score", legend=True, ax=axes
    )
    figure.savefig(picture, dpi=110)
    return "\n".join(lines) + "\n"


def main(args):
    results = Path(args.results)
    text = games_table(results)
    (results / "games.md").write_text(text)
    print(text)
    if args.aggregates:
        figures = Path(args.figures)
        curves_figure(results, figures / "games_curves.png")
        epochs_figure(results, figures / "games_epochs.png")
        heat_map(results, figures / "games_heat_map.png")
        tables = []
        for capacity in ("Medium", "Low"):
            found = seed_means(results, capacity)
            if found:
                picture = figures / f"games_profiles_{capacity.lower()}.png"
                tables.append(f"### {capacity}\n\n{aggregates(found, picture)}")
        (results / "games_aggregates.md").write_text("\n".join(tables))
        print("\n".join(tables))


if __name__ == "__main__":
    main(tyro.cli(Args))
