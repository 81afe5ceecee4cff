"""Phase 3 of actor distillation: fit a fresh student to the teacher's replay buffer, offline.

    python actor_distill.py --capacity medium --epochs 400
    python actor_distill.py --env-id BreakoutNoFrameskip-v4 --capacity low
    python actor_distill.py --eval-only checkpoints/PongNoFrameskip-v4/distilled_medium.pt

The student minimises Eq. 3 of Green, Vineyard & Koç (2019), "Distillation Strategies for Proximal
Policy Optimization": the divergence KL(teacher || student), summed over the actions, averaged over
the batch, without a temperature. A held-out share of the buffer tells when more epochs stop paying,
the proxy metric that the paper leaves to future work.

One step is one action of the agent, which the emulator repeats for four frames; one sample is one
step of the buffer. `global_step` counts the samples seen.
"""

import contextlib
import copy
import difflib
import json
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Experiment
    exp_name: str = "actor_distill"
    """name of this experiment, part of the run's name; no slash"""
    seed: int = 1
    """seed of the initial weights, the held-out share, the shuffles and the games; 0 or more"""
    cuda: bool = True
    """use a CUDA GPU when there is one"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic kernels only; off, it picks the fastest"""
    track: bool = False
    """mirror every logged metric to Weights & Biases"""
    wandb_project_name: str = "actor-distillation"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B entity (user or team); without it, the login's default"""
    capacity: Literal["high", "medium", "low"] | None = None
    """size of the student, Table 2; default medium, with --eval-only the checkpoint's"""
    buffer_path: str | None = None
    """buffer to learn from; default `buffers/{env_id}.npz`, or the shipped one of that game"""
    save_path: str | None = None
    """checkpoint to write; default `checkpoints/{env_id}/distilled_{capacity}.pt`"""
    overwrite: bool = False
    """replace `save_path` if it exists"""

    # Evaluation
    eval_steps: int = 1_000_000
    """budget of the evaluation after distillation; 0 skips it"""
    eval_greedy: bool = False
    """evaluate the most probable action instead of sampling from the policy"""
    eval_only: str | None = None
    """distil nothing: evaluate this checkpoint, of any phase, and leave it as it is"""

    # Environment, of the evaluation
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the Atari game; `ALE/Pong-v5` and `Pong-v5` name the same game"""
    num_envs: int = 16
    """games played at once"""
    repeat_action_probability: float = 0.0
    """sticky actions: chance that the emulator repeats the last action in a frame, 0 to 1"""

    # Algorithm
    epochs: int = 10
    """passes over the buffer; the paper uses 10 to 400"""
    batch_size: int = 64
    """samples a gradient step; the last batch of an epoch may be smaller"""
    learning_rate: float = 1e-3
    """Adam's learning rate at the start"""
    anneal_lr: bool = False
    """lower the learning rate linearly, to 0 after the last batch of the last epoch"""
    temperature: float = 1.0
    """divide the teacher's log-probabilities by this first (Eq. 2); below 1 sharpens, 1 is Eq. 3"""
    value_coef: float = 0.0
    """weight of a squared error that fits the critic to the teacher's values; 0 leaves it random"""
    validation_fraction: float = 0.05
    """share of the samples to hold out, 0.001 to 0.5: whole episodes, or where they are too long
    for that, the buffer's last stretch"""
    early_stop_patience: int = 0
    """stop after this many epochs without a lower held-out KL and keep the best epoch's weights;
    0 runs every epoch and keeps the last"""


class UsageError(Exception):
    """A flag or a file that cannot be used: shown as one line on stderr, with exit status 2."""


def check_flags(args, **ranges):
    """Check that numeric flags lie in their ranges, given as name=(lowest, highest); None passes.

    Raises:
        UsageError: naming the flag, its value and its range.
    """
    for name, (lowest, highest) in ranges.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value <= highest:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value}: must be {lowest:,} to {highest:,}")


def resolve_game(env_id):
    """Find the game that a gymnasium id names.

    Args:
        env_id: `PongNoFrameskip-v4`, `ALE/Pong-v5` or `Pong-v5`.

    Returns:
        The canonical id and ale-py's ROM name: ("MsPacmanNoFrameskip-v4", "ms_pacman").

    Raises:
        UsageError: for an unknown game, with the closest names.
    """
    two_players = {"combat", "joust", "maze_craze", "warlords"}
    games = {f"{rom.title().replace('_', '')}NoFrameskip-v4": rom
             for rom in roms.get_all_rom_ids() if rom not in two_players}
    canonical = re.sub(r"^(ALE/)?(\w+)-v5$", r"\2NoFrameskip-v4", env_id)
    if canonical not in games:
        close = ", ".join(difflib.get_close_matches(canonical, games, cutoff=0))
        raise UsageError(f"--env-id {env_id}: no such game; the closest names are {close}")
    if canonical != env_id:
        print(f"game        {env_id} is {canonical} here; sticky actions stay at the value of "
              "--repeat-action-probability")
    return canonical, games[canonical]


def preprocessing():
    """The emulator's settings that shape an observation, by ale-py's names."""
    return {"frameskip": 4, "maxpool": True, "grayscale": True, "img_height": 84, "img_width": 84,
            "stack_num": 4, "noop_max": 30, "use_fire_reset": True}


def make_envs(rom, num_envs, life_loss, repeat_action_probability):
    """Games that run and are preprocessed on ale-py's C++ threads.

    A game that ends restarts within the same step, so that no step is lost to a reset; rewards
    stay raw. With `life_loss` a lost life also reports `terminated`, while the game goes on.

    Args:
        rom: ale-py's name of the game, such as "ms_pacman".
        num_envs: number of games.
        life_loss: whether a lost life ends an episode.
        repeat_action_probability: sticky actions, 0 to 1.

    Returns:
        An AtariVectorEnv whose observations are uint8 [num_envs, 4, 84, 84], the oldest frame
        first, with blank frames before a game's start.
    """
    return AtariVectorEnv(rom, num_envs, autoreset_mode=AutoresetMode.SAME_STEP,
                          reward_clipping=False, life_loss_info=life_loss,
                          repeat_action_probability=repeat_action_probability, **preprocessing())


def game_seeds(num_envs, *entropy):
    """One emulator seed a game, int64 [num_envs], independent for different `entropy` (integers).

    ale-py's own `reset(seed=1)` and `reset(seed=2)` would share all games but one.
    """
    return (np.random.SeedSequence(entropy).generate_state(num_envs) >> 1).astype(np.int64)


def layer_init(layer, std=math.sqrt(2)):
    """Orthogonal weights with gain `std` and zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Three convolutions and a hidden layer, shared by a policy head and a value head: Table 2.

    Table 2 prints stride 3 for medium's second convolution, but only stride 2 gives the 422,912
    weights that it counts.
    """

    SIZES = {"high": (32, 64, 64, 512), "medium": (16, 32, 32, 256), "low": (8, 16, 16, 128)}

    def __init__(self, capacity, num_actions):
        super().__init__()
        c1, c2, c3, hidden = self.SIZES[capacity]
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, c1, 8, stride=4)), nn.ReLU(),
            layer_init(nn.Conv2d(c1, c2, 4, stride=2)), nn.ReLU(),
            layer_init(nn.Conv2d(c2, c3, 3)), nn.ReLU(), nn.Flatten(),
            layer_init(nn.Linear(c3 * 7 * 7, hidden)), nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(hidden, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(hidden, 1), std=1)

    def forward(self, obs):
        """Observations uint8 [B, 4, 84, 84] to logits float32 [B, A] and values float32 [B]."""
        # channels_last is the layout in which small convolutions are fastest on a CPU
        x = obs.to(torch.float32, memory_format=torch.channels_last) / 255
        hidden = self.network(x)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def sample_actions(logits, generator=None):
    """Draw actions int64 [B] from softmax(logits), logits float [B, A], by the Gumbel-max trick."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)


@contextlib.contextmanager
def atomic_write(path):
    """Open a file that stands at `path` whole when the block ends, and not at all if it raises."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path, overwrite):
    """Make sure that `path` can be written, before any work is spent on its content.

    Raises:
        UsageError: if it exists and `overwrite` is false, is a folder, or lies where none can be.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; name a file")
        if path.exists() and not overwrite:
            raise UsageError(f"{path}: exists already; pass --overwrite, or another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{path}: cannot be written, {error.strerror}; name another") from None


def default_path(path, shipped):
    """`path`, or if nothing is there, the file of `pretrained/` that serves in its place, if any.

    Args:
        path: where a script of this project would have written the file.
        shipped: name of the file in the folder `pretrained/` beside this script.
    """
    shipped = Path(__file__).resolve().parent / "pretrained" / shipped
    if Path(path).exists() or not shipped.exists():
        return path
    print(f"pretrained  {os.path.relpath(shipped)} serves as {path}, which is not there")
    return os.path.relpath(shipped)


def load_checkpoint(path, env_id, num_actions, made_by, capacity=None):
    """Read a checkpoint of this project, of any phase, and its network; run no code in the file.

    Args:
        path: the `.pt` file.
        env_id: canonical id of the game that it must belong to.
        num_actions: size of that game's action set.
        made_by: command that makes such a file, for the messages.
        capacity: size that the network must have, if any.

    Returns:
        The checkpoint, a dict whose tensors are on the CPU, and its Agent.

    Raises:
        UsageError: if the file is missing, damaged, foreign, of another game, or does not fit.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; make it with `{made_by}`")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the CRCs, and one flipped bit is a wrong weight
            if archive.testzip() is not None:
                raise ValueError("CRC mismatch")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can make the parsers raise anything
        raise UsageError(f"{path}: damaged, or no PyTorch checkpoint ({type(error).__name__}); "
                         f"make it anew with `{made_by}`") from None
    needed = {"format_version", "phase", "env_id", "capacity", "num_actions", "global_step",
              "model", "args", "evaluation"}
    if (not isinstance(checkpoint, dict) or not needed <= checkpoint.keys()
            or not isinstance(checkpoint["args"], dict)
            or not isinstance(checkpoint["global_step"], int)):
        raise UsageError(f"{path}: not a checkpoint of this project; make one with `{made_by}`")
    if checkpoint["format_version"] != 1:
        raise UsageError(f"{path}: this script reads format version 1; update the script")
    if checkpoint["env_id"] != env_id:
        raise UsageError(f"{path}: belongs to {checkpoint['env_id']}, not to {env_id}; "
                         f"pass --env-id {checkpoint['env_id']}")
    if capacity not in (None, checkpoint["capacity"]):
        raise UsageError(f"{path}: holds a {checkpoint['capacity']} network, not {capacity}; "
                         "leave out --capacity")
    try:
        agent = Agent(checkpoint["capacity"], num_actions)
        agent.load_state_dict(checkpoint["model"])
    except Exception:
        raise UsageError(f"{path}: its weights do not fit a {checkpoint['capacity']} network with "
                         f"{num_actions} actions; make it anew with `{made_by}`") from None
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise UsageError(f"{path}: holds weights that are not finite; make it with `{made_by}`")
    return checkpoint, agent


@torch.inference_mode()
def play(agent, envs, eval_steps, seed, greedy):
    """Play whole games, in a way that favours neither short nor long ones.

    Game slot e retires at its first game end at or after its own step ceil(eval_steps / num_envs).
    Every game that it began until then counts, and none after: counting only what has finished
    within the budget would leave long games out.

    Args:
        agent: maps observations uint8 [B, 4, 84, 84] to (logits, values).
        envs: AtariVectorEnv of `make_envs(..., life_loss=False)`.
        eval_steps: budget, summed over the slots; games under way go on to their end.
        seed: of the games and the actions; training's random state is neither read nor changed.
        greedy: take the most probable action instead of sampling.

    Returns:
        Raw returns [G] and lengths in steps [G]: two lists, in the order in which the games ended.
    """
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    obs, _ = envs.reset(seed=game_seeds(envs.num_envs, seed, 3))
    playing = np.ones(envs.num_envs, bool)
    game_return, game_length = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    returns, lengths = [], []
    slot_step, quota = 0, math.ceil(eval_steps / envs.num_envs)
    with tqdm(desc="evaluate", unit="step", dynamic_ncols=True, mininterval=1) as bar:
        while playing.any():
            logits, _ = agent(torch.from_numpy(obs).to(device))
            action = logits.argmax(-1) if greedy else sample_actions(logits, generator)
            obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
            slot_step += 1
            game_return += reward
            game_length += 1
            ended = terminated | truncated
            returns += game_return[ended & playing].tolist()
            lengths += game_length[ended & playing].tolist()
            game_return[ended] = game_length[ended] = 0
            bar.total = max(eval_steps, bar.n + int(playing.sum()))
            bar.update(int(playing.sum()))
            if slot_step >= quota:
                playing &= ~ended
                bar.set_postfix_str(f"{playing.sum()} games still to end", refresh=False)
    return returns, lengths


def summarize(returns):
    """Describe the returns of G games, as a dict of plain numbers.

    std is that of the games themselves (ddof 0). The interquartile mean `iqm` leaves out the
    floor(G / 4) lowest and highest games. `ci95` is the 95% percentile bootstrap interval of the
    mean, from 2,000 resamples of the games.
    """
    scores = np.sort(np.asarray(returns, np.float64))
    cut = len(scores) // 4
    means = np.random.default_rng(0).choice(scores, (2000, len(scores))).mean(1)
    return {"mean": float(scores.mean()), "std": float(scores.std()), "max": float(scores.max()),
            "episodes": len(scores), "iqm": float(scores[cut:len(scores) - cut].mean()),
            "ci95": [float(bound) for bound in np.percentile(means, (2.5, 97.5))]}


def evaluate(agent, rom, args, identity, path):
    """Evaluate a policy by the rule of `play`; write the figures as JSON and print a line of them.

    Args:
        agent: the policy.
        rom: ale-py's name of the game.
        args: eval_steps, eval_greedy, num_envs, seed and repeat_action_probability are read.
        identity: env_id, phase, capacity and checkpoint of the policy; the JSON repeats them.
        path: file to write, such as `runs/{run_name}/eval.json`.

    Returns:
        What was written, without the list of every game's return and length.
    """
    envs = make_envs(rom, args.num_envs, False, args.repeat_action_probability)
    returns, lengths = play(agent, envs, args.eval_steps, args.seed, args.eval_greedy)
    envs.close()
    result = {**identity, "seed": args.seed, "greedy": args.eval_greedy, "num_envs": args.num_envs,
              "repeat_action_probability": args.repeat_action_probability,
              "eval_steps": args.eval_steps, "steps": sum(lengths), **summarize(returns)}
    with atomic_write(path) as file:
        file.write(json.dumps({**result, "returns": returns, "lengths": lengths}).encode())
    low, high = result["ci95"]
    different = f" with {len(set(returns))} different returns" if args.eval_greedy else ""
    print(f"evaluation  {result['env_id']} {result['phase']} {result['capacity']}: mean "
          f"{result['mean']:.2f} ± {result['std']:.2f}, max {result['max']:g}, "
          f"{len(returns)} games{different}, {result['steps']:,} steps, iqm {result['iqm']:.2f}, "
          f"95% interval of the mean {low:.2f} to {high:.2f}")
    return result


class Logger:
    """Scalars to TensorBoard in `runs/{run_name}` and, with `--track`, to a W&B run of that name.

    Args:
        run_name: unique name, no slash.
        args: dataclass of flags, which are recorded; track and wandb_* are read.
        group: W&B's group, the game.
        purge_step: on a resume, the first step whose earlier events TensorBoard drops.
    """

    def __init__(self, run_name, args, group, purge_step=None):
        self.writer = SummaryWriter(f"runs/{run_name}", purge_step=purge_step)
        rows = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}", purge_step or 0)
        self.wandb_run = None
        if args.track:
            try:
                import wandb

                self.wandb_run = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=run_name,
                    group=group, job_type=args.exp_name, config=vars(args), save_code=True)
                self.wandb_run.define_metric("*", step_metric="global_step")
            except Exception as error:  # a run is worth more than its mirror
                print(f"warning: no W&B, TensorBoard only: {error}", file=sys.stderr)

    def log(self, metrics, global_step):
        """Record a dict of numbers by name, at a step that never goes back."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, global_step)
        if self.wandb_run is not None:
            self.wandb_run.log({**metrics, "global_step": global_step})

    def close(self):
        """Write out what is still pending."""
        self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def new_run(env_id, args):
    """Make a new folder in `runs/` and return its name, `{env_id}__{exp_name}__{seed}__{time}`.

    Raises:
        UsageError: if exp_name holds a slash.
    """
    if not re.fullmatch(r"[^/\\\0]+", args.exp_name):
        raise UsageError(f"--exp-name {args.exp_name}: must be a name without a slash")
    name = f"{env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    while Path("runs", name).exists():
        name += "-2"
    Path("runs", name).mkdir(parents=True)
    return name


def set_up_torch(args):
    """Seed torch, set cuDNN's determinism, and return the device that the flags ask for."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def load_buffer(path, env_id, action_meanings, made_by):
    """Read a buffer of `collect_buffer.py`, with every check that a wrong file would fail.

    Args:
        path: the `.npz` file.
        env_id: canonical id of the game that it must belong to.
        action_meanings: names of that game's actions, in order.
        made_by: command that makes such a file, for the messages.

    Returns:
        frames, stack_index, action_probs, values and episode_index, as `collect` describes them,
        and `meta`, a dict: all by name.

    Raises:
        UsageError: if the file is missing, damaged, foreign, or of other observations or actions.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; make it with `{made_by}`")
    names = {"frames": np.uint8, "stack_index": np.int32, "action_probs": np.float32,
             "values": np.float32, "episode_index": np.int32}
    try:
        with np.load(path, allow_pickle=False) as archive:
            meta = json.loads(str(archive["meta"]))
            if meta["teacher"]["evaluation"] is not None:
                float(meta["teacher"]["evaluation"]["mean"])
            wanted = {"format_version": 1, "env_id": env_id, "action_meanings": action_meanings,
                      "preprocessing": preprocessing()}
            different = [name for name in wanted if meta[name] != wanted[name]]
            buffer = {} if different else {name: archive[name] for name in names}
    except Exception as error:  # a foreign file can make the parsers raise anything
        raise UsageError(f"{path}: damaged, or no buffer of this project ({type(error).__name__}: "
                         f"{error}); make it anew with `{made_by}`") from None
    for name in different:
        raise UsageError(f"{path}: its {name} is {meta[name]}, not {wanted[name]}; pass another "
                         f"--env-id or --buffer-path, or make it with `{made_by}`")
    frames, samples = buffer["frames"].shape[:1], buffer["stack_index"].shape[:1]
    shapes = {"frames": (*frames, 84, 84), "stack_index": (*samples, 4), "values": samples,
              "action_probs": (*samples, len(action_meanings)), "episode_index": samples}
    for name, dtype in names.items():
        if buffer[name].dtype != dtype or buffer[name].shape != shapes[name]:
            raise UsageError(f"{path}: array {name} is {buffer[name].dtype} {buffer[name].shape}, "
                             f"not {np.dtype(dtype)} {shapes[name]}; make it with `{made_by}`")
    if samples[0] < 2:
        raise UsageError(f"{path}: has too few samples to learn from; make it with `{made_by}`")
    index, probs = buffer["stack_index"], buffer["action_probs"]
    bad = {"stack_index": ((index < 0) | (index >= len(buffer["frames"]))).any(1),
           "action_probs": ~((probs >= 0).all(1) & (abs(probs.sum(1) - 1) < 1e-3)),
           "values": ~np.isfinite(buffer["values"]),
           "episode_index": ~np.isin(np.diff(buffer["episode_index"], prepend=0), (0, 1))}
    for name, rows in bad.items():
        if rows.any():
            raise UsageError(f"{path}: array {name} is invalid, first in row {rows.argmax()}; "
                             f"make it anew with `{made_by}`")
    return buffer | {"meta": meta}


def split_episodes(episode_index, fraction, seed):
    """Hold out whole episodes, drawn at random until they make up `fraction` of the samples.

    Where that would hold out more than twice as much, because the buffer has few and long
    episodes, the buffer's last stretch of the wanted length is held out instead.

    Args:
        episode_index: int32 [N], the episode of each sample, ascending.
        fraction: share to hold out, 0 to 1.
        seed: of the draw.

    Returns:
        Rows to train on and rows to hold out, int64, both ascending and neither empty for N > 1.
    """
    wanted = min(max(1, round(fraction * len(episode_index))), len(episode_index) - 1)
    lengths = np.bincount(episode_index)
    drawn = np.random.default_rng((seed, 4)).permutation(len(lengths))
    drawn = drawn[:np.searchsorted(np.cumsum(lengths[drawn]), wanted) + 1]
    held_out = np.isin(episode_index, drawn)
    if held_out.sum() > 2 * wanted or held_out.all():
        held_out = np.arange(len(episode_index)) >= len(episode_index) - wanted
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def soften(probs, temperature):
    """The teacher's target softmax(log(probs) / temperature), Eq. 2: float32 [N, A] to the same."""
    return probs if temperature == 1 else (probs.log() / temperature).softmax(-1)


def kl_divergence(target_probs, logits):
    """KL(teacher || student) = sum_a p_a log(p_a / q_a), Eq. 3 of the paper, in nats.

    Args:
        target_probs: float32 [B, A], p, the teacher's; zeros are allowed.
        logits: float32 [B, A], the student's; q = softmax(logits).

    Returns:
        float32 [B], one divergence a sample, to be averaged over the batch.
    """
    return (target_probs.xlogy(target_probs) - target_probs * logits.log_softmax(-1)).sum(-1)


def distill_update(agent, optimizer, obs, target_probs, target_values, value_coef):
    """One optimiser step of the student on one batch; no value leaves the device.

    Args:
        obs: uint8 [B, 4, 84, 84].
        target_probs, target_values: float32 [B, A] and [B], the teacher's.
        value_coef: weight of 0.5 (V - V_teacher)^2; at 0 the critic is not touched.

    Returns:
        Sums over the batch, float32 [2], detached: of the KL and of the squared value error.
    """
    logits, values = agent(obs)
    kl = kl_divergence(target_probs, logits)
    value_error = (values - target_values).square()
    loss = kl.mean()
    if value_coef:
        loss = loss + 0.5 * value_coef * value_error.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return torch.stack((kl.sum(), value_error.sum())).detach()


@torch.inference_mode()
def validate(agent, get_batch, rows):
    """Compare student and teacher on held-out samples.

    Args:
        agent: the student.
        get_batch: maps rows int64 [B] to (obs, target_probs, target_values); the targets are the
            teacher's, softened by the temperature.
        rows: int64 [M], the held-out samples.

    Returns:
        By name: `validation/kl`, the mean KL in nats; `validation/agreement`, the share of samples
        on which both find the same action most probable; `validation/entropy_gap`, the student's
        mean entropy less the teacher's, in nats; `validation/value_loss`, half the mean squared
        error of the critic.
    """
    sums = 0
    for batch in rows.split(1024):
        obs, probs, target_values = get_batch(batch)
        logits, values = agent(obs)
        student = logits.softmax(-1)
        sums = sums + torch.stack((
            kl_divergence(probs, logits).sum(), (logits.argmax(-1) == probs.argmax(-1)).sum(),
            probs.xlogy(probs).sum() - student.xlogy(student).sum(),
            0.5 * (values - target_values).square().sum()))
    means = (sums / len(rows)).tolist()
    return dict(zip(("validation/kl", "validation/agreement", "validation/entropy_gap",
                     "validation/value_loss"), means))


def share_of_teacher(result, teacher):
    """A sentence on a policy's mean return as a share of its teacher's.

    Args:
        result: what `evaluate` returned for the policy, or None.
        teacher: what the buffer or checkpoint says of the teacher, or None.
    """
    taught = teacher and teacher["evaluation"]
    if result is None or taught is None:
        return "no share of the teacher's mean, since not both were evaluated"
    text = f"mean {result['mean']:.2f}, its teacher's {taught['mean']:.2f}: "
    if min(result["mean"], taught["mean"]) <= 0:
        text += "no share, since not both are positive"
    else:
        text += f"{100 * result['mean'] / taught['mean']:.1f}% of its teacher"
    rules = ("greedy", "repeat_action_probability")
    if any(result[rule] != taught.get(rule) for rule in rules):
        text += f" (not comparable: {' or '.join(rules)} differs between the two evaluations)"
    return text


def main(args):
    env_id, rom = resolve_game(args.env_id)
    check_flags(args, seed=(0, 2**63 - 1), num_envs=(1, 1024), repeat_action_probability=(0, 1),
                eval_steps=(0 if args.eval_only is None else 1, 10**12), epochs=(1, 10**6),
                batch_size=(1, 10**6), learning_rate=(1e-12, 1e3), temperature=(1e-6, 1e6),
                value_coef=(0, 1e6), validation_fraction=(0.001, 0.5),
                early_stop_patience=(0, 10**6))
    device = set_up_torch(args)
    envs = make_envs(rom, 1, False, args.repeat_action_probability)
    action_meanings = [action.name for action in envs.ale.get_action_set()]
    envs.close()

    if args.eval_only is not None:
        checkpoint, agent = load_checkpoint(args.eval_only, env_id, len(action_meanings),
                                            f"python actor_distill.py --env-id {env_id}",
                                            args.capacity)
        path = f"runs/{new_run(env_id, args)}/eval.json"
        identity = {name: checkpoint[name] for name in ("env_id", "phase", "capacity")}
        evaluate(agent.to(device, memory_format=torch.channels_last), rom, args,
                 identity | {"checkpoint": args.eval_only}, path)
        print(f"wrote       {path}")
        return

    args.capacity = args.capacity or "medium"
    buffer_path = args.buffer_path or default_path(
        f"buffers/{env_id}.npz", f"{env_id}/buffer.npz")
    save_path = args.save_path or f"checkpoints/{env_id}/distilled_{args.capacity}.pt"
    buffer = load_buffer(buffer_path, env_id, action_meanings,
                         f"python collect_buffer.py --env-id {env_id}")
    samples = len(buffer["stack_index"])
    if args.batch_size > samples // 2:
        raise UsageError(f"--batch-size {args.batch_size}: {buffer_path} has {samples:,} samples; "
                         f"must be {samples // 2} at most")
    check_output(save_path, args.overwrite)

    frames, stack_index, action_probs, values = (
        torch.from_numpy(buffer[name]).to(device)
        for name in ("frames", "stack_index", "action_probs", "values"))
    targets = soften(action_probs, args.temperature)
    train_rows, held_out_rows = split_episodes(
        buffer["episode_index"], args.validation_fraction, args.seed)
    held_out_rows = torch.from_numpy(held_out_rows).to(device)

    def get_batch(rows):
        """Observations uint8 [B, 4, 84, 84], target probabilities and values of samples."""
        obs = frames.index_select(0, stack_index[rows].flatten()).unflatten(0, (-1, 4))
        return obs, targets[rows], values[rows]

    agent = Agent(args.capacity, len(action_meanings))
    agent = agent.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    run_name = new_run(env_id, args)
    logger = Logger(run_name, args, env_id)
    print(f"run         runs/{run_name} on {device}, {args.epochs} epochs of {len(train_rows):,} "
          f"samples, {len(held_out_rows):,} held out")

    global_step = 0
    validation = validate(agent, get_batch, held_out_rows)
    logger.log(validation, 0)
    print(f"epoch 0     held-out KL {validation['validation/kl']:.4f}, agreement "
          f"{validation['validation/agreement']:.1%}")
    best_kl, best = math.inf, None
    start_time = time.time()
    bar = tqdm(total=args.epochs * len(train_rows), desc="distil", unit="sample",
               dynamic_ncols=True, mininterval=1)
    for epoch in range(1, args.epochs + 1):
        order = np.random.default_rng((args.seed, 5, epoch)).permutation(train_rows)
        sums = torch.zeros(2, device=device)
        batches = torch.from_numpy(order).to(device).split(args.batch_size)
        for i, rows in enumerate(batches):
            if args.anneal_lr:
                fraction_left = 1 - (epoch - 1 + i / len(batches)) / args.epochs
                optimizer.param_groups[0]["lr"] = fraction_left * args.learning_rate
            sums += distill_update(agent, optimizer, *get_batch(rows), args.value_coef)
            bar.update(len(rows))
        global_step += len(train_rows)
        kl, value_error = (sums / len(train_rows)).tolist()
        if not math.isfinite(kl + args.value_coef * value_error):
            bar.close()
            raise UsageError(f"distillation diverged in epoch {epoch}, KL {kl}, value error "
                             f"{value_error}; no checkpoint was written; lower --learning-rate")
        sps = global_step / (time.time() - start_time)
        validation = validate(agent, get_batch, held_out_rows)
        logger.log({"losses/kl": kl, "losses/value_loss": 0.5 * value_error, **validation,
                    "charts/learning_rate": optimizer.param_groups[0]["lr"],
                    "charts/epoch": epoch, "charts/SPS": sps}, global_step)
        held_out_kl = validation["validation/kl"]
        bar.set_postfix_str(f"epoch {epoch}, held-out KL {held_out_kl:.4f}", refresh=False)
        state = {"epoch": epoch, "global_step": global_step, "validation": validation,
                 "model": agent.state_dict(), "optimizer": optimizer.state_dict()}
        if args.early_stop_patience:
            if held_out_kl < best_kl:
                best_kl, best = held_out_kl, copy.deepcopy(state)
            elif epoch - best["epoch"] >= args.early_stop_patience:
                break
    bar.close()
    print(f"epoch {epoch:<5} held-out KL {held_out_kl:.4f}, agreement "
          f"{validation['validation/agreement']:.1%}, entropy gap "
          f"{validation['validation/entropy_gap']:+.4f}")
    if best is not None:
        state = best
        agent.load_state_dict(state["model"])
        print(f"kept        the weights of epoch {state['epoch']}, held-out KL {best_kl:.4f}")

    identity = {"env_id": env_id, "phase": "distilled", "capacity": args.capacity,
                "checkpoint": save_path}
    teacher = buffer["meta"]["teacher"]

    def save(evaluation):
        """Write the student, and all that further distillation would need, to `save_path`."""
        rng = {"torch": torch.get_rng_state(),
               "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None}
        with atomic_write(save_path) as file:
            torch.save({"format_version": 1, **identity, **state, "teacher": teacher,
                        "num_actions": len(action_meanings), "args": vars(args),
                        "evaluation": evaluation, "run_name": run_name, "rng": rng}, file)

    save(evaluation=None)
    result = None
    if args.eval_steps:
        result = evaluate(agent, rom, args, identity, f"runs/{run_name}/eval.json")
        save(result)
        logger.log({f"eval/{name}": result[name] for name in ("mean", "std", "iqm")}, global_step)
        print(f"wrote       runs/{run_name}/eval.json")
    logger.close()
    print(f"wrote       {save_path}, {Path(save_path).stat().st_size / 1e6:.1f} MB")
    print("curves      tensorboard --logdir runs")
    print(f"next        python finetune_student.py --env-id {env_id} --student-path {save_path}")
    print(f"student     {share_of_teacher(result, teacher)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        main(tyro.cli(Args))
    except (UsageError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; no checkpoint was written", file=sys.stderr)
        sys.exit(130)
