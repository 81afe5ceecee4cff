"""The tables and pictures of the results, from the lines that `record.py` wrote: plays nothing.

    python benchmark/tables.py
    pip install -r benchmark/requirements.txt && python benchmark/tables.py --figures

`results/games/{game}.jsonl` holds the runs of `games.sh`, `results/students/{game}_{teacher}.jsonl`
a strong teacher and its students, by `students.sh`. What is not there yet is a dash. An interval is
a 95% percentile bootstrap over seeds and, within each seed, over its games.
"""

import functools
import itertools
import json
import operator
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass
class Args:
    figures: bool = False
    """also draw the pictures"""


# random and human scores of DQN Zoo (github.com/google-deepmind/dqn_zoo), and the paper's Table 3
REFERENCE = {
    "Breakout": (1.7, 30.5, 277, 166, 248, 309, 187, 201, 159),
    "SpaceInvaders": (148.0, 1668.7, 1653, 1624, 1432, 1569, 1312, 1382, 1288),
    "Qbert": (163.9, 13455.0, 28367, 11646, 28554, 20572, 18502, 23019, 12152),
    "Seaquest": (68.4, 42054.7, 2471, 1908, 2572, 3708, 2315, 2219, 3550),
    "MsPacman": (307.3, 6951.6, 3410, 4544, 3413, 5041, 2085, 3390, 3483),
    "BeamRider": (363.9, 16926.5, 7500, 7018, 6284, 5447, 6958, 5489, 5548),
    "Enduro": (0, 860.5, 722, 827, 656, 733, 948, 611, 1013),
    "Riverraid": (1338.5, 17118.0, 13916, 15601, 13080, 13716, 9408, 11256, 15593),
    "Freeway": (0, 29.6, 34, 33, 34, 32, 34, 33, 33),
    "Pong": (-20.7, 14.6, 21, 21, 20, 19, 21, 19, 21),
}
# the rows of Table 3, and the names of their runs without the seed
ROWS = {
    "Teacher": "teacher",
    "Medium": "direct_medium",
    "Medium AD": "ad_medium",
    "Medium AD tuned": "tuned_medium",
    "Low": "direct_low",
    "Low AD": "ad_low",
    "Low AD tuned": "tuned_low",
}
# the paper's geometric mean over ten games of each row, in percent of the teacher
PAPER = (100, 88, 94, 100, 84, 85, 89)
# how a strong teacher's student learned, and the names of its runs
WAYS = {"": "ad", ", the paper's path": "paper"}
# fine-tuning with one flag changed: the names of its runs
OTHER_RECIPES = {"`--kl-coef 0`": "nopull", "`--learning-rate 2.5e-4`": "slower"}
COLORS = {"medium": "C4", "low": "C0"}
PROXIES = {
    "reverse_kl": "KL(student ‖ teacher), nats",
    "kl": "KL(teacher ‖ student), nats",
    "agreement": "same action best",
    "entropy_gap": "entropy less the teacher's, nats",
}


def load(results):
    """Each game's lines, each strong teacher's with its students', and those of the settings."""

    def read(path):
        return [json.loads(line) for line in path.open()] if path.exists() else []

    games = {game: read(results / "games" / f"{game}.jsonl") for game in REFERENCE}
    strong = {}
    for path in sorted((results / "students").glob("*.jsonl")):
        lines = read(path)
        teacher = find(lines, "teacher")[0]
        title = f"{teacher['env_id'].removesuffix('NoFrameskip-v4')}, {path.stem.split('_', 1)[1]}"
        strong[teacher.get("title", title)] = lines
    return games, strong, read(results / "settings.jsonl")


def find(lines, name):
    """The lines of a name, or of a name, a seed and perhaps a number of a repeat, by seed."""
    found = [x for x in lines if re.fullmatch(rf"{name}(_\d+)*", x["name"])]
    return sorted(found, key=lambda x: x["seed"])


def returns(lines):
    """The returns of each line's games."""
    return [np.array(x["returns"]) for x in lines]


def mean(seeds):
    return seeds.mean(1)


def seed_means(seeds):
    """The mean of each seed's games: [1, seeds]."""
    return np.array([[np.mean(games) for games in seeds]])


def estimate(statistic, *samples, draws=20_000):
    """A statistic of samples, each a list of seeds' returns, and the ends of its 95% interval.

    `statistic` maps the means of seeds, an array [draws, seeds] for each sample, to [draws]. Seeds
    are drawn with replacement, and each time the games within them; of a single seed, its games.
    """
    rng = np.random.default_rng(0)
    resampled = []
    for seeds in samples:
        drawn = rng.integers(len(seeds), size=(draws, len(seeds)))
        means = np.empty(drawn.shape)
        for i, games in enumerate(seeds):
            at = drawn == i
            chosen = rng.integers(len(games), size=(at.sum(), len(games)), dtype=np.uint16)
            means[at] = games[chosen].mean(1)
        resampled.append(means)
    exact = statistic(*map(seed_means, samples))[0]
    return (exact, *np.percentile(statistic(*resampled), (2.5, 97.5)))


def points(scores, game):
    """Scores, or in Pong, where they can be below 0, what they are above a random player's."""
    return scores - min(0, REFERENCE[game][0])


def share(game, lines, name):
    """A row's score as a share of its teacher's, nan where there is none."""
    scores = [
        np.mean([x["mean"] for x in found]) if found else np.nan
        for found in (find(lines, name), find(lines, "teacher"))
    ]
    return points(scores[0], game) / points(scores[1], game)


def geometric_mean(games, *means):
    """The geometric mean over games of policies' shares of their teachers, in percent: [draws].

    `means` has those of the seeds of each game's policy, then of each game's teacher.
    """
    scores = [points(mean(seeds), game) for game, seeds in zip(2 * games, means, strict=True)]
    shares = np.divide(scores[: len(games)], scores[len(games) :])
    return 100 * np.exp(np.mean(np.log(shares), 0))


def interquartile_mean(games, *means):
    """The mean of the middle half of human-normalised scores of all games and seeds: [draws]."""
    scores = []
    for game, seeds in zip(games, means, strict=True):
        random, human = REFERENCE[game][:2]
        # sixty of each game, so that one to six seeds weigh the same
        assert 60 % seeds.shape[1] == 0, "seeds that do not divide 60"
        scores.append(np.tile((seeds - random) / (human - random), 60 // seeds.shape[1]))
    scores = np.sort(np.concatenate(scores, 1))
    quarter = scores.shape[1] // 4
    return mean(scores[:, quarter : scores.shape[1] - quarter])


def table(columns, rows):
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {columns} |", "|" + "---|" * (columns.count(" | ") + 1), *lines]) + "\n"


def games_table(games):
    """For each game the rows of the paper's Table 3."""
    columns = "policy | mean | high score | each seed | games | 95% interval | of teacher | paper"
    parts = []
    for game, lines in games.items():
        rows = []
        for (row, name), paper in zip(ROWS.items(), REFERENCE[game][2:], strict=True):
            found, cells = find(lines, name), [*"––––––"]
            if found:
                score, low, high = estimate(mean, returns(found))
                cells = [
                    f"{score:,.2f}",
                    f"{max(x['max'] for x in found):,.0f}",
                    ", ".join(f"{x['mean']:,.2f}" for x in found),
                    str(sum(x["episodes"] for x in found)),
                    f"{low:,.2f} to {high:,.2f}",
                    f"{share(game, lines, name):.0%}",
                ]
            rows.append([row, *cells, f"{paper:,}"])
        parts.append(f"### {game}\n\n{table(columns, rows)}")
    return "\n".join(parts)


def aggregates_table(games):
    """Each policy over all games, where it was evaluated in all of them."""
    columns = (
        "policy | seeds | of the teacher, geometric mean (95% interval) | in the paper "
        "| human-normalised interquartile mean (95% interval)"
    )
    rows = []
    for (row, name), paper in zip(ROWS.items(), PAPER, strict=True):
        found = [find(lines, name) for lines in games.values()]
        if not all(found):
            rows.append([row, *"––", f"{paper}%", "–"])
            continue
        samples = [returns(lines) for lines in found]
        teachers = [returns(find(lines, "teacher")) for lines in games.values()]
        shares = estimate(functools.partial(geometric_mean, list(games)), *samples, *teachers)
        middle = estimate(functools.partial(interquartile_mean, list(games)), *samples)
        cells = (
            row,
            " to ".join(str(count) for count in sorted({len(lines) for lines in found})),
            "100%" if name == "teacher" else "{:.0f}% ({:.0f}% to {:.0f}%)".format(*shares),
            f"{paper}%",
            "{:.3f} ({:.3f} to {:.3f})".format(*middle),
        )
        rows.append(cells)
    return table(columns, rows)


def student_of(lines, capacity):
    """The student's evaluations before all its fine-tuning: one policy, so one sample."""
    return [np.concatenate([x["before"]["returns"] for x in find(lines, f"tuned_{capacity}")])]


def policies(name):
    """What finds the returns of the policies of a name: one sample a seed."""
    return lambda lines, capacity: returns(find(lines, f"{name}_{capacity}"))


def tuning_cells(files, name, capacity, score, zero=0, base=student_of):
    """Of the students of some games: their score, when tuned, and the difference; or dashes.

    `base` may find other policies than the students. `score` maps the means of seeds, of the games'
    policies and of their teachers, to [draws]; percentages are of what it is above `zero`.
    """
    found, n = [find(lines, f"{name}_{capacity}") for lines in files], len(files)
    if not files or not all(found):
        return [*"–––"]
    students = [base(lines, capacity) for lines in files]
    teachers = [returns(find(lines, "teacher")) for lines in files]
    before = score(*map(seed_means, students + teachers))[0]

    def difference(*means):
        tuned, student, teacher = means[:n], means[n : 2 * n], means[2 * n :]
        return score(*tuned, *teacher) - score(*student, *teacher)

    gain, low, high = estimate(difference, *map(returns, found), *students, *teachers)
    digits = 0 if before >= 1000 else 1 if before >= 100 else 2
    share = f"{gain / (before - zero):+.1%}"
    seeds = " to ".join(map(str, sorted(set(map(len, found)))))
    return [
        f"{before:,.{digits}f}",
        f"{before + gain:,.{digits}f} ({seeds})",
        f"{share}: {gain:+,.{digits}f} ({low:+,.{digits}f} to {high:+,.{digits}f})",
    ]


def tuning_table(games, strong, name):
    """What fine-tuning is worth in each game, to strong teachers' students, and on the whole."""
    parts = (f"{x}'s score | tuned (seeds) | difference (95% interval)" for x in COLORS)
    rows = []
    for label, lines in {**games, **strong}.items():
        zero = min(0, REFERENCE[label.split(",")[0]][0])
        row = [label]
        for capacity in COLORS:
            row += tuning_cells([lines], name, capacity, lambda x, _: mean(x), zero)
        rows.append(row)
    means = {"geometric mean, % of the teachers": ((), student_of)}
    means |= {"without Enduro": (("Enduro",), student_of)} if name == "tuned" else {}
    means |= {"without those that chose the recipe": (("Breakout", "Qbert"), student_of)}
    means |= {"beside 270,000 steps": ((), policies("tuned"))} if name == "tuned1m" else {}
    for label, (without, base) in means.items():
        row = [label]
        for capacity in COLORS:
            shown = [x for x in games if x not in without and find(games[x], f"{name}_{capacity}")]
            score = functools.partial(geometric_mean, shown)
            row += tuning_cells([games[game] for game in shown], name, capacity, score, base=base)
        rows.append(row)
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    return table(f"game | {' | '.join(parts)}", rows)


def students_table(strong):
    """A row for each strong teacher: each seed's score, and their share of their teacher's."""
    rows = []
    for title, lines in strong.items():
        teacher = find(lines, "teacher")
        score, std, episodes = (teacher[0][key] for key in ("mean", "std", "episodes"))
        digits = 2 if abs(score) < 100 else 0
        share_of = functools.partial(geometric_mean, [title.split(",")[0]])
        row = [title, f"{score:,.{digits}f} ± {std:,.{digits}f}, {episodes} games"]
        for capacity, name in itertools.product(COLORS, WAYS.values()):
            if found := find(lines, f"{name}_{capacity}"):
                scores = ", ".join(f"{x['mean']:,.{digits}f}" for x in found)
                shares = estimate(share_of, returns(found), returns(teacher))
                row.append("{}: **{:.0f}%** ({:.0f}% to {:.0f}%)".format(scores, *shares))
            else:
                row.append("–")
        rows.append(row)
    columns = (f"{capacity}{way}" for capacity, way in itertools.product(COLORS, WAYS))
    return table(f"teacher | its score | {' | '.join(columns)}", rows)


def settings_table(settings):
    """A row for each setting of distillation that was tried, its seeds side by side."""
    rows = []
    about = operator.itemgetter("question", "student", "flags")
    for (question, student, flags), group in itertools.groupby(settings, about):
        seeds = list(group)
        digits = 2 if abs(seeds[0]["mean"]) < 100 else 0
        distances = ", ".join(f"{x['reverse_kl']:.3f}" for x in seeds)
        scores = ", ".join(f"{x['mean']:,.{digits}f}" for x in seeds)
        rows.append([question, student, f"`{flags}`" if flags else "defaults", distances, scores])
    columns = "question | student | flags | KL(student ‖ teacher) of each seed | score of each seed"
    return table(columns, rows)


def recipes_table(games):
    """`low` fine-tuned with one flag changed, and by the defaults: each seed's score."""
    rows = []
    for flag, other in OTHER_RECIPES.items():
        ways, base = (f"{other}_low", "tuned_low"), policies(other)
        shown = {game: lines for game, lines in games.items() if find(lines, ways[0])}
        squares, degrees = np.zeros(2), np.zeros(2)
        for game, lines in shown.items():
            seeds = [seed_means(returns(find(lines, way)))[0] for way in ways]
            digits = 2 if seeds[0][0] < 100 else 0
            scores = [", ".join(f"{x:,.{digits}f}" for x in way) for way in seeds]
            cells = tuning_cells([lines], "tuned", "low", lambda x, _: mean(x), base=base)
            rows.append([game, flag, *scores, cells[-1]])
            squares += [np.square(way / way.mean() - 1).sum() for way in seeds]
            degrees += [len(way) - 1 for way in seeds]
        spread = [f"{x:.1%}" for x in np.sqrt(squares / degrees)]
        rows.append(["standard deviation between seeds", flag, *spread, "–"])
        score = functools.partial(geometric_mean, list(shown))
        cells = tuning_cells([*shown.values()], "tuned", "low", score, base=base)
        rows.append(["geometric mean, % of the teachers", flag, *cells])
    return table("game, `low` | changed | so | defaults | difference (95% interval)", rows)


def proxies(strong):
    """Per teacher of eight students or more: each one's share of it, and figures on fresh games."""
    found = {}
    for title, lines in strong.items():
        teacher = find(lines, "teacher")[0]["mean"]
        of = [(x["mean"] / teacher, x["fresh"]) for x in lines if "fresh" in x]
        if len(of) >= 8:
            found[title] = of
    return found


def ranks_agree(x, y):
    """Spearman's rank correlation of two lists."""
    return float(np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1])


def proxies_table(strong):
    """How well each figure orders the students of a teacher by their score."""
    rows = []
    for title, of in proxies(strong).items():
        rows.append([title, str(len(of))])
        for key in PROXIES:
            values = [abs(x[key]) if key == "entropy_gap" else x[key] for _, x in of]
            rows[-1].append(f"{ranks_agree(values, [part for part, _ in of]):+.2f}")
    return table(f"teacher | students | {' | '.join(PROXIES.values())}", rows)


def ten_panels(games, draw, xlabel):
    """A panel for each game, that `draw(axes, game's lines)` fills."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 5, figsize=(15, 5.5), layout="constrained")
    for axes, (game, lines) in zip(panels.flat, games.items(), strict=True):
        draw(axes, lines)
        axes.set_title(game)
    for axes in panels[1]:
        axes.set_xlabel(xlabel)
    for axes in panels[:, 0]:
        axes.set_ylabel("mean return, last 100 games")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def curve(x):
    """Thousands of steps, and returns over them, nan where no game has ended yet."""
    return np.array(x["curve"]["steps"]) / 1000, np.array(x["curve"]["return"], float)


def draw_direct(axes, lines):
    """Returns over direct training by capacity: the shape of the paper's Fig. 2."""
    names = {"low": "direct_low", "medium": "direct_medium", "high, the teacher": "teacher"}
    for label, name in names.items():
        for x in find(lines, name):
            axes.plot(*curve(x), color=COLORS.get(label, "C3"), label=label)


def draw_tuning(axes, lines):
    """Returns over fine-tuning (dotted: a million steps), and the student's and teacher's level."""
    for capacity, color in COLORS.items():
        if tuned := find(lines, f"tuned_{capacity}"):
            # the first games to end are the short ones
            curves = np.array([curve(x) for x in tuned])[:, :, 20:]
            for one in curves:
                axes.plot(*one, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(*curves.mean(0), color=color, label=capacity)
            before = student_of(lines, capacity)[0].mean()
            axes.axhline(before, color=color, linestyle="--", label=f"{capacity}, its student")
        for x in find(lines, f"tuned1m_{capacity}"):
            axes.plot(*np.array(curve(x))[:, 20:], color=color, linestyle=":")
    level = find(lines, "teacher")[0]["mean"]
    axes.axhline(level, color="0.5", label="teacher")


def heat_map(games):
    """Each policy's share of its teacher by game."""
    import matplotlib.pyplot as plt

    rows = list(ROWS)[1:]
    shares = np.array([[share(*game, ROWS[row]) for game in games.items()] for row in rows])
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    axes.imshow(shares, cmap="RdBu", vmin=0, vmax=2, aspect="auto")
    for (i, j), part in np.ndenumerate(shares):
        if not np.isnan(part):
            color = "w" if abs(part - 1) > 0.6 else "k"
            axes.text(j, i, f"{part:.0%}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(games)), games, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    return figure


def epochs_figure(strong):
    """Score and distance over the epochs, by one loss: the shape of the paper's Fig. 3."""
    import matplotlib.pyplot as plt

    others = r"earlier_\w+_\d+epochs"
    shown = {title: lines for title, lines in strong.items() if find(lines, others)}
    figure, rows = plt.subplots(2, len(shown), figsize=(9, 5), layout="constrained", sharex="col")
    for (title, lines), (top, bottom) in zip(shown.items(), rows.T, strict=True):
        teacher = find(lines, "teacher")[0]
        top.axhspan(*(end / teacher["mean"] for end in teacher["ci95"]), color="C3", alpha=0.15)
        top.axhline(1, linestyle="--", linewidth=1, color="C3")
        for capacity, color in COLORS.items():
            found = find(lines, rf"earlier_{capacity}(_\d+epochs)?")
            epochs = np.array([x["epochs"] for x in found])
            beside = epochs * (1.03 if capacity == "low" else 0.97)
            scores = np.array([(x["mean"], *x["ci95"]) for x in found]).T / teacher["mean"]
            top.vlines(beside, *scores[1:], color=color, linewidth=0.8)
            distances = np.array([x["fresh"]["reverse_kl"] for x in found])
            for axes, values in ((top, scores[0]), (bottom, distances)):
                axes.plot(beside, values, "o", markersize=3, color=color)
                at = np.unique(epochs)
                means = [values[epochs == epoch].mean() for epoch in at]
                axes.plot(at, means, color=color, label=capacity)
        top.set_title(title, fontsize=10)
        top.yaxis.set_major_formatter("{x:.0%}")
        bottom.set(xscale="log", ylim=(0, None), xlabel="epochs")
        bottom.set_xticks(at, map(str, at))
        bottom.minorticks_off()
    rows[0, 0].set_ylabel("score, of the teacher's")
    rows[1, 0].set_ylabel("KL, fresh games, nats")
    rows[0, 0].legend(fontsize=8)
    return figure


def proxies_figure(strong):
    """Score over each figure that could tell when distillation is enough."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained", sharey=True)
    for (key, label), axes in zip(PROXIES.items(), panels, strict=True):
        for title, of in proxies(strong).items():
            shares, values = [part for part, _ in of], [x[key] for _, x in of]
            axes.plot(values, shares, "o", markersize=4, label=title)
        axes.set(xlabel=label, xscale="log" if "kl" in key else "linear")
    panels[0].set_ylabel("score, of the teacher's")
    panels[0].yaxis.set_major_formatter("{x:.0%}")
    panels[0].legend(fontsize=8)
    return figure


def tables(games, strong, settings):
    """The name of each Markdown file, and its text."""
    return {
        "games": games_table(games),
        "aggregates": aggregates_table(games),
        "tuning": tuning_table(games, strong, "tuned"),
        "tuning1m": tuning_table(games, strong, "tuned1m"),
        "students": students_table(strong),
        "settings": settings_table(settings),
        "recipes": recipes_table(games),
        "proxies": proxies_table(strong),
    }


def main(args):
    results = Path("benchmark/results")
    games, strong, settings = load(results)
    for name, text in tables(games, strong, settings).items():
        path = results / f"{name}.md"
        path.write_text(text)
        for page in (Path("README.md"), *Path("docs").glob("*.md")):  # which show some of them
            start, end = f"<!-- {path} -->\n", "<!-- end -->"
            before, found, after = page.read_text().partition(start)
            if found:
                assert end in after, f"{page}: no {end} after {start}"
                page.write_text(before + start + text + end + after.partition(end)[2])
    if args.figures:
        direct = ten_panels(games, draw_direct, "thousand steps")
        tuning = ten_panels(games, draw_tuning, "thousand steps of fine-tuning")
        figures = {"games_curves": direct, "games_heat_map": heat_map(games), "tuning": tuning}
        figures |= {"students_epochs": epochs_figure(strong)}
        figures |= {"students_proxies": proxies_figure(strong)}
        for name, figure in figures.items():
            figure.savefig(f"benchmark/figures/{name}.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
