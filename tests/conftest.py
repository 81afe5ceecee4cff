"""What the tests share: the scripts on the import path, ways to run them, and one real chain."""

import contextlib
import os
import subprocess
import sys
import zlib
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ppo_atari_teacher.py", "collect_buffer.py", "actor_distill.py", "finetune_student.py")
sys.path.insert(0, str(ROOT))


def run_script(folder, script, *flags):
    """Run a script in `folder` with flags given as words; W&B stays offline."""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "COLUMNS": "200"}
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=folder,
                          env=environment, capture_output=True, text=True, timeout=300)


def run_main(module, args):
    """Run a script's `main` in this process, in the current folder."""
    with contextlib.ExitStack() as at_exit:
        module.main(args, at_exit)


def unpacked(arrays):
    """What `collect` returned, its frames as an array uint8 [F, 84, 84]."""
    store = arrays["frames"]
    frames = [zlib.decompress(stream + compressor.flush(), -15)
              for stream, compressor in zip(store.compressed, store.compressors)]
    assert [len(x) for x in frames] == [84 * 84 * count for count in store.counts]
    assert [zlib.crc32(x) for x in frames] == store.crcs
    return arrays | {"frames": np.frombuffer(b"".join(frames), np.uint8).reshape(-1, 84, 84)}


SMALL_PPO = ("--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 "
             "--total-timesteps 512 --eval-steps 100").split()
PHASES = {
    "ppo_atari_teacher.py": [*SMALL_PPO, "--track"],
    "collect_buffer.py": "--num-envs 4 --num-samples 4001 --track".split(),
    "actor_distill.py": "--num-envs 4 --epochs 2 --eval-steps 100 --track".split(),
    "finetune_student.py": [*SMALL_PPO, "--track"],
}


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The four scripts run one after another on Pong by their default paths: folder and outputs."""
    folder = tmp_path_factory.mktemp("chain")
    outputs = {}
    for script, flags in PHASES.items():
        outputs[script] = run_script(folder, script, *flags)
        assert outputs[script].returncode == 0, outputs[script].stderr
    return folder, outputs


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
