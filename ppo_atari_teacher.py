"""Phase 1 of actor distillation: train a PPO actor-critic on one Atari game, from scratch.

    python ppo_atari_teacher.py                                   # the teacher, on Pong
    python ppo_atari_teacher.py --env-id BreakoutNoFrameskip-v4 --capacity low
    python ppo_atari_teacher.py --resume                          # go on after an interruption
    python ppo_atari_teacher.py --eval-only checkpoints/PongNoFrameskip-v4/ppo_high.pt

`--capacity medium` and `low` give the directly trained baselines of Green, Vineyard & Koç (2019),
"Distillation Strategies for Proximal Policy Optimization"; its Section 4 and Table 2 are the
defaults here. What the paper leaves unsaid follows the code that it names, Kostrikov's
pytorch-a2c-ppo-acktr-gail of November 2018.

One step is one action of the agent, which the emulator repeats for four frames. Every total of
this file is in steps, summed over the games that are played at once.
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
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "ppo_atari_teacher"
    """name of this experiment, part of the run's name"""
    seed: NonNegativeInt = 1
    """seed of the games, the initial weights, the actions and the minibatches"""
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
    capacity: Literal["high", "medium", "low"] = "high"
    """size of the network, Table 2; the teacher is `high`"""
    save_path: FilePath = "checkpoints/{env_id}/ppo_{capacity}.pt"
    """checkpoint to write; flags in braces are filled in"""
    checkpoint_interval: PositiveInt = 1_000_000
    """save so often that no more steps than this are lost, but at most after each iteration"""
    resume: bool = False
    """go on from `save_path`: same weights, optimiser, random state and step, new games; start
    anew where nothing is saved yet"""
    overwrite: bool = False
    """replace `save_path` if it exists"""

    # Evaluation
    eval_steps: NonNegativeInt = 1_000_000
    """steps of the evaluation after training, plus what finishes its games; 0 skips it"""
    eval_greedy: bool = False
    """evaluate the most probable action instead of sampling from the policy"""
    eval_only: FilePath | None = None
    """train nothing: evaluate this checkpoint, of any phase"""

    # Environment
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game; `ALE/Pong-v5` and `Pong-v5` name the same game"""
    num_envs: PositiveInt = 16
    """games played at once, in training and in evaluation"""
    repeat_action_probability: Fraction = 0.0
    """sticky actions: chance that the emulator repeats the last action in a frame"""

    # Algorithm
    total_timesteps: PositiveInt = 75_000_000
    """steps of training; rounded down to whole iterations of num_envs * num_steps"""
    learning_rate: PositiveFloat = 3e-4
    """Adam's learning rate at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly, to 0 after the last iteration"""
    num_steps: Annotated[int, Field(ge=2)] = 2048
    """steps of each game in one rollout"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of generalised advantage estimation (the paper's tau)"""
    update_epochs: PositiveInt = 10
    """passes over a rollout"""
    num_minibatches: PositiveInt = 32
    """minibatches in a pass; 1024 is the literal reading of the paper's "batch sizes of 32\""""
    norm_adv: bool = True
    """normalise the advantages, once over the whole rollout"""
    clip_coef: PositiveFloat = 0.1
    """clipping range of the probability ratio, and of the value with `clip_vloss`"""
    clip_vloss: bool = True
    """clip the value loss around the rollout's value"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: PositiveFloat = 0.5
    """largest norm of the whole gradient; a longer one is scaled down to it"""
    target_kl: PositiveFloat | None = None
    """skip an iteration's further passes after one whose mean approx_kl exceeds this"""


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


def sample_actions(logits, generator=None, rank=0, processes=1):
    """Draw actions int64 [B] from softmax(logits), float [B, A], by the Gumbel-max trick.

    Each of several processes draws the noise of all games, and uses its own share of it.
    """
    noise = logits.new_empty((processes, *logits.shape)).exponential_(generator=generator)[rank]
    return (logits - noise.log()).argmax(-1)


def main(args):
    args.env_id, rom = resolve_game(args.env_id)
    args.save_path = args.save_path.format(**vars(args))
    device, rank, processes = set_up_torch(args.seed, args.cuda, args.torch_deterministic)
    if args.eval_only:
        checkpoint, agent = load_checkpoint(args.eval_only, args.env_id, "name another checkpoint")
        agent = agent.to(device, memory_format=torch.channels_last)
        return evaluate(agent, rom, args, checkpoint, open_log(args))

    batch_size = args.num_envs * args.num_steps
    if args.num_envs % processes or args.total_timesteps < batch_size:
        sys.exit(f"--num-envs must be a multiple of {processes}, --total-timesteps {batch_size:,}+")
    if batch_size // processes % args.num_minibatches:
        sys.exit(f"--num-minibatches must divide {batch_size // processes}, a process's steps")
    if rank == 0:
        claim(args.save_path, args.overwrite or args.resume)
    envs = AtariEnvs(rom, args.num_envs // processes, True, args.repeat_action_probability)
    agent, checkpoint = Agent(args.capacity, len(envs.action_meanings)), {"global_step": 0}
    if args.resume and os.path.exists(args.save_path):
        checkpoint, agent = load_checkpoint(args.save_path, args.env_id, "pass --overwrite")
    agent = agent.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    last_saved = checkpoint["global_step"]
    if last_saved:
        restore(checkpoint, "ppo", args, agent, optimizer)
    total = args.total_timesteps // batch_size * batch_size
    bar = progress(initial=last_saved, total=total, unit="step", disable=rank > 0)
    iterations = train(args, agent, optimizer, envs, bar, device, rank, processes)
    if rank:  # process 0 alone logs, saves and evaluates
        return list(iterations)

    writer = open_log(args, checkpoint.get("run_name"), last_saved)
    about = {"phase": "ppo", "env_id": args.env_id, "capacity": args.capacity, "args": vars(args)}
    about |= {"checkpoint": args.save_path, "run_name": os.path.basename(writer.log_dir)}
    lr = args.learning_rate * (1 - args.anneal_lr * last_saved / total)
    print(f"run         {writer.log_dir} on {device}, step {last_saved:,}, learning rate {lr:.3g}")

    try:
        for step, scalars in iterations:
            for scalar in scalars:
                writer.add_scalar(*scalar)
            writer.flush()
            checkpoint = {**about, **training_state(agent, optimizer), "global_step": step}
            if step + batch_size > last_saved + args.checkpoint_interval:
                save_checkpoint(args.save_path, checkpoint)
                last_saved = step
        bar.close()
        save_checkpoint(args.save_path, checkpoint)
        if args.eval_steps:
            checkpoint["evaluation"] = evaluate(agent, rom, args, checkpoint, writer)
            save_checkpoint(args.save_path, checkpoint)
    except KeyboardInterrupt:
        bar.close()
        if checkpoint["global_step"] > last_saved:
            save_checkpoint(args.save_path, checkpoint)
        sys.exit(f"\nstopped at step {checkpoint['global_step']:,}; pass --resume to go on")
    print(f"wrote       {args.save_path}, trained for {checkpoint['global_step']:,} steps")
    command = "collect_buffer.py --teacher-path"
    print(f"next        python {command} {args.save_path} --env-id {args.env_id}")


def train(args, agent, optimizer, envs, bar, device, rank=0, processes=1):
    """PPO: play, estimate advantages, update, over and over.

    Yields after each iteration the step and what there is to log, a list of (name, value, step).
    Counts on from the step at which the progress `bar` stands. Of torchrun's processes this one
    plays share `rank` of the games, in `envs`, and learns from them.
    """
    batch_size = envs.num_envs * args.num_steps
    learner = agent
    if processes > 1:  # averages the gradients
        learner = nn.parallel.DistributedDataParallel(agent)
    global_step = start_step = bar.n
    coefficients = (args.clip_coef, args.clip_vloss, args.ent_coef, args.vf_coef)
    loss_function = minibatch_loss
    if args.compile:
        loss_function = torch.compile(minibatch_loss, mode="reduce-overhead", dynamic=False)
    rollout_shape = (args.num_steps, envs.num_envs)
    # with the channels last, as the network wants them: rearranged once, not in every pass
    obs = torch.empty((*rollout_shape, 84, 84, 4), dtype=torch.uint8, device=device)
    actions = torch.empty(rollout_shape, dtype=torch.int64, device=device)
    logprobs, values, forced = torch.empty((3, *rollout_shape), device=device)
    rewards, dones = torch.empty((2, *rollout_shape))
    game_return, game_length = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    seeds = game_seeds(args.num_envs, args.seed, 1, global_step)
    next_obs, _ = envs.reset(seed=np.split(seeds, processes)[rank])
    start_time = time.time()
    while global_step < bar.total:
        fraction = global_step / bar.total
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * fraction)
        scalars = []

        for step in range(args.num_steps):
            obs[step] = torch.from_numpy(next_obs).to(device).permute(0, 2, 3, 1)
            forced[step] = torch.from_numpy(envs.forced)
            decision = act(agent, obs[step].permute(0, 3, 1, 2), rank, processes)
            actions[step], logprobs[step], values[step] = decision
            next_obs, reward, terminated, truncated, info = envs.step(decision[0].cpu().numpy())
            rewards[step] = torch.from_numpy(np.sign(reward))
            dones[step] = torch.from_numpy(terminated | truncated)
            if truncated.any():  # the game would have gone on: its value stands for the rest
                final_obs = torch.from_numpy(info["final_obs"][truncated]).to(device)
                rewards[step][truncated] += args.gamma * agent(final_obs)[1].detach().cpu()

            global_step += args.num_envs
            bar.update(args.num_envs)
            game_return += reward
            game_length += 1
            for e in np.flatnonzero(envs.game_over):
                scalars.append(("charts/episodic_return", game_return[e], global_step))
                scalars.append(("charts/episodic_length", game_length[e], global_step))
                bar.set_postfix_str(f"return {game_return[e]:g}", refresh=False)
                game_return[e] = game_length[e] = 0

        last_values = act(agent, torch.from_numpy(next_obs).to(device), rank, processes)[2].cpu()
        advantages = gae(rewards, values.cpu(), dones, last_values, args.gamma, args.gae_lambda)
        advantages = advantages.to(device)
        returns = advantages + values
        if args.norm_adv:
            all_advantages = gathered(advantages)
            advantages = (advantages - all_advantages.mean()) / (all_advantages.std() + 1e-5)
        advantages *= 1 - forced  # FIRE was not the policy's choice

        b_obs = obs.flatten(0, 1)
        b_rest = [x.flatten() for x in (actions, logprobs, advantages, returns, values)]
        statistics = []
        for _ in range(args.update_epochs):
            order = torch.randperm(processes * batch_size, device=device)
            for mb in (order[order // batch_size == rank] % batch_size).chunk(args.num_minibatches):
                mb_obs = b_obs.index_select(0, mb).permute(0, 3, 1, 2)
                minibatch = (mb_obs, [x[mb] for x in b_rest], coefficients, args.max_grad_norm)
                statistics.append(ppo_update(learner, optimizer, loss_function, *minibatch))
            last = torch.stack(statistics[-args.num_minibatches :]).mean(0)
            if args.target_kl and gathered(last).mean(0)[4] > args.target_kl:  # approx_kl
                break

        losses = gathered(torch.stack(statistics).mean(0)).mean(0).tolist()
        if not math.isfinite(sum(losses)):
            sys.exit(f"training diverged at step {global_step:,}; lower --learning-rate")
        names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
        metrics = {f"losses/{name}": x for name, x in zip(names, losses, strict=True)}
        all_returns = gathered(returns)
        if all_returns.var() > 1e-8:
            unexplained = gathered(returns - values).var() / all_returns.var()
            metrics["losses/explained_variance"] = 1 - unexplained.item()
        metrics["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        scalars += [(name, value, global_step) for name, value in metrics.items()]
        yield global_step, scalars


@torch.no_grad()
def act(agent, obs, rank=0, processes=1):
    """Sampled actions int64 [B], their log-probabilities and the values, float32 [B]."""
    logits, values = agent(obs)
    actions = sample_actions(logits, None, rank, processes)
    logprobs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return actions, logprobs, values


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


def ppo_loss(logits, values, batch, clip_coef, clip_vloss, ent_coef, vf_coef):
    """The clipped objective of PPO, Schulman et al. 2017 (arXiv:1707.06347), Eq. 7 and 9, negated.

    Args:
        logits, values: float32 [B, A] and [B], of the network in training.
        batch: of the rollout, actions int64 [B] and their log-probabilities, advantages, returns
            and values, float32 [B].

    Returns:
        The loss, a scalar to minimise, and float32 [6], detached: policy_loss, value_loss, entropy,
        old_approx_kl = E[-log r], approx_kl = E[r - 1 - log r], the low-variance estimate of
        http://joschu.net/blog/kl-approx.html, and clipfrac.
    """
    actions, old_logprobs, advantages, returns, old_values = batch
    assert values.shape == returns.shape, "values of shape [B, 1] would broadcast"
    all_logprobs = logits.log_softmax(-1)
    logratio = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - old_logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()
    value_error = (values - returns).square()
    if clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        value_error = torch.max(value_error, (clipped_values - returns).square())
    value_loss = 0.5 * value_error.mean()
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
    loss = policy_loss - ent_coef * entropy + vf_coef * value_loss
    approx_kl = (ratio - 1 - logratio).mean()
    clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
    statistics = (policy_loss, value_loss, entropy, -logratio.mean(), approx_kl, clipfrac)
    return loss, torch.stack(statistics).detach()


def minibatch_loss(agent, obs, batch, coefficients):
    """`ppo_loss` of the network's outputs on observations uint8 [B, 4, 84, 84]."""
    return ppo_loss(*agent(obs), batch, *coefficients)


def ppo_update(agent, optimizer, loss_function, obs, batch, coefficients, max_grad_norm):
    """One optimiser step on a minibatch: observations uint8 [B, 4, 84, 84], `ppo_loss`'s batch.

    `loss_function` is `minibatch_loss`, compiled or not. Returns the statistics of `ppo_loss`; no
    value leaves the device.
    """
    optimizer.zero_grad()
    loss, statistics = loss_function(agent, obs, batch, coefficients)
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    optimizer.step()
    return statistics.clone()  # CUDA graphs write the next ones to the same place


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


def resolve_game(env_id):
    """The canonical id of a gymnasium id, and ale-py's ROM name; exits for an unknown game.

    `ALE/MsPacman-v5` gives ("MsPacmanNoFrameskip-v4", "ms_pacman").
    """
    games = {f"{r.title().replace('_', '')}NoFrameskip-v4": r for r in roms.get_all_rom_ids()}
    canonical = re.sub(r"^(ALE/)?(\w+)-v5$", r"\2NoFrameskip-v4", env_id)
    if canonical not in games:
        sys.exit(f"--env-id {env_id}: no such game; ids look like ALE/MsPacman-v5")
    return canonical, games[canonical]


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
