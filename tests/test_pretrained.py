"""What ships in `pretrained/`: the files are those of its table and do what the table says."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, run_main

import actor_distill as distill
import collect_buffer as collect
import finetune_student as finetune
from tools import strip_checkpoint

PRETRAINED = ROOT / "pretrained"
POLICIES = sorted(f"{path.parent.name}/{path.name}" for path in PRETRAINED.glob("*/*.pt"))


def table_rows():
    """Rows of `pretrained/README.md`: file to its other cells."""
    text = (PRETRAINED / "README.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE)
    return {file: [cell.strip() for cell in cells.split("|")] for file, cells in rows}


@pytest.fixture(scope="module", params=[x.parent.name for x in PRETRAINED.glob("*/buffer.npz")])
def shipped(request):
    """A game with a teacher and a buffer that ship: its id, and what `load_buffer` reads."""
    path = PRETRAINED / request.param / "buffer.npz"
    return request.param, distill.load_buffer(path, request.param)


def test_every_file_is_in_the_table_and_has_its_sha256():
    files = {str(p.relative_to(PRETRAINED)): p for p in PRETRAINED.glob("*/*")}
    sums = [line.split("  ") for line in (PRETRAINED / "SHA256SUMS").read_text().splitlines()]
    assert files.keys() == table_rows().keys() and len(files) == len(sums)
    for digest, name in sums:
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("file", POLICIES)
def test_policy_is_stripped_small_and_as_good_as_its_row_says(file):
    path = PRETRAINED / file
    checkpoint, _ = distill.load_checkpoint(path, path.parent.name, "")
    assert not {"optimizer", "rng", "last_model"} & checkpoint.keys()
    assert path.stat().st_size < {"high": 7e6, "medium": 1e6, "low": 3e5}[checkpoint["capacity"]]
    result, row = checkpoint["evaluation"], " ".join(table_rows()[file])
    low, high = result["ci95"]
    assert f"{checkpoint['global_step']:,}" in row
    assert f"{result['mean']:.2f} ± {result['std']:.2f}" in row
    assert f"{result['episodes']} games" in row and f"{low:.2f} to {high:.2f}" in row


def test_buffer_was_recorded_from_the_shipped_teacher(shipped):
    """From its file in float32, of which the one that ships has the weights in float16."""
    game, (frames, stack_index, action_probs, values, _, meta) = shipped
    path = PRETRAINED / game / "ppo_high.pt"
    teacher, agent = collect.load_teacher(path, game, action_probs.shape[1])
    assert f"`{meta['teacher']['sha256']}`" in (PRETRAINED / "README.md").read_text()
    assert meta["teacher"]["evaluation"] == teacher["evaluation"]
    rows = np.random.default_rng(0).choice(len(values), 200, replace=False)
    with torch.no_grad():
        logits, expected = agent(torch.from_numpy(frames[stack_index[rows]]))
    np.testing.assert_allclose(action_probs[rows], logits.softmax(-1), atol=2e-3)
    np.testing.assert_allclose(values[rows], expected, atol=1e-2)


def test_held_out_samples_are_no_training_samples(shipped):
    """Against a comparison of whole observations, byte for byte, by a hash of 16 bytes."""
    game, (frames, stack_index, *_, episode_index, _) = shipped
    hashes = [hashlib.blake2b(frame, digest_size=16).digest() for frame in frames]
    train_rows, held_out = distill.split_episodes(episode_index, 0.05, 1)
    stacks = [b"".join(hashes[i] for i in stack) for stack in stack_index]
    known = {stacks[row] for row in train_rows}
    expected = [row for row in held_out if stacks[row] not in known]
    found = distill.unlike_training(frames, stack_index, train_rows, held_out)
    assert found.tolist() == expected
    if game == "PongNoFrameskip-v4":
        assert (len(held_out), len(found)) == (3567, 2539)


def test_a_checkpoint_stripped_for_shipping_plays_the_same(tmp_path):
    agent, obs = distill.Agent("low", 6), torch.randint(0, 256, (50, 4, 84, 84), dtype=torch.uint8)
    agent.actor.weight.data *= 100  # as it begins, every action is as probable
    about = {"env_id": "PongNoFrameskip-v4", "capacity": "low", "optimizer": {}}
    whole, stripped = tmp_path / "whole.pt", tmp_path / "new" / "stripped.pt"
    torch.save({**about, "model": agent.state_dict()}, whole)
    strip_checkpoint.main(str(whole), str(stripped))
    saved, rounded = distill.load_checkpoint(stripped, "PongNoFrameskip-v4", "")
    assert "optimizer" not in saved and stripped.stat().st_size < 0.6 * whole.stat().st_size
    with torch.no_grad():
        probs, expected = (x(obs)[0].softmax(-1) for x in (rounded, agent))
    torch.testing.assert_close(probs, expected, atol=2e-3, rtol=0)


def test_weights_in_float16_score_as_the_evaluation_in_their_file_says(tmp_path, monkeypatch):
    """In Riverraid, whose games are short; the mean of four varies by half a game's spread."""
    monkeypatch.chdir(tmp_path)
    path = PRETRAINED / "RiverraidNoFrameskip-v4" / "distilled_low.pt"
    flags = {"env_id": path.parent.name, "eval_only": str(path), "eval_steps": 4, "num_envs": 4}
    run_main(distill, distill.Args(**flags))
    (file,) = tmp_path.glob("runs/*/eval.json")
    found, expected = json.loads(file.read_text()), torch.load(path)["evaluation"]
    assert found["episodes"] == 4
    assert found["mean"] == pytest.approx(expected["mean"], abs=3 * expected["std"] / 2)


@pytest.mark.parametrize("file", [x for x in POLICIES if re.match("(?!Pong).*/ppo", x)])
def test_a_shipped_teacher_of_another_game_is_recorded_at_once(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    game = file.split("/")[0]
    run_main(collect, collect.Args(env_id=game, num_samples=40, num_envs=4))
    *_, probs, _, _, meta = distill.load_buffer(tmp_path / f"buffers/{game}.npz", game)
    assert meta["teacher"]["evaluation"]["steps"] >= 100_000
    chance = 1 / probs.shape[1]
    assert probs.max(1).mean() > 1.5 * chance, "it has learned to prefer some actions"


def test_shipped_files_serve_where_the_default_paths_are_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in PRETRAINED.glob("*/*")}
    shipped = PRETRAINED / "PongNoFrameskip-v4"
    run_main(collect, collect.Args(num_samples=8, num_envs=2))
    printed = capsys.readouterr().out
    assert f"\npretrained  {shipped}/ppo_high.pt serves as checkpoints/" in "\n" + printed
    assert "evaluation" not in printed, "its file holds one"
    (tmp_path / "buffers" / "PongNoFrameskip-v4.npz").unlink()
    with pytest.raises(SystemExit, match=f"^--loss mse: {shipped}/buffer.npz has no Q-values"):
        run_main(distill, distill.Args(loss="mse", eval_steps=0, epochs=1))
    with pytest.raises(
        SystemExit, match="^x.npz: .*No such file"
    ):  # asked for, and not the default
        run_main(distill, distill.Args(buffer_path="x.npz", eval_steps=0, epochs=1))
    still = {"num_envs": 1, "num_steps": 2, "total_timesteps": 2, "learning_rate": 1e-9}
    still["fit_critic"] = False
    for capacity, flags in (("medium", {}), ("low", {"capacity": "low"})):
        run_main(finetune, finetune.Args(**still, eval_steps=0, **flags))
        tuned = torch.load(f"checkpoints/{shipped.name}/finetuned_{capacity}.pt")
        student = torch.load(shipped / f"distilled_{capacity}.pt")
        student["model"] = {name: x.float() for name, x in student["model"].items()}
        torch.testing.assert_close(tuned["model"], student["model"], atol=1e-6, rtol=0)
        assert tuned["teacher"] == student["teacher"]
    assert before == {path: path.read_bytes() for path in PRETRAINED.glob("*/*")}
