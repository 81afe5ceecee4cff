"""Copy a checkpoint for shipping: without what only a resume needs, its weights in float16.

    python tools/strip_checkpoint.py checkpoints/PongNoFrameskip-v4/ppo_high.pt \\
        pretrained/PongNoFrameskip-v4/ppo_high.pt
"""

from pathlib import Path

import torch
import tyro


def main(source: tyro.conf.Positional[str], target: tyro.conf.Positional[str]):
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    for name in ("optimizer", "rng", "last_model"):
        checkpoint.pop(name, None)
    checkpoint["model"] = {name: x.half().contiguous() for name, x in checkpoint["model"].items()}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, target)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
