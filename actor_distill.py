"""Phase 3 of actor distillation: fit a fresh student to the teacher's replay buffer, offline.

    python actor_distill.py --capacity medium --epochs 400
    python actor_distill.py --resume                              # go on after an interruption
    python actor_distill.py --eval-only checkpoints/PongNoFrameskip-v4/distilled_medium.pt

The student minimises KL(student || teacher) over the actions, averaged over the batch, after a
fifth of its training by KL(teacher || student), Eq. 3 of Green, Vineyard & Koç (2019),
"Distillation Strategies for Proximal Policy Optimization"; `--loss kl` keeps to Eq. 3. From a
buffer of Q-values it learns by one of the three losses of DQN distillation, Rusu et al. 2015
(arXiv:1511.06295). `global_step` counts the samples seen.
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
from datetime import timedelta
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
    """compile network and loss with torch.compile, to CUDA graphs on a GPU"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic kernels only"""
    track: bool = False
    """mirror the run to Weights & Biases"""
    wandb_project_name: str = "actor-distillation"
    """W&B project; the variable WANDB_ENTITY names the user or team"""
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
    """learning rate; SGD takes 0.01, and with `--loss kl` 0.03"""
    anneal_lr: bool = True
    """let the rate fall linearly to 0, after a rise over the first 10% of the training"""
    loss: Literal["reverse_kl", "kl", "mse", "nll"] | None = None
    """KL(student || teacher) after a start by kl, KL(teacher || student), the squared error of
    Q-values, or the negative log-likelihood of the teacher's best action; default reverse_kl, for
    Q-values kl"""
    temperature: PositiveFloat | None = None
    """divides log-probabilities (default 1, as in Eq. 3) or Q-values (default 0.01) for a KL"""
    value_coef: float = 0.0
    """weight of a squared error that fits the critic to the teacher's values; 0 leaves it random"""
    validation_fraction: Annotated[float, Field(ge=0.001, le=0.5)] = 0.05
    """share of the samples to hold out: whole episodes or, if these are long, the last stretch"""
    early_stop_patience: NonNegativeInt = 0
    """stop after so many epochs without a lower held-out loss and keep the best; 0 runs them all"""


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
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(c3 * 7 * 7, hidden)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(hidden, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(hidden, 1), std=1)

    def forward(self, obs):
        """Observations uint8 [B, 4, 84, 84] to logits float32 [B, A] and values float32 [B]."""
        # the layout in which small convolutions are fastest on a CPU; bytes are cheap to rearrange
        x = obs.contiguous(memory_format=torch.channels_last).float()
        first, *rest = self.network
        # divides 255 out of the first convolution's weights instead of out of every pixel
        x = F.conv2d(x, first.weight / 255, first.bias, first.stride)
        for layer in rest:
            x = layer(x)
        return self.actor(x), self.critic(x).squeeze(-1)


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


def make_targets(outputs, q_values, loss, temperature):
    """What the student is fitted to, from the teacher's Q-values or probabilities float32 [N, A].

    For a KL softmax(Q / temperature) or softmax(log(p) / temperature); for "nll" 1 for the best
    action, 0 for the others; for "mse" the Q-values.
    """
    if loss == "mse":
        return outputs
    if loss == "nll":
        return nn.functional.one_hot(outputs.argmax(-1), outputs.shape[1]).float()
    if q_values:  # the maximum goes first: dividing would cost large Q-values their last digits
        return ((outputs - outputs.amax(-1, keepdim=True)) / temperature).softmax(-1)
    return outputs if temperature == 1 else (outputs.log() / temperature).softmax(-1)


def batch_loss(agent, obs, targets, target_values, value_coef, divergence=kl_divergence):
    """The student's loss on observations uint8 [B, 4, 84, 84], and the batch's sums, float32 [2].

    `targets` float32 [B, A] and `target_values` [B] are the teacher's; `value_coef` weighs
    0.5 (V - V_teacher)^2, the second sum; `divergence` maps targets and logits to float32 [B].
    """
    logits, values = agent(obs)
    assert values.shape == target_values.shape, "values of shape [B, 1] would broadcast"
    distance = divergence(targets, logits)
    value_error = 0.5 * (values - target_values).square()
    loss = distance.mean()
    if value_coef:
        loss = loss + value_coef * value_error.mean()
    return loss, torch.stack((distance.sum(), value_error.sum())).detach()


def distill_update(agent, optimizer, loss_function, *batch):
    """One optimiser step by `batch_loss`, compiled or not, which takes `batch` after the student.

    Returns its two sums; no value leaves the device.
    """
    optimizer.zero_grad()
    loss, sums = loss_function(agent, *batch)
    loss.backward()
    optimizer.step()
    return sums.clone()  # CUDA graphs write the next ones to the same place


@torch.inference_mode()
def validate(agent, get_batch, rows, loss="kl", divergence=kl_divergence):
    """Compare student and teacher on samples, rows int64 [M] of `get_batch`: means by name.

    `validation/{loss}`, in nats unless squared; `validation/agreement`, the share in which both
    find the same action best; `validation/value_loss`, half the critic's squared error;
    `validation/entropy_gap`, the student's entropy less the targets'.
    """
    sums = 0
    for batch in rows.split(1024):
        obs, targets, target_values = get_batch(batch)
        logits, values = agent(obs)
        student, teacher = logits.softmax(-1), targets.softmax(-1) if loss == "mse" else targets
        agrees = logits.argmax(-1) == targets.argmax(-1)
        value_error = 0.5 * (values - target_values).square()
        entropy_gap = teacher.xlogy(teacher).sum(-1) - student.xlogy(student).sum(-1)
        figures = (divergence(targets, logits), agrees, value_error, entropy_gap)
        sums = sums + torch.stack([figure.sum() for figure in figures])
    names = (loss, "agreement", "value_loss", "entropy_gap")
    means = (sums / len(rows)).tolist()
    return {f"validation/{name}": mean for name, mean in zip(names, means, strict=True)}


def main(args):
    args.env_id, rom = resolve_game(args.env_id)
    args.buffer_path = find_input(args.buffer_path, Args.buffer_path, "buffer.npz", args)
    args.save_path = args.save_path.format(**vars(args))
    device, rank, processes = set_up_torch(args.seed, args.cuda, args.torch_deterministic)
    if args.eval_only:
        checkpoint, agent = load_checkpoint(args.eval_only, args.env_id, "name another checkpoint")
        agent = agent.to(device, memory_format=torch.channels_last)
        return evaluate(agent, rom, args, checkpoint, open_log(args))

    if rank == 0:
        claim(args.save_path, args.overwrite or args.resume)
    *buffer, episode_index, meta = load_buffer(args.buffer_path, args.env_id)
    q_values = meta.get("targets") == "q_values"
    args.loss = args.loss or ("kl" if q_values else "reverse_kl")
    if args.loss == "mse" and not q_values:
        sys.exit(f"--loss mse: {args.buffer_path} has no Q-values; pass --loss kl or nll")
    args.temperature = args.temperature or (0.01 if q_values else 1.0)
    train_rows, held_out = split_episodes(episode_index, args.validation_fraction, args.seed)
    new = unseen(*buffer[:2], train_rows, held_out)
    print(f"held out    {len(held_out):,} samples, {len(new):,} of them unlike any to train on")
    held_out = new if len(new) else held_out
    batch_size = min(args.batch_size, len(train_rows))
    if batch_size % processes:
        sys.exit(f"--batch-size {batch_size} must be a multiple of the {processes} processes")
    strata = train_rows[: len(train_rows) // batch_size * batch_size].reshape(batch_size, -1)
    total = args.epochs * strata.size
    strata = np.split(strata, processes)[rank]
    frames, stack_index, outputs, values = (torch.from_numpy(array).to(device) for array in buffer)
    targets = make_targets(outputs, q_values, args.loss, args.temperature)

    def get_batch(rows):
        """Observations uint8 [B, 4, 84, 84], targets and target values of samples."""
        newest_last = [frames.index_select(0, index) for index in stack_index[rows].unbind(1)]
        return torch.stack(newest_last, -1).permute(0, 3, 1, 2), targets[rows], values[rows]

    agent, checkpoint = Agent(args.capacity, outputs.shape[1]), {}
    if args.resume and os.path.exists(args.save_path):
        checkpoint, agent = load_checkpoint(args.save_path, args.env_id, "pass --overwrite")
        agent.load_state_dict(checkpoint.get("last_model", checkpoint["model"]))
    agent = agent.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(agent.parameters(), momentum=0.9, fused=True)
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(agent.parameters(), fused=True)
    teacher = meta.get("teacher") or {}
    args.teacher = teacher.get("sha256")  # no flag: for W&B's config
    criterion, best = f"validation/{args.loss}", (0, math.inf)
    if checkpoint:
        restore(checkpoint, "distilled", args, agent, optimizer)
        best = (checkpoint["epoch"], checkpoint["validation"].get(criterion, math.inf))
    start = total // args.epochs * checkpoint.get("last_epoch", 0)
    bar = progress(initial=start, total=total, unit="sample", disable=rank > 0)
    data = (get_batch, strata, torch.from_numpy(held_out).to(device))
    epochs = train(args, agent, optimizer, *data, best, bar, rank, processes)
    if rank:  # process 0 alone logs, saves and evaluates
        return list(epochs)

    writer = open_log(args, checkpoint.get("run_name"), start)
    about = {"phase": "distilled", "env_id": args.env_id, "capacity": args.capacity}
    about |= {"checkpoint": args.save_path, "run_name": os.path.basename(writer.log_dir)}
    about |= {"args": vars(args), "teacher": teacher}
    lr = f"{scheduled(args, start / total):.3g} of {args.learning_rate:g}"
    print(f"run         {writer.log_dir} on {device}, sample {start:,}, learning rate {lr}")

    try:
        for epoch, best_epoch, metrics, validation in epochs:
            for name, value in (metrics | validation).items():
                writer.add_scalar(name, value, bar.n)
            writer.flush()
            bar.set_postfix_str(f"epoch {epoch}, {criterion} {validation[criterion]:.4f}", False)
            state = training_state(agent, optimizer)
            state |= {"last_model": state["model"], "last_epoch": epoch}
            state |= {"epoch": epoch, "global_step": bar.n, "validation": validation}
            if best_epoch < epoch:
                kept = ("model", "epoch", "global_step", "validation")
                state |= {name: checkpoint[name] for name in kept}
            checkpoint = {**about, **state}
            save_checkpoint(args.save_path, checkpoint)
        bar.close()
        agent.load_state_dict(checkpoint["model"])
        figures = [f"{name} {value:.4f}" for name, value in checkpoint["validation"].items()]
        print(f"kept        epoch {checkpoint['epoch']}: {', '.join(figures)}")
        if args.eval_steps:
            checkpoint["evaluation"] = evaluate(agent, rom, args, checkpoint, writer)
            save_checkpoint(args.save_path, checkpoint)
    except KeyboardInterrupt:
        bar.close()
        epochs = checkpoint.get("last_epoch", 0)
        if epochs:  # the signal may have come while it was being saved
            save_checkpoint(args.save_path, checkpoint)
        sys.exit(f"\nstopped after epoch {epochs}; pass --resume to go on")
    print(f"wrote       {args.save_path}")
    if args.loss != "mse":  # which gives PPO no policy to start from
        command = "finetune_student.py --student-path"
        print(f"next        python {command} {args.save_path} --env-id {args.env_id}")
    share = share_of_teacher(checkpoint.get("evaluation"), teacher.get("evaluation"))
    print(f"student     {share}")


def train(args, agent, optimizer, get_batch, strata, held_out, best, bar, rank=0, processes=1):
    """Fit the student, from the sample on at which the progress `bar` stands.

    Args:
        get_batch: maps rows int64 [B] to observations, targets and target values.
        strata: rows int64 [B, K]; each of the K batches of an epoch has one row of each stratum. Of
            torchrun's `processes`, this one has share `rank` of the strata.
        held_out: rows int64 [M], a tensor; `best`: number and loss of the best epoch on them.

    Yields after each epoch its number, the best one's, and two dicts to log, one by `validate`.
    """
    learner, loss_function, start, start_time = agent, batch_loss, bar.n, time.time()
    agent.critic.requires_grad_(args.value_coef != 0)
    if processes > 1:  # averages the gradients
        learner = nn.parallel.DistributedDataParallel(agent)
    if args.compile:
        loss_function = torch.compile(batch_loss, mode="reduce-overhead", dynamic=False)
    divergences = {"reverse_kl": reverse_kl, "mse": squared_error}
    divergence = divergences.get(args.loss, kl_divergence)
    samples = processes * strata.size
    best_epoch, best_loss = best
    columns = np.tile(np.arange(strata.shape[1]), (processes * len(strata), 1))
    for epoch in range(start // samples + 1, args.epochs + 1):
        if 0 < args.early_stop_patience < epoch - best_epoch:
            return
        shuffled = np.random.default_rng((args.seed, 5, epoch)).permuted(columns, axis=1)
        order = np.take_along_axis(strata, np.split(shuffled, processes)[rank], axis=1)
        sums = torch.zeros(2, device=held_out.device)
        for i, rows in enumerate(torch.from_numpy(order.T.copy()).to(held_out.device)):
            fraction = (epoch - 1 + i / len(order.T)) / args.epochs
            optimizer.param_groups[0]["lr"] = scheduled(args, fraction)
            # from the start on, KL(student || teacher) can end at one action for every observation,
            # where its gradient vanishes
            by_eq3 = args.loss == "reverse_kl" and fraction < 0.2
            batch = (*get_batch(rows), args.value_coef, kl_divergence if by_eq3 else divergence)
            sums += distill_update(learner, optimizer, loss_function, *batch)
            bar.update(processes * len(rows))

        loss, value_loss = (gathered(sums).sum(0) / samples).tolist()
        if not math.isfinite(loss + value_loss):
            sys.exit(f"distillation diverged in epoch {epoch}; lower --learning-rate")
        metrics = {f"losses/{args.loss}": loss, "losses/value_loss": value_loss}
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = (epoch * samples - start) / (time.time() - start_time)
        metrics["charts/epoch"] = epoch
        validation = validate(agent, get_batch, held_out, args.loss, divergence)
        held_out_loss = gathered(sums.new_tensor(validation[f"validation/{args.loss}"]))[0]
        if not args.early_stop_patience or held_out_loss < best_loss:
            best_epoch, best_loss = epoch, held_out_loss
        yield epoch, best_epoch, metrics, validation


def load_buffer(path, env_id):
    """Read a buffer, or exit: frames, stack_index, action_probs or q_values, values, episode_index
    and `meta`, as in docs/files.md. Runs no code in it."""
    fix = f"make one with `python collect_buffer.py --env-id {env_id}`"
    try:
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
            if meta["env_id"] != env_id:
                sys.exit(f"{path}: plays {meta['env_id']}; pass that --env-id, or {fix}")
            targets = meta.get("targets", "action_probs")
            names = ("frames", "stack_index", targets, "values", "episode_index")
            frames, stack_index, outputs, *rest = (file[name] for name in names)
        fits = [len(array) == len(stack_index) for array in (outputs, *rest)]
        fits.append(frames.shape[1:] == (84, 84) and frames.dtype == np.uint8)
        fits.append(0 <= stack_index.min() and stack_index.max() < len(frames))
        fits.append(targets == "q_values" or np.allclose(abs(outputs).sum(1), 1, atol=1e-3))
        if not all(fits) or not np.isfinite(outputs).all():
            raise ValueError("its arrays do not fit each other, or hold no probabilities")
    except Exception as error:  # noqa: BLE001, as foreign files can raise anything
        sys.exit(f"{path}: no buffer of this project ({error!r:.250}); {fix}")
    return frames, stack_index, outputs, *rest, meta


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


def unseen(frames, stack_index, train_rows, held_out):
    """The held-out rows whose observation is no training row's; many are, as games start alike."""
    checksums = np.array([zlib.crc32(frame) for frame in frames], np.uint32)
    observations = checksums[stack_index].view("V16").ravel()
    return held_out[~np.isin(observations[held_out], observations[train_rows])]


def scheduled(args, fraction):
    """The learning rate after a `fraction`, 0 to 1, of the training."""
    # a rise over 2% left a student of Pong with nearly all channels of a convolution dead
    return args.learning_rate * (min(fraction / 0.1, 1 - fraction) if args.anneal_lr else 1)


class AtariEnvs(AtariVectorEnv):
    """Games on ale-py's C++ threads; in those that have FIRE, it is pressed after each lost life.

    So do the wrappers of the paper's reference code; ale-py's defaults are the rest of that
    protocol. The stack of frames runs on over a lost life, which with `life_loss` is reported as
    `terminated`. A game that ends begins anew within the same step. Rewards are raw. Observations
    are uint8 [N, 4, 84, 84], the oldest frame first, blank before a game's start.

    `forced`, bool [N]: the games whose next step presses FIRE, whatever action is given;
    `game_over`, bool [N]: those that ended with the last step.
    """

    def __init__(self, rom, num_envs, life_loss, repeat_action_probability):
        super().__init__(
            rom,
            num_envs,
            autoreset_mode="SameStep",
            reward_clipping=False,
            life_loss_info=life_loss,
            repeat_action_probability=repeat_action_probability,
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
        self.game_over = info["episode_frame_number"] < self.frame_number
        lost_life = (0 < info["lives"]) & (info["lives"] < self.lives) & ~self.game_over
        self.forced = lost_life & (self.fire is not None)
        self.lives, self.frame_number = info["lives"], info["episode_frame_number"]
        return obs, reward, terminated, truncated, info


def game_seeds(num_envs, *entropy):
    """One emulator seed a game, int64 [num_envs], independent for different `entropy` (integers).

    ale-py's own `reset(seed=1)` and `reset(seed=2)` would share all games but one.
    """
    return (np.random.SeedSequence(entropy).generate_state(num_envs) >> 1).astype(np.int64)


def sample_actions(logits, generator=None, rank=0, processes=1):
    """Draw actions int64 [B] from softmax(logits), float [B, A], by the Gumbel-max trick.

    Each of several processes draws the noise of all games, and uses its own share of it.
    """
    noise = logits.new_empty((processes, *logits.shape)).exponential_(generator=generator)[rank]
    return (logits - noise.log()).argmax(-1)


@torch.inference_mode()
def play(agent, envs, eval_steps, seed, greedy, device):
    """Play whole games, and leave out neither short nor long ones: raw returns and lengths, lists.

    A slot retires at its first game end at or after its step ceil(eval_steps / N); every game that
    it began until then counts. A bias of the order of 1 / (games of a slot) stays, as slots with
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
        bar.total = max(eval_steps, bar.n + int(playing.sum()))
        bar.update(int(playing.sum()))
        game_return += reward
        game_length += 1
        ended = terminated | truncated
        returns += game_return[ended & playing].tolist()
        lengths += game_length[ended & playing].tolist()
        game_return[ended] = game_length[ended] = 0
        if slot_step * envs.num_envs >= eval_steps:
            playing &= ~ended
    bar.close()
    return returns, lengths


def summarize(returns):
    """Mean, sd (ddof 0) and max of games' returns, as plain numbers.

    `ci95` is the 95% percentile bootstrap interval of the mean, from 2,000 resamples of the games;
    None for a single game.
    """
    scores = np.array(returns, np.float64)
    means = np.random.default_rng(0).choice(scores, (2000, len(scores))).mean(1)
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "max": float(scores.max()),
        "episodes": len(scores),
        "ci95": np.percentile(means, (2.5, 97.5)).round(3).tolist() if len(scores) > 1 else None,
    }


def evaluate(agent, rom, args, checkpoint, writer, name="eval"):
    """Evaluate a policy by the rule of `play`; log it, write `{name}.json` and print a line.

    Q-values play their best action. Of `checkpoint`, env_id, phase, capacity, checkpoint, args,
    global_step and teacher are read. Returns what is written, without the lists of all games.
    """
    greedy = args.eval_greedy or checkpoint["args"].get("loss") == "mse"
    envs = AtariEnvs(rom, args.num_envs, False, args.repeat_action_probability)
    device = next(agent.parameters()).device
    returns, lengths = play(agent, envs, args.eval_steps, args.seed, greedy, device)
    flags = ("seed", "num_envs", "repeat_action_probability", "eval_steps")
    result = {
        **{key: checkpoint[key] for key in ("env_id", "phase", "capacity", "checkpoint")},
        **{key: getattr(args, key) for key in flags},
        "greedy": greedy,
        "steps": sum(lengths),
        **summarize(returns),
    }
    path = Path(writer.log_dir, f"{name}.json")
    path.write_text(json.dumps({**result, "returns": returns, "lengths": lengths}))
    for key in ("mean", "std"):
        writer.add_scalar(f"eval/{key}", result[key], checkpoint["global_step"])
    writer.flush()
    if args.track:
        import wandb

        about = {**vars(args), "teacher": checkpoint.get("teacher")}
        artifact = wandb.Artifact(f"{wandb.run.id}-{name}", "model", metadata=about)
        for file in (checkpoint["checkpoint"], path):
            artifact.add_file(file)
        wandb.log_artifact(artifact)
    print(
        f"evaluation  mean {result['mean']:.2f} ± {result['std']:.2f}, 95% interval of the mean "
        f"{result['ci95'] or 'unknown'}, {len(returns)} games, {result['steps']:,} steps: {path}"
    )
    return result


def share_of_teacher(result, teacher):
    """A student's mean return as a share of its teacher's, in words, of evaluations or None."""
    if not result or not teacher:
        return "no share of its teacher, since not both are evaluated"
    text = f"mean {result['mean']:.2f}, its teacher's {teacher['mean']:.2f}"
    if min(result["mean"], teacher["mean"]) > 0:
        text += f": {result['mean'] / teacher['mean']:.1%} of its teacher"
    return text


def resolve_game(env_id):
    """The canonical id of a gymnasium id, and ale-py's ROM name; exits for an unknown game.

    `ALE/MsPacman-v5` gives ("MsPacmanNoFrameskip-v4", "ms_pacman").
    """
    games = {f"{r.title().replace('_', '')}NoFrameskip-v4": r for r in roms.get_all_rom_ids()}
    canonical = re.sub(r"^(ALE/)?(\w+)-v5$", r"\2NoFrameskip-v4", env_id)
    if canonical not in games:
        sys.exit(f"--env-id {env_id}: no such game; ids look like ALE/MsPacman-v5")
    return canonical, games[canonical]


def find_input(path, default, shipped, args):
    """`path` with its flags filled in, or if that is the default and missing, the shipped file."""
    path, pretrained = path.format(**vars(args)), Path(__file__).with_name("pretrained")
    shipped = pretrained / args.env_id / shipped
    if path == default.format(**vars(args)) and not os.path.exists(path) and shipped.exists():
        print(f"pretrained  {shipped} serves as {path}")
        return str(shipped)
    return path


def set_up_torch(seed, cuda, torch_deterministic):
    """Seed torch, join torchrun's processes if any: device, this one's rank, how many they are."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = torch_deterministic
    if sys.platform == "linux":
        # glibc would return every batch's activations to the system and fetch them page by page
        # again, a fifth to a third of the time at batches of 1024 and more
        libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    rank = int(os.environ.get("RANK", "0"))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        torch.distributed.init_process_group(timeout=timedelta(days=1))  # evaluations are long
    gpu = f"cuda:{rank % max(1, torch.cuda.device_count())}"
    return torch.device(gpu if cuda and torch.cuda.is_available() else "cpu"), rank, processes


def gathered(x):
    """The tensors `x` of all of torchrun's processes, [P, ...]; each process gets them all."""
    if not torch.distributed.is_initialized():
        return x.unsqueeze(0)
    every = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, x)
    return torch.stack(every)


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

        names = {"project": args.wandb_project_name, "name": run_name, "id": run_name}
        wandb.init(**names, resume="allow", config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(f"runs/{run_name}", purge_step=global_step + 1)
    rows = "".join(f"\n|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|flag|value|\n|-|-|{rows}", global_step)
    return writer


def claim(path, replace):
    """Keep `path` for this process to write; exits if another writes it, or if the file exists."""
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

    Where it cannot be used, or plays another game than `env_id`, exits with the advice `fix`.
    """
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("damaged: a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["env_id"] != env_id:
            sys.exit(f"{path}: plays {saved['env_id']}; pass that --env-id")
        agent = Agent(saved["capacity"], len(saved["model"]["actor.bias"]))
        agent.load_state_dict(saved["model"])
    except Exception as error:  # noqa: BLE001, as foreign files can raise anything
        sys.exit(f"{path}: no checkpoint of this project ({error!r:.100}); {fix}")
    return {**saved, "checkpoint": path}, agent


def training_state(agent, optimizer):
    """A copy of weights, optimiser and random states: all that later updates depend on."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    rng = {"torch": torch.get_rng_state(), "cuda": cuda}
    state = {"model": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}
    return copy.deepcopy(state)


def restore(saved, phase, args, agent, optimizer):
    """Put back what `training_state` copied, and print which flags are not those of before."""
    kind = (phase, args.capacity)
    if kind != (saved["phase"], saved["capacity"]) or "optimizer" not in saved:
        sys.exit(f"{args.save_path}: holds no training of kind {kind}; pass another path")
    optimizer.load_state_dict(saved["optimizer"])
    for parameter, moments in optimizer.state.items():
        # fused optimisers pair weights and moments by their place in memory: in another layout
        # than its channels_last weight a moment would move the wrong weights, without an error
        for name in moments.keys() - {"step"}:
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    torch.set_rng_state(saved["rng"]["torch"])
    if agent.actor.weight.is_cuda and saved["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(saved["rng"]["cuda"], agent.actor.weight.device)
    for name, before in saved["args"].items():
        now = vars(args).get(name, before)
        if now != before and name not in ("resume", "overwrite"):
            print(f"resumed     with --{name.replace('_', '-')} {now}; it was {before}")


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    main(tyro.cli(Args))
