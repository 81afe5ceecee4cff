"""What the four files promise about themselves: equal blocks, complete help, clean imports."""

import ast
import itertools
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, run_script

# lines of code that a script may have
LIMITS = dict(zip(SCRIPTS, (696, 720, 799, 746)))


def definitions(script):
    """Top-level functions and classes of a script: name to source, decorators included."""
    text = (ROOT / script).read_text()
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1:node.end_lineno])
    return found


def flags(script):
    """The fields of a script's Args, each with whether a docstring follows it."""
    (args,) = [node for node in ast.parse((ROOT / script).read_text()).body
               if isinstance(node, ast.ClassDef) and node.name == "Args"]
    return {node.target.id: isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            for node, following in zip(args.body, [*args.body[1:], None])
            if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))
def test_blocks_of_the_same_name_are_identical_to_the_letter(one, other):
    first, second = definitions(one), definitions(other)
    shared = first.keys() & second.keys() - {"Args", "main"}
    assert {"Agent", "make_envs", "load_checkpoint", "UsageError", "Logger"} <= shared
    for name in shared:
        assert first[name] == second[name], f"{name} differs between {one} and {other}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_and_explains_every_flag(script, tmp_path):
    result = run_script(tmp_path, script, "--help")
    assert result.returncode == 0
    for name, documented in flags(script).items():
        assert documented, f"{name} has no docstring"
        assert re.search(rf"--{name.replace('_', '-')}\b", result.stdout), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    text = (ROOT / script).read_text()
    for name in flags(script):
        assert f"args.{name}" in text, f"{name} is never read"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_compact_and_documented(script):
    text = (ROOT / script).read_text()
    assert max(map(len, text.splitlines())) <= 100
    tree = ast.parse(text)
    documented = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented |= set(range(node.lineno, node.end_lineno + 1))
    code = [line for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.strip().startswith("#") and number not in documented]
    assert len(code) <= LIMITS[script]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Args"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("script", SCRIPTS)
def test_import_has_no_side_effect_and_does_not_need_wandb(script, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['wandb'] = None; "
            f"import {script[:-3]}")
    result = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True,
                            text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_finetuning_is_the_teachers_recipe():
    """The two PPO scripts share every default but the ones that fine-tuning is about."""
    def defaults(script):
        return {node.target.id: ast.unparse(node.value)
                for node in ast.walk(ast.parse((ROOT / script).read_text()))
                if isinstance(node, ast.AnnAssign) and node.value is not None}

    teacher, student = defaults("ppo_atari_teacher.py"), defaults("finetune_student.py")
    different = {name for name in teacher if teacher[name] != student[name]}
    assert different == {"exp_name", "capacity", "total_timesteps"}
    assert student.keys() - teacher.keys() == {"student_path", "critic_warmup_updates"}


def test_paper_values_are_the_defaults():
    paper = dict(total_timesteps=75_000_000, num_envs=16, num_steps=2048, gamma=0.99,
                 gae_lambda=0.95, update_epochs=10, num_minibatches=32, clip_coef=0.1,
                 learning_rate=3e-4, anneal_lr=True, norm_adv=True, clip_vloss=True, ent_coef=0.01,
                 vf_coef=0.5, max_grad_norm=0.5, target_kl=None, capacity="high",
                 eval_steps=1_000_000, repeat_action_probability=0.0, env_id="PongNoFrameskip-v4")
    import ppo_atari_teacher
    args = vars(ppo_atari_teacher.Args())
    assert {name: args[name] for name in paper} == paper


@pytest.mark.skipif(not torch.backends.openmp.is_available() or sys.platform != "linux",
                    reason="GNU OpenMP only")
@pytest.mark.parametrize("script", SCRIPTS)
def test_openmp_spins_briefly_unless_told_otherwise(script, tmp_path, monkeypatch):
    """Set before torch is imported; libgomp itself says what it has read."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for told, expected in ((None, 10000), ("77", 77)):
        if told:
            monkeypatch.setenv("GOMP_SPINCOUNT", told)
        result = run_script(tmp_path, script, "--help")
        assert re.search(rf"GOMP_SPINCOUNT = '{expected}'", result.stderr), result.stderr
