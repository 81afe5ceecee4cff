"""What the four files promise about themselves: equal blocks, size, style, help, clean imports."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
import torch
import tyro
from conftest import ENVIRONMENT, ROOT, SCRIPTS, run_script

import finetune_student
import ppo_atari_teacher

# lines of code that a script may have, for good
LIMITS = dict(zip(SCRIPTS, (450, 420, 520, 500), strict=True))


def top_level(script):
    """Names of a script's top-level definitions, each with its source, decorators included."""
    text = (ROOT / script).read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        source = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = source
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = source
        elif isinstance(node, ast.If):
            found[f"{lines[node.lineno - 1]} {len(found) > 0}"] = source
    return found


def flags(script):
    """The fields of a script's Args, each with the first line of the docstring below it."""
    tree = ast.parse((ROOT / script).read_text())
    (args,) = (x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Args")
    pairs = zip(args.body[::2], args.body[1::2], strict=True)
    return {field.target.id: text.value.value.splitlines()[0] for field, text in pairs}


def test_blocks_of_the_same_name_are_equal_to_the_letter():
    blocks = {script: top_level(script) for script in SCRIPTS}
    everywhere = set.intersection(*(set(found) for found in blocks.values()))
    expected = {"FilePath", "Fraction", "AtariEnvs", "Agent", "play", "evaluate", "claim"}
    assert expected | {'if __name__ == "__main__": True'} <= everywhere
    for name in set().union(*blocks.values()) - {"Args", "main", "train"}:
        sources = {found[name] for found in blocks.values() if name in found}
        assert len(sources) == 1, f"{name} is not the same everywhere"


def test_finetuning_differs_from_the_teacher_by_what_it_changes():
    command = ["diff", "ppo_atari_teacher.py", "finetune_student.py"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert 0 < len(result.stdout.splitlines()) < 150

    teacher, student = vars(ppo_atari_teacher.Args()), vars(finetune_student.Args())
    assert {x for x in teacher if teacher[x] != student[x]} == {
        "exp_name",
        "capacity",
        "save_path",
        "total_timesteps",
    }
    assert student.keys() - teacher.keys() == {"student_path", "critic_warmup_updates"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_compact(script):
    text = (ROOT / script).read_text()
    nodes = list(ast.walk(ast.parse(text)))
    documentation = {
        number
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    lines = [line.strip() for line in text.splitlines()]
    code = [i for i, line in enumerate(lines, 1) if line and line[0] != "#"]
    assert len(set(code) - documentation) <= LIMITS[script]
    assert len(lines) <= 750
    # and the lines are not saved by tricks
    starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts)), "two statements on a line"
    for node in nodes:
        if isinstance(node, ast.IfExp):
            assert sum(isinstance(x, ast.IfExp) for x in ast.walk(node)) == 1, node.lineno


@pytest.mark.parametrize(
    ("script", "function", "first"),
    [
        ("ppo_atari_teacher.py", "train", ast.For),
        ("collect_buffer.py", "collect", ast.While),
        ("actor_distill.py", "kl_divergence", ast.Return),
        ("actor_distill.py", "distill_update", ast.Assign),
        ("finetune_student.py", "train", ast.For),
    ],
)
def test_the_algorithm_begins_in_the_upper_half(script, function, first):
    text = (ROOT / script).read_text()
    (found,) = (x for x in ast.parse(text).body if getattr(x, "name", "") == function)
    begin = min(node.lineno for node in ast.walk(found) if isinstance(node, first))
    assert begin <= len(text.splitlines()) / 2


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]])
def test_ruff_is_content(command):
    command = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "100"]
    command += [*SCRIPTS, "tests"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_by_help_and_read(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(importlib.import_module(script[:-3]).Args, args=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, explanation in flags(script).items():
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
        assert explanation in text, name
        assert re.search(rf"\bargs\.{name}\b", (ROOT / script).read_text()), f"{name} is not read"


def test_imports_have_no_side_effect_and_do_not_need_wandb(tmp_path):
    names = ", ".join(script[:-3] for script in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['wandb'] = None"
    code += "; import torch; state = torch.get_rng_state()"
    code += f"; import {names}; assert torch.equal(state, torch.get_rng_state())"
    command = [sys.executable, "-B", "-c", code]
    result = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_papers_values_are_the_defaults():
    paper = {
        "env_id": "PongNoFrameskip-v4",
        "capacity": "high",
        "num_envs": 16,
        "repeat_action_probability": 0.0,
        "eval_steps": 1_000_000,
        "total_timesteps": 75_000_000,
        "learning_rate": 3e-4,
        "anneal_lr": True,
        "num_steps": 2048,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "update_epochs": 10,
        "num_minibatches": 32,
        "norm_adv": True,
        "clip_coef": 0.1,
        "clip_vloss": True,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
        "target_kl": None,
    }
    args = vars(ppo_atari_teacher.Args())
    assert {name: args[name] for name in paper} == paper


@pytest.mark.skipif(
    not torch.backends.openmp.is_available() or sys.platform != "linux", reason="GNU OpenMP only"
)
def test_openmp_spins_briefly(tmp_path, monkeypatch):
    """Set before torch is imported; libgomp itself says what it has read."""
    monkeypatch.delitem(ENVIRONMENT, "GOMP_SPINCOUNT", raising=False)
    monkeypatch.setitem(ENVIRONMENT, "OMP_DISPLAY_ENV", "VERBOSE")
    result = run_script(tmp_path, SCRIPTS[0], "--help")
    assert "GOMP_SPINCOUNT = '10000'" in result.stderr
