"""What the tests share: the scripts on the import path, ways to run them, and one real chain."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests side by side share the cores

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ppo_atari_teacher.py", "collect_buffer.py", "actor_distill.py", "finetune_student.py")
ENVIRONMENT = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "COLUMNS": "200"}
sys.path.insert(0, str(ROOT))

SMALL_PPO = ["--num-envs", "2", "--num-steps", "128", "--num-minibatches", "4"]
SMALL_PPO += ["--update-epochs", "2", "--total-timesteps", "512", "--eval-steps", "100"]
PHASES = {
    "ppo_atari_teacher.py": [*SMALL_PPO, "--track"],
    "collect_buffer.py": ["--num-envs", "2", "--num-samples", "3001", "--track"],
    "actor_distill.py": ["--num-envs", "2", "--epochs", "2", "--eval-steps", "100", "--track"],
    "finetune_student.py": [*SMALL_PPO, "--track"],
}


def run_script(folder, script, *flags):
    """Run a script in `folder` with flags given as words; W&B stays offline."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    options = {"cwd": folder, "env": ENVIRONMENT, "timeout": 300}
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def run_main(module, args):
    """Run a script's `main` in this process, in the current folder."""
    module.main(args)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The four scripts run one after another on Pong by their default paths: folder and outputs.

    Once for all of pytest-xdist's workers, the first of which runs it while the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, record = base / "chain", base / "chain.json"
    with open(base / "chain.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            folder.mkdir()
            outputs = {}
            for script, flags in PHASES.items():
                result = run_script(folder, script, *flags)
                assert result.returncode == 0, result.stderr
                outputs[script] = {"stdout": result.stdout, "stderr": result.stderr}
            record.write_text(json.dumps(outputs))
    outputs = json.loads(record.read_text())
    return folder, {script: SimpleNamespace(**output) for script, output in outputs.items()}


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def opinionated_agent(agent_class, capacity, num_actions):
    """A fresh network whose policy is far from uniform, unlike the small initial policy head's."""
    agent = agent_class(capacity, num_actions)
    with torch.no_grad():
        agent.actor.weight.mul_(300)
    return agent.to(memory_format=torch.channels_last)


def tensorboard_scalars(folder):
    """Every scalar logged in a folder: tag to a list of (step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def buffer_arrays(num_samples=20, env_id="PongNoFrameskip-v4"):
    """The arrays of a buffer of noise, as `collect_buffer.py` names them: two games."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(num_samples, 6))
    meta = {"env_id": env_id}
    return {
        "frames": rng.integers(256, size=(num_samples + 1, 84, 84), dtype=np.uint8),
        "stack_index": rng.integers(num_samples + 1, size=(num_samples, 4), dtype=np.int32),
        "action_probs": torch.from_numpy(logits).softmax(-1).float().numpy(),
        "values": rng.normal(size=num_samples).astype(np.float32),
        "episode_index": np.arange(num_samples, dtype=np.int32) // (num_samples // 2),
        "meta": np.array(json.dumps(meta)),
    }
