"""Phase 1 of actor distillation: train a PPO actor-critic on one Atari game, from scratch.

    python ppo_atari_teacher.py                                   # the teacher, on Pong
    python ppo_atari_teacher.py --env-id BreakoutNoFrameskip-v4 --capacity low
    python ppo_atari_teacher.py --resume                          # go on after an interruption
    python ppo_atari_teacher.py --eval-only checkpoints/PongNoFrameskip-v4/ppo_high.pt

`--capacity medium` and `low` give the directly trained baselines of Green, Vineyard & Koç (2019),
"Distillation Strategies for Proximal Policy Optimization"; its Section 4 and Table 2 are the
defaults here. What the paper leaves unsaid follows the code that it names, Kostrikov's
pytorch-a2c-ppo-acktr-gail of November 2018.

One step is one action of the agent, which the emulator repeats for four frames. Every count of
this file is in steps, summed over the games that are played at once.
"""

import atexit
import contextlib
import copy
import ctypes
import difflib
import io
import itertools
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the slow imports below ends quietly
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # where a caller has closed stdout or stderr, no file of ours may take its place
    # GNU OpenMP's threads wait for work by spinning, for milliseconds by default, on the very cores
    # that the games need between two decisions; it reads this when torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Experiment
    exp_name: str = "ppo_atari_teacher"
    """name of this experiment, part of the run's name; no slash"""
    seed: int = 1
    """seed of the games, the initial weights, the actions and the minibatches; 0 or more"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where the network runs; `auto` takes a CUDA GPU when there is one, `cuda` demands it"""
    bf16: bool = False
    """train in bfloat16, faster where the hardware has it; weights, heads, losses, optimiser and
    evaluations stay float32"""
    compile: bool = False
    """compile network and loss with torch.compile, to CUDA graphs on a GPU: half a minute at the
    start or more, and on a CPU no gain"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic kernels only; off, it picks the fastest"""
    track: bool = False
    """mirror every logged metric to Weights & Biases"""
    wandb_project_name: str = "actor-distillation"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B entity (user or team); without it, the login's default"""
    capacity: Literal["high", "medium", "low"] = "high"
    """size of the network, the paper's Table 2; the teacher is `high`"""
    save_path: str | None = None
    """checkpoint to write; default `checkpoints/{env_id}/ppo_{capacity}.pt`"""
    checkpoint_interval: int = 1_000_000
    """save so often that no more steps than this are lost, but at most after each iteration"""
    resume: bool = False
    """go on from `save_path`: same weights, optimiser, random state and step, new games; start anew
    where nothing is saved yet"""
    overwrite: bool = False
    """replace `save_path` if it exists"""

    # Evaluation
    eval_steps: int = 1_000_000
    """budget of the evaluation after training; 0 skips it"""
    eval_greedy: bool = False
    """evaluate the most probable action instead of sampling from the policy"""
    eval_temperature: float | None = None
    """sample from softmax(logits / this) in evaluations; default 1, but networks of Q-values, which
    `--loss mse` makes, take the best action; 0.01 samples from those as Eq. 2 does"""
    eval_only: str | None = None
    """train nothing: evaluate this checkpoint, of any phase, and leave it as it is"""

    # Environment
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the Atari game; `ALE/Pong-v5` and `Pong-v5` name the same game"""
    num_envs: int = 16
    """games played at once, in training and in evaluation"""
    repeat_action_probability: float = 0.0
    """sticky actions: chance that the emulator repeats the last action in a frame, 0 to 1"""

    # Algorithm
    total_timesteps: int = 75_000_000
    """steps of training; rounded down to whole iterations of num_envs * num_steps"""
    learning_rate: float = 3e-4
    """Adam's learning rate at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly, to 0 after the last iteration"""
    num_steps: int = 2048
    """steps of each game in one rollout"""
    gamma: float = 0.99
    """discount factor, 0 to 1"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation, 0 to 1 (the paper's tau)"""
    update_epochs: int = 10
    """passes over a rollout"""
    num_minibatches: int = 32
    """minibatches in a pass; 1024 is the literal reading of the paper's "batch sizes of 32\""""
    norm_adv: bool = True
    """normalise the advantages, once over the whole rollout"""
    clip_coef: float = 0.1
    """clipping range of the probability ratio, and of the value with `clip_vloss`"""
    clip_vloss: bool = True
    """clip the value loss around the rollout's value"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the whole gradient; a longer one is scaled down to it"""
    target_kl: float | None = None
    """skip an iteration's further passes after one whose mean approx_kl exceeds this"""


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


def default_protocol():
    """How this project's own policies are played; students of other teachers follow theirs.

    With `greedy` the network gives Q-values, and an evaluation takes the best action unless it is
    told a temperature; the others are those of `Games`.
    """
    return {"fire_on_life_loss": False, "repeat_first_frame": False, "restart_stack": True,
            "greedy": False}


class Games(AtariVectorEnv):
    """Games on ale-py's C++ threads that can begin a life as CleanRL's and SB3's wrappers do.

    With `fire_on_life_loss` the step after a lost life presses FIRE, or NOOP in a game without it,
    whatever action is sent, and with `restart_stack` the stack of frames begins anew after that
    step. A stack that begins is filled up with blank frames or, with `repeat_first_frame`, with its
    first one.

    Attributes:
        new_life: bool [n], the games that FIRE or NOOP will be pressed for in the next step.
        new_game: bool [n], the games that the last step ended, and that began anew.
        age: int64 [n], steps since each stack began.
    """

    def __init__(self, rom, num_envs, fire_on_life_loss, repeat_first_frame, restart_stack,
                 **settings):
        super().__init__(rom, num_envs, **settings)
        actions = [action.name for action in self.ale.get_action_set()]
        self.press = actions.index("FIRE" if "FIRE" in actions else "NOOP")
        self.presses, self.repeat_first_frame = fire_on_life_loss, repeat_first_frame
        self.restart_stack = restart_stack

    def reset(self, **options):
        """Begin new games: observations and info."""
        obs, info = super().reset(**options)
        self.lives, self.frame_number = info["lives"], info["episode_frame_number"]
        self.age, self.new_life = np.zeros(len(obs), np.int64), np.zeros(len(obs), bool)
        return self.begin_stacks(obs), info

    def begin_stacks(self, obs):
        """Fill up the stacks that have not four frames of their own yet, in place."""
        if self.presses or self.repeat_first_frame:
            for i in np.flatnonzero(self.age < 3):
                missing = 3 - self.age[i]
                obs[i, :missing] = obs[i, missing] if self.repeat_first_frame else 0
        return obs

    def send(self, actions):
        """Begin a step with actions int64 [n]."""
        super().send(np.where(self.new_life, self.press, actions))

    def recv(self):
        """End a step: observations, raw rewards, terminated, truncated and info."""
        obs, reward, terminated, truncated, info = super().recv()
        # only a new game turns back the frames
        self.new_game = info["episode_frame_number"] < self.frame_number
        begins = self.new_game | (self.new_life & self.restart_stack)
        self.age = np.where(begins, 0, self.age + 1)
        if self.presses:
            lost = (0 < info["lives"]) & (info["lives"] < self.lives)
            self.new_life = lost & ~self.new_game
        self.lives, self.frame_number = info["lives"], info["episode_frame_number"]
        return self.begin_stacks(obs), reward, terminated, truncated, info


def make_envs(rom, num_envs, life_loss, repeat_action_probability, protocol=None, device="cpu"):
    """Games that run and are preprocessed on ale-py's C++ threads, in one group or in two.

    Of two groups one plays while a GPU decides for the other; a CPU's network needs the games'
    cores, and is faster for all of them at once. A game that ends restarts within the same step, so
    that no step is lost to a reset; rewards stay raw. With `life_loss` a lost life also reports
    `terminated`, while the game goes on.

    Args:
        rom: ale-py's name of the game, such as "ms_pacman".
        num_envs: number of games, N.
        life_loss: whether a lost life ends an episode.
        repeat_action_probability: sticky actions, 0 to 1.
        protocol: dict as of `default_protocol`, or None for that.
        device: where the network is.

    Returns:
        A list of (Games, slice of the N games that it plays): one, or on a GPU two if N is not 1.
        An observation is uint8 [4, 84, 84], the oldest frame first, filled up at a game's start.
    """
    protocol = protocol or default_protocol()
    middle = num_envs if torch.device(device).type == "cpu" else (num_envs + 1) // 2
    parts = [slice(0, middle), slice(middle, num_envs)][:1 if middle == num_envs else 2]
    return [(Games(rom, part.stop - part.start, protocol["fire_on_life_loss"],
                   protocol["repeat_first_frame"], protocol["restart_stack"],
                   autoreset_mode=AutoresetMode.SAME_STEP, reward_clipping=False,
                   life_loss_info=life_loss, repeat_action_probability=repeat_action_probability,
                   **preprocessing()), part)
            for part in parts]


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
    weights that it counts. With `bf16` all but the two heads is computed in bfloat16.

    Args:
        capacity: name in SIZES, or the four widths themselves.
        num_actions: A.
    """

    SIZES = {"high": (32, 64, 64, 512), "medium": (16, 32, 32, 256), "low": (8, 16, 16, 128)}
    bf16 = False

    def __init__(self, capacity, num_actions):
        super().__init__()
        c1, c2, c3, hidden = self.SIZES.get(capacity, capacity)
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
        # channels_last is the layout in which small convolutions are fastest on a CPU, and bytes
        # are cheaper to rearrange than floats
        x = obs.contiguous(memory_format=torch.channels_last)
        x = x.to(torch.bfloat16 if self.bf16 else torch.float32)  # whole numbers, exact in both
        first, *rest = self.network
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            # divides 255 out of the first convolution's weights instead of out of every pixel
            x = F.conv2d(x, first.weight / 255, first.bias, first.stride)
            for layer in rest:
                x = layer(x)
        x = x.float()
        return self.actor(x), self.critic(x).squeeze(-1)


def sample_actions(logits, generator=None):
    """Draw actions int64 [B] from softmax(logits), logits float [B, A], by the Gumbel-max trick."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)


def catch_stops():
    """Let a first SIGINT or SIGTERM raise KeyboardInterrupt(its number), a second leave at once.

    It is raised in this file's own code, where it is certain to end the script: some libraries
    swallow what is raised in a callback of theirs. Elsewhere a timer tries again, for 2 seconds.
    """
    first = []  # the first signal's number, and until when it waits for this file's own code

    def handle(number, frame):
        if number != signal.SIGALRM:
            if first:
                os._exit(128 + number)
            first[:] = number, time.monotonic() + 2
            signal.signal(signal.SIGALRM, handle)
        own = frame and frame.f_code.co_filename == handle.__code__.co_filename
        if own or time.monotonic() > first[1]:
            raise KeyboardInterrupt(first[0])
        signal.setitimer(signal.ITIMER_REAL, 0.005)

    # at its exit Python gives up the timer's handler, without which the timer would kill
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
        atexit.register(signal.signal, number, signal.SIG_DFL)


class Outlet(io.FileIO):
    """Where stdout or stderr goes; drops what cannot be written, as when Ctrl-C ended `tee` too.

    A reader that has stalled keeps nothing waiting for longer than half a second a line.
    """

    def write(self, content):
        """Write bytes, or drop them, and return how many are done with."""
        with contextlib.suppress(OSError):
            if select.select([], [self], [], 0.5)[1]:
                return super().write(content) or len(content)
        return len(content)


@contextlib.contextmanager
def atomic_write(path):
    """Open a file that stands at `path` whole when the block ends, and not at all if it raises.

    An OSError of the block is raised again with the name of the file.
    """
    target = Path(os.path.realpath(path))  # a link stays, and the file that it names is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def refuse(message):
    """Turn an error of the block into a UsageError: `message`, and the error itself.

    Foreign files can make the parsers raise anything. A UsageError passes as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{message} ({error!r:.160})") from None


def check_output(path, overwrite, *inputs):
    """Make sure that `path` can be written, before any work is spent on its content.

    What killed processes left of earlier attempts to write it is removed.

    Args:
        path: file to write.
        overwrite: whether it may exist already.
        inputs: paths that are read, and so must not be it.

    Raises:
        UsageError: if it may not be replaced, is a folder or an input, or lies where none can be.
    """
    target = Path(os.path.realpath(path))
    with refuse(f"{path}: cannot be written; name another"):
        if target.exists() and not target.is_file():
            raise UsageError(f"{path}: is a folder or a device; name a file")
        if str(target) in map(os.path.realpath, inputs):
            raise UsageError(f"{path}: is read as well; name another file to write")
        if target.exists() and not overwrite:
            raise UsageError(f"{path}: exists already; pass --overwrite, or another path")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        for file in target.parent.glob(".*.tmp"):
            if stale := re.fullmatch(rf"\.{re.escape(target.name)}\.(\d+)\.tmp", file.name):
                with contextlib.suppress(OSError, OverflowError):
                    try:
                        os.kill(int(stale[1]), 0)  # signal 0 only asks whether the process lives
                    except ProcessLookupError:
                        file.unlink()
        probe = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        probe.touch()
        probe.unlink()


def load_tensors(content):
    """What torch.save wrote as these bytes; no code in it is run.

    Raises:
        Exception: of any kind, as foreign bytes can make the parsers raise anything.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # torch.load does not look at the CRCs, and one flipped bit is a wrong weight; it stores
        # without compression, so a member that is larger than the file, or claims so, is a trap
        if (sum(member.file_size for member in archive.infolist()) > len(content)
                or any(member.compress_type for member in archive.infolist())
                or archive.testzip() is not None):
            raise ValueError("CRC mismatch")
    with warnings.catch_warnings(action="ignore"):  # of odd kinds of tensors
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_checkpoint(path, env_id, num_actions, made_by, capacity=None):
    """Read a checkpoint of this project, of any phase, and its network; run no code in the file.

    Args:
        path: the `.pt` file.
        env_id: canonical id of the game that it must belong to.
        num_actions: size of that game's action set.
        made_by: command that makes such a file, for the messages.
        capacity: size that the network must have, if any.

    Returns:
        The checkpoint, a dict whose tensors are on the CPU and that has a `protocol` even if the
        file has none, and its Agent.

    Raises:
        UsageError: if the file is missing, damaged, foreign, of another game, or does not fit.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; make it with `{made_by}`")
    with refuse(f"{path}: damaged, or its parts do not fit a checkpoint of this project; make it "
                f"anew with `{made_by}`"):
        found = load_tensors(Path(path).read_bytes())
        # all but the tensors is plain, and counted lazily before it is compared or printed: a
        # small file can name the same list over and over, a list of such lists, and so on
        plain = {name: x for name, x in found.items()
                 if name not in ("model", "last_model", "optimizer", "rng")}
        if sum(1 for _ in itertools.islice(json.JSONEncoder().iterencode(plain), 10**5)) == 10**5:
            raise ValueError("too many values")
        for name, wanted, fix in (("format_version", 1, "update the script"),
                                  ("env_id", env_id, "pass that --env-id"),
                                  ("capacity", capacity, "pass that --capacity")):
            if wanted not in (None, found[name]):
                raise UsageError(f"{path}: its {name} is {found[name]!r:.60}, not {wanted}; {fix}")
        found["protocol"] = default_protocol() | found.get("protocol", {})
        results = (found["evaluation"], found.get("evaluation_before"),
                   found["teacher"]["evaluation"] if found.get("teacher") else None)
        results = [result for result in results if result is not None]
        numbers = [result["mean"] for result in results]
        numbers += found.get("validation", {}).values()
        counts = (found["global_step"], found.get("epoch", 0), found.get("last_epoch", 0))
        fits = {
            "phase": isinstance(found["phase"], str), "args": isinstance(found["args"], dict),
            "protocol": dict.fromkeys(default_protocol(), bool)
                == {name: type(x) for name, x in found["protocol"].items()},
            "result": all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
                and all(isinstance(result.get("protocol", {}), dict) for result in results),
            "step": all(type(x) is int and x >= 0 for x in counts),
            # a tensor may repeat one number over and over
            "size": 4 * sum(x.numel() for x in found["model"].values()) < os.path.getsize(path)}
        if wrong := [name for name, fit in fits.items() if not fit]:
            raise ValueError(f"wrong {', '.join(wrong)}")
        agent = Agent(Agent.SIZES[found["capacity"]], num_actions)
        for weights in (found.get("last_model", found["model"]), found["model"]):
            agent.load_state_dict(weights)
            if not all(x.dtype == torch.float32 and x.isfinite().all() for x in weights.values()):
                raise ValueError("weights that are not finite or not float32")
    return found, agent


@torch.inference_mode()
def play(agent, groups, eval_steps, seed, greedy, temperature=1.0):
    """Play whole games, in a way that favours neither short nor long ones.

    Game slot e retires at its first game end at or after its own step ceil(eval_steps / N). Every
    game that it began until then counts, and none after: counting only what has finished within
    the budget would leave long games out.

    Args:
        agent: maps observations uint8 [B, 4, 84, 84] to (logits, values).
        groups: N games of `make_envs(..., life_loss=False)`.
        eval_steps: budget, summed over the slots; games under way go on to their end.
        seed: of the games and the actions; training's random state is neither read nor changed.
        greedy: take the most probable action instead of sampling.
        temperature: otherwise, sample from softmax(logits / temperature).

    Returns:
        Raw returns [G] and lengths in steps [G]: two lists, in the order in which the games ended.
    """
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def decide(envs, obs):
        logits, _ = agent(torch.from_numpy(obs).to(device))
        action = logits.argmax(-1) if greedy else sample_actions(logits / temperature, generator)
        envs.send(action.cpu().numpy())

    num_envs = groups[-1][1].stop
    seeds = game_seeds(num_envs, seed, 3)
    for envs, part in groups:
        decide(envs, envs.reset(seed=seeds[part])[0])
    playing = np.ones(num_envs, bool)
    game_return, game_length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
    returns, lengths = [], []
    slot_step, quota = 0, math.ceil(eval_steps / num_envs)
    with tqdm(desc="evaluate", unit="step", dynamic_ncols=True, mininterval=1) as bar:
        while playing.any():
            slot_step += 1
            game_length += 1
            bar.total = max(eval_steps, bar.n + int(playing.sum()))
            bar.update(int(playing.sum()))
            for envs, part in groups:
                obs, reward, terminated, truncated, _ = envs.recv()
                decide(envs, obs)
                game_return[part] += reward
                ended = np.zeros(num_envs, bool)
                ended[part] = terminated | truncated
                returns += game_return[ended & playing].tolist()
                lengths += game_length[ended & playing].tolist()
                game_return[ended] = game_length[ended] = 0
                if slot_step >= quota:
                    playing &= ~ended
                    bar.set_postfix_str(f"{playing.sum()} games still to end", refresh=False)
    for envs, _ in groups:
        envs.recv()
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
        args: eval_steps, eval_greedy, eval_temperature, num_envs, seed and
            repeat_action_probability are read.
        identity: env_id, phase, capacity, checkpoint and protocol of the policy; the JSON repeats
            them.
        path: file to write, such as `runs/{run_name}/eval.json`.

    Returns:
        What was written, without the list of every game's return and length.
    """
    check_output(path, True)
    protocol = identity["protocol"]
    greedy = args.eval_greedy or (protocol["greedy"] and args.eval_temperature is None)
    temperature = args.eval_temperature or 1.0
    groups = make_envs(rom, args.num_envs, False, args.repeat_action_probability, protocol,
                       agent.critic.weight.device)
    returns, lengths = play(agent, groups, args.eval_steps, args.seed, greedy, temperature)
    for envs, _ in groups:
        envs.close()
    result = {**identity, "seed": args.seed, "greedy": greedy, "temperature": temperature,
              "num_envs": args.num_envs,
              "repeat_action_probability": args.repeat_action_probability,
              "eval_steps": args.eval_steps, "steps": sum(lengths), **summarize(returns)}
    with atomic_write(path) as file:
        file.write(json.dumps({**result, "returns": returns, "lengths": lengths}).encode())
    low, high = result["ci95"]
    different = f" with {len(set(returns))} different returns" if greedy else ""
    print(f"evaluation  {result['env_id']} {result['phase']} {result['capacity']}: mean "
          f"{result['mean']:.2f} ± {result['std']:.2f}, max {result['max']:g}, "
          f"{len(returns)} games{different}, {result['steps']:,} steps, iqm {result['iqm']:.2f}, "
          f"95% interval of the mean {low:.2f} to {high:.2f}")
    return result


class Logger:
    """Scalars to TensorBoard in `runs/{run_name}` and, with `--track`, to a W&B run of that name.

    A run is worth more than its log: where one of the two fails, a warning is all that happens.

    Args:
        run_name: unique name, no slash.
        args: dataclass of flags, which are recorded; track and wandb_* are read.
        group: W&B's group, the game.
        global_step: where the run goes on; TensorBoard drops what was logged after it.
        wandb_id: on a resume, the `wandb_id` of before: an online W&B run goes on under it, while
            an offline one cannot, so that a new one of the same name and group follows it.
    """

    def __init__(self, run_name, args, group, global_step=0, wandb_id=None):
        self.folder, self.warned = f"runs/{run_name}", set()
        self.tensorboard = self.wandb = self.wandb_id = None
        with self.tolerate("tensorboard"):
            self.tensorboard = SummaryWriter(self.folder, purge_step=global_step + 1)
            rows = "".join(f"\n|{name}|{value}|" for name, value in vars(args).items())
            self.tensorboard.add_text("hyperparameters", f"|flag|value|\n|-|-|{rows}", global_step)
        with self.tolerate("wandb"):
            if args.track:
                import wandb

                online = wandb.setup().settings.mode == "online"
                again = {"id": wandb_id, "resume": "allow"} if online and wandb_id else {}
                self.wandb = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=run_name,
                    group=group, job_type=args.exp_name, config=vars(args), save_code=True, **again)
                self.wandb.define_metric("*", step_metric="global_step")
                self.wandb_id = self.wandb.id if online else None

    @contextlib.contextmanager
    def tolerate(self, part):
        """Turn an error of one part of the log into a warning, given once, and drop that part."""
        try:
            yield
        except Exception as error:
            setattr(self, part, None)
            if part not in self.warned:
                print(f"warning: {part} misses some of this run: {error!r:.300}", file=sys.stderr)
            self.warned.add(part)

    def log(self, metrics, global_step):
        """Record a dict of numbers by name, at a step that never goes back."""
        with self.tolerate("tensorboard"):
            if shutil.disk_usage(self.folder).free < 2**20:  # its thread would die of a full disk
                raise OSError("less than 1 MB is free; it goes on when there is more")
            self.tensorboard = self.tensorboard or SummaryWriter(self.folder)
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, global_step)
            self.tensorboard.flush()  # a killed process loses nothing that was logged
        with self.tolerate("wandb"):
            if self.wandb is not None:
                self.wandb.log({**metrics, "global_step": global_step})

    def close(self):
        """End the W&B run; TensorBoard's file is whole after every `log`."""
        with self.tolerate("wandb"):
            if self.wandb is not None:
                self.wandb.finish()


def new_run(env_id, args):
    """Make a new folder in `runs/` and return its name, `{env_id}__{exp_name}__{seed}__{time}`.

    Raises:
        UsageError: if exp_name holds a slash.
    """
    if not re.fullmatch(r"[^/\\\0]{1,100}", args.exp_name):
        raise UsageError(f"--exp-name {args.exp_name:.100}: must be 1 to 100 letters, no slash")
    name = f"{env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    while Path("runs", name).exists():
        name += "-2"
    Path("runs", name).mkdir(parents=True)
    return name


def set_up_torch(args):
    """Seed torch, set cuDNN's determinism, keep memory, and return the device of the flags.

    Raises:
        UsageError: if that is a GPU and there is none.
    """
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    with contextlib.suppress(AttributeError):  # where the C library is not glibc
        # glibc returns large blocks to the system at once, so that every batch would fetch its
        # activations page by page: a fifth to a third of the time at batches of 1024 and more
        libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; pass --device cpu or auto")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def gae(rewards, values, ends, bootstraps, last_values, gamma, gae_lambda):
    """Generalised advantage estimation, Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t) and A_t = delta_t + gamma lambda A_{t+1}. Nothing
    flows back over an episode's end, where V(s_{t+1}) is 0 if the episode terminated and the value
    of its final observation if it was truncated.

    Args:
        rewards, values: float32 [T, N], r_t and V(s_t).
        ends: float32 [T, N], 1 where an episode ended with step t, for whatever reason.
        bootstraps: float32 [T, N], value of the final observation where truncated, elsewhere 0.
        last_values: float32 [N], value of the observation after the last step.
        gamma, gae_lambda: 0 to 1.

    Returns:
        Advantages float32 [T, N]; with `values` added, the returns that the critic is fitted to.
    """
    advantages = torch.empty_like(rewards)
    advantage, next_values = torch.zeros_like(last_values), last_values
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * ((1 - ends[t]) * next_values + bootstraps[t]) - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * (1 - ends[t]) * advantage
        next_values = values[t]
    return advantages


def ppo_loss(logits, values, actions, old_logprobs, advantages, returns, old_values,
             clip_coef, clip_vloss, ent_coef, vf_coef):
    """The clipped objective of PPO, Schulman et al. 2017 (arXiv:1707.06347), Eq. 7 and 9, negated.

    Args:
        logits, values: float32 [B, A] and [B], of the network in training.
        actions: int64 [B].
        old_logprobs, advantages, returns, old_values: float32 [B], of the rollout.
        clip_coef, clip_vloss, ent_coef, vf_coef: the flags of these names.

    Returns:
        The loss, a scalar to minimise, and float32 [6], detached: policy_loss, value_loss, entropy,
        old_approx_kl = E[-log r], approx_kl = E[r - 1 - log r], the low-variance estimate of
        http://joschu.net/blog/kl-approx.html, and clipfrac.
    """
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
    clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
    statistics = (policy_loss, value_loss, entropy, -logratio.mean(),
                  (ratio - 1 - logratio).mean(), clipfrac)
    return loss, torch.stack(statistics).detach()


def minibatch_loss(agent, obs, *batch, **coefficients):
    """`ppo_loss` of the network's outputs on observations uint8 [B, 4, 84, 84]."""
    return ppo_loss(*agent(obs), *batch, **coefficients)


def compiled(function):
    """Compile a function of tensors and networks, on a GPU to CUDA graphs, when first called.

    What it returns lasts until its next call; batches of another size are compiled anew. A call
    raises UsageError where torch.compile cannot do it, as without a C++ compiler.
    """
    fast = torch.compile(function, mode="reduce-overhead", dynamic=False)

    def call(*args, **kwargs):
        try:
            return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            problem = str(error).splitlines()[0]
            raise UsageError(f"--compile: {problem:.300}; mend that, or leave it out") from None

    return call


def ppo_update(agent, optimizer, loss_function, *batch, max_grad_norm, **coefficients):
    """One optimiser step on one minibatch; no value leaves the device.

    Args:
        loss_function: `minibatch_loss`, compiled or not.
        batch: observations uint8 [B, 4, 84, 84], and actions to old_values of `ppo_loss`.
        max_grad_norm: bound on the norm of the whole gradient.
        coefficients: clip_coef to vf_coef of `ppo_loss`, by name.

    Returns:
        The six statistics of `ppo_loss`, float32 [6].
    """
    optimizer.zero_grad()
    loss, statistics = loss_function(agent, *batch, **coefficients)
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    optimizer.step()
    return statistics.clone()


def save_checkpoint(path, checkpoint):
    """Write a checkpoint, whole or not at all; a full disk raises OSError, as for any file."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def restore(path, saved, phase, args, agent, optimizer, free=()):
    """Go on where a checkpoint was saved: put back weights, moments and random states.

    Each moment gets its parameter's memory layout. Fused optimisers pair them by their place in
    memory: a moment in another layout than its channels_last weight would move the wrong weights,
    without any error.

    Args:
        path, saved: the checkpoint's file and content.
        phase: that the checkpoint must be of.
        args: the flags now; those that shape training must equal the saved ones.
        agent, optimizer: what is changed, besides torch's generators.
        free: further flags that may differ.

    Raises:
        UsageError: if the checkpoint or a flag does not fit.
    """
    if saved["phase"] != phase:
        raise UsageError(f"{path}: holds no {phase} training; name another --save-path")
    free = {"total_timesteps", "epochs", "checkpoint_interval", "buffer_path", "save_path",
            "env_id", "resume", "overwrite", "device", "compile", "track", "wandb_project_name",
            "wandb_entity", "eval_steps", "eval_greedy", "eval_temperature", "eval_only", *free}
    for name, value in vars(args).items():
        before = saved["args"].get(name, getattr(type(args), name))  # a new flag had its default
        if name not in free and before != value:
            raise UsageError(f"--{name.replace('_', '-')} {value}: {path} was trained with "
                             f"{before!r:.60}; resume with that, or name another --save-path")
    lowest = ({"step": 1, "exp_avg": -math.inf, "exp_avg_sq": 0}
              if isinstance(optimizer, torch.optim.Adam) else {"momentum_buffer": -math.inf})
    with refuse(f"{path}: its training cannot be restored; name another --save-path"):
        needed = {"epoch", "last_epoch", "validation"} if phase == "distilled" else set()
        # the critic, or all but the critic, may have been left out of every update
        names, parameters = zip(*agent.named_parameters())
        everything = set(range(len(names)))
        critic = {i for i in everything if "critic" in names[i]}
        if not (needed <= saved.keys() and len(os.fsencode(saved["run_name"])) < 256
                and re.fullmatch(r"(?!\.\.?$)[^/\\\0]+", saved["run_name"])
                and set(saved["optimizer"]["state"]) in (everything, critic, everything - critic)):
            raise ValueError("no training to go on with")
        # a student's weights may be those of an earlier epoch than the last
        agent.load_state_dict(saved.get("last_model", saved["model"]))
        for (i, moments), name in itertools.product(saved["optimizer"]["state"].items(), lowest):
            moment = moments[name].detach()
            like = parameters[i].sum() if name == "step" else parameters[i]
            if ((moment.shape, moment.dtype) != (like.shape, torch.float32)
                    or not (moment.isfinite() & (moment >= lowest[name])).all()):
                raise ValueError(f"{name} of weight {i}")
            optimizer.state[parameters[i]][name] = torch.empty_like(like).copy_(moment)
        torch.set_rng_state(saved["rng"]["torch"])
        if agent.critic.weight.is_cuda and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])


def training_state(agent, optimizer):
    """A copy of weights, optimiser and random states: all that later updates depend on."""
    cuda = torch.cuda.get_rng_state() if agent.critic.weight.is_cuda else None
    return copy.deepcopy({"model": agent.state_dict(), "optimizer": optimizer.state_dict(),
                          "rng": {"torch": torch.get_rng_state(), "cuda": cuda}})


def main(args, at_exit):
    env_id, rom = resolve_game(args.env_id)
    check_flags(
        args, seed=(0, 2**63 - 1), checkpoint_interval=(1, 10**12), num_envs=(1, 1024),
        eval_steps=(0 if args.eval_only is None else 1, 10**12), eval_temperature=(1e-6, 1e4),
        repeat_action_probability=(0, 1),
        learning_rate=(1e-12, 1e3), num_steps=(1, 10**6), gamma=(0, 1), gae_lambda=(0, 1),
        update_epochs=(1, 1000), num_minibatches=(1, args.num_envs * args.num_steps),
        total_timesteps=(args.num_envs * args.num_steps, 10**12), clip_coef=(1e-12, 1e6),
        ent_coef=(0, 1e6), vf_coef=(0, 1e6), max_grad_norm=(1e-12, 1e12), target_kl=(1e-12, 1e6))
    if args.eval_greedy and args.eval_temperature is not None:
        raise UsageError(f"--eval-temperature {args.eval_temperature}: --eval-greedy leaves no "
                         "chance; drop one")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        raise UsageError(f"--num-minibatches {args.num_minibatches}: must divide {batch_size}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # for a rollout's frames
    check_flags(args, num_steps=(1, memory // (args.num_envs * 4 * 84 * 84)))
    device = set_up_torch(args)
    groups = make_envs(rom, args.num_envs, True, args.repeat_action_probability, device=device)
    for envs, _ in groups:
        at_exit.callback(envs.close)
    num_actions = int(envs.single_action_space.n)
    made_by = f"python ppo_atari_teacher.py --env-id {env_id} --capacity {args.capacity}"

    if args.eval_only is not None:
        saved, agent = load_checkpoint(args.eval_only, env_id, num_actions, made_by)
        path = f"runs/{new_run(env_id, args)}/eval.json"
        identity = {name: saved[name] for name in ("env_id", "phase", "capacity", "protocol")}
        evaluate(agent.to(device, memory_format=torch.channels_last), rom, args,
                 identity | {"checkpoint": args.eval_only}, path)
        print(f"wrote       {path}")
        return

    save_path = args.save_path or f"checkpoints/{env_id}/ppo_{args.capacity}.pt"
    check_output(save_path, args.overwrite or args.resume)
    agent = Agent(args.capacity, num_actions).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    saved = {}
    if args.resume and Path(save_path).exists():
        saved, _ = load_checkpoint(save_path, env_id, num_actions, made_by + " --overwrite")
        restore(save_path, saved, "ppo", args, agent, optimizer)
    state, global_step = saved, saved.get("global_step", 0)
    last_saved = start_step = global_step
    run_name = saved.get("run_name") or new_run(env_id, args)
    logger = Logger(run_name, args, env_id, global_step, saved.get("wandb_id"))
    at_exit.callback(logger.close)
    if args.resume:
        print(f"resumed     {save_path} at step {global_step:,}" if saved else
              f"resume      {save_path} is not there yet, so training starts anew")
    identity = {"env_id": env_id, "phase": "ppo", "capacity": args.capacity,
                "checkpoint": save_path, "protocol": default_protocol()}
    num_iterations = args.total_timesteps // batch_size
    print(f"run         runs/{run_name} on {device}, {num_iterations:,} iterations of "
          f"{batch_size:,} steps")

    def save(evaluation=None, final=False):
        """Write the state after the last whole iteration; only warn if others are to follow."""
        nonlocal last_saved
        try:
            save_checkpoint(save_path, {
                **state, "format_version": 1, **identity, "num_actions": num_actions,
                "args": vars(args), "evaluation": evaluation, "run_name": run_name,
                "wandb_id": logger.wandb_id})
            last_saved = state["global_step"]
        except OSError as error:
            if final:
                raise
            print(f"\nwarning: step {state['global_step']:,} not saved: {error}", file=sys.stderr)

    def kept():
        """Say what is saved."""
        return f"{save_path} holds step {last_saved:,}" if last_saved else "nothing is saved yet"

    def save_when_stopped(kind, *_):
        """Save what is whole, if a signal ends the script, and say how to go on."""
        if kind is KeyboardInterrupt:
            if state and state["global_step"] > last_saved:
                save()
            words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
            words = ["python", *words, "--resume"] if last_saved else ["python", *sys.argv]
            print(f"\nstopped     {kept()}; to go on:\n"
                  f"            {shlex.join(words)}", file=sys.stderr)

    at_exit.push(save_when_stopped)
    agent.bf16 = args.bf16
    loss_function = compiled(minibatch_loss) if args.compile else minibatch_loss
    rollout_shape = (args.num_steps, args.num_envs)
    # with the channels last, as the network wants them: rearranged once, not in every pass
    obs = torch.empty((*rollout_shape, 84, 84, 4), dtype=torch.uint8, device=device)
    actions = torch.empty(rollout_shape, dtype=torch.int64, device=device)
    logprobs, values = torch.empty((2, *rollout_shape), device=device)
    rewards, ends, bootstraps = torch.empty((3, *rollout_shape))

    next_obs = np.empty((args.num_envs, 4, 84, 84), np.uint8)
    game_return, game_length = np.zeros(args.num_envs), np.zeros(args.num_envs, np.int64)
    seeds = game_seeds(args.num_envs, args.seed, 1, global_step)
    for envs, part in groups:
        next_obs[part], _ = envs.reset(seed=seeds[part])
    recent_returns = []
    start_time = time.time()
    bar = at_exit.enter_context(tqdm(total=num_iterations * batch_size, initial=global_step,
                                     unit="step", mininterval=1))
    for iteration in range(global_step // batch_size + 1, num_iterations + 1):
        if args.anneal_lr:
            fraction_left = 1 - (iteration - 1) / num_iterations
            optimizer.param_groups[0]["lr"] = fraction_left * args.learning_rate

        bar.set_description("rollout")
        with torch.no_grad():
            for step, (envs, part) in itertools.product(range(args.num_steps + 1), groups):
                if step > 0:  # what has become of the last decision
                    past = (step - 1, part)
                    next_obs[part], reward, terminated, truncated, info = envs.recv()
                    # a lost life is `terminated` too
                    game_over = truncated | (terminated & envs.new_game)
                    rewards[past] = torch.from_numpy(np.sign(reward))
                    ends[past] = torch.from_numpy(terminated | truncated)
                    bootstraps[past] = 0
                    if truncated.any():
                        final_obs = torch.from_numpy(info["final_obs"][truncated]).to(device)
                        bootstraps[past][torch.from_numpy(truncated)] = agent(final_obs)[1].cpu()

                    global_step += len(reward)
                    bar.update(len(reward))
                    game_return[part] += reward
                    game_length[part] += 1
                    for e in part.start + np.flatnonzero(game_over):
                        logger.log({"charts/episodic_return": game_return[e],
                                    "charts/episodic_length": game_length[e]}, global_step)
                        recent_returns.append(game_return[e])
                        game_return[e] = game_length[e] = 0
                if step < args.num_steps:
                    now = (step, part)
                    obs[now] = torch.from_numpy(next_obs[part]).permute(0, 2, 3, 1)
                    logits, values[now] = agent(obs[now].permute(0, 3, 1, 2))
                    actions[now] = sample_actions(logits)
                    taken = actions[now].unsqueeze(-1)
                    logprobs[now] = logits.log_softmax(-1).gather(-1, taken).squeeze(-1)
                    # last: the games' threads leave no core for anything else
                    envs.send(actions[now].cpu().numpy())

        with torch.no_grad():
            last_values = agent(torch.from_numpy(next_obs).to(device))[1].cpu()
        advantages = gae(rewards, values.cpu(), ends, bootstraps, last_values,
                         args.gamma, args.gae_lambda).to(device)
        returns = advantages + values
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-5)

        b_obs = obs.flatten(0, 1)
        b_rest = [x.flatten() for x in (actions, logprobs, advantages, returns, values)]
        statistics = []
        for epoch in range(args.update_epochs):
            bar.set_description(f"update {epoch + 1}/{args.update_epochs}")
            for mb in torch.randperm(batch_size, device=device).chunk(args.num_minibatches):
                mb_obs = b_obs.index_select(0, mb).permute(0, 3, 1, 2)
                statistics.append(ppo_update(
                    agent, optimizer, loss_function, mb_obs, *(x[mb] for x in b_rest),
                    max_grad_norm=args.max_grad_norm, clip_coef=args.clip_coef,
                    clip_vloss=args.clip_vloss, ent_coef=args.ent_coef, vf_coef=args.vf_coef))
            if args.target_kl is not None:
                if torch.stack(statistics[-args.num_minibatches:])[:, 4].mean() > args.target_kl:
                    break

        losses = torch.stack(statistics).mean(0)
        names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
        metrics = {f"losses/{name}": value for name, value in zip(names, losses.tolist())}
        # a gradient that is not finite leaves weights that are not, even after a finite loss
        if not all(x.isfinite().all() for x in (losses, *agent.parameters())):
            raise UsageError(f"training diverged at step {global_step:,}, {metrics}; {kept()}; "
                             "lower --learning-rate")
        unexplained = (returns - values).var() / returns.var()
        metrics["losses/explained_variance"] = 1 - unexplained.item()
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
        logger.log(metrics, global_step)
        if recent_returns:
            bar.set_postfix_str(f"return {np.mean(recent_returns[-100:]):.1f}", refresh=False)
        state = {**training_state(agent, optimizer), "global_step": global_step}
        if global_step + batch_size - last_saved > args.checkpoint_interval:
            save()
    bar.close()
    if global_step > last_saved:
        save(final=not args.eval_steps)

    agent.bf16 = False
    if args.eval_steps:
        result = evaluate(agent, rom, args, identity, f"runs/{run_name}/eval.json")
        save(result, final=True)
        if global_step > start_step or not saved.get("evaluation"):  # else it was logged before
            logger.log({f"eval/{name}": result[name] for name in ("mean", "std", "iqm")},
                       global_step)
        print(f"wrote       runs/{run_name}/eval.json")
    print(f"wrote       {save_path}, {Path(save_path).stat().st_size / 1e6:.1f} MB, trained for "
          f"{global_step:,} steps")
    print("curves      tensorboard --logdir runs")
    print(f"next        python collect_buffer.py --env-id {env_id} --teacher-path "
          f"{shlex.quote(save_path)}")


if __name__ == "__main__":
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(Outlet(number, "w", closefd=False)),
                         errors="replace", line_buffering=True) for number in (1, 2))
    catch_stops()
    try:
        with contextlib.ExitStack() as at_exit:
            main(tyro.cli(Args), at_exit)
    except (UsageError, OSError, MemoryError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        if isinstance(error, (MemoryError, RuntimeError)):
            if "memory" not in repr(error).lower():
                raise
            problem = f"out of memory ({problem:.99}); use smaller batches, fewer games or samples"
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped by a signal", file=sys.stderr)
        sys.exit(128 + stop.args[0])
