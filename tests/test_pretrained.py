"""What ships in `pretrained/`: the files are those of its table and do what the table says."""

import hashlib
import json
import re

import actor_distill as distill
import collect_buffer as collect
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

PRETRAINED = ROOT / "pretrained"
GAMES = sorted(path.name for path in PRETRAINED.iterdir() if path.is_dir())


def table_rows():
    """Rows of `pretrained/README.md`: file to its other cells."""
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", (PRETRAINED / "README.md").read_text(), re.M)
    return {file: [cell.strip() for cell in cells.split("|")] for file, cells in rows}


def test_every_file_is_in_the_table_with_its_sha256():
    files = {str(path.relative_to(PRETRAINED)): path for path in PRETRAINED.rglob("*")
             if path.suffix in (".pt", ".npz")}
    rows = table_rows()
    assert files.keys() == rows.keys() and files
    for name, path in files.items():
        assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" in rows[name], name


@pytest.mark.parametrize("game", GAMES)
def test_teacher_is_stripped_small_and_as_good_as_its_row_says(game):
    path = PRETRAINED / game / "ppo_high.pt"
    (envs, _), = collect.make_envs(collect.resolve_game(game)[1], 1, False, 0.0)
    checkpoint, _ = collect.load_checkpoint(path, game, int(envs.single_action_space.n), "")
    assert not {"optimizer", "rng"} & checkpoint.keys() and path.stat().st_size < 7e6
    result, row = checkpoint["evaluation"], " ".join(table_rows()[f"{game}/ppo_high.pt"])
    low, high = result["ci95"]
    for text in (f"{checkpoint['global_step']:,}", f"{result['mean']:.2f} ± {result['std']:.2f}",
                 f"{result['episodes']} games", f"{low:.2f} to {high:.2f}"):
        assert text in row, text


@pytest.mark.parametrize("game", GAMES)
def test_buffer_was_recorded_from_the_shipped_teacher(game):
    (envs, _), = collect.make_envs(collect.resolve_game(game)[1], 1, False, 0.0)
    meanings = [action.name for action in envs.ale.get_action_set()]
    buffer = distill.load_buffer(PRETRAINED / game / "buffer.npz", game, meanings, "")
    teacher = (PRETRAINED / game / "ppo_high.pt").read_bytes()
    assert buffer["meta"]["teacher"]["sha256"] == hashlib.sha256(teacher).hexdigest()
    _, agent = collect.load_checkpoint(PRETRAINED / game / "ppo_high.pt", game, len(meanings), "")
    rows = np.random.default_rng(0).choice(len(buffer["values"]), 200, replace=False)
    with torch.no_grad():
        logits, values = agent(torch.from_numpy(buffer["frames"][buffer["stack_index"][rows]]))
    np.testing.assert_allclose(buffer["action_probs"][rows], logits.softmax(-1), atol=1e-4)
    np.testing.assert_allclose(buffer["values"][rows], values, atol=1e-3)


def test_shipped_files_serve_where_the_default_paths_are_empty(tmp_path):
    before = {path: path.read_bytes() for path in PRETRAINED.rglob("*") if path.is_file()}
    played = run_script(tmp_path, "collect_buffer.py", "--num-samples", 500, "--num-envs", 4)
    assert played.returncode == 0, played.stderr
    assert re.search(r"^pretrained  \S+ppo_high.pt serves as checkpoints/", played.stdout, re.M)
    (tmp_path / "buffers" / "PongNoFrameskip-v4.npz").unlink()
    fitted = run_script(tmp_path, "actor_distill.py", "--eval-steps", 0, "--epochs", 2,
                        "--capacity", "low", "--optimizer", "adam")
    assert fitted.returncode == 0, fitted.stderr
    assert re.search(r"^pretrained  \S+buffer.npz serves as buffers/", fitted.stdout, re.M)
    student = torch.load(tmp_path / "checkpoints/PongNoFrameskip-v4/distilled_low.pt",
                         weights_only=True)
    assert student["validation"]["validation/agreement"] > 0.6
    assert before == {path: path.read_bytes() for path in before}
    assert json.loads(json.dumps(student["teacher"]["evaluation"]))["mean"] > 0
