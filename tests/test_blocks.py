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
from tools import copy_blocks

# lines of code that a script may have, for good
LIMITS = dict(zip(SCRIPTS, (450, 420, 520, 500), strict=True))


# what a reader meets of these, from the top to the bottom
TOP_DOWN = ("Args", "AtariEnvs", "Agent", "gae", "ppo_loss", "kl_divergence", "reverse_kl")
TOP_DOWN += ("squared_error", "train", "collect", "play", "main")


def flags(script):
    """The fields of a script's Args, each with the first line of the docstring below it."""
    tree = ast.parse((ROOT / script).read_text())
    (args,) = (x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Args")
    pairs = zip(args.body[::2], args.body[1::2], strict=True)
    return {field.target.id: text.value.value.splitlines()[0] for field, text in pairs}


def test_blocks_of_the_same_name_are_equal_to_the_letter():
    found = {script: copy_blocks.blocks((ROOT / script).read_text()) for script in SCRIPTS}
    everywhere = set.intersection(*map(set, found.values()))
    expected = {"FilePath", "Fraction", "AtariEnvs", "Agent", "play", "evaluate", "lock_output"}
    assert expected | {'if __name__ == "__main__": (end)'} <= everywhere
    for name in set().union(*found.values()):
        versions = {}
        for script in SCRIPTS:
            if name in found[script]:
                versions.setdefault(found[script][name], []).append(script)
        files = " is not that of ".join(map(" and ".join, versions.values()))
        fix = "copy the right one to the others by `python tools/copy_blocks.py SCRIPT`"
        assert len(versions) == 1, f"{name} of {files}; {fix}"


def test_copying_blocks_changes_these_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_blocks, "ROOT", tmp_path)
    before = {script: (ROOT / script).read_text() for script in SCRIPTS}
    changed = before[SCRIPTS[2]].replace("\ndef game_seeds(", "\n@cache\ndef game_seeds(seed, ")
    own = re.compile(r"^(class Args|def train\(|def main\()", re.MULTILINE)
    before[SCRIPTS[2]] = changed = own.sub(r"@own\n\1", changed)
    for script, text in before.items():
        (tmp_path / script).write_text(text)
    copy_blocks.main(SCRIPTS[2])
    right = copy_blocks.blocks(changed)
    assert right["game_seeds"].startswith("@cache\ndef game_seeds(seed, ")
    for script, text in before.items():
        blocks, after = copy_blocks.blocks(text), (tmp_path / script).read_text()
        assert ("@own" in after) == (script == SCRIPTS[2])
        expected = {name: right.get(name, block) for name, block in blocks.items()}
        assert copy_blocks.blocks(after) == expected
        for name, block in blocks.items():
            text, after = text.replace(block, ""), after.replace(expected[name], "")
        assert text == after, "what is the script's own"


def test_finetuning_differs_from_the_teacher_by_what_it_changes():
    command = ["diff", "ppo_atari_teacher.py", "finetune_student.py"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert 0 < len(result.stdout.splitlines()) < 205

    teacher, student = vars(ppo_atari_teacher.Args()), vars(finetune_student.Args())
    changed = {name for name in teacher if teacher[name] != student.get(name, teacher[name])}
    recipe = {"total_timesteps", "learning_rate", "num_steps", "update_epochs", "num_minibatches"}
    recipe |= {"clip_coef", "clip_vloss", "ent_coef", "vf_coef"}
    assert changed == recipe | {"exp_name", "capacity", "save_path"}
    assert student.keys() - teacher.keys() == {"student_path", "kl_coef", "fit_critic"}
    assert not teacher.keys() - student.keys()


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_read_from_top_to_bottom(script):
    text = (ROOT / script).read_text()
    nodes = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    begins = [nodes[name].lineno for name in TOP_DOWN if name in nodes]
    assert begins == sorted(begins) and list(nodes)[-1] == "main"
    (loop,) = (nodes[name] for name in ("train", "collect") if name in nodes)
    assert loop.end_lineno - loop.lineno < 150
    following = text.splitlines()[loop.end_lineno :]
    assert next(line for line in following if line).startswith("# Nothing below changes ")


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
    paper = """--env-id PongNoFrameskip-v4 --capacity high --num-envs 16
        --repeat-action-probability 0 --eval-steps 1_000_000 --total-timesteps 75_000_000
        --learning-rate 3e-4 --anneal-lr --num-steps 2048 --gamma 0.99 --gae-lambda 0.95
        --update-epochs 10 --num-minibatches 32 --norm-adv --clip-coef 0.1 --clip-vloss
        --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5"""
    args = tyro.cli(ppo_atari_teacher.Args, args=paper.split())
    assert args == ppo_atari_teacher.Args()


@pytest.mark.skipif(
    not torch.backends.openmp.is_available() or sys.platform != "linux", reason="GNU OpenMP only"
)
def test_openmp_spins_briefly(tmp_path, monkeypatch):
    """Set before torch is imported; libgomp itself says what it has read."""
    monkeypatch.delitem(ENVIRONMENT, "GOMP_SPINCOUNT", raising=False)
    monkeypatch.setitem(ENVIRONMENT, "OMP_DISPLAY_ENV", "VERBOSE")
    result = run_script(tmp_path, SCRIPTS[0], "--help")
    assert "GOMP_SPINCOUNT = '10000'" in result.stderr
