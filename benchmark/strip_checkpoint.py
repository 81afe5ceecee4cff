"""Copy a checkpoint without its optimiser and random state, for shipping.

    python benchmark/strip_checkpoint.py checkpoints/PongNoFrameskip-v4/ppo_high.pt \\
        pretrained/PongNoFrameskip-v4/ppo_high.pt
"""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    source, target = sys.argv[1:]
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    checkpoint = {name: x for name, x in checkpoint.items() if name not in ("optimizer", "rng")}
    checkpoint["model"] = {name: x.contiguous() for name, x in checkpoint["model"].items()}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, target)
