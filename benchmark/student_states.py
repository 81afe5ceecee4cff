"""A second round of samples: the student plays, the teacher says what it would have done there.

    python benchmark/student_states.py --env-id BreakoutNoFrameskip-v4 --teacher-path acktr.pt
        --student-path checkpoints/BreakoutNoFrameskip-v4/distilled_low.pt --buffer-path buffers/2.npz

Writes a buffer like that of `collect_buffer.py`, except that the states are those of the student's
games. `distill_defaults.py` learns from several buffers at once.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import actor_distill as distill
import collect_buffer as collection


@dataclass
class Args:
    teacher_path: str
    """who labels; what `collect_buffer.py` reads"""
    student_path: str
    """who plays; a checkpoint of this project"""
    buffer_path: str
    """buffer to write"""
    env_id: str = "PongNoFrameskip-v4"
    """game of both"""
    num_samples: int = 100_000
    """steps to record"""
    num_envs: int = 64
    """games played at once"""
    seed: int = 1
    """seed of games and actions"""


def main(args):
    args.env_id, rom = collection.resolve_game(args.env_id)
    device = collection.set_up_torch(args.seed, True)
    envs = collection.AtariEnvs(rom, args.num_envs, 0.0, life_loss=False)
    actions = envs.action_meanings
    about, teacher = collection.load_teacher(args.teacher_path, args.env_id, len(actions))
    _, student = distill.load_checkpoint(args.student_path, args.env_id, "name another student")
    play_style = (args.seed, False, None)
    arrays = collection.collect(student.to(device), envs, args.num_samples, *play_style, device)
    frames, stack_index = arrays["frames"], arrays["stack_index"]
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(stack_index)), len(stack_index) // 512 + 1):
            obs = torch.from_numpy(frames[stack_index[rows]]).to(device)
            logits, values = teacher.to(device)(obs)
            arrays["action_probs"][rows] = logits.softmax(-1).cpu().numpy()
            arrays["values"][rows] = values.cpu().numpy()
    meta = {"env_id": args.env_id, "action_meanings": actions, "targets": "action_probs"}
    meta |= {"teacher": about, "steps": len(stack_index), "args": vars(args)}
    with open(args.buffer_path, "wb") as file:
        np.savez_compressed(file, **arrays, meta=np.array(json.dumps(meta)))
    print(f"wrote {args.buffer_path}, {len(stack_index):,} samples")


if __name__ == "__main__":
    main(tyro.cli(Args))
