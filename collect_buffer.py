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
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # Ctrl-C during the slow imports below ends quietly
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
    """checkpoint of the teacher; default `checkpoints/{env_id}/ppo_high.pt`, or the shipped one"""
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

    # Collection
    num_samples: int = 540_000
    """steps to record, all games together; DQN distillation used ten hours of play, 540,000"""
    greedy: bool = False
    """play the most probable action instead of sampling from the policy"""


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
    """Games that run and are preprocessed on ale-py's C++ threads, in two halves.

    One half plays while the network decides for the other. A game that ends restarts within the
    same step, so that no step is lost to a reset; rewards stay raw. With `life_loss` a lost life
    also reports `terminated`, while the game goes on.

    Args:
        rom: ale-py's name of the game, such as "ms_pacman".
        num_envs: number of games, N.
        life_loss: whether a lost life ends an episode.
        repeat_action_probability: sticky actions, 0 to 1.

    Returns:
        A list of (AtariVectorEnv, slice of the N games that it plays): two, or one where N is 1.
        An observation is uint8 [4, 84, 84], the oldest frame first, with blank frames before a
        game's start.
    """
    middle = (num_envs + 1) // 2
    parts = [slice(0, middle), slice(middle, num_envs)][:num_envs]
    return [(AtariVectorEnv(rom, part.stop - part.start, autoreset_mode=AutoresetMode.SAME_STEP,
                            reward_clipping=False, life_loss_info=life_loss,
                            repeat_action_probability=repeat_action_probability,
                            **preprocessing()), part) for part in parts]


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
    """

    SIZES = {"high": (32, 64, 64, 512), "medium": (16, 32, 32, 256), "low": (8, 16, 16, 128)}
    bf16 = False

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
        # channels_last is the layout in which small convolutions are fastest on a CPU, and bytes
        # are cheaper to rearrange than floats
        x = obs.contiguous(memory_format=torch.channels_last).float().div_(255)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.network(x)
        hidden = hidden.float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def sample_actions(logits, generator=None):
    """Draw actions int64 [B] from softmax(logits), logits float [B, A], by the Gumbel-max trick."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)


@contextlib.contextmanager
def half_the_threads():
    """Leave half of the cores to the games that play while a network on the CPU decides."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def catch_stops():
    """Let a first SIGINT or SIGTERM raise KeyboardInterrupt(its number), a second leave at once.

    It is raised in this file's own code, where it is certain to end the script: some libraries
    swallow what is raised in a callback of theirs. Elsewhere a timer tries again, for 2 seconds.
    """
    def leave(number, frame):
        os._exit(128 + number)

    def stop(number, frame):
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, leave)
        deadline = time.monotonic() + 2

        def attempt(_, frame):
            own = frame is not None and frame.f_code.co_filename == stop.__code__.co_filename
            if own or time.monotonic() > deadline:
                raise KeyboardInterrupt(number)
            signal.setitimer(signal.ITIMER_REAL, 0.005)

        signal.signal(signal.SIGALRM, attempt)
        attempt(number, frame)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    # at its exit Python gives up the timer's handler, without which the timer would kill
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)


class Unbreakable:
    """A text stream that drops what cannot be written, as when Ctrl-C has ended `tee` first."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write and flush, or drop."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
            self.stream.flush()
        return len(text)

    def flush(self):
        """Do nothing: `write` has flushed."""


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
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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
    try:
        if target.exists() and not target.is_file():
            raise UsageError(f"{path}: is a folder or a device; name a file")
        if str(target) in map(os.path.realpath, inputs):
            raise UsageError(f"{path}: is read as well; name another file to write")
        if target.exists() and not overwrite:
            raise UsageError(f"{path}: exists already; pass --overwrite, or another path")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
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
            # torch.load does not look at the CRCs, and one flipped bit is a wrong weight; it stores
            # without compression, so a member that is larger than the file is a trap
            if (sum(member.file_size for member in archive.infolist()) > os.path.getsize(path)
                    or archive.testzip() is not None):
                raise ValueError("CRC mismatch")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can make the parsers raise anything
        raise UsageError(f"{path}: damaged, or no PyTorch checkpoint ({type(error).__name__}); "
                         f"make it anew with `{made_by}`") from None
    needed = {"format_version", "phase", "env_id", "capacity", "num_actions", "global_step",
              "model", "args", "evaluation"}
    try:
        # all but weights, optimiser and random state is plain, to be compared and printed safely
        plain = {name: value for name, value in checkpoint.items()
                 if name not in ("model", "last_model", "optimizer", "rng")}
        # lazily, as a small file can name the same list over and over, a list of such lists, ...
        encoded = itertools.islice(json.JSONEncoder().iterencode(plain), 10**5)
        teacher = plain.get("teacher") or {"evaluation": None}
        results = (plain["evaluation"], plain.get("evaluation_before"), teacher["evaluation"])
        numbers = [result["mean"] for result in results if result is not None]
        for name in ("kl", "agreement", "entropy_gap") if "validation" in plain else ():
            numbers.append(plain["validation"][f"validation/{name}"])
        counts = [plain.get(name, 0) for name in ("global_step", "epoch", "last_epoch")]
        if (sum(1 for _ in encoded) == 10**5 or not needed <= checkpoint.keys()
                or not isinstance(plain["args"], dict)
                or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
                or not all(type(x) is int and x >= 0 for x in counts)
                or not all(result is None or "greedy" in result for result in results)):
            raise ValueError
    except Exception:
        raise UsageError(f"{path}: not a checkpoint of this project; make one with `{made_by}`"
                         ) from None
    if checkpoint["format_version"] != 1:
        raise UsageError(f"{path}: this script reads format version 1; update the script")
    if checkpoint["env_id"] != env_id:
        raise UsageError(f"{path}: belongs to {checkpoint['env_id']!r:.60}, not to {env_id}; "
                         f"pass --env-id {checkpoint['env_id']!r:.60}")
    if capacity not in (None, checkpoint["capacity"]):
        raise UsageError(f"{path}: holds a {checkpoint['capacity']!r:.60} network, not {capacity}; "
                         "pass the --capacity that it holds")
    try:
        weights = [*checkpoint["model"].values(), *checkpoint.get("last_model", {}).values()]
        if {x.dtype for x in weights} != {torch.float32}:
            raise ValueError("load_state_dict would convert them in silence")
        agent = Agent(checkpoint["capacity"], num_actions)
        agent.load_state_dict(checkpoint["model"])
    except Exception:
        raise UsageError(f"{path}: its weights do not fit a {checkpoint['capacity']!r:.60} network "
                         f"with {num_actions} actions; make it anew with `{made_by}`") from None
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise UsageError(f"{path}: holds weights that are not finite; make it with `{made_by}`")
    return checkpoint, agent


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
        self.folder, self.tensorboard, self.warned = f"runs/{run_name}", None, []
        self.wandb = self.wandb_id = None
        with self.tolerate("tensorboard"):
            self.tensorboard = SummaryWriter(self.folder, purge_step=global_step + 1)
            rows = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
            table = f"|flag|value|\n|-|-|\n{rows}"
            self.tensorboard.add_text("hyperparameters", table, global_step)
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
                self.warned.append(part)
                print(f"warning: {part} misses some of this run: {error!r:.300}", file=sys.stderr)

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
        """End the log, and with it the W&B run."""
        with self.tolerate("tensorboard"):
            if self.tensorboard is not None:
                self.tensorboard.close()
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


@torch.inference_mode()
def collect(agent, halves, num_samples, seed, greedy, on_game_end):
    """Let a policy play and record every step, each frame once.

    Game slot e fills a contiguous stretch of the samples, in the order of play, so that compression
    finds frames that look alike next to each other. Frame row i + 1 is the newest frame of sample
    i, and row 0 is the blank frame from before a game's start.

    Args:
        agent: maps observations uint8 [B, 4, 84, 84] to (logits, values).
        halves: games of `make_envs(..., life_loss=False)`.
        num_samples: N, steps to record over all slots; games under way are then cut off.
        seed: of the games and the actions.
        greedy: take the most probable action instead of sampling.
        on_game_end: called with (samples so far, raw return, length in steps) at each game's end.

    Returns:
        Two things. The buffer's arrays by name, without `meta`: frames uint8 [N + 1, 84, 84],
        stack_index int32 [N, 4], action_probs float32 [N, A], values float32 [N], actions uint8
        [N], rewards float32 [N], dones bool [N], env_index and episode_index int32 [N], and
        episode_returns float32 [E], NaN for a game that was cut off. And None, or the
        KeyboardInterrupt that cut the recording short, N then being smaller than asked for.
    """
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    num_envs, num_actions = halves[-1][1].stop, int(halves[0][0].single_action_space.n)
    stretch = num_samples // num_envs + (np.arange(num_envs) < num_samples % num_envs)
    first = np.cumsum(stretch) - stretch
    frames = np.empty((num_samples + 1, 84, 84), np.uint8)
    frames[0] = 0
    stack_index = np.empty((num_samples, 4), np.int32)
    action_probs = np.empty((num_samples, num_actions), np.float32)
    values, rewards = np.empty((2, num_samples), np.float32)
    actions, dones = np.empty(num_samples, np.uint8), np.empty(num_samples, bool)
    obs = np.empty((num_envs, 4, 84, 84), np.uint8)
    seeds = game_seeds(num_envs, seed, 2)
    for envs, part in halves:
        obs[part], _ = envs.reset(seed=seeds[part])
    age = np.zeros(num_envs, np.int64)
    frames_back = np.array([3, 2, 1, 0])
    recorded, steps, stopped = 0, 0, None
    with half_the_threads(), tqdm(total=num_samples, desc="collect", unit="step",
                                  dynamic_ncols=True, mininterval=1) as bar:
        try:
            for t, (envs, part) in itertools.product(range(stretch[0] + 1), halves):
                slots = np.arange(num_envs)[part]
                e = slots[t <= stretch[part]]  # later slots may have one sample less to record
                if t > 0 and len(e):  # what has become of the last decision
                    obs[part], reward, terminated, truncated, _ = envs.recv()
                    ended = terminated | truncated
                    past = first[e] + t - 1
                    rewards[past], dones[past] = reward[:len(e)], ended[:len(e)]
                    recorded += len(e)
                    bar.update(len(e))
                    for row, length in zip(past, age[e] + 1):
                        if dones[row]:
                            game = rewards[row + 1 - length:row + 1]
                            on_game_end(recorded, float(game.sum()), int(length))
                    age[part] = np.where(ended, 0, age[part] + 1)
                if part.stop == num_envs:
                    steps = t
                e = slots[t < stretch[part]]
                if len(e):
                    logits, value = agent(torch.from_numpy(obs[part]).to(device))
                    action = logits.argmax(-1) if greedy else sample_actions(logits, generator)
                    action = action.cpu().numpy()
                    envs.send(action)
                    row = first[e] + t
                    frames[row + 1] = obs[e, 3]
                    in_game = frames_back <= age[e, None]
                    stack_index[row] = np.where(in_game, row[:, None] + 1 - frames_back, 0)
                    action_probs[row] = logits.softmax(-1).cpu().numpy()[:len(e)]
                    values[row] = value.cpu().numpy()[:len(e)]
                    actions[row] = action[:len(e)]
        except KeyboardInterrupt as stop:
            if steps == 0:
                raise
            stopped = stop

    samples = {"stack_index": stack_index, "action_probs": action_probs, "values": values,
               "actions": actions, "rewards": rewards, "dones": dones}
    if stopped is not None:  # close up the gaps that the slots' unfilled ends leave
        stretch = np.minimum(stretch, steps)
        for old, new, length in zip(first, np.cumsum(stretch) - stretch, stretch):
            index = stack_index[old:old + length]
            index[index > 0] -= old - new
            for array in (frames[1:], *samples.values()):
                array[new:new + length] = array[old:old + length]
        num_samples, first = int(stretch.sum()), np.cumsum(stretch) - stretch
        frames = frames[:num_samples + 1]
        samples = {name: array[:num_samples] for name, array in samples.items()}

    # a slot's stretch begins with a new game, and so does the sample after a game's end
    dones = samples["dones"]
    starts = np.append(True, dones[:-1])
    starts[first[stretch > 0]] = True
    game_start = np.flatnonzero(starts)
    finished = dones[np.append(game_start[1:], num_samples) - 1]
    episode_returns = np.add.reduceat(samples["rewards"], game_start, dtype=np.float64)
    return {"frames": frames, **samples,
            "env_index": np.repeat(np.arange(num_envs, dtype=np.int32), stretch),
            "episode_index": np.cumsum(starts, dtype=np.int32) - np.int32(1),
            "episode_returns": np.where(finished, episode_returns, np.nan).astype(np.float32)
            }, stopped


def save_buffer(path, arrays):
    """Write arrays as a compressed `.npz`, whole or not at all, with a progress bar.

    Args:
        path: file to write.
        arrays: name: array, each C-contiguous.
    """
    chunk = 2**24
    with (atomic_write(path) as file,
          zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
          tqdm(total=sum(array.nbytes for array in arrays.values()), desc="compress", unit="B",
               unit_scale=True, dynamic_ncols=True, mininterval=1) as bar):
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, header)
                content = array.reshape(-1).view(np.uint8)
                for start in range(0, len(content), chunk):
                    member.write(content[start:start + chunk])
                    bar.update(len(content[start:start + chunk]))


def main(args, at_exit):
    env_id, rom = resolve_game(args.env_id)
    check_flags(args, seed=(0, 2**63 - 1), num_envs=(1, 1024), num_samples=(1, 2**31 - 2),
                repeat_action_probability=(0, 1))
    device = set_up_torch(args)
    halves = make_envs(rom, args.num_envs, False, args.repeat_action_probability)
    for envs, _ in halves:
        at_exit.callback(envs.close)
    teacher_path = args.teacher_path or default_path(
        f"checkpoints/{env_id}/ppo_high.pt", f"{env_id}/ppo_high.pt")
    buffer_path = args.buffer_path or f"buffers/{env_id}.npz"
    checkpoint, agent = load_checkpoint(teacher_path, env_id, int(envs.single_action_space.n),
                                        f"python ppo_atari_teacher.py --env-id {env_id}")
    with open(teacher_path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    check_output(buffer_path, args.overwrite, teacher_path)
    run_name = new_run(env_id, args)
    logger = Logger(run_name, args, env_id)
    at_exit.callback(logger.close)
    print(f"run         runs/{run_name} on {device}, {args.num_samples:,} steps of {teacher_path}")

    # nothing slow comes between recording and writing, where a signal would lose the recording
    action_meanings = [action.name for action in envs.ale.get_action_set()]
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "numpy", "ale-py", "gymnasium")}
    start_time = time.time()
    arrays, stopped = collect(
        agent.to(device, memory_format=torch.channels_last), halves, args.num_samples, args.seed,
        args.greedy, lambda samples, game_return, length: logger.log(
            {"charts/episodic_return": game_return, "charts/episodic_length": length,
             "charts/SPS": samples / (time.time() - start_time)}, samples))
    samples = len(arrays["actions"])
    meta = {"format_version": 1, "env_id": env_id, "action_meanings": action_meanings,
            "preprocessing": preprocessing(), "num_envs": args.num_envs, "seed": args.seed,
            "repeat_action_probability": args.repeat_action_probability, "greedy": args.greedy,
            "steps": samples, "capacity": checkpoint["capacity"],
            "teacher": {"path": teacher_path, "sha256": sha256, "phase": checkpoint["phase"],
                        "capacity": checkpoint["capacity"], "steps": checkpoint["global_step"],
                        "evaluation": checkpoint["evaluation"]},
            "versions": versions}
    arrays["meta"] = np.array(json.dumps(meta))
    try:
        save_buffer(buffer_path, arrays)
    except KeyboardInterrupt as stop:  # what is recorded gets written, unless a second one comes
        stopped = stop
        save_buffer(buffer_path, arrays)

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
    sys.stdout.reconfigure(errors="replace")
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    catch_stops()
    try:
        with contextlib.ExitStack() as at_exit:
            main(tyro.cli(Args), at_exit)
    except (UsageError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped by a signal", file=sys.stderr)
        sys.exit(128 + (*stop.args, signal.SIGINT)[0])
