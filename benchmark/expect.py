"""What the README's commands take on this machine: time, memory, files, and their evaluations.

    python benchmark/expect.py

Runs each once, in a temporary folder: the first command of the README, its chain of four small ones,
and one iteration at the paper's settings, by both readings of its batch size. Writes
`benchmark/results/expect.{md,json}`.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GAME = "--env-id BreakoutNoFrameskip-v4"
SMALL = "--num-steps 128 --num-minibatches 8 --update-epochs 3 --eval-steps 8_000"
SESSIONS = (  # commands that share a folder
    ["actor_distill.py --capacity medium --epochs 10 --eval-steps 50_000"],
    [
        f"ppo_atari_teacher.py {GAME} --save-path checkpoints/demo.pt --total-timesteps 16_384 {SMALL}",
        f"collect_buffer.py {GAME} --num-samples 10_000",
        f"actor_distill.py {GAME} --epochs 3 --eval-steps 8_000",
        f"finetune_student.py {GAME} --total-timesteps 8_192 {SMALL}",
    ],
    ["ppo_atari_teacher.py --total-timesteps 32_768 --eval-steps 0"],
    ["ppo_atari_teacher.py --total-timesteps 32_768 --eval-steps 0 --num-minibatches 1024"],
)


def measure(command, folder):
    """Run one command of the README in a folder: a dict of what it took and what it printed."""
    words = shlex.split(command)
    start = time.perf_counter()
    with open(folder / "output", "w+") as output:
        options = {"cwd": folder, "stdout": output, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, ROOT / words[0], *words[1:]], **options)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        printed = output.read()
    if status:
        sys.exit(f"python {command}: failed; run it by hand to see why")
    wrote = re.search(r"^wrote +(\S+\.(?:pt|npz)).*$", printed, re.MULTILINE)
    return {
        "command": f"python {command}",
        "seconds": time.perf_counter() - start,
        "peak memory MB": usage.ru_maxrss / 1e3,
        "MB written": (folder / wrote[1]).stat().st_size / 1e6,
        "printed": printed,
    }


def main():
    results = []
    for session in SESSIONS:
        with tempfile.TemporaryDirectory() as folder:
            for command in session:
                print(f"python {command}", file=sys.stderr)
                results.append(measure(command, Path(folder)))
    machine = (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores with "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}"
    )
    lines = [
        f"`python benchmark/expect.py`, {machine}, one run each.",
        "",
        "| command | wall time | peak memory | writes |",
        "|---|---|---|---|",
    ]
    for x in results:
        memory = f"{x['peak memory MB'] / 1e3:.2f} GB | {x['MB written']:.1f} MB"
        lines.append(f"| `{x['command']}` | {x['seconds']:.0f} s | {memory} |")
    for x in results:
        lines += ["", f"`{x['command']}` printed:", "", "```", x["printed"].rstrip(), "```"]
    result = {"machine": machine, "results": results}
    (ROOT / "benchmark/results/expect.md").write_text("\n".join(lines) + "\n")
    (ROOT / "benchmark/results/expect.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
