"""Phase 4 of actor distillation: train a distilled student further, with PPO in the game.

    python finetune_student.py                                    # the medium student of Pong
    python finetune_student.py --env-id BreakoutNoFrameskip-v4 --capacity low
    python finetune_student.py --resume                           # go on after an interruption
    python finetune_student.py --eval-only checkpoints/PongNoFrameskip-v4/finetuned_medium.pt

`diff ppo_atari_teacher.py finetune_student.py` shows what changes in PPO. The critic, which Green,
Vineyard & Koç (2019), arXiv:1901.08128, leave random, is first fitted to a rollout's returns. A
falling weight on KL(policy ‖ student) holds the policy near the student. PPO's defaults are not the
paper's, which the README has. A step is one action, of four frames; totals are over all games.
"""

import copy
import ctypes
import fcntl
import json
import os
import re
import signal
import sys
import time
import zipfile
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
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "finetune_student"
    """name of this experiment, part of the run's name"""
    seed: NonNegativeInt = 1
    """seed of the games, the actions and the minibatches"""
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
    """size of the student"""
    student_path: FilePath = "checkpoints/{env_id}/distilled_{capacity}.pt"
    """checkpoint to start from; where the default is missing, the one that ships serves"""
    save_path: FilePath = "checkpoints/{env_id}/finetuned_{capacity}.pt"
    """checkpoint to write; flags in braces are filled in"""
    checkpoint_interval: PositiveInt = 1_000_000
    """save so often that no more steps than this are lost, but at most after each iteration"""
    resume: bool = False
    """go on from `save_path`, with new games and random numbers; start anew if nothing is saved"""
    overwrite: bool = False
    """replace `save_path` if it exists"""

    # Evaluation
    eval_steps: NonNegativeInt = 1_000_000
    """steps of each evaluation, before and after training, then on to games' ends; 0 skips both"""
    eval_greedy: bool = False
    """evaluate the most probable action instead of sampling from the policy"""
    eval_only: FilePath | None = None
    """train nothing: evaluate this checkpoint, of any phase"""

    # Environment
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game; `ALE/Pong-v5` and `Pong-v5` name the same game"""
    num_envs: PositiveInt = 16
    """games played at once, in training and in evaluation; in training all processes share them"""
    repeat_action_probability: Fraction = 0.0
    """sticky actions: chance that the emulator repeats the last action in a frame"""

    # Algorithm
    total_timesteps: PositiveInt = 20_000_000
    """steps of training; rounded down to whole iterations of num_envs * num_steps, one at least"""
    learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly, to 0 after the last iteration"""
    num_steps: Annotated[int, Field(ge=2)] = 1024
    """steps of each game in one rollout"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of generalised advantage estimation (the paper's tau)"""
    update_epochs: PositiveInt = 4
    """passes over a rollout"""
    num_minibatches: PositiveInt = 16
    """minibatches in a pass"""
    norm_adv: bool = True
    """normalise the advantages, once over the whole rollout, of each process"""
    clip_coef: PositiveFloat = 0.2
    """clipping range of the probability ratio, and of the value with `clip_vloss`"""
    clip_vloss: bool = False
    """clip the value loss around the rollout's value"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    max_grad_norm: PositiveFloat = 0.5
    """largest norm of the whole gradient; a longer one is scaled down to it"""
    kl_coef: float = 0.5
    """weight of KL(policy ‖ student), to hold the policy near the student; falls with the rate"""
    fit_critic: bool = True
    """fit the critic to the first rollout's returns; without, it begins as it was distilled"""


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


def log_prob(logits, actions):
    """Log-probabilities float32 [B] of actions int64 [B] under softmax(logits), [B, A]."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def gae(rewards, values, dones, last_values, gamma, gae_lambda):
    """Generalised advantage estimation, Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t) and A_t = delta_t + gamma lambda A_{t+1}. Nothing
    flows back over an episode's end, where V(s_{t+1}) is 0.

    Args:
        rewards, values, dones: float32 [T, N]: r_t, V(s_t), and 1 if an episode ended with step t.
        last_values: float32 [N], value of the observation after the last step.

    Returns:
        Advantages float32 [T, N]; with `values` added, the returns that the critic is fitted to.
    """
    advantages = torch.empty_like(rewards)
    advantage, next_values = torch.zeros_like(last_values), last_values
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (1 - dones[t]) * next_values - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * (1 - dones[t]) * advantage
        next_values = values[t]
    return advantages


def ppo_loss(
    logits, values, actions, old_logprobs, advantages, returns, old_values, clip_coef, clip_vloss
):
    """The parts of PPO's objective, Schulman et al. 2017 (arXiv:1707.06347), Eq. 7 and 9.

    Args:
        logits, values: float32 [B, A] and [B], of the network in training.
        actions, old_logprobs, advantages, returns, old_values: int64 [B] and float32 [B], of the
            rollout; the old ones by the network that played.
        clip_coef, clip_vloss: as the flags of these names.

    Returns:
        Scalars: policy_loss and value_loss, to minimise, entropy, to maximise, and of the ratio r
        old_approx_kl = E[-log r], approx_kl = E[r - 1 - log r], the low-variance estimate of
        http://joschu.net/blog/kl-approx.html, and clipfrac.
    """
    assert values.shape == returns.shape, "values of shape [B, 1] would broadcast"
    logratio = log_prob(logits, actions) - old_logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()
    value_error = (values - returns).square()
    if clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        value_error = torch.max(value_error, (clipped_values - returns).square())
    value_loss = 0.5 * value_error.mean()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    old_approx_kl = -logratio.mean()
    approx_kl = (ratio - 1 - logratio).mean()
    clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
    return policy_loss, value_loss, entropy, old_approx_kl, approx_kl, clipfrac


@torch.no_grad()
def fit_critic(agent, obs, last_obs, rewards, dones, gamma, gae_lambda):
    """Replace the critic's layer by the ridge regression of a rollout's returns on its features.

    The returns hold V itself, by `gae`: solved for where both agree, LSTD(lambda) of Boyan 2002.
    `obs` is uint8 [T, N, 4, 84, 84], the rest as in `gae`. Returns V, float32 [T + 1, N].
    """
    features = []  # the critic's inputs
    hook = agent.critic.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    for step_obs in (*obs, last_obs):
        agent(step_obs)
    hook.remove()
    x = F.pad(torch.stack(features).double().cpu(), (0, 1), value=1.0)  # for the bias
    inputs = x[:-1].flatten(0, 1)
    # the returns are linear in V = x @ weights: a part from the rewards, and one from each feature
    by_rewards = gae(rewards.double(), 0 * rewards, dones, 0 * rewards[0], gamma, gae_lambda)
    by_features = x[:-1] + gae(0 * x[:-1], x[:-1], dones.unsqueeze(-1), x[-1], gamma, gae_lambda)
    gram = sum_over_processes(inputs.T @ inputs)
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    gram -= sum_over_processes(inputs.T @ by_features.flatten(0, 1))
    weights = torch.linalg.solve(gram, sum_over_processes(inputs.T @ by_rewards.flatten()))
    agent.critic.weight.copy_(weights[:-1])
    agent.critic.bias.copy_(weights[-1:])
    return (x @ weights).float()


def sum_over_processes(x):
    """A tensor summed in place over torchrun's processes, if there are several; returns it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def train(args, rom, checkpoint, writer, device, rank=0, world_size=1):
    """PPO: play, estimate advantages, update, over and over. Returns the trained agent.

    Goes on from `checkpoint`, and keeps in it what the last whole iteration has led to. Its
    "student" holds the weights that KL(policy ‖ student) is measured from. Of torchrun's processes
    each plays and learns from its own games, with averaged gradients; process 0 logs and saves.
    """
    num_envs = max(1, args.num_envs // world_size)
    envs = AtariEnvs(rom, num_envs, args.repeat_action_probability, life_loss=True)
    agent = Agent(args.capacity, len(envs.action_meanings))
    agent = agent.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    agent.load_state_dict(checkpoint["student"])
    student = copy.deepcopy(agent)  # stays as it is, for KL(policy ‖ student)
    restore(checkpoint, agent, optimizer)
    learner, loss_function = agent, ppo_loss
    if world_size > 1:  # starts from the weights of process 0, and averages the gradients
        learner = nn.parallel.DistributedDataParallel(agent)
    if args.compile:
        learner = torch.compile(learner, mode="reduce-overhead", dynamic=False)
        loss_function = torch.compile(ppo_loss, dynamic=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    shape = (args.num_steps, num_envs)
    # in memory the channels are last, as the network wants them: rearranged once, not in every pass
    pixels = torch.empty((*shape, 84, 84, 4), dtype=torch.uint8, device=device)
    obs = pixels.permute(0, 1, 4, 2, 3)  # the same memory, as [T, N, 4, 84, 84]
    actions = torch.empty(shape, dtype=torch.int64, device=device)
    logprobs = torch.empty(shape, device=device)
    values = torch.empty(shape, device=device)
    forced = torch.empty(shape, dtype=torch.bool, device=device)
    rewards = torch.empty(shape)
    dones = torch.empty(shape)

    batch_size = args.num_steps * num_envs * world_size
    total_steps = max(1, args.total_timesteps // batch_size) * batch_size
    global_step = start_step = last_saved = checkpoint["global_step"]
    # each process has its own games and random numbers, and new ones after a resume
    seeds = game_seeds(num_envs, args.seed, 1, rank, global_step)
    torch.manual_seed(int(seeds[0]))
    next_obs, _ = envs.reset(seed=seeds)
    game_return, game_length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
    bar = progress(initial=global_step, total=total_steps, unit="step", disable=rank > 0)
    start_time = time.time()
    while global_step < total_steps:
        remaining = 1 - global_step / total_steps if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # play
        with torch.no_grad(), autocast:
            for step in range(args.num_steps):
                obs[step] = torch.from_numpy(next_obs).to(device)
                forced[step] = torch.from_numpy(envs.forced)
                logits, values[step] = agent(obs[step])
                actions[step] = action = sample_actions(logits)
                logprobs[step] = log_prob(logits, action)
                next_obs, reward, terminated, truncated, info = envs.step(action.cpu().numpy())
                rewards[step] = torch.from_numpy(np.sign(reward))
                dones[step] = torch.from_numpy(terminated | truncated)  # ended by this step
                if truncated.any():  # the game would have gone on: its value stands for the rest
                    final_obs = torch.from_numpy(info["final_obs"][truncated]).to(device)
                    rewards[step][truncated] += args.gamma * agent(final_obs)[1].cpu()
                global_step += num_envs * world_size
                bar.update(num_envs * world_size)
                game_return += reward
                game_length += 1
                for e in np.flatnonzero(envs.game_over):
                    if rank == 0:
                        writer.add_scalar("charts/episodic_return", game_return[e], global_step)
                        writer.add_scalar("charts/episodic_length", game_length[e], global_step)
                    bar.set_postfix_str(f"return {game_return[e]:g}", refresh=False)
                    game_return[e] = game_length[e] = 0
            last_values = agent(torch.from_numpy(next_obs).to(device))[1].cpu()

        if args.fit_critic and global_step == batch_size:  # after the first rollout
            last_obs = torch.from_numpy(next_obs).to(device)
            fitted = fit_critic(agent, obs, last_obs, rewards, dones, args.gamma, args.gae_lambda)
            values[:], last_values = fitted[:-1], fitted[-1]

        # estimate advantages
        advantages = gae(rewards, values.cpu(), dones, last_values, args.gamma, args.gae_lambda)
        advantages = advantages.to(device)
        returns = advantages + values
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
        advantages[forced] = 0  # FIRE was not the policy's choice

        # update
        b_pixels = pixels.flatten(0, 1)
        b_actions = actions.flatten()
        b_logprobs = logprobs.flatten()
        with torch.no_grad(), autocast:
            parts = b_pixels.permute(0, 3, 1, 2).chunk(args.num_minibatches)
            b_student_logprobs = torch.cat([student(x)[0].log_softmax(-1) for x in parts])
        b_advantages = advantages.flatten()
        b_returns = returns.flatten()
        b_values = values.flatten()
        statistics = []
        for _ in range(args.update_epochs):
            for mb in torch.randperm(len(b_pixels), device=device).chunk(args.num_minibatches):
                with autocast:
                    logits, new_values = learner(b_pixels.index_select(0, mb).permute(0, 3, 1, 2))
                losses = loss_function(
                    logits,
                    new_values,
                    b_actions[mb],
                    b_logprobs[mb],
                    b_advantages[mb],
                    b_returns[mb],
                    b_values[mb],
                    args.clip_coef,
                    args.clip_vloss,
                )
                policy_loss, value_loss, entropy, *_ = losses
                logprobs_now = logits.log_softmax(-1)
                kl = (logprobs_now.exp() * (logprobs_now - b_student_logprobs[mb])).sum(-1).mean()
                loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
                loss = loss + args.kl_coef * remaining * kl
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                statistics.append(torch.stack([*losses, kl]).detach())

        # log and save
        if not agent(torch.from_numpy(next_obs).to(device))[0].isfinite().all():
            sys.exit(f"training diverged at step {global_step:,}; lower --learning-rate")
        losses = sum_over_processes(torch.stack(statistics).mean(0)) / world_size
        state = {"model": agent.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.update(copy.deepcopy(state), global_step=global_step, evaluation=None)
        names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
        if rank == 0:
            for name, value in zip((*names, "student_kl"), losses.tolist(), strict=True):
                writer.add_scalar(f"losses/{name}", value, global_step)
            explained_variance = 1 - (returns - values).var() / returns.var()
            writer.add_scalar("losses/explained_variance", explained_variance, global_step)
            sps = (global_step - start_step) / (time.time() - start_time)
            writer.add_scalar("charts/SPS", sps, global_step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.flush()
            if global_step + batch_size > min(last_saved + args.checkpoint_interval, total_steps):
                save_checkpoint(args.save_path, checkpoint)
                last_saved = global_step
    return agent


# Nothing below changes how the network learns: evaluation, logging, files and main.


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


def main(args):
    args.env_id, rom = resolve_game(args.env_id)
    device = set_up_torch(args.seed, args.cuda)
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        # the critic's fit sums on the CPU; the others wait while process 0 evaluates the student
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    if args.eval_only:
        checkpoint, agent = load_checkpoint(args.eval_only, args.env_id, "name another checkpoint")
        return evaluate(agent, rom, args, checkpoint, open_log(args), device) if rank == 0 else None

    args.save_path = fill_in(args.save_path, args)
    writer = None
    if args.resume and os.path.exists(args.save_path):
        checkpoint = load_training(args.save_path, "finetuned", args)
        args.student_path = checkpoint["args"]["student_path"]
    else:
        shipped = f"distilled_{args.capacity}.pt"
        args.student_path = find_input(args.student_path, Args.student_path, shipped, args)
        saved, agent = load_checkpoint(args.student_path, args.env_id, "run actor_distill.py first")
        if saved["args"].get("loss") == "mse":
            sys.exit(f"{args.student_path}: has Q-values, no policy; distil with --loss kl or nll")
        if saved["capacity"] != args.capacity:
            sys.exit(f"{args.student_path}: pass its --capacity {saved['capacity']}")
        checkpoint = {"global_step": 0, "student": saved["model"], "teacher": saved.get("teacher")}
    args.teacher = (checkpoint["teacher"] or {}).get("sha256")  # no flag: for W&B's config
    if rank == 0:
        lock_output(args.save_path, args.overwrite or args.resume)
        writer = open_log(args, checkpoint.get("run_name"), checkpoint["global_step"])
        checkpoint.update(phase="finetuned", env_id=args.env_id, capacity=args.capacity)
        checkpoint.update(args=vars(args), checkpoint=args.save_path)
        checkpoint["run_name"] = Path(writer.log_dir).name
        print(f"run         {writer.log_dir} on {device}, from step {checkpoint['global_step']:,}")

    try:
        if rank == 0 and args.eval_steps and not checkpoint["global_step"]:
            saved["global_step"] = 0
            before = evaluate(agent, rom, args, saved, writer, device, "eval_before")
            checkpoint["evaluation_before"] = before
        agent = train(args, rom, checkpoint, writer, device, rank, world_size)
        if rank == 0 and args.eval_steps:
            checkpoint["evaluation"] = evaluate(agent, rom, args, checkpoint, writer, device)
            save_checkpoint(args.save_path, checkpoint)
    except KeyboardInterrupt:
        if rank == 0 and "optimizer" in checkpoint:
            save_checkpoint(args.save_path, checkpoint)
        sys.exit(f"\nstopped at step {checkpoint['global_step']:,}; pass --resume to go on")
    if rank == 0:
        print(f"wrote       {args.save_path}, trained for {checkpoint['global_step']:,} steps")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(tyro.cli(Args))
