"""The four scripts as a user runs them: chained by default paths, tracked, resumed, evaluated."""

import importlib
import inspect
import json
import re

import actor_distill
import numpy as np
import pytest
import torch
from conftest import PHASES, ROOT, SCRIPTS, SMALL_PPO, run_main, run_script
from test_ppo import tensorboard_scalars

GAME = "PongNoFrameskip-v4"
FILES = {"ppo_atari_teacher.py": f"checkpoints/{GAME}/ppo_high.pt",
         "collect_buffer.py": f"buffers/{GAME}.npz",
         "actor_distill.py": f"checkpoints/{GAME}/distilled_medium.pt",
         "finetune_student.py": f"checkpoints/{GAME}/finetuned_medium.pt"}
PPO_METRICS = {"charts/learning_rate", "charts/SPS", "losses/value_loss", "losses/policy_loss",
               "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac",
               "losses/explained_variance", "eval/mean", "eval/std", "eval/iqm"}
METRICS = {"ppo_atari_teacher.py": PPO_METRICS, "finetune_student.py": PPO_METRICS,
           "collect_buffer.py": {"charts/episodic_return", "charts/episodic_length", "charts/SPS"},
           "actor_distill.py": {"losses/kl", "losses/value_loss", "validation/kl",
                                "validation/agreement", "validation/entropy_gap",
                                "validation/value_loss", "charts/epoch", "charts/SPS",
                                "charts/learning_rate",
                                "eval/mean", "eval/std", "eval/iqm"}}


def run_folder(chain, script):
    """The run folder that a script of the chain named."""
    folder, outputs = chain
    return folder / re.search(r"^run +(\S+) on ", outputs[script].stdout, re.M)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_says_what_was_written_and_what_comes_next(chain, script):
    folder, outputs = chain
    assert (folder / FILES[script]).is_file()
    lines = outputs[script].stdout.splitlines()
    assert any(line.startswith("wrote") and FILES[script] in line for line in lines)
    following = next(line for line in lines if line.startswith("next")).split()[2]
    assert following == {**dict(zip(SCRIPTS, SCRIPTS[1:])), SCRIPTS[3]: SCRIPTS[3]}[script]
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
    assert scalars["charts/learning_rate"] == [(256, pytest.approx(3e-4)),
                                               (512, pytest.approx(1.5e-4))]
    assert all(0 < value < np.log(6) + 1e-3 for _, value in scalars["losses/entropy"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_wandb_offline_mirrors_the_run(chain, script):
    """W&B's own file holds the run's name, its group and each metric's name."""
    files = list((chain[0] / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == len(SCRIPTS), "one W&B run a script"
    name = run_folder(chain, script).name.encode()
    (content,) = [text for text in (file.read_bytes() for file in files) if name in text]
    assert GAME.encode() in content and b"global_step" in content
    for metric in METRICS[script]:
        assert metric.encode() in content, metric


@pytest.mark.parametrize("script, file, phase", [
    ("ppo_atari_teacher.py", "eval.json", "ppo"), ("actor_distill.py", "eval.json", "distilled"),
    ("finetune_student.py", "eval_before.json", "distilled"),
    ("finetune_student.py", "eval.json", "finetuned")])
def test_evaluation_file(chain, script, file, phase):
    result = json.loads((run_folder(chain, script) / file).read_text())
    returns = result["returns"]
    assert (result["env_id"], result["phase"], result["seed"]) == (GAME, phase, 1)
    assert result["capacity"] == ("high" if phase == "ppo" else "medium")
    assert (chain[0] / result["checkpoint"]).is_file() and result["eval_steps"] == 100
    assert result["steps"] == sum(result["lengths"]) >= 4 * 764  # no game of Pong is shorter
    assert len(returns) == len(result["lengths"]) == result["episodes"] == 4
    assert all(-21 <= x <= 21 and x == int(x) for x in returns)
    assert result["mean"] == pytest.approx(np.mean(returns))
    assert result["std"] == pytest.approx(np.std(returns)) and result["max"] == max(returns)
    assert result["iqm"] == pytest.approx(np.mean(sorted(returns)[1:3]))
    assert result["ci95"][0] <= result["mean"] <= result["ci95"][1]


def test_checkpoints_hold_what_the_readme_says(chain):
    common = {"format_version", "phase", "env_id", "capacity", "num_actions", "global_step",
              "model", "args", "evaluation", "checkpoint", "run_name", "optimizer", "rng",
              "wandb_id", "protocol"}
    extra = {"ppo_atari_teacher.py": set(),
             "actor_distill.py": {"teacher", "epoch", "validation", "last_epoch", "last_model",
                                "buffer_sha256"},
             "finetune_student.py": {"teacher", "evaluation_before"}}
    for script, more in extra.items():
        checkpoint = torch.load(chain[0] / FILES[script], weights_only=True)
        assert checkpoint.keys() == common | more
        assert checkpoint["num_actions"] == 6 and checkpoint["env_id"] == GAME
        assert checkpoint["evaluation"]["episodes"] == 4
    assert checkpoint["teacher"]["path"] == FILES["ppo_atari_teacher.py"]


def test_last_lines_compare_student_and_teacher(chain):
    _, outputs = chain
    assert re.search(r"^student     mean -?\d+\.\d+, its teacher's -?\d+\.\d+: ",
                     outputs["actor_distill.py"].stdout.splitlines()[-1])
    assert re.search(r"^gain        mean \S+ before, \S+ after: [+-]\d",
                     outputs["finetune_student.py"].stdout, re.M)


def test_a_second_run_refuses_to_replace_the_first(chain):
    folder, _ = chain
    before = {file: (folder / file).read_bytes() for file in FILES.values()}
    for script, file in FILES.items():
        result = run_script(folder, script, *(x for x in PHASES[script] if x != "--track"))
        assert result.returncode == 2 and "--overwrite" in result.stderr and file in result.stderr
    assert before == {file: (folder / file).read_bytes() for file in FILES.values()}


@pytest.mark.parametrize("script", ["ppo_atari_teacher.py", "finetune_student.py"])
def test_resume_continues_step_optimiser_and_learning_rate(chain, script, tmp_path):
    """2 iterations, then --resume to 5: everything counts on from where the file stood."""
    folder, _ = chain
    file = tmp_path / "resumed.pt"
    flags = [*SMALL_PPO, "--save-path", file, "--eval-steps", 0]
    first = run_script(folder, script, *flags, "--resume")
    assert first.returncode == 0 and "starts anew" in first.stdout
    saved = torch.load(file, weights_only=True)
    second = run_script(folder, script, *flags, "--resume", "--total-timesteps", 1280)
    assert second.returncode == 0, second.stderr
    assert "at step 512" in second.stdout
    resumed = torch.load(file, weights_only=True)
    assert (saved["global_step"], resumed["global_step"]) == (512, 1280)
    updates = [x["optimizer"]["state"][0]["step"].item() for x in (saved, resumed)]
    assert updates == [2 * 2 * 4, 5 * 2 * 4]
    assert resumed["run_name"] == saved["run_name"]
    scalars = tensorboard_scalars(folder / "runs" / saved["run_name"])
    expected = [3e-4, 1.5e-4, 3e-4 * 3 / 5, 3e-4 * 2 / 5, 3e-4 / 5]
    assert scalars["charts/learning_rate"] == [
        (256 * (i + 1), pytest.approx(rate)) for i, rate in enumerate(expected)]
    changed = run_script(folder, script, *flags, "--resume", "--gamma", 0.9)
    assert changed.returncode == 2 and "--gamma" in changed.stderr
    done = run_script(folder, script, *flags, "--resume", "--total-timesteps", 1280)
    assert done.returncode == 0
    assert torch.load(file, weights_only=True)["global_step"] == 1280


def test_resumed_training_starts_from_the_saved_weights(chain, tmp_path):
    folder, _ = chain
    flags = [*SMALL_PPO, "--save-path", tmp_path / "x.pt", "--eval-steps", 0]
    run_script(folder, "ppo_atari_teacher.py", *flags)
    before = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    result = run_script(folder, "ppo_atari_teacher.py", *flags, "--resume", "--learning-rate",
                        "3e-4", "--total-timesteps", 768)
    after = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    assert result.returncode == 0
    for name in before:  # 8 updates at a third of 3e-4 move no weight further than this
        assert 0 < (after[name] - before[name]).abs().max() < 8 * 1.1e-4, name


@pytest.mark.parametrize("script", ["ppo_atari_teacher.py", "actor_distill.py",
                                    "finetune_student.py"])
def test_eval_only_repeats_the_evaluation_and_leaves_the_file_alone(chain, script):
    folder, _ = chain
    file = folder / FILES[script]
    before = file.read_bytes()
    result = run_script(folder, script, "--eval-only", FILES[script], "--eval-steps", 100,
                        "--num-envs", 4, "--exp-name", f"again-{script[:-3]}")
    assert result.returncode == 0, result.stderr
    assert file.read_bytes() == before
    (path,) = (folder / "runs").glob(f"*again-{script[:-3]}*/eval.json")
    again = json.loads(path.read_text())
    assert again == json.loads((run_folder(chain, script) / "eval.json").read_text())


def test_critic_warm_up_leaves_the_policy_bit_identical(chain, tmp_path):
    folder, _ = chain
    result = run_script(folder, "finetune_student.py", *SMALL_PPO, "--eval-steps", 0,
                        "--critic-warmup-updates", 2, "--save-path", tmp_path / "warm.pt")
    assert result.returncode == 0, result.stderr
    before = torch.load(folder / FILES["actor_distill.py"], weights_only=True)["model"]
    after = torch.load(tmp_path / "warm.pt", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"critic.weight", "critic.bias"}


def test_finetuning_starts_from_the_student(chain, tmp_path):
    folder, _ = chain
    before = torch.load(folder / FILES["actor_distill.py"], weights_only=True)["model"]
    after = torch.load(folder / FILES["finetune_student.py"], weights_only=True)["model"]
    for name in before:  # 16 updates of Adam at 3e-4 move no weight further than this
        assert 0 < (after[name] - before[name]).abs().max() < 16 * 3.3e-4, name


def test_other_ids_of_a_game_end_up_in_the_same_place(chain, tmp_path):
    result = run_script(tmp_path, "ppo_atari_teacher.py", *SMALL_PPO, "--eval-steps", 0,
                        "--env-id", "ALE/MsPacman-v5", "--capacity", "low")
    assert result.returncode == 0, result.stderr
    assert "sticky actions stay at the value of --repeat-action-probability" in result.stdout
    checkpoint = torch.load(tmp_path / "checkpoints/MsPacmanNoFrameskip-v4/ppo_low.pt",
                            weights_only=True)
    assert checkpoint["env_id"] == "MsPacmanNoFrameskip-v4" and checkpoint["num_actions"] == 9


@pytest.mark.parametrize("script", ["ppo_atari_teacher", "actor_distill", "finetune_student"])
def test_every_update_is_compiled_with_the_flag_only(chain, script, tmp_path, monkeypatch):
    """And the games that are played know where the network is."""
    monkeypatch.chdir(tmp_path)
    module, compiled, devices = importlib.import_module(script), [], []
    loss = "batch_loss" if script == "actor_distill" else "minibatch_loss"
    update = "distill_update" if script == "actor_distill" else "ppo_update"
    monkeypatch.setattr(module, "compiled", lambda function: lambda *x, **y: (
        compiled.append(function.__name__), function(*x, **y))[1])
    plain_update, plain_envs, updates = getattr(module, update), module.make_envs, []
    monkeypatch.setattr(module, update, lambda *x, **y: (
        updates.append(1), plain_update(*x, **y))[1])

    def make_envs(rom, num_envs, life_loss, sticky, protocol=None, device=None):
        if num_envs > 1:
            devices.append(device)
        return plain_envs(rom, num_envs, life_loss, sticky, protocol, "cpu")

    monkeypatch.setattr(module, "make_envs", make_envs)
    flags = {"num_envs": 2, "eval_steps": 1, "device": "cpu", "save_path": "x.pt"}
    if script == "actor_distill":
        flags |= {"epochs": 1, "buffer_path": str(chain[0] / f"buffers/{GAME}.npz")}
    else:
        flags |= {"num_steps": 8, "num_minibatches": 2, "total_timesteps": 16, "update_epochs": 1}
    if script == "finetune_student":
        flags["student_path"] = str(chain[0] / f"checkpoints/{GAME}/distilled_medium.pt")
    monkeypatch.setattr(module, "play", lambda *x: ([1.0], [1]))
    run_main(module, module.Args(**flags))
    assert updates and not compiled
    updates.clear()
    run_main(module, module.Args(**flags, compile=True, overwrite=True))
    assert compiled == [loss] * len(updates) and updates
    assert devices and all(device == torch.device("cpu") for device in devices)


def test_collection_tells_its_games_where_the_network_is(chain, tmp_path, monkeypatch):
    collect = importlib.import_module("collect_buffer")
    plain, devices = collect.make_envs, []

    def make_envs(rom, num_envs, life_loss, sticky, protocol=None, device=None):
        devices.append((num_envs, device))
        return plain(rom, num_envs, life_loss, sticky, protocol, "cpu")

    monkeypatch.setattr(collect, "make_envs", make_envs)
    run_main(collect, collect.Args(
        num_samples=20, num_envs=2, device="cpu", buffer_path=str(tmp_path / "x.npz"),
        teacher_path=str(chain[0] / f"checkpoints/{GAME}/ppo_high.pt")))
    assert (2, torch.device("cpu")) in devices


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("script, update", [
    ("ppo_atari_teacher", "ppo_update"), ("actor_distill", "distill_update"),
    ("finetune_student", "ppo_update")])
def test_bf16_is_for_training_alone(chain, script, update, bf16, tmp_path, monkeypatch):
    """Updates run as the flag says, evaluations and validations always in float32."""
    monkeypatch.chdir(tmp_path)
    module, used = importlib.import_module(script), []
    for name in (update, "validate"):
        if plain := getattr(module, name, None):
            monkeypatch.setattr(module, name, lambda agent, *x, plain=plain, name=name, **y: (
                used.append((name, agent.bf16)), plain(agent, *x, **y))[1])
    monkeypatch.setattr(module, "play", lambda agent, *x: (
        used.append(("play", agent.bf16)), ([1.0], [1]))[1])
    flags = {"num_envs": 2, "eval_steps": 10, "device": "cpu", "bf16": bf16, "save_path": "x.pt"}
    if script == "actor_distill":
        flags |= {"epochs": 1, "buffer_path": str(chain[0] / f"buffers/{GAME}.npz")}
    else:
        flags |= {"num_steps": 8, "num_minibatches": 2, "total_timesteps": 16, "update_epochs": 1}
    if script == "finetune_student":
        flags["student_path"] = str(chain[0] / f"checkpoints/{GAME}/distilled_medium.pt")
    run_main(module, module.Args(**flags))
    assert set(used) == {(update, bf16), ("play", False)} | (
        {("validate", False)} if script == "actor_distill" else set())


def test_the_readmes_python_runs(chain, monkeypatch):
    """Its blocks, to the letter: a buffer read by NumPy, and blocks of a script taken elsewhere."""
    folder, _ = chain
    monkeypatch.chdir(folder)
    reading, taking = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    found = {"np": np}
    exec(reading, found)
    assert found["observations"].shape == (256, 4, 84, 84)
    np.testing.assert_allclose(found["targets"].sum(1), 1, atol=1e-5)

    taken = {"torch": torch}  # the functions that it names, and nothing else of the script
    for name in ("kl_divergence", "batch_loss", "distill_update"):
        assert f"`{name}`" in (ROOT / "README.md").read_text()
        exec(inspect.getsource(getattr(actor_distill, name)), taken)

    class Student(torch.nn.Linear):
        def forward(self, obs):
            outputs = super().forward(obs)
            return outputs[:, :3], outputs[:, 3]

    obs, targets = torch.rand(8, 3), torch.rand(8, 3).softmax(-1)
    student = Student(3, 4)
    before = actor_distill.kl_divergence(targets, student(obs)[0]).sum().item()
    taken |= {"student": student, "batches": 50 * [(obs, targets, obs[:, 0])]}
    exec(taking, taken)
    assert 0 < taken["kl_sum"] < 0.7 * before
