"""Record policies that play side by side, as a GIF or an MP4, in the game's own colours.

    pip install -r tools/requirements.txt
    python tools/record_video.py --checkpoints pretrained/PongNoFrameskip-v4/ppo_high.pt
    python tools/record_video.py --env-id BreakoutNoFrameskip-v4 --path breakout.mp4 --checkpoints
        checkpoints/BreakoutNoFrameskip-v4/{ppo_high,distilled_medium,distilled_low}.pt

A checkpoint may be of any phase, or any teacher that `collect_buffer.py` reads. All play the same
game, by the same seed, until its end or the end of the video. A caption holds the number of weights
and the score so far.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if importlib.util.find_spec("imageio") is None:
    sys.exit("imageio is missing; pip install -r tools/requirements.txt")

import imageio.v3 as iio
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import collect_buffer

FRAMES_PER_SECOND = 15  # the emulator's 60, of which a step takes four
WIDTH, HEIGHT, CAPTION, GAP = 160, 210, 48, 8


@dataclass
class Args:
    checkpoints: tuple[str, ...]
    """policies to show, from left to right"""
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game"""
    path: str = "video.gif"
    """file to write, `.gif` or `.mp4`"""
    overwrite: bool = False
    """replace `path` if it exists"""
    seconds: float = 30
    """length of the video, which plays as fast as the console did"""
    skip: float = 0
    """seconds of the game to leave out at its start"""
    scale: int = 1
    """pixels on a side for each pixel of the game"""
    seed: int = 1
    """seed of the game and of the sampled actions"""
    greedy: bool = False
    """take a policy's most probable action instead of sampling; Q-values always play their best"""


class ColorTwin:
    """The games of an AtariEnvs once more, in colour and at the console's resolution.

    By the same seeds and actions they are the same games. `picture` is uint8 [N, 210, 160, 3].
    """

    def __init__(self, rom, envs):
        self.envs = envs
        self.colored = AtariVectorEnv(
            rom,
            envs.num_envs,
            autoreset_mode="SameStep",
            reward_clipping=False,
            grayscale=False,
            img_width=WIDTH,
            img_height=HEIGHT,
            stack_num=1,
        )

    def reset(self, seed):
        obs, _ = self.envs.reset(seed=seed)
        self.picture = self.colored.reset(seed=seed)[0][:, 0]
        return obs

    def step(self, actions):
        """Both play `actions`, or FIRE where it is forced: what each `step` returns, two tuples."""
        if self.envs.forced.any():
            actions = np.where(self.envs.forced, self.envs.fire, actions)
        colored = self.colored.step(actions)
        self.picture = colored[0][:, 0]
        return self.envs.step(actions), colored


@torch.inference_mode()
def record(agents, rom, steps, skip, seed, greedy):
    """Yield a picture of each game, uint8 [N, 210, 160, 3], and the scores, float [N], each step.

    `greedy` holds a bool for each agent: play the best action, or sample. A game that is over stays
    as it ended; the recording ends with the last game.
    """
    twin = ColorTwin(rom, collect_buffer.AtariEnvs(rom, len(agents), 0.0, life_loss=False))
    generator = torch.Generator().manual_seed(seed)
    obs = twin.reset(collect_buffer.game_seeds(1, seed, 3).repeat(len(agents)))
    playing, score = np.ones(len(agents), bool), np.zeros(len(agents))
    picture = twin.picture.copy()
    for step in range(skip + steps):
        if step >= skip:
            yield picture.copy(), score.copy()
        if not playing.any():
            break
        pairs = zip(agents, torch.from_numpy(obs).unsqueeze(1), strict=True)
        logits = torch.cat([agent(x)[0] for agent, x in pairs])
        sampled = collect_buffer.sample_actions(logits, generator)
        actions = torch.where(torch.tensor(greedy), logits.argmax(-1), sampled)
        (obs, reward, terminated, truncated, _), _ = twin.step(actions.numpy())
        score += reward * playing
        playing &= ~(terminated | truncated)
        picture[playing] = twin.picture[playing]


def draw(picture, labels, scores, scale):
    """One frame of the video, uint8 [H, W, 3]: the games side by side, each above its caption."""
    step = scale * (WIDTH + GAP)
    size = (step * len(labels) - scale * GAP, scale * (HEIGHT + CAPTION))
    frame = Image.new("RGB", tuple(x + x % 2 for x in size), "white")  # MP4 wants even sides
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(11 * scale)
    for i, (game, label, score) in enumerate(zip(picture, labels, scores, strict=True)):
        game = Image.fromarray(game).resize((scale * WIDTH, scale * HEIGHT), Image.NEAREST)
        frame.paste(game, (i * step, 0))
        place = (i * step + scale * WIDTH // 2, scale * (HEIGHT + CAPTION // 2))
        text = f"{label}\nscore {score:g}"
        pen.multiline_text(place, text, "black", font, anchor="mm", align="center")
    return np.asarray(frame)


def main(args):
    env_id, rom = collect_buffer.resolve_game(args.env_id)
    if not args.path.endswith((".gif", ".mp4")):
        sys.exit(f"--path {args.path}: must end in .gif or .mp4")
    num_actions = len(collect_buffer.AtariEnvs(rom, 1, 0.0, life_loss=False).action_meanings)
    agents, labels, greedy = [], [], []
    for checkpoint in args.checkpoints:
        about, agent = collect_buffer.load_teacher(checkpoint, env_id, num_actions)
        agents.append(agent.to(memory_format=torch.channels_last))
        greedy.append(args.greedy or about["args"].get("loss") == "mse")
        thousands = sum(x.numel() for x in agent.parameters()) / 1000
        kind = about["phase"].replace("ppo", "PPO")
        if about["capacity"] in ("high", "medium", "low"):
            kind += f", {about['capacity']}"
        labels.append(f"{kind}\n{thousands:,.0f} thousand weights")
    collect_buffer.lock_output(args.path, args.overwrite)
    steps, skip = (round(x * FRAMES_PER_SECOND) for x in (args.seconds, args.skip))
    bar = collect_buffer.progress(total=skip + steps, initial=skip, unit="step")
    frames = []
    for picture, scores in record(agents, rom, steps, skip, args.seed, greedy):
        frames.append(draw(picture, labels, scores, args.scale))
        bar.update()
    bar.close()
    if not frames:
        sys.exit(f"--skip {args.skip}: every game ended before; pass less")
    written = Path(args.path).with_stem(f"{Path(args.path).stem}.tmp")
    # a GIF tells the length of each frame in hundredths of a second
    ends = np.arange(len(frames) + 1) * 100 // FRAMES_PER_SECOND
    options = {"loop": 0, "duration": (10 * np.diff(ends)).tolist()}
    if args.path.endswith(".mp4"):
        options = {"fps": FRAMES_PER_SECOND, "macro_block_size": 2}
    iio.imwrite(written, frames, **options)
    os.replace(written, args.path)
    size = os.path.getsize(args.path) / 1e6
    print(f"wrote       {args.path}, {len(frames) / FRAMES_PER_SECOND:.1f} s, {size:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args))
