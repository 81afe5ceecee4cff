"""The four scripts as a user runs them: chained by default paths, tracked, evaluated, compiled."""

import collections
import importlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, buffer_arrays, tensorboard_scalars

import actor_distill
import ppo_atari_teacher as teacher

GAME = "PongNoFrameskip-v4"
FILES = {
    "ppo_atari_teacher.py": f"checkpoints/{GAME}/ppo_high.pt",
    "collect_buffer.py": f"buffers/{GAME}.npz",
    "actor_distill.py": f"checkpoints/{GAME}/distilled_medium.pt",
    "finetune_student.py": f"checkpoints/{GAME}/finetuned_medium.pt",
}
CURVES = {"eval/mean", "eval/std", "charts/learning_rate", "charts/SPS"}
LOSSES = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
PPO_METRICS = CURVES | {f"losses/{name}" for name in (*LOSSES, "explained_variance")}
DISTANCES = ("kl", "reverse_kl", "value_loss")
DISTILLATION = CURVES | {
    f"{part}/{name}" for part in ("losses", "validation") for name in DISTANCES
}
DISTILLATION |= {"validation/agreement", "validation/entropy_gap", "charts/epoch"}
METRICS = {
    "ppo_atari_teacher.py": PPO_METRICS,
    "collect_buffer.py": {"charts/episodic_return"},
    "actor_distill.py": DISTILLATION,
    "finetune_student.py": PPO_METRICS | {"losses/student_kl"},
}


def run_folder(chain, script):
    """The run folder that a script of the chain named."""
    folder, outputs = chain
    return folder / re.search(r"^run +(\S+) on ", outputs[script].stdout, re.MULTILINE)[1]


def checkpoint_of(chain, script):
    return torch.load(chain[0] / FILES[script], weights_only=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_says_what_was_written_and_which_command_comes_next(chain, script):
    folder, outputs = chain
    assert (folder / FILES[script]).is_file()
    lines = outputs[script].stdout.splitlines()
    assert any(line.startswith("wrote") and FILES[script] in line for line in lines)
    if script == SCRIPTS[-1]:
        return
    following = dict(itertools.pairwise(SCRIPTS))[script]
    (command,) = [line for line in lines if line.startswith("next ")]
    assert re.match(rf"next +python {following} ", command)
    assert FILES[script] in command and f"--env-id {GAME}" in command
    args = importlib.import_module(following[:-3]).Args.__dataclass_fields__
    flags = re.findall(r"--([a-z-]+)", command)
    assert {flag.replace("-", "_") for flag in flags} <= args.keys()
    assert not list(folder.rglob("*.tmp")), "no temporary file is left behind"


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_holds_the_metrics(chain, script):
    scalars = tensorboard_scalars(run_folder(chain, script))
    optional = {"charts/episodic_return", "charts/episodic_length"}  # no game may have ended yet
    assert METRICS[script] <= scalars.keys() <= METRICS[script] | optional
    page = (ROOT / "docs/metrics.md").read_text()
    for tag, points in scalars.items():
        assert f"`{tag}`" in page
        steps = [step for step, _ in points]
        assert steps == sorted(steps), f"{tag}: the step never goes back"
        assert np.isfinite([value for _, value in points]).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_wandb_offline_mirrors_the_run(chain, script):
    """W&B's own file holds the run's name, its metrics, and the paths and the game as used."""
    files = list((chain[0] / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == len(SCRIPTS), "one W&B run a script"
    name = run_folder(chain, script).name.encode()
    (content,) = [text for text in (file.read_bytes() for file in files) if b"/" + name in text]
    for metric in (*METRICS[script], "global_step"):
        assert metric.encode() in content, metric
    path = "buffer_path" if script == "collect_buffer.py" else "save_path"
    for flag, value in ((path, FILES[script]), ("env_id", GAME)):
        assert re.search(rb'%b[^"]{1,4}"%b"' % (flag.encode(), value.encode()), content), flag
    if script != "collect_buffer.py":  # the artifact, and the flags that it was made by
        assert name + b"-eval" in content
        for file in (FILES[script].split("/")[-1], "eval.json"):
            entry = b"\n" + bytes([len(file)]) + file.encode()  # of its manifest, not of the output
            assert entry in content, file
        *_, about = re.findall(rb'{"exp_name":.*}', content)
        about, _ = json.JSONDecoder().raw_decode(about.decode(errors="ignore"))
        assert about == checkpoint_of(chain, script)["args"]


@pytest.mark.parametrize(
    "script, file, phase",
    [
        ("ppo_atari_teacher.py", "eval.json", "ppo"),
        ("actor_distill.py", "eval.json", "distilled"),
        ("finetune_student.py", "eval_before.json", "distilled"),
        ("finetune_student.py", "eval.json", "finetuned"),
    ],
)
def test_evaluation_file(chain, script, file, phase):
    result = json.loads((run_folder(chain, script) / file).read_text())
    assert (result["env_id"], result["phase"], result["seed"]) == (GAME, phase, 1)
    assert result["capacity"] == ("high" if phase == "ppo" else "medium")
    assert (chain[0] / result["checkpoint"]).is_file() and result["eval_steps"] == 100
    assert result["steps"] == sum(result["lengths"]) >= 2 * 764  # no game of Pong is shorter
    returns = result["returns"]
    assert len(returns) == len(result["lengths"]) == result["episodes"] == 2
    assert set(returns) <= set(range(-21, 22)) and result["max"] == max(returns)
    assert (result["mean"], result["std"]) == pytest.approx((np.mean(returns), np.std(returns)))


def test_checkpoints_hold_what_going_on_needs(chain):
    about = {"phase", "env_id", "capacity", "args", "checkpoint", "run_name", "global_step"}
    common = about | {"model", "optimizer", "evaluation"}
    distilled = {"teacher", "epoch", "validation", "last_epoch", "last_step", "last_model"}
    extra = {
        "ppo_atari_teacher.py": set(),
        "actor_distill.py": distilled | {"eq3_epochs"},
        "finetune_student.py": {"teacher", "student", "evaluation_before"},
    }
    for script, more in extra.items():
        checkpoint = checkpoint_of(chain, script)
        assert checkpoint.keys() == common | more
        assert checkpoint["env_id"] == GAME and checkpoint["checkpoint"] == FILES[script]
        written = json.loads((run_folder(chain, script) / "eval.json").read_text())
        assert checkpoint["evaluation"].items() <= written.items()
    taught = checkpoint_of(chain, "ppo_atari_teacher.py")
    assert checkpoint["teacher"]["checkpoint"] == FILES["ppo_atari_teacher.py"]
    assert checkpoint["teacher"]["evaluation"] == taught["evaluation"]


def test_the_last_line_compares_student_and_teacher(chain):
    def mean(script, name="evaluation"):
        return f"{checkpoint_of(chain, script)[name]['mean']:.2f}"

    taught = mean("ppo_atari_teacher.py")
    *_, last = chain[1]["actor_distill.py"].stdout.splitlines()
    assert last == f"student     mean {mean('actor_distill.py')}, its teacher's {taught}"


def test_eval_only_repeats_the_evaluation_and_leaves_the_file_alone(chain, tmp_path, monkeypatch):
    """Of any phase: here the teacher's script evaluates the fine-tuned student."""
    monkeypatch.chdir(tmp_path)
    path = str(chain[0] / FILES["finetune_student.py"])
    before = Path(path).read_bytes()
    teacher.main(teacher.Args(eval_only=path, eval_steps=100, num_envs=2))
    assert Path(path).read_bytes() == before
    (written,) = tmp_path.glob("runs/*/eval.json")
    first = json.loads((run_folder(chain, "finetune_student.py") / "eval.json").read_text())
    assert json.loads(written.read_text()) == {**first, "checkpoint": path}
    assert tensorboard_scalars(written.parent)["eval/mean"] == [(512, first["mean"])]


def test_finetuning_starts_from_the_student(chain):
    before = checkpoint_of(chain, "actor_distill.py")["model"]
    after = checkpoint_of(chain, "finetune_student.py")
    shared = [name for name in before if not name.startswith("critic")]
    for name in shared:  # 16 updates of Adam at 1e-3 move no weight further than this
        assert 0 < (after["model"][name] - before[name]).abs().max() < 16 * 1.1e-3, name
    student = checkpoint_of(chain, "actor_distill.py")["evaluation"]
    assert after["evaluation_before"] == student


SMALL = {"num_envs": 2, "eval_steps": 0}
SMALL_RUN = {"num_steps": 8, "num_minibatches": 2, "total_timesteps": 16, "update_epochs": 1}


def test_other_ids_of_a_game_end_up_in_the_same_place(tmp_path, monkeypatch):
    """The whole chain finds its files, whichever id names the game; logs hold the canonical one."""
    monkeypatch.chdir(tmp_path)
    game = "MsPacmanNoFrameskip-v4"
    flags = [SMALL_RUN, {"num_samples": 20}, {"epochs": 1}, SMALL_RUN]
    ids = ["ALE/MsPacman-v5", "MsPacman-v5", game, "ALE/MsPacman-v5"]
    for script, env_id, more in zip(SCRIPTS, ids, flags, strict=True):
        module = importlib.import_module(script[:-3])
        module.main(module.Args(env_id=env_id, **SMALL, **more))
    places = ("ppo_high", "distilled_medium", "finetuned_medium")
    files = [f"checkpoints/{game}/{name}.pt" for name in places]
    assert {str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*.pt")} == set(files)
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert saved["env_id"] == saved["args"]["env_id"] == game
        assert saved["args"]["save_path"] == file
    assert (tmp_path / f"buffers/{game}.npz").is_file()
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 4 and all(run.name.startswith(f"{game}__") for run in runs)


@pytest.mark.parametrize(
    "script, expected",
    [
        ("ppo_atari_teacher", {"network": 2, "ppo_loss": 2}),
        ("actor_distill", {"network": 1, "kl_divergence": 2, "reverse_kl": 2}),  # and held out
        ("finetune_student", {"network": 2, "ppo_loss": 2}),
    ],
)
def test_updates_are_compiled_with_the_flag_only(script, expected, tmp_path, monkeypatch):
    """By a compiler that does nothing but count the calls of what it is given."""
    monkeypatch.chdir(tmp_path)
    module, calls = importlib.import_module(script), collections.Counter()

    def compiler(function, **options):
        def call(*inputs):
            calls[getattr(function, "__name__", "network")] += 1
            return function(*inputs)

        return call

    monkeypatch.setattr(module.torch, "compile", compiler)
    flags = SMALL | SMALL_RUN
    if script == "actor_distill":
        flags = SMALL | {"epochs": 1, "buffer_path": "buffer.npz"}
        np.savez("buffer.npz", **buffer_arrays())
    module.main(module.Args(**flags, save_path="plain.pt"))
    assert not calls
    module.main(module.Args(**flags, save_path="compiled.pt", compile=True))
    assert calls == expected


@pytest.mark.parametrize("page", ["docs/adapt.md", "docs/files.md"])
def test_the_documented_python_runs(page, monkeypatch):
    """To the letter: a buffer read by NumPy, and functions of the scripts taken elsewhere."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        found = {"np": np}
        exec(block, found)  # noqa: S102
        if "observations" in found:
            assert found["observations"].shape == (256, 4, 84, 84)
            np.testing.assert_allclose(found["targets"][:256].sum(1), 1, atol=1e-5)
        if "teacher_probs" in found:
            uniform = found["teacher_probs"].new_zeros(64, 3)
            start = actor_distill.kl_divergence(found["teacher_probs"], uniform).mean()
            assert 0 < found["loss"] < start
        if "arrays" in found:
            assert len(found["arrays"]["frames"]) == 101
        if "returns" in found and "score" in found:
            assert len(found["returns"]) >= 2 and found["score"] == np.mean(found["returns"])


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_of_readme_and_docs_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "pretrained" / "README.md"]
    for page in [*pages, *(ROOT / "docs").glob("*.md")]:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"
