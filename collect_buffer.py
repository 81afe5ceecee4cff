"""Phase 2 of actor distillation: the trained teacher plays, and a replay buffer records it.

    python collect_buffer.py                                      # the teacher of Pong
    python collect_buffer.py --env-id BreakoutNoFrameskip-v4 --num-samples 50_000

The buffer is one `.npz` that NumPy alone can read. It holds every frame once; an observation is
four rows of `frames`, so that 540,000 samples fit in 4 GB where stacked they would fill 15 GB:

    with np.load("buffers/PongNoFrameskip-v4.npz") as buffer:
        observation = buffer["frames"][buffer["stack_index"][i]]  # uint8 [4, 84, 84]
        target = buffer["action_probs"][i]                        # float32 [A]

One step is one action of the teacher, which the emulator repeats for four frames; one sample is
one step.
"""

import atexit
import contextlib
import ctypes
import difflib
import hashlib
import importlib.metadata
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
import zlib
from concurrent.futures import ThreadPoolExecutor
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
    exp_name: str = "collect_buffer"
    """name of this experiment, part of the run's name; no slash"""
    seed: int = 1
    """seed of the games and the sampled actions; 0 or more"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where the network runs; `auto` takes a CUDA GPU when there is one, `cuda` demands it"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic kernels only; off, it picks the fastest"""
    track: bool = False
    """mirror every logged metric to Weights & Biases"""
    wandb_project_name: str = "actor-distillation"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B entity (user or team); without it, the login's default"""
    teacher_path: str | None = None
    """checkpoint of the teacher: this project's, CleanRL's state dict (PPO, DQN) or
    Stable-Baselines3's zip file (PPO, DQN); default `checkpoints/{env_id}/ppo_high.pt`, or the
    shipped one"""
    buffer_path: str | None = None
    """buffer to write; default `buffers/{env_id}.npz`"""
    overwrite: bool = False
    """replace `buffer_path` if it exists"""

    # Environment
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the Atari game; `ALE/Pong-v5` and `Pong-v5` name the same game"""
    num_envs: int = 16
    """games played at once"""
    repeat_action_probability: float = 0.0
    """sticky actions: chance that the emulator repeats the last action in a frame, 0 to 1"""
    fire_on_life_loss: Literal["auto", "on", "off"] = "auto"
    """press FIRE, or NOOP in a game without it, in the step after a lost life, and do not record
    that step; `auto` is on for teachers of CleanRL and Stable-Baselines3, which were trained that
    way, and their students"""
    envpool: bool = False
    """the teacher is of CleanRL's ppo_atari_envpool.py, whose file looks like ppo_atari.py's: its
    stack of frames runs on over a lost life"""

    # Collection
    num_samples: int = 540_000
    """steps to record, all games together; DQN distillation used ten hours of play, 540,000"""
    greedy: bool = False
    """play the most probable action instead of sampling from the policy"""
    epsilon: float | None = None
    """chance that a teacher with Q-values plays a random action instead of its best, 0 to 1;
    default 0.05"""


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


class ForeignTeacher(Agent):
    """A network that CleanRL or Stable-Baselines3 has trained, of whatever widths.

    Args:
        widths: of the three convolutions and the hidden layer.
        num_actions: A.
        q_network: whether the head gives Q-values, and its maximum the value.
        own_critic: whether the critic has layers of its own instead of sharing the actor's.
    """

    def __init__(self, widths, num_actions, q_network, own_critic):
        super().__init__(widths, num_actions)
        self.q_network = q_network
        self.value_agent = Agent(widths, num_actions) if own_critic else None

    def forward(self, obs):
        """As Agent's; for a Q-network Q-values take the place of the logits."""
        logits, values = super().forward(obs)
        if self.value_agent is not None:
            values = self.value_agent(obs)[1]
        return logits, logits.amax(-1) if self.q_network else values


def load_foreign(path, env_id, num_actions):
    """Read a network of CleanRL or Stable-Baselines3, known by its layers' names and shapes.

    Of Stable-Baselines3's zip files only `policy.pth` is read, never the pickled rest.

    Args:
        path: the file.
        env_id, num_actions: the game, which these files do not name, and the size of its actions.

    Returns:
        None if the file is none of theirs but may be this project's; otherwise a description, a
        dict like a checkpoint without weights, and its ForeignTeacher.

    Raises:
        UsageError: if the file is damaged, of another kind of agent, or does not fit the game.
    """
    accepted = ("accepted are checkpoints of this project, state dicts of CleanRL's ppo_atari.py, "
                "its envpool and multi-GPU forms and dqn_atari.py, and zip files of Stable-"
                "Baselines3's PPO and DQN with CnnPolicy")
    if not Path(path).is_file():
        return None
    with refuse(f"{path}: damaged, or no PyTorch checkpoint; {accepted}"):
        content = Path(path).read_bytes()
        if content[:2] != b"PK" and b"params" in content and b"kernel" in content:  # flax's names
            raise UsageError(f"{path}: holds the weights of a JAX agent; {accepted}")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if "policy.pth" in archive.namelist():
                member = archive.getinfo("policy.pth")
                if member.file_size > len(content) or member.compress_type not in (
                        zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("policy.pth is larger than its archive")
                content = archive.read("policy.pth")
        found = load_tensors(content)
    if isinstance(found, dict) and "format_version" in found:
        return None
    if not (isinstance(found, dict) and found and all(
            isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in found.items())):
        raise UsageError(f"{path}: holds no state dict but a {type(found).__name__}; {accepted}")
    # what data-parallel and compiled modules put before every name
    found = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in found.items()}
    convolutions = {f"cnn.{i}": f"network.{i}" for i in (0, 2, 4)} | {"linear.0": "network.7"}
    sb3_body = {f"features_extractor.{theirs}": ours for theirs, ours in convolutions.items()}
    cleanrl_body = {f"network.{i}": f"network.{i}" for i in (0, 2, 4, 7)}
    layouts = {
        "CleanRL PPO": cleanrl_body | {"actor": "actor", "critic": "critic"},
        "CleanRL DQN": cleanrl_body | {"network.9": "actor"},
        "Stable-Baselines3 PPO": sb3_body | {"action_net": "actor", "value_net": "critic"},
        "Stable-Baselines3 DQN": {f"q_net.{theirs}": ours for theirs, ours in sb3_body.items()}
        | {"q_net.q_net.0": "actor"}}
    copies = r"(pi_|vf_)features_extractor\.|q_net_target\."
    own = {name for name in found if not re.match(copies, name)}
    kind = next((kind for kind, layout in layouts.items() if own == {
        f"{layer}.{part}" for layer in layout for part in ("weight", "bias")}), None)
    if kind is None:
        text = ", ".join(sorted({name.rpartition(".")[0] or name for name in own}))
        what = ("a recurrent policy" if "lstm" in text else "a policy of continuous actions"
                if "log_std" in text else f"the layers {text!a:.300}"
                if any(x.ndim == 4 for x in found.values()) else "an MlpPolicy, no convolutions")
        raise UsageError(f"{path}: holds {what}; {accepted}")

    def renamed(prefix=""):
        """Weights by the names of Agent, the convolutions' from the copy with a prefix if any."""
        weights = {}
        for theirs, ours in layouts[kind].items():
            theirs = prefix + theirs if prefix + theirs + ".weight" in found else theirs
            for part in ("weight", "bias"):
                weights[f"{ours}.{part}"] = found[f"{theirs}.{part}"]
        return weights

    with refuse(f"{path}: {kind} whose layers do not fit each other; {accepted}"):
        policy, value = renamed("pi_"), renamed("vf_")
        if any(4 * sum(x.numel() for x in weights.values()) > len(content)
               for weights in (policy, value)):
            raise ValueError("larger than the file")
        own_critic = any((policy[name] != value[name]).any() for name in policy)
        widths = tuple(len(policy[f"network.{i}.bias"]) for i in (0, 2, 4, 7))
        first, hidden, actions = (tuple(policy[f"{name}.weight"].shape)
                                  for name in ("network.0", "network.7", "actor"))
    if min(widths) < 1 or first[1:] != (4, 8, 8) or hidden[1:] != (widths[2] * 49,):
        raise UsageError(f"{path}: {kind} whose first convolution is {first} and hidden layer "
                         f"{hidden}; observations must be 4 frames of 84x84")
    if actions[0] != num_actions:
        raise UsageError(f"{path}: {kind} with {actions[0]} actions, while {env_id} has "
                         f"{num_actions}; pass the --env-id that it was trained on")
    with refuse(f"{path}: {kind} with wrong weights"):
        q_network = kind.endswith("DQN")
        if q_network:
            policy |= {"critic.weight": torch.zeros(1, widths[3]), "critic.bias": torch.zeros(1)}
        if own_critic:
            policy |= {f"value_agent.{name}": x for name, x in value.items()}
        if {x.dtype for x in policy.values()} != {torch.float32}:
            raise ValueError("of another type than float32")
        agent = ForeignTeacher(widths, num_actions, q_network, own_critic)
        agent.load_state_dict(policy)
        if not all(parameter.isfinite().all() for parameter in agent.parameters()):
            raise ValueError("not finite")
    names = {widths: name for name, widths in Agent.SIZES.items()}
    protocol = {"fire_on_life_loss": True, "repeat_first_frame": kind.startswith("CleanRL"),
                "restart_stack": True, "greedy": q_network}
    return {"phase": kind, "capacity": names.get(widths, "-".join(map(str, widths))),
            "global_step": None, "evaluation": None, "protocol": protocol}, agent


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


class FrameStore:
    """Frames of 84x84 bytes in several stretches, compressed as they come.

    They take a hundredth of their size, and little is left to do when a signal ends the recording.
    They are compressed on a thread of their own, which no signal interrupts in mid-frame.

    Args:
        stretches: number of stretches, which follow one another in the file.

    Attributes:
        counts: int64 [stretches], the frames of each; reliable once the store is closed.
        crcs: CRC-32 of the bytes of each.
    """

    def __init__(self, stretches):
        self.compressors = [zlib.compressobj(wbits=-15) for _ in range(stretches)]
        self.compressed = [bytearray() for _ in range(stretches)]
        self.counts, self.crcs = np.zeros(stretches, np.int64), [0] * stretches
        self.thread = ThreadPoolExecutor(1)
        self.job = self.thread.submit(self.compress, [], [])

    def compress(self, stretches, frames):
        """Append frames to stretches, one each; on the thread."""
        for i, frame in zip(stretches, frames):
            self.compressed[i] += self.compressors[i].compress(frame)
            self.crcs[i] = zlib.crc32(frame, self.crcs[i])
            self.counts[i] += 1

    def add(self, stretches, frames):
        """Begin to append frames uint8 [n, 84, 84] to n stretches; the next call waits for it."""
        self.job.result()
        self.job = self.thread.submit(self.compress, stretches, frames)

    def close(self):
        """Wait for what was added; raises the error that it met, if any."""
        self.thread.shutdown()
        self.job.result()

    @property
    def nbytes(self):
        """Bytes of the frames when they are not compressed."""
        return 84 * 84 * int(self.counts.sum())

    def write(self, archive):
        """Write all frames as the array `frames` into an open ZipFile.

        A raw deflate stream may be made of parts that end at a whole byte. A ZipFile does not take
        what is compressed already, so it is told that it stores these bytes, and put right then.
        """
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {
            "descr": "|u1", "fortran_order": False, "shape": (self.nbytes // 84**2, 84, 84)})
        compressor, crc = zlib.compressobj(wbits=-15), zlib.crc32(header.getbuffer())
        info = zipfile.ZipInfo("frames.npy")
        with archive.open(info, "w", force_zip64=True) as member:
            member.write(compressor.compress(header.getbuffer()))
            member.write(compressor.flush(zlib.Z_SYNC_FLUSH))
            for part, compressor, count, part_crc in zip(
                    self.compressed, self.compressors, self.counts, self.crcs):
                member.write(part)
                member.write(compressor.copy().flush(zlib.Z_SYNC_FLUSH))
                crc = crc32_combine(crc, part_crc, 84 * 84 * int(count))
            member.write(zlib.compress(b"", wbits=-15))
        info.compress_type, info.CRC = zipfile.ZIP_DEFLATED, crc
        info.file_size = header.tell() + self.nbytes
        archive.fp.seek(info.header_offset)
        archive.fp.write(info.FileHeader(zip64=True))
        archive.fp.seek(0, os.SEEK_END)


def crc32_combine(first, second, length):
    """CRC-32 of two texts in a row, from the CRC-32 of each and the second's length in bytes.

    As zlib's C function of that name, which Python's module lacks: the first is multiplied by
    x^(8 length), modulo the polynomial of the CRC, whose bits stand in reverse order.
    """
    def multiply(a, b):
        product = 0
        for bit in reversed(range(32)):
            product ^= b if a >> bit & 1 else 0
            b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
        return product

    power = 1 << 23  # x^8
    while length:
        first = multiply(power, first) if length & 1 else first
        power, length = multiply(power, power), length >> 1
    return first ^ second


@torch.inference_mode()
def collect(agent, groups, num_samples, seed, greedy, on_game_end, epsilon=None):
    """Let a policy play and record every step, each frame once.

    Game slot e fills a contiguous stretch of the samples, in the order of play, so that compression
    finds frames that look alike next to each other. Frame row 0 is the blank frame from before a
    game's start, and row i + 1 is the newest frame of sample i; but a slot that is cut short in
    mid-step keeps that step's frame too, without a sample. The last rows, if any, hold frames of
    steps that pressed FIRE or NOOP, which later stacks show if they run on over a life.

    Args:
        agent: maps observations uint8 [B, 4, 84, 84] to (logits or Q-values, values).
        groups: games of `make_envs(..., life_loss=False)`; steps that press FIRE for a new life are
            not recorded, but for their reward, which is added to the step before.
        num_samples: N, steps to record over all slots; games under way are then cut off.
        seed: of the games and the actions.
        greedy: take the most probable action instead of sampling.
        on_game_end: called with (samples so far, raw return, length in steps) at each game's end.
        epsilon: for Q-values, which are stored instead of probabilities: chance of a random action
            instead of the best one.

    Returns:
        Two things. The buffer's arrays by name, without `meta`: frames, a FrameStore of F > N,
        stack_index int32 [N, 4], action_probs or q_values float32 [N, A], values float32 [N],
        actions uint8 [N], rewards float32 [N], dones bool [N], env_index and episode_index int32
        [N], and episode_returns float32 [E], NaN for a game that was cut off. And None, or the
        KeyboardInterrupt that cut the recording short, N then being smaller than asked for.
    """
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    num_envs, num_actions = groups[-1][1].stop, int(groups[0][0].single_action_space.n)
    stretch = num_samples // num_envs + (np.arange(num_envs) < num_samples % num_envs)
    first = np.cumsum(stretch) - stretch
    # the blank frame, those of each slot, and those of pressed steps
    frames, pressed_frames = FrameStore(1 + num_envs + 1), 0
    frames.add([0], np.zeros((1, 84, 84), np.uint8))
    stack_index = np.empty((num_samples, 4), np.int32)
    targets = np.empty((num_samples, num_actions), np.float32)
    values, rewards = np.empty((2, num_samples), np.float32)
    actions, dones = np.empty(num_samples, np.uint8), np.empty(num_samples, bool)
    obs = np.empty((num_envs, 4, 84, 84), np.uint8)
    seeds = game_seeds(num_envs, seed, 2)
    for envs, part in groups:
        obs[part], _ = envs.reset(seed=seeds[part])
    filled = np.zeros(num_envs, np.int64)  # samples of each slot whose outcome is known
    decided = np.zeros(num_envs, bool)  # whether the step under way is a sample
    game_return, game_length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
    stack = np.zeros((num_envs, 4), np.int32)  # the rows of each slot's last four frames

    def decide(envs, part):
        """Record a step of one group of games where it is the agent's own, and begin it."""
        nonlocal pressed_frames
        outputs, value = agent(torch.from_numpy(obs[part]).to(device))
        if greedy or epsilon is not None:
            action = outputs.argmax(-1)
        else:
            action = sample_actions(outputs, generator)
        if epsilon is not None:
            explores = torch.rand(len(action), generator=generator, device=device) < epsilon
            action[explores] = torch.randint(
                num_actions, (int(explores.sum()),), generator=generator, device=device)
        action = action.cpu().numpy()
        mine = (filled[part] < stretch[part]) & ~envs.new_life
        row = (first[part] + filled[part])[mine]
        newest = np.zeros(len(mine), np.int32)
        newest[mine] = row + 1
        if not envs.restart_stack:
            pressed = (filled[part] < stretch[part]) & envs.new_life
            newest[pressed] = num_samples + 1 + pressed_frames + np.arange(pressed.sum())
            pressed_frames += int(pressed.sum())
        kept = np.flatnonzero(newest)
        frames.add(np.where(mine, np.arange(part.start, part.stop), num_envs)[kept] + 1,
                   obs[part][kept, 3])
        shifted = np.column_stack((stack[part, 1:], newest))
        filling = newest if envs.repeat_first_frame else 0 * newest
        begun = np.column_stack((filling, filling, filling, newest))
        stack[part] = np.where(envs.age[:, None] == 0, begun, shifted)
        stack_index[row] = stack[part][mine]
        recorded = outputs if epsilon is not None else outputs.softmax(-1)
        targets[row] = recorded.cpu().numpy()[mine]
        values[row] = value.cpu().numpy()[mine]
        actions[row] = action[mine]
        decided[part] = mine
        envs.send(action)  # last: the games' threads leave no core for recording

    samples = {"stack_index": stack_index,
               "action_probs" if epsilon is None else "q_values": targets,
               "values": values, "actions": actions, "rewards": rewards, "dones": dones}
    with tqdm(total=num_samples, desc="collect", unit="step", dynamic_ncols=True,
              mininterval=1) as bar:
        try:
            for envs, part in groups:
                decide(envs, part)
            playing = list(groups)
            while playing:
                for envs, part in playing[:]:
                    obs[part], reward, terminated, truncated, _ = envs.recv()
                    ended = terminated | truncated
                    game_return[part] += reward
                    game_length[part] += 1
                    row, mine = first[part] + filled[part], decided[part]
                    rewards[row[mine]], dones[row[mine]] = reward[mine], ended[mine]
                    pressed = ~mine & (filled[part] < stretch[part])
                    rewards[row[pressed] - 1] += reward[pressed]
                    dones[row[pressed] - 1] |= ended[pressed]
                    filled[part] += mine
                    bar.update(int(mine.sum()))
                    for e in part.start + np.flatnonzero(ended & (mine | pressed)):
                        on_game_end(int(filled.sum()), float(game_return[e]), int(game_length[e]))
                    game_return[part][ended] = game_length[part][ended] = 0
                    if (filled[part] < stretch[part]).any():
                        decide(envs, part)
                    else:
                        playing.remove((envs, part))
            bar.close()
            return assemble(frames, samples, first, filled), None
        except KeyboardInterrupt as stop:  # a second signal would not come here
            if not filled.any():
                raise
            return assemble(frames, samples, first, filled), stop


def assemble(frames, samples, first, filled):
    """Make a buffer's arrays of what was recorded, if need be less than was asked for.

    Args:
        frames: FrameStore of the blank frame, the N slots' frames and those of pressed steps.
        samples: the other arrays by name, as they were asked for; changed if there are fewer.
        first, filled: int64 [N], each slot's first row in them, and how many it has.

    Returns:
        What `collect` returns.
    """
    frames.close()
    asked_for, num_samples = len(samples["dones"]), int(filled.sum())
    new_first = np.cumsum(filled) - filled
    if num_samples < asked_for:  # close up the gaps that the slots' unfilled ends leave
        # the frame of a step that was not finished stays, without a sample
        _, *frame_row, pressed_row = np.cumsum(frames.counts) - frames.counts
        for old, new, length, new_row in zip(first, new_first, filled, frame_row):
            index = samples["stack_index"][old:old + length]
            index += np.where(index > asked_for, pressed_row - asked_for - 1,
                              (index > 0) * (new_row - old - 1))
            for array in samples.values():
                array[new:new + length] = array[old:old + length]
        samples = {name: array[:num_samples] for name, array in samples.items()}

    # a slot's stretch begins with a new game, and so does the sample after a game's end
    dones = samples["dones"]
    starts = np.append(True, dones[:-1])
    starts[new_first[filled > 0]] = True
    game_start = np.flatnonzero(starts)
    finished = dones[np.append(game_start[1:], num_samples) - 1]
    returns = np.add.reduceat(samples["rewards"], game_start, dtype=np.float64)
    return {"frames": frames, **samples,
            "env_index": np.repeat(np.arange(len(filled), dtype=np.int32), filled),
            "episode_index": np.cumsum(starts, dtype=np.int32) - np.int32(1),
            "episode_returns": np.where(finished, returns, np.nan).astype(np.float32)}


def save_buffer(path, arrays, meta):
    """Write the arrays of `collect` and a dict as a compressed `.npz`, whole or not at all."""
    arrays = arrays | {"meta": np.array(json.dumps(meta))}
    with (atomic_write(path) as file,
          zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive):
        for name, array in arrays.items():
            if isinstance(array, FrameStore):
                array.write(archive)
                continue
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def main(args, at_exit):
    env_id, rom = resolve_game(args.env_id)
    check_flags(args, seed=(0, 2**63 - 1), num_envs=(1, 1024), num_samples=(2, 2**31 - 2),
                repeat_action_probability=(0, 1), epsilon=(0, 1))
    device = set_up_torch(args)
    (envs, _), = make_envs(rom, 1, False, args.repeat_action_probability)
    action_meanings = [action.name for action in envs.ale.get_action_set()]
    envs.close()
    teacher_path = args.teacher_path or default_path(
        f"checkpoints/{env_id}/ppo_high.pt", f"{env_id}/ppo_high.pt")
    buffer_path = args.buffer_path or f"buffers/{env_id}.npz"
    checkpoint, agent = (
        load_foreign(teacher_path, env_id, len(action_meanings))
        or load_checkpoint(teacher_path, env_id, len(action_meanings),
                           f"python ppo_atari_teacher.py --env-id {env_id}"))
    q_network = isinstance(agent, ForeignTeacher) and agent.q_network
    if checkpoint["protocol"]["greedy"] and not q_network:
        raise UsageError(f"{teacher_path}: imitates Q-values, which this script records only from "
                         "the Q-network itself; pass that, or distil with --loss kl or nll")
    if q_network:
        if args.greedy and args.epsilon:
            raise UsageError(f"--epsilon {args.epsilon}: --greedy leaves no chance; drop one")
        args.epsilon = 0.0 if args.greedy else 0.05 if args.epsilon is None else args.epsilon
    elif args.epsilon is not None:
        raise UsageError(f"--epsilon {args.epsilon}: {teacher_path} is a policy without Q-values, "
                         "which explores by itself; leave the flag out")
    protocol = dict(checkpoint["protocol"])
    if args.fire_on_life_loss != "auto":
        protocol["fire_on_life_loss"] = args.fire_on_life_loss == "on"
    if args.envpool:
        if checkpoint["phase"] != "CleanRL PPO":
            raise UsageError(f"--envpool: {teacher_path} is no policy of CleanRL's but "
                             f"{checkpoint['phase']!r:.60}; leave the flag out")
        protocol["restart_stack"] = False
    groups = make_envs(rom, args.num_envs, False, args.repeat_action_probability, protocol,
                       device)
    for envs, _ in groups:
        at_exit.callback(envs.close)
    with open(teacher_path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    check_output(buffer_path, args.overwrite, teacher_path)
    run_name = new_run(env_id, args)
    logger = Logger(run_name, args, env_id)
    at_exit.callback(logger.close)
    print(f"run         runs/{run_name} on {device}, {args.num_samples:,} steps of {teacher_path}")

    if isinstance(agent, ForeignTeacher):
        print(f"teacher     {checkpoint['phase']}, {checkpoint['capacity']}"
              + (f", epsilon {args.epsilon:g}" if q_network else "")
              + (", FIRE or NOOP pressed after a lost life" if protocol["fire_on_life_loss"]
                 else ""))

    meta = {"format_version": 1, "env_id": env_id, "action_meanings": action_meanings,
            "preprocessing": preprocessing(), "num_envs": args.num_envs, "seed": args.seed,
            "repeat_action_probability": args.repeat_action_probability, "greedy": args.greedy,
            "epsilon": args.epsilon, "protocol": protocol,
            "targets": "q_values" if q_network else "action_probs",
            "capacity": checkpoint["capacity"],
            "teacher": {"path": teacher_path, "sha256": sha256, "phase": checkpoint["phase"],
                        "capacity": checkpoint["capacity"], "steps": checkpoint["global_step"],
                        "evaluation": checkpoint["evaluation"]},
            "versions": {name: importlib.metadata.version(name)
                         for name in ("torch", "numpy", "ale-py", "gymnasium")}}
    if len(json.dumps(meta)) > 2**14 - 2**8:  # what the loader reads at most, less the steps
        raise UsageError(f"{teacher_path}: what it says of itself is too long for a buffer; make "
                         "it anew")
    start_time = time.time()
    arrays, stopped = collect(
        agent.to(device, memory_format=torch.channels_last), groups, args.num_samples, args.seed,
        args.greedy, lambda samples, game_return, length: logger.log(
            {"charts/episodic_return": game_return, "charts/episodic_length": length,
             "charts/SPS": samples / (time.time() - start_time)}, samples), args.epsilon)
    samples = len(arrays["actions"])
    meta |= {"steps": samples}
    wait = 0
    while True:
        try:
            time.sleep(wait)
            save_buffer(buffer_path, arrays, meta)
            break
        except KeyboardInterrupt as stop:  # what is recorded gets written, if no second one comes
            stopped, wait = stop, 0
        except OSError as error:
            print(f"warning: not saved: {error}", file=sys.stderr)
            if stopped is not None:
                raise stopped from None
            wait = 10

    game_returns = arrays["episode_returns"][~np.isnan(arrays["episode_returns"])]
    size = Path(buffer_path).stat().st_size
    print(f"games       {len(game_returns)} finished, {len(arrays['episode_returns'])} begun"
          + (f"; mean return of the finished ones {game_returns.mean():.2f}, which favours short "
             "games: it is not an evaluation" if len(game_returns) else ""))
    print(f"wrote       {buffer_path}, {samples:,} samples, {size / 1e6:.1f} MB on disk, "
          f"{size / samples:.0f} bytes a sample, "
          f"{sum(array.nbytes for array in arrays.values()) / 1e6:,.0f} MB in memory")
    print(f"next        python actor_distill.py --env-id {env_id} --buffer-path "
          f"{shlex.quote(buffer_path)}")
    if stopped is not None:
        raise stopped


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
