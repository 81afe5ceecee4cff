"""The tables in `benchmark/results/` follow from the result files beside them."""

import json
import shutil
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
        [sys.executable, ROOT / "benchmark" / "table3.py", *GAMES, "--results", folder],
        check=True,
        capture_output=True,
    )
    return (folder / "table3.md").read_text()


def test_the_same_files_give_the_same_table(table):
    assert GAMES and table == (RESULTS / "table3.md").read_text()


def test_the_documentation_shows_the_same_table(table):
    shown = (
        (ROOT / "docs" / "results.md").read_text().split("<!-- benchmark/results/table3.md -->")[1]
    )
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
    setting = distill_defaults.parse("batch_size=256,learning_rate=8e-3,reverse=1,schedule=cosine")
    assert (setting.batch_size, setting.learning_rate, setting.reverse) == (256, 8e-3, True)
    shares = [distill_defaults.share_of_rate(setting, used, 10**6) for used in (0, 0.5, 1)]
    np.testing.assert_allclose(shares, [1, 0.5, 0], atol=1e-12)
    assert distill_defaults.share_of_rate(setting, 0.0, 29) == 0.1


def test_the_table_of_deployed_files_equals_their_json_and_the_documentation():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import deploy

    folder = RESULTS / "deploy"
    games = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    table = deploy.table(games)
    assert len(games) >= 3 and table == (folder / "table.md").read_text()
    assert table.strip() in (ROOT / "docs" / "deploy.md").read_text()


def test_the_table_of_students_equals_its_files_and_the_documentation():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import students

    folder = RESULTS / "students"
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    table = students.table(found)
    assert found and table == (folder / "table.md").read_text()
    assert table.strip() in (ROOT / "docs" / "results.md").read_text()
    one = {"mean": 90.0, "std": 10.0, "episodes": 100}
    ratio, low, high = students.share(one, {"mean": 100.0, "std": 10.0, "episodes": 100})
    rng = np.random.default_rng(0)
    draws = rng.normal(90, 1, 10**5) / rng.normal(100, 1, 10**5)
    assert ratio == pytest.approx(0.9)
    np.testing.assert_allclose((low, high), np.percentile(draws, (2.5, 97.5)), atol=1e-3)
