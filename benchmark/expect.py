"""What short runs take on this machine: time, memory, files, and what they print.

    python benchmark/expect.py

Runs the README's first command and a small one of each phase; writes `benchmark/results/expect.md`.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GAME = "--env-id BreakoutNoFrameskip-v4"
SMALL = "--num-steps 128 --num-minibatches 8 --update-epochs 3 --eval-steps 8_000"
COMMANDS = (
    "actor_distill.py --capacity medium --eval-steps 50_000",
    f"ppo_atari_teacher.py {GAME} --save-path checkpoints/demo.pt --total-timesteps 16_384 {SMALL}",
    f"collect_buffer.py {GAME} --num-samples 10_000",
    f"actor_distill.py {GAME} --epochs 3 --eval-steps 8_000",
    f"finetune_student.py {GAME} --total-timesteps 8_192 {SMALL}",
)


def main():
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    machine = f"{os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}"
    machine += f", torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, one run each"
    lines = [f"`python benchmark/expect.py`, {machine}.", ""]
    lines += ["| command | wall time | peak memory | writes |", "|---|---|---|---|"]
    printed = []
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
        for command in COMMANDS:
            output.truncate(output.seek(0))
            (script, *flags), start = command.split(), time.perf_counter()
            options = {"cwd": folder, "stdout": output, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen([sys.executable, ROOT / script, *flags], **options)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            output.seek(0)
            text = output.read()
            if status:
                sys.exit(f"python {command}: failed; run it by hand to see why")
            wrote = Path(folder, re.search(r"^wrote +(\S+\.(?:pt|npz))", text, re.MULTILINE)[1])
            figures = f"{usage.ru_maxrss / 1e6:.2f} GB | {wrote.stat().st_size / 1e6:.1f} MB"
            lines.append(f"| `python {command}` | {seconds:.0f} s | {figures} |")
            printed += ["", f"`python {command}` printed:", "", "```", text.rstrip(), "```"]
    Path(ROOT, "benchmark/results/expect.md").write_text("\n".join([*lines, *printed]) + "\n")


if __name__ == "__main__":
    main()
