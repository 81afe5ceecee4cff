"""The tables in `benchmark/results/` and in the documentation follow from the runs' lines."""

import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import tables

RESULTS = ROOT / "benchmark" / "results"
BLOCK = re.compile(r"<!-- (benchmark/\S+\.md) -->(.*?)(?:<!-- end -->|\Z)", re.DOTALL)
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(doc.name, *found) for doc in DOCS for found in BLOCK.findall(doc.read_text())]


@pytest.fixture(scope="module")
def made():
    """What `tables.py` makes of the files: name to text."""
    return tables.tables(*tables.load(RESULTS))


def cells(text, label):
    """The other cells of each row that begins with a label."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [row[1:] for row in rows if row[0] == label]


@pytest.mark.parametrize(
    "name",
    ["games", "aggregates", "tuning", "tuning1m", "students", "settings", "recipes", "proxies"],
)
def test_a_table_equals_what_its_files_give(name, made):
    assert made[name] == (RESULTS / f"{name}.md").read_text()


def test_the_table_of_deployed_files_equals_their_json():
    import deploy

    paths = sorted((RESULTS / "deploy").glob("*.json"))
    text = deploy.table({path.stem: json.loads(path.read_text()) for path in paths})
    assert paths and text == (RESULTS / "deploy" / "table.md").read_text()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(block[:2]))
def test_the_documentation_shows_the_file(block):
    _, file, shown = block
    assert shown.strip() == (ROOT / file).read_text().strip()


@pytest.mark.parametrize("centres", [[100], [90, 100, 110, 95, 105], [100] * 3])
def test_the_interval_equals_one_by_variances(centres):
    """Of several seeds it is far too short unless the seeds are resampled, too."""
    rng = np.random.default_rng(1)
    seeds = [rng.normal(centre, 20, 80) for centre in centres]
    within = np.mean([games.var() / len(games) for games in seeds])
    error = ((np.var([games.mean() for games in seeds]) + within) / len(seeds)) ** 0.5
    expected = np.mean(seeds) + np.array([0, -1.96, 1.96]) * error
    assert tables.estimate(tables.mean, seeds) == pytest.approx(expected, abs=0.2 * error)


def test_the_interval_of_a_share_covers_it():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(60):
        seeds = [rng.normal(seed, 20, 50) for seed in rng.normal(90, 4, 8)]
        samples = (seeds, [rng.normal(100, 20, 100)])
        _, low, high = tables.estimate(lambda x, y: x.mean(1) / y.mean(1), *samples, draws=300)
        covered += low < 0.9 < high
    assert 50 <= covered < 60


@pytest.mark.parametrize("row, name", list(tables.ROWS.items())[1:])
def test_the_aggregates_are_geometric_means_over_games(row, name, made):
    shares = []
    for path in (RESULTS / "games").glob("*.jsonl"):
        means = {}
        for x in map(json.loads, path.read_text().splitlines()):
            means.setdefault(re.sub(r"_\d+$", "", x["name"]), []).append(x["mean"])
        if name in means:
            zero = -20.7 if path.stem == "Pong" else 0
            shares.append((statistics.mean(means[name]) - zero) / (means["teacher"][0] - zero))
    share = cells(made["aggregates"], row)[0][1].split()[0]
    complete = len(shares) == len(tables.REFERENCE)
    assert share == (f"{100 * statistics.geometric_mean(shares):.0f}%" if complete else "–")


def test_the_middle_half_gives_each_game_the_same_weight():
    """Enduro's one seed is at 0, Freeway's two at a half of a human's score and at the whole."""
    seeds = np.array([[0.0]]), np.array([[14.8, 29.6]])
    assert tables.interquartile_mean(["Enduro", "Freeway"], *seeds) == pytest.approx([0.25])


def test_recipes_are_compared_by_their_seeds():
    def run(name, mean):
        return {"name": name, "seed": int(name[-1]), "returns": [mean], "mean": mean}

    scores = {"Qbert": ([900, 1100], [1200, 1300, 1400]), "Enduro": ([45, 55], [60, 60])}
    kl, rate = "`--kl-coef 0`", "`--learning-rate 2.5e-4`"
    games = {"Pong": []}
    for game, (without, tuned) in scores.items():
        games[game] = [{"name": "teacher", "seed": 1, "returns": [1000], "mean": 1000}]
        games[game] += [run(f"nopull_low_{i}", mean) for i, mean in enumerate(without, 4)]
        games[game] += [run(f"tuned_low_{i}", mean) for i, mean in enumerate(tuned, 4)]
    games["Qbert"] += [run("slower_low_4", 1200), run("slower_low_5", 1400)]
    text = tables.recipes_table(games)
    assert cells(text, "Pong") == [], "no runs, no row"
    pull, slower = cells(text, "Qbert")
    assert pull[:3] == [kl, "900, 1,100", "1,200, 1,300, 1,400"]
    assert slower[:3] == [rate, "1,200, 1,400", "1,200, 1,300, 1,400"]
    assert slower[3].startswith("+0.0%: +0 (")
    ((*seeds, difference),) = cells(text, "Enduro")
    assert seeds == [kl, "45.00, 55.00", "60.00, 60.00"]
    assert difference.startswith("+20.0%: +10.00 (")
    # of shares of each game's mean; three and two seeds leave three degrees of freedom
    without = statistics.stdev([0.9, 1.1])
    tuned = (2 * statistics.variance([1200 / 1300, 1, 1400 / 1300]) / 3) ** 0.5
    pull, slower = cells(text, "standard deviation between seeds")
    assert pull == [kl, f"{without:.1%}", f"{tuned:.1%}", "–"]
    without, tuned = (statistics.stdev(x) for x in ([12 / 13, 14 / 13], [12 / 13, 1, 14 / 13]))
    assert slower == [rate, f"{without:.1%}", f"{tuned:.1%}", "–"]
    before, after = 100 * (1 * 0.05) ** 0.5, 100 * (1.3 * 0.06) ** 0.5
    pull, slower = cells(text, "geometric mean, % of the teachers")
    assert slower[:3] == [rate, "130.0", "130.0 (3)"]
    assert pull[:3] == [kl, f"{before:.2f}", f"{after:.2f} (2 to 3)"]


def test_tuning_is_compared_with_the_student_of_all_runs():
    def run(name, returns, before=()):
        about = {"name": name, "seed": 1, "returns": returns, "before": {"returns": before}}
        return {**about, "mean": statistics.mean(returns)}

    pong = [run("teacher", [19.3])]  # 40 above random
    pong += [run("tuned_low_1", [17.3, 17.3], [13.3, 15.3]), run("tuned_low_2", [19.3], [14.3])]
    enduro = [run("teacher", [100]), run("tuned_low_1", [99], [90]), run("tuned1m_low_1", [108])]
    games, strong = {"Pong": pong, "Enduro": enduro, "Qbert": []}, {"Pong, x": pong}
    short, long = (tables.tuning_table(games, strong, name) for name in ("tuned", "tuned1m"))
    for label in ("Pong", "Pong, x"):
        (row,) = cells(short, label)
        assert row[:5] == [*"–––", "14.30", "18.30 (2)"]
        assert re.match(r"\+11\.4%: \+4\.00 \(\+[23]\.\d\d to \+[45]", row[5])
    difference = "+10.0%: +9.00 (+9.00 to +9.00)"
    assert cells(short, "Enduro") == [[*"–––", "90.00", "99.00 (1)", difference]]
    assert cells(short, "Qbert") == [], "no runs, no row"
    student, tuned = (100 * (x * y) ** 0.5 for x, y in ((35 / 40, 0.9), (39 / 40, 0.99)))
    label = "geometric mean, % of the teachers"
    (row,) = cells(short, label)
    assert row[3:5] == [f"{student:.2f}", f"{tuned:.2f} (1 to 2)"]
    assert f": +{tuned - student:.2f} (" in row[5]
    assert cells(long, label)[0][3:5] == ["90.00", "108.00 (1)"]
    assert cells(long, "beside 270,000 steps")[0][3:5] == ["99.00", "108.00 (1)"]
    assert cells(short, "beside 270,000 steps") == cells(long, "Pong") == []


def test_students_of_a_strong_teacher_stand_beside_those_of_the_papers_path():
    def run(name, score):
        about = {"name": name, "seed": int(name[-1]), "mean": score, "std": 0.0, "episodes": 2}
        return {**about, "returns": [score, score]}

    lines = [{**run("teacher_1", 450), "std": 50.0}, run("ad_low_1", 360), run("ad_low_2", 450)]
    lines += [run("earlier_low_1", 1), run("ad_medium_1", 405), run("paper_low_1", 225)]
    (row,) = cells(tables.students_table({"Breakout, x": lines}), "Breakout, x")
    assert row == [
        "450 ± 50, 2 games",
        "405: **90%** (90% to 90%)",
        "–",
        "360, 450: **90%** (80% to 100%)",
        "225: **50%** (50% to 50%)",
    ]


def test_a_run_is_recorded_as_one_line(tmp_path):
    file, writer = tmp_path / "new" / "Pong.jsonl", SummaryWriter(tmp_path)
    for i in range(1, 201):
        writer.add_scalar("charts/episodic_return", i, 10 * i + 1000)
    writer.add_scalar("validation/reverse_kl", 0.5, 1)
    writer.close()
    evaluation = {"seed": 1, "mean": 2.5, "returns": [2.0, 3.0], "lengths": [7, 8]}
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    record = [sys.executable, ROOT / "benchmark" / "record.py", tmp_path, file, "--name"]
    for name in ("low_1", "low_2"):
        subprocess.run([*record, name], check=True)
    (tmp_path / "eval_before.json").write_text('{"mean": 1.0}')
    options = ["--command", "python x.py --seed 1", "--seconds", "9.5"]
    subprocess.run([*record, "low_1", *options], check=True)
    other, found = map(json.loads, file.read_text().splitlines())
    assert (other["name"], other["command"], "before" in other) == ("low_2", "", False)
    curve = found.pop("curve")
    about = {"name": "low_1", "command": "python x.py --seed 1", "seconds": 9.5}
    assert found == {**about, **evaluation, "before": {"mean": 1.0}}
    assert curve["validation/reverse_kl"] == [0.5] and curve["steps"][::99] == [30, 3000]
    assert curve["return"][:33] == [None] * 33, "no game has ended by step 990"
    # by step 1050 five games have ended, and by step 3000 the last hundred are games 101 to 200
    assert (curve["return"][34], curve["return"][-1]) == (3.0, 150.5)
