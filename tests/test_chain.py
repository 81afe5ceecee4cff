"""The four scripts as a user runs them: chained by default paths, tracked, evaluated."""

import inspect
import json
import re

import numpy as np
import pytest
import torch
from conftest import PHASES, ROOT, SCRIPTS, run_main, run_script, tensorboard_scalars

import actor_distill
import finetune_student
import ppo_atari_teacher

GAME = "PongNoFrameskip-v4"
FILES = {
    "ppo_atari_teacher.py": f"checkpoints/{GAME}/ppo_high.pt",
    "collect_buffer.py": f"buffers/{GAME}.npz",
    "actor_distill.py": f"checkpoints/{GAME}/distilled_medium.pt",
    "finetune_student.py": f"checkpoints/{GAME}/finetuned_medium.pt",
}
EVAL = {"eval/mean", "eval/std", "eval/iqm"}
LOSSES = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
PPO_METRICS = {f"losses/{name}" for name in LOSSES}
PPO_METRICS |= {"losses/explained_variance", "charts/learning_rate", "charts/SPS"}
VALIDATION = {f"validation/{x}" for x in ("kl", "agreement", "entropy_gap", "value_loss")}
METRICS = {
    "ppo_atari_teacher.py": PPO_METRICS | EVAL,
    "collect_buffer.py": {"charts/episodic_return"} | EVAL,
    "actor_distill.py": VALIDATION
    | {"losses/kl", "losses/value_loss", "charts/epoch", "charts/SPS", "charts/learning_rate"}
    | EVAL,
    "finetune_student.py": PPO_METRICS | EVAL,
}


def run_folder(chain, script):
    """The run folder that a script of the chain named."""
    folder, outputs = chain
    return folder / re.search(r"^run +(\S+) on ", outputs[script].stdout, re.MULTILINE)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_says_what_is_written_and_what_comes_next(chain, script):
    folder, outputs = chain
    lines = outputs[script].stdout.splitlines()
    assert any(line.startswith("wrote") and FILES[script] in line for line in lines)
    command = next(line for line in lines if line.startswith("next")).split()
    assert command[2] == dict(zip(SCRIPTS, (*SCRIPTS[1:], SCRIPTS[3]), strict=True))[script]
    assert FILES[script] in command
    assert not list(folder.rglob("*.tmp")), "no temporary file is left behind"


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_and_wandb_hold_the_metrics(chain, script):
    """W&B's own file of the offline run holds each name, the run's and the game's."""
    folder = run_folder(chain, script)
    scalars = tensorboard_scalars(folder)
    optional = {"charts/episodic_return", "charts/episodic_length"}  # no game may have ended yet
    if script == "collect_buffer.py":  # the teacher of the chain holds its own evaluation
        optional |= EVAL
    assert METRICS[script] - optional <= scalars.keys() <= METRICS[script] | optional
    for tag, points in scalars.items():
        steps = [step for step, _ in points]
        assert steps == sorted(steps), f"{tag}: the step never goes back"
        assert np.isfinite([value for _, value in points]).all(), tag
    files = (chain[0] / "wandb").glob(f"offline-run-*-{folder.name}/run-*.wandb")
    (content,) = (file.read_bytes() for file in files)
    for name in (*scalars, GAME, folder.name, FILES[script], "global_step"):
        assert name.encode() in content, name


def test_ppo_logs_every_iteration(chain):
    scalars = tensorboard_scalars(run_folder(chain, "ppo_atari_teacher.py"))
    rates = [(256, pytest.approx(3e-4)), (512, pytest.approx(1.5e-4))]
    assert scalars["charts/learning_rate"] == rates
    assert all(0 < value < np.log(6) + 1e-3 for _, value in scalars["losses/entropy"])


@pytest.mark.parametrize(
    ("script", "file", "phase"),
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


def test_checkpoints_hold_what_the_docs_say(chain):
    text = (ROOT / "docs" / "files.md").read_text()
    common = {"phase", "env_id", "capacity", "global_step", "model", "args", "checkpoint"}
    common |= {"run_name", "evaluation", "optimizer", "rng"}
    extra = {
        "ppo_atari_teacher.py": set(),
        "actor_distill.py": {"teacher", "epoch", "validation", "last_epoch", "last_model"},
        "finetune_student.py": {"teacher", "evaluation_before"},
    }
    for script, more in extra.items():
        checkpoint = torch.load(chain[0] / FILES[script], weights_only=True)
        assert checkpoint.keys() == common | more
        assert all(f"`{name}`" in text for name in checkpoint)
        assert checkpoint["evaluation"]["episodes"] == 2 and checkpoint["env_id"] == GAME
    assert checkpoint["teacher"]["checkpoint"] == FILES["ppo_atari_teacher.py"]


def test_last_lines_compare_student_and_teacher(chain):
    _, outputs = chain
    student, tuned = (outputs[script].stdout.splitlines() for script in SCRIPTS[2:])
    assert re.fullmatch(r"student     mean -\d+\.\d+, its teacher's -\d+\.\d+", student[-1])
    assert re.fullmatch(r"gain        mean -\d+\.\d+ before, -\d+\.\d+ after", tuned[-2])
    assert re.fullmatch(r"student     mean -\d+\.\d+, its teacher's -\d+\.\d+", tuned[-1])


def test_a_second_run_does_not_replace_the_first(chain):
    folder, _ = chain
    before = {file: (folder / file).read_bytes() for file in FILES.values()}
    for script, file in FILES.items():
        result = run_script(folder, script, *(x for x in PHASES[script] if x != "--track"))
        expected = f"{file}: exists already; pass --overwrite, or another path\n"
        assert result.returncode != 0 and result.stderr == expected
    assert before == {file: (folder / file).read_bytes() for file in FILES.values()}


def test_eval_only_repeats_the_evaluation_and_leaves_the_file_alone(chain, monkeypatch, tmp_path):
    folder, _ = chain
    monkeypatch.chdir(tmp_path)
    for module in (ppo_atari_teacher, actor_distill, finetune_student):
        script = f"{module.__name__}.py"
        path, expected = folder / FILES[script], run_folder(chain, script) / "eval.json"
        content, name = path.read_bytes(), f"again_{module.__name__}"
        flags = {"eval_steps": 100, "num_envs": 2, "exp_name": name}
        run_main(module, module.Args(eval_only=str(path), **flags))
        assert path.read_bytes() == content
        (again,) = tmp_path.glob(f"runs/*{name}*/eval.json")
        assert json.loads(again.read_text()) == json.loads(expected.read_text())


def test_finetuning_starts_from_the_student(chain):
    before = torch.load(chain[0] / FILES["actor_distill.py"], weights_only=True)["model"]
    after = torch.load(chain[0] / FILES["finetune_student.py"], weights_only=True)["model"]
    for name in before:  # 16 updates of Adam at 3e-4 move no weight further than this
        assert 0 < (after[name] - before[name]).abs().max() < 16 * 3.3e-4, name


def test_other_ids_of_a_game_end_up_in_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"num_envs": 2, "num_steps": 2, "total_timesteps": 4, "num_minibatches": 1}
    for env_id in ("ALE/MsPacman-v5", "MsPacmanNoFrameskip-v4"):
        path = "{env_id}_" + env_id[:3] + ".pt"
        args = ppo_atari_teacher.Args(
            env_id=env_id, capacity="low", eval_steps=0, save_path=path, **flags
        )
        run_main(ppo_atari_teacher, args)
        saved = torch.load(f"MsPacmanNoFrameskip-v4_{env_id[:3]}.pt", weights_only=True)
        assert saved["env_id"] == saved["args"]["env_id"] == "MsPacmanNoFrameskip-v4"
        assert saved["args"]["save_path"] == f"MsPacmanNoFrameskip-v4_{env_id[:3]}.pt"
        assert len(saved["model"]["actor.bias"]) == 9


@pytest.mark.parametrize("module", [ppo_atari_teacher, actor_distill, finetune_student])
def test_every_update_is_compiled_with_the_flag_only(chain, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compiled, updates = [], []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **_: lambda *x: (compiled.append(function.__name__), function(*x))[1],
    )
    loss, update = "minibatch_loss", "ppo_update"
    flags = {"num_steps": 8, "num_minibatches": 2, "total_timesteps": 16, "update_epochs": 1}
    if module is actor_distill:
        loss, update = "batch_loss", "distill_update"
        flags = {"epochs": 1, "buffer_path": str(chain[0] / FILES["collect_buffer.py"])}
    if module is finetune_student:
        flags["student_path"] = str(chain[0] / FILES["actor_distill.py"])
    plain = getattr(module, update)
    monkeypatch.setattr(module, update, lambda *x: (updates.append(1), plain(*x))[1])
    for compile in (False, True):
        args = module.Args(
            num_envs=2, eval_steps=0, save_path=f"{compile}.pt", compile=compile, **flags
        )
        run_main(module, args)
        assert compiled == ([loss] * len(updates) if compile else [])
        updates.clear()


def test_python_of_readme_and_docs_runs(chain, monkeypatch):
    """To the letter: a buffer read by NumPy, and blocks of a script taken elsewhere."""
    monkeypatch.chdir(chain[0])
    block = re.compile(r"```python\n(.*?)```", re.DOTALL)
    (reading,) = block.findall((ROOT / "docs" / "files.md").read_text())
    found = {"np": np}
    exec(reading, found)
    assert found["observations"].shape == (256, 4, 84, 84)
    np.testing.assert_allclose(found["targets"].sum(1), 1, atol=1e-5)

    (taking,) = block.findall((ROOT / "README.md").read_text())
    taken = {"torch": torch}  # the functions that it names, and nothing else of the script
    for name in ("kl_divergence", "batch_loss", "distill_update"):
        assert f"`{name}`" in (ROOT / "README.md").read_text()
        exec(inspect.getsource(getattr(actor_distill, name)), taken)

    class Student(torch.nn.Linear):
        def forward(self, obs):
            outputs = super().forward(obs)
            return outputs[:, :3], outputs[:, 3]

    obs, targets, student = torch.rand(8, 3), torch.rand(8, 3).softmax(-1), Student(3, 4)
    before = actor_distill.kl_divergence(targets, student(obs)[0]).sum().item()
    taken |= {"student": student, "batches": 50 * [(obs, targets, obs[:, 0])]}
    exec(taking, taken)
    assert 0 < taken["kl_sum"] < 0.7 * before


def test_every_link_of_readme_and_docs_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "pretrained" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
