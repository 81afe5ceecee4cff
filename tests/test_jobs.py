"""Sweeps and arrays of jobs: their commands are those of the scripts, a requeued job goes on."""

import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tyro
import yaml
from conftest import ENVIRONMENT, ROOT, SCRIPTS

import actor_distill as distill
import ppo_atari_teacher as teacher


def test_every_command_of_the_sweep_is_understood_and_writes_a_file_of_its_own():
    sweep = yaml.safe_load((ROOT / "benchmark/sweep.yaml").read_text())
    assert sweep["program"] in SCRIPTS and sweep["metric"]["name"] == "eval/mean"
    start, flags = ["${env}", "python", "${program}"], ["--track", "--resume"]
    assert sweep["command"] == [*start, "${args}", *flags]
    values = [x.get("values", [x.get("value")]) for x in sweep["parameters"].values()]
    paths = []
    for chosen in itertools.product(*values):
        words = [f"--{x}={y}" for x, y in zip(sweep["parameters"], chosen, strict=True)]
        args = tyro.cli(distill.Args, args=[*words, *flags])
        paths.append(args.save_path.format(**vars(args)))
    assert len(set(paths)) == len(paths) == 16


def test_every_printed_command_is_understood_and_keeps_small_teachers_apart():
    """A teacher by the default path is what the next scripts find, before the one that ships."""
    pages = [ROOT / "README.md", ROOT / "pretrained/README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    command = r"(?:python|torchrun .*?) ((?:tools/(?!copy_blocks))?\w+)\.py([^`#|\n]*)"
    commands = re.findall(command, text)
    assert {f"{name}.py" for name, _ in commands} >= set(SCRIPTS)
    for name, flags in commands:
        args = tyro.cli(
            importlib.import_module(name.replace("/", ".")).Args, args=shlex.split(flags)
        )
        if name == "ppo_atari_teacher" and args.total_timesteps < 1_000_000:
            assert args.save_path != teacher.Args.save_path, flags


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder in which `python` and `scontrol` write down how they were called."""
    monkeypatch.chdir(tmp_path)
    Path("bin").mkdir()
    Path("bin/scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    # ends as a training does at SIGTERM: with status 1, after it has saved
    body = (
        'trap \'sleep 0.5; echo > saved; exit 1\' TERM\necho "$@" > called\nsleep "$LASTS" & wait\n'
    )
    Path("bin/python").write_text(f"#!/bin/bash\n{body}")
    for path in Path("bin").iterdir():
        path.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    return {**environment, "SLURM_JOB_ID": "77", "LASTS": "0"}


@pytest.mark.parametrize("task, game, seed", [(0, "Breakout", 1), (19, "Pong", 2), (29, "Pong", 3)])
def test_a_job_of_the_array_trains_its_game_and_seed(task, game, seed, slurm):
    command = ["bash", ROOT / "benchmark/slurm.sh", SCRIPTS[0], "--capacity", "low"]
    subprocess.run(command, env={**slurm, "SLURM_ARRAY_TASK_ID": str(task)}, check=True)
    script, *words = Path("called").read_text().split()
    args = tyro.cli(teacher.Args, args=words)
    assert script == SCRIPTS[0] and (args.capacity, args.resume) == ("low", True)
    assert (args.env_id, args.seed) == (f"{game}NoFrameskip-v4", seed)
    path = f"checkpoints/{args.env_id}/ppo_atari_teacher_low_{seed}.pt"
    assert args.save_path.format(**vars(args)) == path
    assert not Path("requeued").exists()


def test_a_preempted_job_saves_and_goes_back_into_the_queue(slurm):
    command = ["bash", str(ROOT / "benchmark/slurm.sh"), SCRIPTS[0]]
    environment = {**slurm, "SLURM_ARRAY_TASK_ID": "3", "LASTS": "60"}
    job = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not Path("called").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=30)
    assert Path("saved").exists(), "it waits until the training has saved"
    assert Path("requeued").read_text() == "requeue 77\n"
