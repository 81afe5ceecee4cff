"""The four scripts as a user runs them: chained by default paths, tracked, evaluated, compiled."""

import importlib
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, run_main, run_script, tensorboard_scalars

import actor_distill

GAME = "PongNoFrameskip-v4"
FILES = {
    "ppo_atari_teacher.py": f"checkpoints/{GAME}/ppo_high.pt",
    "collect_buffer.py": f"buffers/{GAME}.npz",
    "actor_distill.py": f"checkpoints/{GAME}/distilled_medium.pt",
    "finetune_student.py": f"checkpoints/{GAME}/finetuned_medium.pt",
}
EVALUATION = {"eval/mean", "eval/std"}
LOSSES = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
PPO_METRICS = {
    *EVALUATION,
    *(f"losses/{name}" for name in LOSSES),
    "losses/explained_variance",
    "charts/learning_rate",
    "charts/SPS",
}
VALIDATION = ("reverse_kl", "agreement", "entropy_gap", "value_loss")
METRICS = {
    "ppo_atari_teacher.py": PPO_METRICS,
    "collect_buffer.py": {"charts/episodic_return"},
    "actor_distill.py": {
        *EVALUATION,
        *(f"validation/{name}" for name in VALIDATION),
        "losses/reverse_kl",
        "losses/value_loss",
        "charts/epoch",
        "charts/learning_rate",
        "charts/SPS",
    },
    "finetune_student.py": PPO_METRICS,
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
    following = dict(zip(SCRIPTS, [*SCRIPTS[1:], SCRIPTS[3]], strict=True))[script]
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
    for tag, points in scalars.items():
        steps = [step for step, _ in points]
        assert steps == sorted(steps), f"{tag}: the step never goes back"
        assert np.isfinite([value for _, value in points]).all()


def test_ppo_logs_every_iteration(chain):
    scalars = tensorboard_scalars(run_folder(chain, "ppo_atari_teacher.py"))
    rates = [(256, pytest.approx(3e-4)), (512, pytest.approx(1.5e-4))]
    assert scalars["charts/learning_rate"] == rates
    assert len(scalars["losses/entropy"]) == 2
    assert all(0 < value < math.log(6) + 1e-3 for _, value in scalars["losses/entropy"])


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
    config = [(path, FILES[script]), ("env_id", GAME)]
    if script in SCRIPTS[2:]:
        config.append(("teacher", checkpoint_of(chain, script)["teacher"]["sha256"]))
    for flag, value in config:
        assert re.search(rb'%b[^"]{1,4}"%b"' % (flag.encode(), value.encode()), content), flag
    if script != "collect_buffer.py":  # the artifact, and what it was made from
        assert name + b"-eval" in content
        for file in (FILES[script].split("/")[-1], "eval.json"):
            entry = b"\n" + bytes([len(file)]) + file.encode()  # of its manifest, not of the output
            assert entry in content, file
        *_, about = re.findall(rb'{"exp_name":.*"teacher":.*}', content)
        about, _ = json.JSONDecoder().raw_decode(about.decode(errors="ignore"))
        assert about["save_path"] == FILES[script]
        if script != "ppo_atari_teacher.py":
            sha256 = checkpoint_of(chain, script)["teacher"]["sha256"]
            assert about["teacher"]["sha256"] == sha256 and len(sha256) == 64


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
    returns = result["returns"]
    assert (result["env_id"], result["phase"], result["seed"]) == (GAME, phase, 1)
    assert result["capacity"] == ("high" if phase == "ppo" else "medium")
    assert (chain[0] / result["checkpoint"]).is_file() and result["eval_steps"] == 100
    assert result["steps"] == sum(result["lengths"]) >= 2 * 764  # no game of Pong is shorter
    assert len(returns) == len(result["lengths"]) == result["episodes"] == 2
    assert all(-21 <= x <= 21 and x == int(x) for x in returns)
    assert result["mean"] == pytest.approx(np.mean(returns))
    assert result["std"] == pytest.approx(np.std(returns)) and result["max"] == max(returns)
    assert result["ci95"][0] <= result["mean"] <= result["ci95"][1]


def test_checkpoints_hold_what_going_on_needs(chain):
    about = {"phase", "env_id", "capacity", "args", "checkpoint", "run_name", "global_step"}
    common = about | {"model", "optimizer", "rng", "evaluation"}
    distilled = {"teacher", "epoch", "validation", "last_epoch", "last_model"}
    extra = {
        "ppo_atari_teacher.py": set(),
        "actor_distill.py": distilled,
        "finetune_student.py": {"teacher", "evaluation_before"},
    }
    for script, more in extra.items():
        checkpoint = checkpoint_of(chain, script)
        assert checkpoint.keys() == common | more
        assert checkpoint["env_id"] == GAME and checkpoint["checkpoint"] == FILES[script]
        written = json.loads((run_folder(chain, script) / "eval.json").read_text())
        assert checkpoint["evaluation"].items() <= written.items()
    teacher = checkpoint_of(chain, "ppo_atari_teacher.py")
    assert checkpoint["teacher"]["checkpoint"] == FILES["ppo_atari_teacher.py"]
    assert checkpoint["teacher"]["evaluation"] == teacher["evaluation"]


def test_last_lines_compare_student_and_teacher(chain):
    _, outputs = chain
    means = {}
    for script in FILES.keys() - {"collect_buffer.py"}:
        means[script] = f"{checkpoint_of(chain, script)['evaluation']['mean']:.2f}"
    before = f"{checkpoint_of(chain, 'finetune_student.py')['evaluation_before']['mean']:.2f}"
    taught = means["ppo_atari_teacher.py"]
    *_, gain, last = outputs["finetune_student.py"].stdout.splitlines()
    assert last == f"student     mean {means['finetune_student.py']}, its teacher's {taught}"
    assert gain == f"gain        mean {before} before, {means['finetune_student.py']} after"
    last = outputs["actor_distill.py"].stdout.splitlines()[-1]
    assert last == f"student     mean {means['actor_distill.py']}, its teacher's {taught}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_run_refuses_to_replace_the_first(chain, script, monkeypatch):
    folder, _ = chain
    monkeypatch.chdir(folder)
    before = (folder / FILES[script]).read_bytes()
    module = importlib.import_module(script[:-3])
    with pytest.raises(SystemExit, match=f"{FILES[script]}: exists already; pass --overwrite"):
        run_main(module, module.Args())
    assert (folder / FILES[script]).read_bytes() == before


def test_eval_only_repeats_the_evaluation_and_leaves_the_file_alone(chain):
    """Of any phase: here the teacher's script evaluates the fine-tuned student, tracked."""
    folder, _ = chain
    script, path = "finetune_student.py", FILES["finetune_student.py"]
    before = (folder / path).read_bytes()
    # in a folder apart, so that its W&B run is none of the chain's
    flags = ["--eval-only", "../" + path, "--eval-steps", 100, "--num-envs", 2, "--track"]
    (folder / "apart").mkdir()
    result = run_script(folder / "apart", "ppo_atari_teacher.py", *flags)
    assert result.returncode == 0, result.stderr
    assert (folder / path).read_bytes() == before
    (written,) = (folder / "apart").glob("runs/*/eval.json")
    first = json.loads((run_folder(chain, script) / "eval.json").read_text())
    assert json.loads(written.read_text()) == {**first, "checkpoint": "../" + path}
    scalars = tensorboard_scalars(written.parent)
    assert scalars["eval/mean"] == [(512, first["mean"])] and scalars.keys() == EVALUATION
    (mirror,) = (folder / "apart").glob("wandb/offline-run-*/run-*.wandb")
    assert all(metric.encode() in mirror.read_bytes() for metric in EVALUATION)


@pytest.mark.parametrize("script", ["actor_distill", "finetune_student"])
def test_eval_only_plays_the_checkpoint_that_is_named(chain, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, played = importlib.import_module(script), []

    def play(agent, envs, eval_steps, seed, greedy, device):
        played.append((agent.state_dict(), envs.num_envs, eval_steps, seed, greedy))
        return [1.0, 2.0], [5, 6]

    monkeypatch.setattr(module, "play", play)
    path = str(chain[0] / FILES["ppo_atari_teacher.py"])
    flags = {"eval_only": path, "eval_steps": 7, "num_envs": 2, "seed": 3, "eval_greedy": True}
    run_main(module, module.Args(**flags))
    ((weights, *rest),) = played
    assert rest == [2, 7, 3, True]
    model = checkpoint_of(chain, "ppo_atari_teacher.py")["model"]
    assert all(torch.equal(weights[name], model[name]) for name in model)
    (written,) = tmp_path.glob("runs/*/eval.json")
    assert json.loads(written.read_text())["mean"] == 1.5
    assert not list(tmp_path.rglob("*.pt"))


def test_finetuning_starts_from_the_student(chain):
    before = checkpoint_of(chain, "actor_distill.py")["model"]
    after = checkpoint_of(chain, "finetune_student.py")
    for name in before:  # 16 updates of Adam at 3e-4 move no weight further than this
        assert 0 < (after["model"][name] - before[name]).abs().max() < 16 * 3.3e-4, name
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
        run_main(module, module.Args(env_id=env_id, **SMALL, **more))
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


@pytest.mark.parametrize("script", ["ppo_atari_teacher", "actor_distill", "finetune_student"])
def test_every_update_is_compiled_with_the_flag_only(chain, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, compiled, updates = importlib.import_module(script), [], []
    loss, update = "minibatch_loss", "ppo_update"
    if script == "actor_distill":
        loss, update = "batch_loss", "distill_update"
    plain_update = getattr(module, update)

    def stand_in(function, **options):
        def call(*inputs):
            compiled.append(function.__name__)
            return function(*inputs)

        return call

    def counted(*inputs):
        updates.append(1)
        return plain_update(*inputs)

    monkeypatch.setattr(module.torch, "compile", stand_in)
    monkeypatch.setattr(module, update, counted)
    flags = SMALL | SMALL_RUN
    if script == "actor_distill":
        flags = SMALL | {"epochs": 1, "buffer_path": str(chain[0] / f"buffers/{GAME}.npz")}
    if script == "finetune_student":
        flags |= {"student_path": str(chain[0] / FILES["actor_distill.py"])}
    run_main(module, module.Args(**flags, save_path="plain.pt"))
    assert updates and not compiled
    updates.clear()
    run_main(module, module.Args(**flags, save_path="compiled.pt", compile=True))
    assert compiled == [loss] * len(updates) and updates


@pytest.mark.parametrize("page", ["docs/adapt.md", "docs/files.md", "README.md"])
def test_the_documented_python_runs(page, chain, monkeypatch):
    """To the letter: a buffer read by NumPy, and functions of the scripts taken elsewhere."""
    monkeypatch.chdir(chain[0])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks or page == "README.md"
    for block in blocks:
        found = {"np": np}
        exec(block, found)  # noqa: S102
        if "observations" in found:
            assert found["observations"].shape == (256, 4, 84, 84)
            np.testing.assert_allclose(found["targets"][:256].sum(1), 1, atol=1e-5)
        if "kl_sum" in found:
            uniform = found["teacher_probs"].new_zeros(64, 3)
            start = actor_distill.kl_divergence(found["teacher_probs"], uniform).sum()
            assert 0 < found["kl_sum"] < start
        if "arrays" in found:
            assert len(found["arrays"]["actions"]) == 100
        if "returns" in found and "score" in found:
            assert len(found["returns"]) >= 2 and found["score"] == np.mean(found["returns"])


def test_every_link_of_readme_and_docs_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "pretrained" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
