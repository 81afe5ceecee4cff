"""The tables in `benchmark/results/` follow from the result files beside them."""

import json
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

RESULTS = ROOT / "benchmark" / "results"
GAMES = sorted(path.parent.name for path in RESULTS.glob("*/table3"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Table 3 made anew from a copy of the result files: its text."""
    folder = tmp_path_factory.mktemp("results")
    for game in GAMES:
        shutil.copytree(RESULTS / game / "table3", folder / game / "table3")
    subprocess.run(
        [sys.executable, ROOT / "benchmark" / "pong_table.py", *GAMES, "--results", folder],
        check=True,
        capture_output=True,
    )
    return (folder / "pong_table.md").read_text()


def test_the_same_files_give_the_same_table(table):
    assert GAMES and table == (RESULTS / "pong_table.md").read_text()


def test_the_documentation_shows_the_same_table(table):
    docs = (ROOT / "docs" / "results.md").read_text()
    shown = docs.split("<!-- benchmark/results/pong_table.md -->")[1]
    assert shown.split("<!-- end -->")[0].strip() == table.split("\n\n", 1)[1].strip()


def test_wall_time_includes_what_a_run_goes_on_from(table):
    folder = RESULTS / "PongNoFrameskip-v4" / "table3"
    seconds = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/run.json")}
    student, tuned = seconds["ad10_medium_1"], seconds["tuned_medium_1"]
    assert tuned["after"] == "ad10_medium_1"
    row = next(line for line in table.splitlines() if line.startswith("| Medium AD tuned |"))
    assert f"| {student['seconds'] + tuned['seconds']:,.0f} s |" in row


def test_the_teachers_row_equals_its_evaluation(table):
    found = json.loads((RESULTS / "PongNoFrameskip-v4/table3/teacher/eval.json").read_text())
    row = next(line for line in table.splitlines() if line.startswith("| Teacher |"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    returns = np.array(found["returns"])
    assert found["steps"] >= 200_000 and found["greedy"] is False
    assert cells[:4] == [
        f"{returns.mean():.2f} ± {returns.std():.2f}",
        f"{returns.max():g}",
        str(len(returns)),
        "1",
    ]
    assert cells[5] == "100.0%" and cells[9] == "21", "the share, and the paper's mean"


def test_the_table_of_the_games_equals_their_files():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import table3

    text = table3.games_table(RESULTS)
    assert text == (RESULTS / "games.md").read_text() and text.count("| Teacher |") == 10
    runs = [{"returns": [1.0, 3.0]}, {"returns": [11.0, 13.0]}]
    low, high = table3.mean_interval(runs)
    assert 1 <= low < 4 and 10 < high <= 13, "the seeds are resampled, not the games alone"
    reference = table3.REFERENCE["Breakout"]
    cells = table3.cells([{"mean": 2.0, "max": 3.0, "episodes": 2, **runs[0]}], 4.0, reference, 5)
    assert cells == ["2.00", "3", "2.00", "2", "1.00 to 3.00", "50%", "248"]
    pong = [{"mean": -8.7, "max": 3.0, "episodes": 2, **runs[0]}]
    assert table3.cells(pong, 3.3, table3.REFERENCE["Pong"], 5)[5] == "50%"


def test_the_aggregates_are_over_the_games_that_have_every_row_of_low():
    games, shares = 0, []
    for folder in RESULTS.glob("*/games"):
        teacher, *students = (
            [json.loads(path.read_text())["mean"] for path in folder.glob(f"{runs}/eval.json")]
            for runs in ("teacher", "direct_low_*", "tuned_low_*", "ad_low_*")
        )
        if all(students):
            games += 1
            random = -20.7 if folder.parent.name.startswith("Pong") else 0
            shares.append((statistics.mean(students[-1]) - random) / (teacher[0] - random))
    text = (RESULTS / "games_aggregates.md").read_text()
    row = re.search(r"### Low\n\n(\d+) games.*?\| Low AD \|[^|]*\|[^|]*\| (\d+)%", text, re.DOTALL)
    assert row.groups() == (str(games), f"{100 * statistics.geometric_mean(shares):.0f}")


def test_the_losses_table_equals_its_json():
    results = json.loads((RESULTS / "losses.json").read_text())
    text = (RESULTS / "losses.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| Q-network |", "| policy |"))]
    assert len(rows) == len(results["students"]) == 10
    for row, student in zip(rows, results["students"]):
        assert f"{student['evaluation']['mean']:.2f} ± " in row and student["flags"] in row


def test_the_table_of_defaults_equals_its_json_and_settings_are_read():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import distill_defaults

    folder = RESULTS / "defaults"
    assert distill_defaults.table(folder) == (folder / "table.md").read_text()
    setting = distill_defaults.parse("batch_size=256,learning_rate=8e-3,reverse=0,schedule=cosine")
    assert (setting.batch_size, setting.learning_rate, setting.reverse) == (256, 8e-3, 0)
    assert distill_defaults.changed(setting)["reverse"] == 0
    shares = [distill_defaults.share_of_rate(setting, done) for done in (0.01, 0.5, 1)]
    np.testing.assert_allclose(shares, [0.5, 0.5, 0], atol=1e-12)


def test_the_study_of_defaults_chooses_draws_and_moves_samples():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import distill_defaults as study
    import torch

    slot = np.repeat([0, 1, 2], 40)
    chosen = study.choose(study.parse("slots=2,samples=20,stride=5"), slot)
    assert chosen.tolist() == [0, 5, 40, 45], (
        "of two slots the first ten each, every fifth of those"
    )

    # half of the samples have a sure teacher, half one that knows nothing
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).repeat(500, 1)
    rows, rng = np.arange(1000), np.random.default_rng(0)
    assert sorted(study.epoch_of(study.Setting(), rows, probs, rng).ravel().tolist()) == sorted(
        set(study.epoch_of(study.Setting(), rows, probs, rng).ravel().tolist())
    )
    for sampling, share in (
        ("unsure", 0.1 / (0.2 + np.log(2))),
        ("sure", 1 - 0.1 / (0.2 + np.log(2))),
    ):
        setting = study.Setting(sampling=sampling, batch_size=1000)
        drawn = np.concatenate([study.epoch_of(setting, rows, probs, rng) for _ in range(20)])
        assert (drawn % 2 == 0).mean() == pytest.approx(share, abs=0.01)

    obs = torch.zeros(300, 4, 84, 84, dtype=torch.uint8)
    obs[:, :, 40, 50] = 7
    moved = study.shifted(obs, 2)
    places = {tuple(x) for x in (moved[:, 0] == 7).nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in range(38, 43) for x in range(48, 53)}
    assert (moved.flatten(1).sum(1) == 28).all(), "all four frames move alike"


def test_the_overview_of_the_study_has_runs_of_one_length_and_the_first_seed(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmark"))
    import distill_defaults

    folder = RESULTS / "study"
    overview = distill_defaults.overview(folder)
    assert overview == (folder / "overview.md").read_text()
    assert overview.strip() in (ROOT / "docs" / "results.md").read_text()
    about = {"env_id": "QbertNoFrameskip-v4", "label": "second round", "setting": {"stride": 8}}
    of = ((1_350_016, 1, 0.11), (1_350_144, 1, 0.12), (337_536, 1, 0.13), (1_350_016, 2, 0.14))
    runs = [dict(zip(("seen", "seed", "fresh/reverse_kl"), x, strict=True)) for x in of]
    runs[0] |= {"label": "", "setting": {"dropout": 0.1}, "mean": 5123.4}
    text = "\n".join(json.dumps({**about, **run}) for run in runs)
    (tmp_path / "Qbert.jsonl").write_text(text)
    rows = distill_defaults.overview(tmp_path).splitlines()[2:]
    assert rows == ["| dropout 0.1 | 0.1100; 5,123 |", "| stride 8, second round | 0.1200 |"]


def test_the_table_of_deployed_files_equals_their_json_and_the_documentation():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import deploy

    folder = RESULTS / "deploy"
    games = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    table = deploy.table(games)
    assert len(games) >= 3 and table == (folder / "table.md").read_text()
    assert table.strip() in (ROOT / "docs" / "deploy.md").read_text()


def test_the_tables_of_students_equal_their_files_and_the_documentation():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import students

    folder = RESULTS / "students"
    teachers, studies = students.read(folder)
    docs = (ROOT / "docs" / "results.md").read_text()
    for name, table in (
        ("table", students.table(teachers)),
        ("proxies", students.proxy_table(students.proxies(teachers, studies))),
    ):
        assert table == (folder / f"{name}.md").read_text() and table.strip() in docs


def test_the_distance_over_samples_takes_plain_low_students():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import students

    plain = {"batch_size": 64, "learning_rate": 0.002}
    run = {"seed": 1, "label": "", "samples": 100, "seen": 502, "fresh/reverse_kl": 0.4}
    study = [{**run, "setting": {**plain, "stride": 4}}, {**run, "setting": plain, "label": "x"}]
    study += [{**run, "setting": {**plain, "dropout": 0.1}}, {**run, "setting": plain, "seed": 2}]
    about = {"capacity": "low", "loss": "reverse_kl", "num_envs": 128, "samples": 400, "epochs": 5}
    found = [{**about, "fresh": {"reverse_kl": kl}} for kl in (0.1, 0.3)]
    others = ({"capacity": "medium"}, {"loss": "kl"}, {"num_envs": 16})
    found += [{**about, **other, "fresh": {"reverse_kl": 9.0}} for other in others]
    lines = students.samples_lines({"students": found}, study)
    assert lines == {(100, 5): pytest.approx(0.4), (400, 5): pytest.approx(0.2)}


def test_a_row_shows_the_most_seeds_of_equal_data_then_the_most_epochs():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import students

    def student(seed, epochs, samples=540):
        about = {"capacity": "low", "loss": "kl", "num_envs": 1}
        return {**about, "samples": samples, "epochs": epochs, "seed": seed}

    one_each = [student(1, 1), student(1, 10), student(1, 5)]
    assert students.usual(one_each, "low", "kl") == [student(1, 10)]
    three = [student(2, 5), student(3, 5), student(4, 5, samples=9)]
    assert students.usual(one_each + three, "low", "kl") == [student(i, 5) for i in (1, 2, 3)]
    assert students.usual(one_each, "medium", "kl") == []


def test_the_share_of_a_teacher_has_an_interval_that_covers_it():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import students

    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        seeds = rng.normal(90, 4, 8)
        games = [rng.normal(seed, 20, 50) for seed in seeds]
        ratio, low, high = students.share(games, rng.normal(100, 20, 100), draws=300)
        covered += low < 0.9 < high
        assert low < ratio < high
    assert covered >= 50
    alone = students.share([[80.0], [90.0], [100.0]], [100.0])
    assert alone == pytest.approx((0.9, 0.8 + 0.1 / 3, 1 - 0.1 / 3), abs=0.04), (
        "seeds are resampled"
    )
    assert alone[1] < 0.84 and alone[2] > 0.96
    assert students.ranks_agree([1, 2, 3, 9], [4, 5, 6, 7]) == pytest.approx(1)
    assert students.ranks_agree([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
