"""Phase 3 of actor distillation: fit a fresh student to the teacher's replay buffer, offline.

    python actor_distill.py --capacity medium --epochs 400
    python actor_distill.py --resume                              # go on after an interruption
    python actor_distill.py --eval-only checkpoints/PongNoFrameskip-v4/distilled_medium.pt

In the first fifth of its training the student minimises KL(teacher || student), Eq. 3 of Green,
Vineyard & Koç (2019), "Distillation Strategies for Proximal Policy Optimization"; then it minimises
KL(student || teacher). `--loss kl` keeps to Eq. 3. From a buffer of Q-values it learns by one of
the losses of Rusu et al. 2015 (arXiv:1511.06295). `global_step` counts the samples seen.
"""

import copy
import ctypes
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    # OpenMP's threads wait for work by spinning on the cores that the games need between two
    # decisions; torch reads for how long when it is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FilePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass
class Args:
    # Experiment
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "actor_distill"
    """name of this experiment, part of the run's name"""
    seed: NonNegativeInt = 1
    """seed of the initial weights, the held-out share, the shuffles and the games"""
    cuda: bool = True
    """use a GPU where there is one"""
    compile: bool = False
    """compile network and loss of the updates; on a GPU the network becomes CUDA graphs"""
    bf16: bool = False
    """run the network in bfloat16 in training; slower on CPUs without AVX-512-BF16 or AMX"""
    track: bool = False
    """mirror the run to Weights & Biases"""
    wandb_project_name: str = "actor-distillation"
    """W&B project"""
    wandb_entity: str | None = None
    """user or team that the project belongs to; by default W&B's own choice"""
    capacity: Literal["high", "medium", "low"] = "medium"
    """size of the student, Table 2"""
    buffer_path: FilePath = "buffers/{env_id}.npz"
    """buffer to learn from; where the default is missing, the one that ships serves"""
    save_path: FilePath = "checkpoints/{env_id}/distilled_{capacity}.pt"
    """checkpoint to write after every epoch; flags in braces are filled in"""
    resume: bool = False
    """go on from `save_path`, after its last whole epoch; start anew where nothing is saved yet"""
    overwrite: bool = False
    """replace `save_path` if it exists"""

    # Evaluation
    eval_steps: NonNegativeInt = 1_000_000
    """steps of the evaluation after distillation, plus what finishes its games; 0 skips it"""
    eval_greedy: bool = False
    """evaluate the most probable action instead of sampling from the policy"""
    eval_only: FilePath | None = None
    """distil nothing: evaluate this checkpoint, of any phase"""

    # Environment
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game; `ALE/Pong-v5` and `Pong-v5` name the same game"""
    num_envs: PositiveInt = 16
    """games played at once in the evaluation"""
    repeat_action_probability: Fraction = 0.0
    """sticky actions: chance that the emulator repeats the last action in a frame"""

    # Algorithm
    epochs: PositiveInt = 10
    """passes over the buffer; the paper uses 10 to 400"""
    batch_size: PositiveInt = 64
    """samples per gradient step; the buffer has as many equal stretches, and each gives one"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or the paper's mini-batch SGD, with momentum 0.9"""
    learning_rate: PositiveFloat = 2e-3
    """highest learning rate; for SGD pass 0.01, and with `--loss kl` 0.03"""
    anneal_lr: bool = True
    """let the rate rise linearly from 0, then fall to 0"""
    warmup_fraction: Fraction = 0.1
    """share of the training in which the rate rises, with `anneal_lr`"""
    loss: Literal["reverse_kl", "kl", "mse", "nll"] | None = None
    """KL(student || teacher), KL(teacher || student), the squared error of Q-values, or the
    negative log-likelihood of the teacher's best action; default reverse_kl, for Q-values kl"""
    eq3_fraction: Fraction = 0.2
    """share of the training, at its start, in which `reverse_kl` still learns by kl, Eq. 3"""
    temperature: PositiveFloat | None = None
    """divides log-probabilities (default 1, as in Eq. 3) or Q-values (default 0.01) for a KL"""
    value_coef: float = 0.0
    """weight of a squared error that fits the critic to the teacher's values; 0 leaves it random"""
    validation_fraction: Annotated[float, Field(ge=0.001, le=0.5)] = 0.05
    """share of the samples to hold out: whole episodes or, if these are long, the last stretch"""
    early_stop_patience: NonNegativeInt = 0
    """stop after so many epochs, past Eq. 3's share, without a lower held-out loss, and keep the
    best; 0 runs them all"""


class AtariEnvs(AtariVectorEnv):
    """Atari games on ale-py's C++ threads, with the game's minimal set of actions.

    After a lost life FIRE replaces the next action, in games that have FIRE, as in the paper's
    reference code. The game and the stack of frames go on over a lost life; with `life_loss` it is
    reported as `terminated`. A game that ends begins anew within the same step. Rewards are raw.
    Observations are uint8 [N, 4, 84, 84], oldest frame first, blank before a game's start.

    `forced`, bool [N]: the games whose next step presses FIRE, whatever action is given;
    `game_over`, bool [N]: those that ended with the last step.
    """

    def __init__(self, rom, num_envs, repeat_action_probability, life_loss):
        super().__init__(
            rom,
            num_envs,
            noop_max=30,  # a game starts with 0 to 29 no-ops, or with FIRE and 0 to 28
            use_fire_reset=True,
            frameskip=4,
            maxpool=True,  # each pixel's maximum over the last two of the four frames
            max_num_frames_per_episode=108_000,
            life_loss_info=life_loss,
            reward_clipping=False,
            repeat_action_probability=repeat_action_probability,
            autoreset_mode="SameStep",
        )
        self.action_meanings = [action.name for action in self.ale.get_action_set()]
        self.fire = self.action_meanings.index("FIRE") if "FIRE" in self.action_meanings else None

    def reset(self, **options):
        obs, info = super().reset(**options)
        self.lives, self.frame_number = info["lives"], info["episode_frame_number"]
        self.forced = np.zeros(self.num_envs, bool)
        return obs, info

    def step(self, actions):
        if self.forced.any():
            actions = np.where(self.forced, self.fire, actions)
        obs, reward, terminated, truncated, info = super().step(actions)
        # neither a lost life nor `terminated` tells: only a new game sets this counter back
        self.game_over = info["episode_frame_number"] < self.frame_number
        lost_life = (0 < info["lives"]) & (info["lives"] < self.lives) & ~self.game_over
        self.forced = lost_life & (self.fire is not None)
        self.lives, self.frame_number = info["lives"], info["episode_frame_number"]
        return obs, reward, terminated, truncated, info


def game_seeds(num_envs, *entropy):
    """An emulator seed per game, int64 [num_envs], independent for different `entropy`, integers:
    the run's seed, then 2 for collection, 3 for evaluation, or 1, process and step for training.

    ale-py's own `reset(seed=1)` and `reset(seed=2)` would share all games but one.
    """
    return (np.random.SeedSequence(entropy).generate_state(num_envs) >> 1).astype(np.int64)


def layer_init(layer, std=2**0.5):
    """Orthogonal weights with gain `std` and zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Three convolutions and a hidden layer, shared by a policy head and a value head: Table 2.

    Table 2 prints stride 3 for medium's second convolution, but only stride 2 gives the 422,912
    weights that it counts. `capacity` may also be the four widths themselves.
    """

    def __init__(self, capacity, num_actions):
        super().__init__()
        sizes = {"high": (32, 64, 64, 512), "medium": (16, 32, 32, 256), "low": (8, 16, 16, 128)}
        c1, c2, c3, hidden = sizes.get(capacity, capacity)
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, c1, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(c1, c2, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(c2, c3, 3)),
            nn.Flatten(),  # before ReLU, whose gradient then has one layout only
            nn.ReLU(),
            layer_init(nn.Linear(c3 * 7 * 7, hidden)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(hidden, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(hidden, 1), std=1)

    def forward(self, obs):
        """Observations uint8 [B, 4, 84, 84] to logits float32 [B, A] and values float32 [B]."""
        # the layout in which small convolutions are fastest on a CPU; bytes are cheap to rearrange
        x = obs.contiguous(memory_format=torch.channels_last)
        x = x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x.float()
        first, *rest = self.network
        # the same as obs / 255, but divides the few weights instead of every pixel
        x = F.conv2d(x, first.weight / 255, first.bias, first.stride)
        for layer in rest:
            x = layer(x)
        return self.actor(x).float(), self.critic(x).float().squeeze(-1)


def sample_actions(logits, generator=None):
    """Draw actions int64 [B] from softmax(logits), float [B, A], by the Gumbel-max trick."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log()).argmax(-1)


def kl_divergence(target_probs, logits):
    """KL(teacher || student) = sum_a p_a log(p_a / q_a), Eq. 3 of the paper, in nats, float32 [B];
    p is the teacher's, float32 [B, A], zeros allowed, q = softmax(logits) of the student."""
    return (target_probs.xlogy(target_probs) - target_probs * logits.log_softmax(-1)).sum(-1)


def reverse_kl(target_probs, logits):
    """KL(student || teacher) = sum_a q_a log(q_a / p_a), in nats, float32 [B]: shuns what the
    teacher never does, where Eq. 3 covers all that it does. p counts as 1e-8 or more."""
    logprobs = logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - target_probs.clamp(min=1e-8).log())).sum(-1)


def squared_error(target_q, q_values):
    """|| Q_teacher - Q_student ||^2 over the actions, Rusu et al. 2015: [B, A] twice to [B]."""
    return (target_q - q_values).square().sum(-1)


def make_targets(outputs, are_q_values, loss, temperature):
    """Targets float32 [N, A] from the teacher's Q-values or probabilities of that shape.

    For a KL softmax(Q / temperature) or softmax(log(p) / temperature); for "nll" 1 for the best
    action, 0 for the others; for "mse" the Q-values.
    """
    if loss == "mse":
        return outputs
    if loss == "nll":
        return F.one_hot(outputs.argmax(-1), outputs.shape[1]).float()
    if are_q_values:  # the maximum goes first: dividing would cost large Q-values their last digits
        return ((outputs - outputs.amax(-1, keepdim=True)) / temperature).softmax(-1)
    return outputs if temperature == 1 else (outputs.log() / temperature).softmax(-1)


def split_episodes(episode_index, fraction, seed):
    """Hold out whole episodes, drawn at random until they make up `fraction` of the samples.

    Where that would be more than twice as much, as episodes are few and long, holds out the last
    stretch of the buffer. Returns rows to train on and rows to hold out, int64, both ascending.
    """
    wanted = min(max(1, round(fraction * len(episode_index))), len(episode_index) - 1)
    lengths = np.bincount(episode_index)
    drawn = np.random.default_rng((seed, 4)).permutation(len(lengths))
    drawn = drawn[: np.searchsorted(np.cumsum(lengths[drawn]), wanted) + 1]
    held_out = np.isin(episode_index, drawn)
    if held_out.sum() > 2 * wanted or held_out.all():
        held_out = np.arange(len(episode_index)) >= len(episode_index) - wanted
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def unlike_training(frames, stack_index, train_rows, held_out):
    """The held-out rows whose observation no training row has: games start alike."""
    # four checksums as one key of 16 bytes, so that isin compares whole observations
    checksums = np.array([zlib.crc32(frame) for frame in frames], np.uint32)
    observations = checksums[stack_index].view("V16").ravel()
    return held_out[~np.isin(observations[held_out], observations[train_rows])]


def sum_over_processes(x):
    """A tensor summed in place over torchrun's processes, if there are several; returns it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


@torch.inference_mode()
def validate(agent, get_batch, rows, loss_functions):
    """Compare student and teacher on samples, rows int64 [M] of `get_batch`: means by name.

    `validation/{name}` of each of `loss_functions`, which map targets and logits to float32 [B];
    `agreement`, the share in which both find the same action best; `entropy_gap`, the student's
    entropy less the targets'; `value_loss`, half the critic's squared error.
    """
    sums = 0
    for batch in rows.split(1024):
        obs, targets, target_values = get_batch(batch)
        logits, values = agent(obs)
        student = logits.softmax(-1)
        teacher = targets.softmax(-1) if "mse" in loss_functions else targets
        figures = {name: f(targets, logits) for name, f in loss_functions.items()}
        figures["agreement"] = logits.argmax(-1) == targets.argmax(-1)
        figures["entropy_gap"] = teacher.xlogy(teacher).sum(-1) - student.xlogy(student).sum(-1)
        figures["value_loss"] = 0.5 * (values - target_values).square()
        figures["count"] = torch.ones_like(values)
        sums = sums + torch.stack([figure.sum() for figure in figures.values()])
    totals = dict(zip(figures, sum_over_processes(sums).tolist(), strict=True))
    count = totals.pop("count")
    return {f"validation/{name}": total / count for name, total in totals.items()}


def train(args, buffer, checkpoint, writer, device, rank=0, world_size=1):
    """Fit a student to what `load_buffer` has read. Returns the one to keep.

    Goes on from `checkpoint`, and keeps in it what the last whole epoch has led to. Of torchrun's
    processes each learns from its share of a batch, with averaged gradients; process 0 alone logs,
    to `writer`, and saves.
    """
    frames, stack_index, outputs, teacher_values, episode_index, meta = buffer
    train_rows, held_out = split_episodes(episode_index, args.validation_fraction, args.seed)
    novel = unlike_training(frames, stack_index, train_rows, held_out)
    if rank == 0:
        print(
            f"held out    {len(held_out):,} samples, {len(novel):,} of them unlike any to train on"
        )
    held_out = novel if len(novel) else held_out
    held_out = torch.from_numpy(held_out[rank::world_size]).to(device)
    frames = torch.from_numpy(frames).to(device)
    stack_index = torch.from_numpy(stack_index).to(device)
    teacher_values = torch.from_numpy(teacher_values).to(device)
    outputs = torch.from_numpy(outputs).to(device)
    are_q_values = meta.get("targets") == "q_values"
    targets = make_targets(outputs, are_q_values, args.loss, args.temperature)

    def get_batch(rows):
        """Observations uint8 [B, 4, 84, 84], targets [B, A] and the teacher's values [B]."""
        # on a CPU several times as fast as frames[stack_index[rows]], and channels_last at once
        newest_last = [frames.index_select(0, index) for index in stack_index[rows].unbind(1)]
        obs = torch.stack(newest_last, -1).permute(0, 3, 1, 2)
        return obs, targets[rows], teacher_values[rows]

    agent = Agent(args.capacity, targets.shape[1])
    agent = agent.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), fused=True)
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(agent.parameters(), momentum=0.9, fused=True)
    restore(checkpoint, agent, optimizer)
    learner = agent
    loss_functions = {"kl": kl_divergence, "reverse_kl": reverse_kl}
    if args.loss == "nll":  # the divergence from a one-hot target
        loss_functions = {"nll": kl_divergence}
    if args.loss == "mse":
        loss_functions = {"mse": squared_error}
    if world_size > 1:  # starts from the weights of process 0, and averages the gradients
        learner = nn.parallel.DistributedDataParallel(agent)
    if args.compile:
        learner = torch.compile(learner, mode="reduce-overhead", dynamic=False)
        loss_functions = {
            name: torch.compile(f, dynamic=False) for name, f in loss_functions.items()
        }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    batch_size = min(args.batch_size, len(train_rows))
    steps = len(train_rows) // batch_size
    # a batch has one sample of each stratum, an equal stretch of the buffer
    strata = train_rows[: steps * batch_size].reshape(batch_size, steps)[rank::world_size]
    start_epoch = checkpoint["last_epoch"]
    # as first planned, also where a resume asks for more epochs
    eq3_epochs = checkpoint.setdefault("eq3_epochs", args.eq3_fraction * args.epochs)
    if args.loss != "reverse_kl":
        eq3_epochs = 0
    epoch_samples = steps * batch_size
    done = start_epoch * epoch_samples
    total = args.epochs * epoch_samples
    bar = progress(initial=done, total=total, unit="sample", disable=rank > 0)
    start_time = time.time()
    for epoch in range(start_epoch + 1, args.epochs + 1):
        if 0 < args.early_stop_patience < epoch - max(checkpoint["epoch"], eq3_epochs):
            break
        shuffled = np.random.default_rng((args.seed, 5, rank, epoch)).permuted(strata, axis=1)
        sums = torch.zeros(len(loss_functions) + 1, device=device)
        for i, rows in enumerate(torch.from_numpy(shuffled.T.copy()).to(device)):
            epochs_done = epoch - 1 + i / steps
            lr = args.learning_rate
            if args.anneal_lr:
                knots = [0, args.warmup_fraction * args.epochs, args.epochs]
                lr *= np.interp(epochs_done, knots, [0, 1, 0]).item()
            optimizer.param_groups[0]["lr"] = lr

            b_obs, b_targets, b_values = get_batch(rows)
            with autocast:
                logits, values = learner(b_obs)
            losses = {name: f(b_targets, logits).mean() for name, f in loss_functions.items()}
            losses["value_loss"] = 0.5 * (values - b_values).square().mean()
            # from the start on, KL(student || teacher) can end at one action for every observation,
            # where its gradient vanishes
            by_eq3 = epochs_done < eq3_epochs
            loss = losses["kl" if by_eq3 else args.loss] + args.value_coef * losses["value_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack(list(losses.values())).detach()
            bar.update(batch_size)

        validation = validate(agent, get_batch, held_out, loss_functions)
        if not all(map(math.isfinite, validation.values())):
            sys.exit(f"distillation diverged in epoch {epoch}; lower --learning-rate")
        metrics = validation | {"charts/epoch": epoch, "charts/learning_rate": lr}
        metrics["charts/SPS"] = (epoch - start_epoch) * epoch_samples / (time.time() - start_time)
        means = sum_over_processes(sums / steps) / world_size
        for name, mean in zip(losses, means.tolist(), strict=True):
            metrics[f"losses/{name}"] = mean
        criterion = f"validation/{args.loss}"
        bar.set_postfix_str(f"epoch {epoch}, {criterion} {validation[criterion]:.4f}", False)
        step = epoch * epoch_samples
        state = copy.deepcopy({"model": agent.state_dict(), "optimizer": optimizer.state_dict()})
        update = {"last_epoch": epoch, "last_step": step, "last_model": state["model"]}
        update["optimizer"] = state["optimizer"]
        best = checkpoint.get("validation", {}).get(criterion, math.inf)
        if not args.early_stop_patience or validation[criterion] < best:
            update |= {"epoch": epoch, "global_step": step, "model": state["model"]}
            update["validation"] = validation
        checkpoint.update(update, evaluation=None)
        if rank == 0:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()
            save_checkpoint(args.save_path, checkpoint)
    agent.load_state_dict(checkpoint["model"])
    return agent


# Nothing below changes how the network learns: evaluation, logging, files and main.


def load_buffer(path, env_id):
    """Read a buffer, or exit: frames, stack_index, action_probs or q_values, values, episode_index
    and `meta`, as in docs/files.md. Runs no code in it."""
    fix = f"make one with `python collect_buffer.py --env-id {env_id}`"
    try:
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
            if meta["env_id"] != env_id:
                sys.exit(f"{path}: plays {meta['env_id']}; pass that --env-id, or {fix}")
            kind = meta.get("targets", "action_probs")
            names = ("frames", "stack_index", kind, "values", "episode_index")
            frames, stack_index, outputs, values, episode_index = (file[name] for name in names)
        fits = [len(array) == len(stack_index) for array in (outputs, values, episode_index)]
        fits.append(frames.shape[1:] == (84, 84) and frames.dtype == np.uint8)
        fits.append(0 <= stack_index.min() and stack_index.max() < len(frames))
        fits.append(kind == "q_values" or np.allclose(abs(outputs).sum(1), 1, atol=1e-3))
        if not all(fits) or not np.isfinite(outputs).all():
            raise ValueError("its arrays do not fit each other, or hold no probabilities")
    except Exception as error:  # noqa: BLE001, as foreign files can raise anything
        sys.exit(f"{path}: no buffer of this project ({error!r:.250}); {fix}")
    return frames, stack_index, outputs, values, episode_index, meta


@torch.inference_mode()
def play(agent, envs, eval_steps, seed, greedy, device):
    """Play whole games, and leave out neither short nor long ones: raw returns and lengths, lists.

    A slot retires at its first game end at or after its step ceil(eval_steps / N); every game that
    it began until then counts. A bias of the order of 1 / (number of games) stays, as slots with
    long games play fewer.

    `agent` maps observations uint8 [N, 4, 84, 84] on `device` to (logits, values); a lost life ends
    nothing in `envs`; `seed` is that of games and actions, apart from torch's own.
    """
    generator = torch.Generator(device).manual_seed(seed)
    obs, _ = envs.reset(seed=game_seeds(envs.num_envs, seed, 3))
    playing, slot_step = np.ones(envs.num_envs, bool), 0
    game_return, game_length = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    returns, lengths = [], []
    bar = progress(desc="evaluate", total=eval_steps, unit="step")
    while playing.any():
        logits, _ = agent(torch.from_numpy(obs).to(device))
        actions = logits.argmax(-1) if greedy else sample_actions(logits, generator)
        obs, reward, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        slot_step += 1
        bar.update(int(playing.sum()))
        game_return += reward
        game_length += 1
        ended = terminated | truncated
        returns += game_return[ended & playing].tolist()
        lengths += game_length[ended & playing].tolist()
        game_return[ended] = game_length[ended] = 0
        if slot_step * envs.num_envs >= eval_steps:
            playing &= ~ended
    return returns, lengths


def summarize(returns):
    """Mean, sd (ddof 0) and max of games' returns, as plain numbers.

    `ci95` is the 95% percentile bootstrap interval of the mean, from 2,000 resamples of the games;
    None for a single game.
    """
    means = np.random.default_rng(0).choice(returns, (2000, len(returns))).mean(1)
    return {
        "mean": float(np.mean(returns)),
        "std": float(np.std(returns)),
        "max": float(max(returns)),
        "episodes": len(returns),
        "ci95": np.percentile(means, (2.5, 97.5)).round(3).tolist() if len(returns) > 1 else None,
    }


def evaluate(agent, rom, args, checkpoint, writer, device, name="eval"):
    """Evaluate a policy by the rule of `play`; log it, write `{name}.json` and print a line.

    Q-values play their best action. Of `checkpoint`, env_id, phase, capacity, checkpoint, args and
    global_step are read. Returns what is written, without the lists of all games.
    """
    greedy = args.eval_greedy or checkpoint["args"].get("loss") == "mse"
    envs = AtariEnvs(rom, args.num_envs, args.repeat_action_probability, life_loss=False)
    agent = agent.to(device, memory_format=torch.channels_last)
    returns, lengths = play(agent, envs, args.eval_steps, args.seed, greedy, device)
    result = {key: checkpoint[key] for key in ("env_id", "phase", "capacity", "checkpoint")}
    for key in ("seed", "num_envs", "repeat_action_probability", "eval_steps"):
        result[key] = getattr(args, key)
    result |= {"greedy": greedy, "steps": sum(lengths), **summarize(returns)}
    path = Path(writer.log_dir, f"{name}.json")
    path.write_text(json.dumps({**result, "returns": returns, "lengths": lengths}))
    writer.add_scalar("eval/mean", result["mean"], checkpoint["global_step"])
    writer.add_scalar("eval/std", result["std"], checkpoint["global_step"])
    writer.flush()
    if args.track:
        import wandb

        artifact = wandb.Artifact(f"{wandb.run.id}-{name}", "model", metadata=vars(args))
        artifact.add_file(checkpoint["checkpoint"])
        artifact.add_file(path)
        wandb.log_artifact(artifact)
    score = f"mean {result['mean']:.2f} ± {result['std']:.2f}, 95% interval {result['ci95']}"
    print(f"evaluation  {score}, {len(returns)} games, {result['steps']:,} steps: {path}")
    return result


def resolve_game(env_id):
    """The canonical id of a gymnasium id, and ale-py's ROM name; exits for an unknown game.

    `ALE/MsPacman-v5` gives ("MsPacmanNoFrameskip-v4", "ms_pacman").
    """
    games = {f"{r.title().replace('_', '')}NoFrameskip-v4": r for r in roms.get_all_rom_ids()}
    canonical = re.sub(r"^(ALE/)?(\w+)-v5$", r"\2NoFrameskip-v4", env_id)
    if canonical not in games:
        sys.exit(f"--env-id {env_id}: no such game; ids look like ALE/MsPacman-v5")
    return canonical, games[canonical]


def set_up_torch(seed, cuda):
    """Seed torch and tune its memory; returns the device, a GPU for each process of torchrun."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    if sys.platform == "linux":
        # glibc would return every batch's activations to the system and fetch them page by page
        # again, a fifth to a third of the time at batches of 1024 and more
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(gpu if cuda and torch.cuda.is_available() else "cpu")


def find_input(path, default, shipped, args):
    """`path` with its flags filled in, or if that is the default and missing, the shipped file."""
    shipped = Path(__file__).with_name("pretrained") / args.env_id / shipped
    filled = fill_in(path, args)
    if path == default and not os.path.exists(filled) and shipped.exists():
        print(f"pretrained  {shipped} serves as {filled}")
        return str(shipped)
    return filled


def progress(**options):
    """A progress bar, drawn anew every second, or every minute where stderr is a file."""
    seconds = 1 if sys.stderr.isatty() else 60
    return tqdm(mininterval=seconds, maxinterval=seconds, dynamic_ncols=True, **options)


def open_log(args, run_name=None, global_step=0):
    """A SummaryWriter for `runs/{run_name}`, mirrored by W&B; hides what came after global_step."""
    started = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_name = run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{started}"
    if args.track:
        import wandb

        wandb.init(
            entity=args.wandb_entity,
            project=args.wandb_project_name,
            name=run_name,
            id=run_name,
            resume="allow",
            config=vars(args),
            sync_tensorboard=True,
        )
    writer = SummaryWriter(f"runs/{run_name}", purge_step=global_step + 1)
    rows = "".join(f"\n|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|flag|value|\n|-|-|{rows}", global_step)
    return writer


def fill_in(path, args):
    """`path` with flags in braces filled in."""
    try:
        return path.format(**vars(args))
    except Exception as error:  # noqa: BLE001, as `{a.b[c]}` can raise anything
        sys.exit(f"{path}: no flag fits its braces ({error}); name flags as in {{env_id}}")


def lock_output(path, replace):
    """Keep `path` for this process to write. Exits if another writes it, or if it exists and is not
    to be replaced."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        fcntl.flock(os.open(f"{path}.lock", os.O_CREAT, 0o644), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        sys.exit(f"{path}: in use by another run, or not writable ({error}); pass another path")
    if os.path.isdir(path) or (os.path.exists(path) and not replace):
        sys.exit(f"{path}: exists already; pass --overwrite, or another path")


def save_checkpoint(path, checkpoint):
    """Write a checkpoint, whole or not at all."""
    torch.save(checkpoint, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, env_id, fix):
    """Read a checkpoint of this project, of any phase: the dict, and its Agent; runs no code in it.

    Exits where it plays another game than `env_id` or, with the advice `fix`, cannot be used.
    """
    try:
        assert zipfile.ZipFile(path).testzip() is None, "damaged: a checksum is wrong"
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["env_id"] != env_id:
            sys.exit(f"{path}: plays {saved['env_id']}; pass that --env-id")
        agent = Agent(saved["capacity"], len(saved["model"]["actor.bias"]))
        agent.load_state_dict(saved["model"])
    except Exception as error:  # noqa: BLE001, as foreign files can raise anything
        sys.exit(f"{path}: no checkpoint of this project ({error!r:.100}); {fix}")
    return {**saved, "checkpoint": path}, agent


def load_training(path, phase, args):
    """The checkpoint of a training to go on with; exits if these flags would make it another."""
    saved, _ = load_checkpoint(path, args.env_id, "pass --overwrite without --resume")
    if saved["phase"] != phase or "optimizer" not in saved:
        sys.exit(f"{path}: holds no training of phase {phase}; pass another path")
    for name in ("capacity", "seed", "optimizer", "validation_fraction"):
        if (before := saved["args"].get(name)) != vars(args).get(name):
            sys.exit(f"{path}: was begun with {name} {before}; pass the same, or another path")
    return saved


def restore(checkpoint, agent, optimizer):
    """Put back weights and the optimiser's state, as much of it as `checkpoint` holds."""
    if "model" in checkpoint:
        agent.load_state_dict(checkpoint.get("last_model", checkpoint["model"]))
    if "optimizer" in checkpoint:
        # Adam counts its steps in place, and a stop may save the checkpoint as it is
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    for parameter, moments in optimizer.state.items():
        # fused optimisers pair weights and moments by their place in memory: in another layout
        # than its channels_last weight a moment would move the wrong weights, without an error
        for name in moments.keys() - {"step"}:
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def compare(result, teacher):
    """A student's and its teacher's mean returns, in words, of evaluations by the same rules."""
    rules = ("greedy", "repeat_action_probability")
    if not result or not teacher or any(result[rule] != teacher[rule] for rule in rules):
        return "not compared with its teacher, since not both are evaluated by the same rules"
    return f"mean {result['mean']:.2f}, its teacher's {teacher['mean']:.2f}"


def main(args):
    args.env_id, rom = resolve_game(args.env_id)
    device = set_up_torch(args.seed, args.cuda)
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.eval_only:
        checkpoint, agent = load_checkpoint(args.eval_only, args.env_id, "name another checkpoint")
        return evaluate(agent, rom, args, checkpoint, open_log(args), device) if rank == 0 else None

    args.buffer_path = find_input(args.buffer_path, Args.buffer_path, "buffer.npz", args)
    buffer = load_buffer(args.buffer_path, args.env_id)
    meta = buffer[-1]
    q_values = meta.get("targets") == "q_values"
    args.loss = args.loss or ("kl" if q_values else "reverse_kl")
    if args.loss == "mse" and not q_values:
        sys.exit(f"--loss mse: {args.buffer_path} has no Q-values; pass --loss kl or nll")
    args.temperature = args.temperature or (0.01 if q_values else 1.0)
    args.teacher = (meta.get("teacher") or {}).get("sha256")  # no flag: for W&B's config
    args.save_path = fill_in(args.save_path, args)
    checkpoint = {"last_epoch": 0, "epoch": 0, "global_step": 0}
    writer = None
    if args.resume and os.path.exists(args.save_path):
        checkpoint = load_training(args.save_path, "distilled", args)
    if rank == 0:
        lock_output(args.save_path, args.overwrite or args.resume)
        writer = open_log(args, checkpoint.get("run_name"), checkpoint.get("last_step", 0))
        checkpoint.update(phase="distilled", env_id=args.env_id, capacity=args.capacity)
        checkpoint.update(args=vars(args), teacher=meta.get("teacher"))
        checkpoint.update(checkpoint=args.save_path, run_name=Path(writer.log_dir).name)
        print(f"run         {writer.log_dir} on {device}, from epoch {checkpoint['last_epoch']}")

    try:
        agent = train(args, buffer, checkpoint, writer, device, rank, world_size)
        if rank == 0 and args.eval_steps:
            checkpoint["evaluation"] = evaluate(agent, rom, args, checkpoint, writer, device)
            save_checkpoint(args.save_path, checkpoint)
    except KeyboardInterrupt:
        if rank == 0 and "optimizer" in checkpoint:
            save_checkpoint(args.save_path, checkpoint)
        sys.exit(f"\nstopped after epoch {checkpoint['last_epoch']}; pass --resume to go on")
    if rank == 0:
        figures = [f"{name} {value:.4f}" for name, value in checkpoint["validation"].items()]
        print(f"kept        epoch {checkpoint['epoch']}: {', '.join(figures)}")
        print(f"wrote       {args.save_path}")
        if args.loss != "mse":  # which gives PPO no policy to start from
            command = f"finetune_student.py --env-id {args.env_id} --capacity {args.capacity}"
            print(f"next        python {command} --student-path {args.save_path}")
        taught = (meta.get("teacher") or {}).get("evaluation")
        print(f"student     {compare(checkpoint.get('evaluation'), taught)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(tyro.cli(Args))
