"""Phase 2 of actor distillation: the trained teacher plays, and a replay buffer records it.

    python collect_buffer.py                                      # the teacher of Pong
    python collect_buffer.py --env-id BreakoutNoFrameskip-v4 --num-samples 50_000
    python collect_buffer.py --env-id QbertNoFrameskip-v4 --teacher-path ppo.zip

The buffer is one `.npz` that NumPy alone can read. It holds every frame once; an observation is
four rows of `frames`, so that 540,000 samples fit in 4 GB where stacked they would fill 15 GB:

    with np.load("buffers/PongNoFrameskip-v4.npz") as buffer:
        frames, stack_index, action_probs = (
            buffer[name] for name in ("frames", "stack_index", "action_probs")
        )
    observation, target = frames[stack_index[i]], action_probs[i]  # uint8 [4, 84, 84], float32 [A]

One step is one action of the teacher, which the emulator repeats for four frames; one sample is
one step.
"""

import ctypes
import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Annotated

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
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FilePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass
class Args:
    # Experiment
    exp_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "collect_buffer"
    """name of this experiment, part of the run's name"""
    seed: NonNegativeInt = 1
    """seed of the games and the sampled actions"""
    cuda: bool = True
    """use a GPU where there is one"""
    track: bool = False
    """mirror the run to Weights & Biases"""
    wandb_project_name: str = "actor-distillation"
    """W&B project"""
    wandb_entity: str | None = None
    """user or team that the project belongs to; by default W&B's own choice"""
    teacher_path: FilePath = "checkpoints/{env_id}/ppo_high.pt"
    """checkpoint of the teacher: this project's, a state dict of CleanRL (PPO, DQN) or Kostrikov's
    code, a zip of Stable-Baselines3 (PPO, DQN); where the default is missing, the one that ships"""
    buffer_path: FilePath = "buffers/{env_id}.npz"
    """buffer to write; flags in braces are filled in"""
    overwrite: bool = False
    """replace `buffer_path` if it exists"""

    # Evaluation
    eval_steps: NonNegativeInt = 100_000
    """steps of evaluating a teacher whose file holds no evaluation; 0 skips it"""
    eval_greedy: bool = False
    """evaluate such a teacher's most probable action instead of sampling from its policy"""

    # Environment
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game; `ALE/Pong-v5` and `Pong-v5` name the same game"""
    num_envs: PositiveInt = 16
    """games played at once"""
    repeat_action_probability: Fraction = 0.0
    """sticky actions: chance that the emulator repeats the last action in a frame"""

    # Collection
    num_samples: Annotated[int, Field(ge=2)] = 540_000
    """steps of all games to record, rounded down to a multiple of `num_envs`, one a game at least;
    a forced FIRE gives no sample. DQN distillation used ten hours of play, 540,000"""
    greedy: bool = False
    """play the best action: of a policy without sampling, of Q-values without `epsilon`"""
    epsilon: Fraction = 0.05
    """chance that a teacher with Q-values plays a random action instead of its best"""


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


@torch.inference_mode()
def collect(agent, envs, num_samples, seed, greedy, epsilon, device, writer=None):
    """Let a policy play, and record each step's newest frame once. Ctrl-C ends it early.

    Each game slot plays equally many steps and fills one stretch of the rows, in the order of play,
    so that compression finds frames that look alike next to each other. A step in which FIRE is
    forced is no sample, but later stacks show its frame. A game's last screen is not recorded.

    Args:
        agent: maps observations uint8 [n, 4, 84, 84] to (logits or Q-values, values).
        envs: AtariEnvs of n games, in which a lost life ends nothing.
        num_samples: steps to play over all slots, rounded down to a multiple of n; games under way
            are then cut off.
        seed: of the games and the actions.
        greedy: take the best action, instead of sampling or of `epsilon`.
        epsilon: None for a policy; otherwise the outputs are Q-values, which are recorded with
            their maximum as the value, and this is the chance of a random, not the best action.
        device: where the agent is.
        writer: SummaryWriter for the return of each game that ends, or None.

    Returns:
        The buffer's arrays by name, of F steps and N samples: frames uint8 [1 + F, 84, 84], row 0
        blank as before a game's start, stack_index int32 [N, 4], action_probs or q_values float32
        [N, A], values float32 [N], actions uint8 [N], rewards float32 [N], dones bool [N],
        env_index and episode_index int32 [N], and episode_returns float32 [E], NaN for a game that
        was cut off. The reward and the end that a forced step brings count for the step before it.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, num_actions = envs.num_envs, len(envs.action_meanings)
    steps = max(1, num_samples // n)
    first = steps * np.arange(n)
    frames = np.zeros((1 + n * steps, 84, 84), np.uint8)
    stack_index = np.zeros((n * steps, 4), np.int32)
    targets = np.zeros((n * steps, num_actions), np.float32)
    values = np.zeros(n * steps, np.float32)
    rewards = np.zeros(n * steps, np.float32)
    actions = np.zeros(n * steps, np.uint8)
    dones = np.zeros(n * steps, bool)
    is_sample = np.zeros(n * steps, bool)
    stack = np.zeros((n, 4), np.int32)
    game_return = np.zeros(n)
    played = 0
    latest = first  # each slot's last sample
    obs, _ = envs.reset(seed=game_seeds(n, seed, 2))
    bar = progress(desc="collect", total=n * steps, unit="step")
    try:
        for step in range(steps):
            outputs, value = agent(torch.from_numpy(obs).to(device))
            if epsilon is None:
                action = outputs.argmax(-1) if greedy else sample_actions(outputs, generator)
                outputs = outputs.softmax(-1)
            else:
                value, action = outputs.max(-1)
                chance = 0 if greedy else epsilon
                explores = torch.rand(n, generator=generator, device=device) < chance
                random_action = torch.randint(num_actions, (n,), generator=generator, device=device)
                action = torch.where(explores, random_action, action)
            action = action.cpu().numpy()
            row = first + step
            stack = np.column_stack((stack[:, 1:], 1 + row))
            frames[1 + row] = obs[:, 3]
            stack_index[row] = stack
            targets[row] = outputs.cpu().numpy()
            values[row] = value.cpu().numpy()
            actions[row] = action
            is_sample[row] = ~envs.forced
            latest = np.where(envs.forced, latest, row)

            obs, reward, terminated, truncated, _ = envs.step(action)
            ended = terminated | truncated
            rewards[latest] += reward
            dones[latest] |= ended
            stack[ended] = 0
            played = step + 1
            bar.update(n)
            game_return += reward
            if writer:
                for total in game_return[ended]:
                    writer.add_scalar("charts/episodic_return", total, n * played)
            game_return[ended] = 0
    except KeyboardInterrupt:
        print("\nstopped     what is recorded becomes a shorter buffer", file=sys.stderr)

    # close the gaps that Ctrl-C leaves between the slots, in place, as frames take much memory
    rows = (first[:, None] + np.arange(played)).ravel()
    position = np.zeros(1 + n * steps, np.int32)
    for new, old in enumerate(rows, 1):
        frames[new] = frames[1 + old]
        position[1 + old] = new
    kept = rows[is_sample[rows]]
    env_index = (kept // steps).astype(np.int32)
    # a game begins with each slot's stretch, and after each game's end
    begins = np.diff(env_index, prepend=-1) > 0
    begins[1:] |= dones[kept][:-1]
    episode_index = np.cumsum(begins, dtype=np.int32) - np.int32(1)
    episode_returns = np.bincount(episode_index, rewards[kept]).astype(np.float32)
    episode_returns[np.bincount(episode_index, dones[kept]) == 0] = np.nan
    return {
        "frames": frames[: 1 + len(rows)],
        "stack_index": position[stack_index[kept]],
        "action_probs" if epsilon is None else "q_values": targets[kept],
        "values": values[kept],
        "actions": actions[kept],
        "rewards": rewards[kept],
        "dones": dones[kept],
        "env_index": env_index,
        "episode_index": episode_index,
        "episode_returns": episode_returns,
    }


# Nothing below changes how it is recorded: evaluation, logging, files and main.


def load_teacher(path, env_id, num_actions):
    """Read a teacher, of a kind that its layers' names tell; runs no code in it.

    Returns what it is, a dict of checkpoint (its path), sha256, env_id, phase, capacity, args,
    global_step and evaluation, and its Agent. Only this project's files name their game. Exits for
    a file of any other kind, game or number of actions.
    """
    network = ("network.0", "network.2", "network.4", "network.7")
    kostrikov = ("base.main.0", "base.main.2", "base.main.4", "base.main.7")
    cnn = [f"features_extractor.{layer}" for layer in ("cnn.0", "cnn.2", "cnn.4", "linear.0")]
    layouts = {
        "CleanRL PPO": (*network, "actor", "critic"),
        "CleanRL DQN": (*network, "network.9"),
        "Kostrikov": (*kostrikov, "dist.linear", "base.critic_linear"),
        "Stable-Baselines3 PPO": (*cnn, "action_net", "value_net"),
        "Stable-Baselines3 DQN": (*(f"q_net.{layer}" for layer in cnn), "q_net.q_net.0"),
    }
    fix = f"make one with `python ppo_atari_teacher.py --env-id {env_id}`, or pass one of CleanRL, "
    fix += "Kostrikov or Stable-Baselines3 (README: your own teacher)"
    try:
        file = path
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are none
            archive = zipfile.ZipFile(path)
            assert archive.testzip() is None, "damaged: a checksum is wrong"
            if "policy.pth" in archive.namelist():
                file = io.BytesIO(archive.read("policy.pth"))
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved.get("env_id", env_id) != env_id:
            sys.exit(f"{path}: plays {saved['env_id']}; pass that --env-id")
        wrappers = r"^(module\.|_orig_mod\.)+"  # of data-parallel and of compiled modules
        found = {re.sub(wrappers, "", name): x for name, x in saved.get("model", saved).items()}
        for name in list(found):  # Stable-Baselines3 saves its networks several times
            copied = name[:3] in ("pi_", "vf_") and torch.equal(found[name], found[name[3:]])
            if copied or name.startswith("q_net_target."):
                del found[name]
        layers = {name.rpartition(".")[0] for name in found}
        kind = next((kind for kind, names in layouts.items() if layers == set(names)), None)
        if kind is None:
            raise ValueError(f"its layers are {', '.join(sorted(layers))}")
        weights = {}
        for ours, theirs in zip((*network, "actor", "critic"), layouts[kind], strict=False):
            for part in ("weight", "bias"):
                weights[f"{ours}.{part}"] = found[f"{theirs}.{part}"]
        widths = tuple(len(weights[f"{layer}.bias"]) for layer in network)
        agent = Agent(widths, num_actions)
        agent.load_state_dict(weights, strict="DQN" not in kind)  # those have no critic
    except pickle.UnpicklingError:
        sys.exit(f"{path}: damaged, or a pickled module instead of plain tensors; {fix}")
    except Exception as error:  # noqa: BLE001, as foreign files can raise anything
        sys.exit(f"{path}: no teacher of {env_id} ({error!r:.250}); {fix}")
    teacher = {
        "checkpoint": path,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "env_id": env_id,
        "phase": saved.get("phase", kind),
        "capacity": saved.get("capacity", "-".join(map(str, widths))),
        "args": {"loss": "mse"} if "DQN" in kind else saved.get("args", {}),
        "global_step": saved.get("global_step", 0),
        "evaluation": saved.get("evaluation"),
    }
    return teacher, agent


def find_input(path, default, shipped, args):
    """`path` with its flags filled in, or if that is the default and missing, the shipped file."""
    shipped = Path(__file__).with_name("pretrained") / args.env_id / shipped
    filled = fill_in(path, args)
    if path == default and not os.path.exists(filled) and shipped.exists():
        print(f"pretrained  {shipped} serves as {filled}")
        return str(shipped)
    return filled


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


def main(args):
    args.env_id, rom = resolve_game(args.env_id)
    args.teacher_path = find_input(args.teacher_path, Args.teacher_path, "ppo_high.pt", args)
    args.buffer_path = fill_in(args.buffer_path, args)
    device = set_up_torch(args.seed, args.cuda)
    envs = AtariEnvs(rom, args.num_envs, args.repeat_action_probability, life_loss=False)
    teacher, agent = load_teacher(args.teacher_path, args.env_id, len(envs.action_meanings))
    agent = agent.to(device, memory_format=torch.channels_last)
    lock_output(args.buffer_path, args.overwrite)
    writer = open_log(args)
    print(f"run         {writer.log_dir} on {device}, {teacher['phase']} of {args.teacher_path}")
    if not teacher["evaluation"] and args.eval_steps:
        teacher["evaluation"] = evaluate(agent, rom, args, teacher, writer, device)

    epsilon = args.epsilon if teacher["args"].get("loss") == "mse" else None
    arrays = collect(agent, envs, args.num_samples, args.seed, args.greedy, epsilon, device, writer)
    samples = len(arrays["actions"])
    if not samples:
        sys.exit("stopped before anything was recorded")
    meta = {
        "env_id": args.env_id,
        "action_meanings": envs.action_meanings,
        "targets": "action_probs" if epsilon is None else "q_values",
        "teacher": teacher,
        "args": vars(args),
    }
    print(f"saving      {samples:,} samples, {arrays['frames'].nbytes / 1e6:,.0f} MB in memory")
    with open(f"{args.buffer_path}.tmp", "wb") as file:
        np.savez_compressed(file, **arrays, meta=np.array(json.dumps(meta)))
    os.replace(f"{args.buffer_path}.tmp", args.buffer_path)
    games = np.isfinite(arrays["episode_returns"]).sum()
    print(f"wrote       {args.buffer_path}, {samples:,} samples, {games} whole games")
    command = f"actor_distill.py --env-id {args.env_id} --buffer-path"
    print(f"next        python {command} {args.buffer_path}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(tyro.cli(Args))
