"""Train a Q-network with Stable-Baselines3's DQN: a teacher for `collect_buffer.py` to record.

    python benchmark/q_teacher.py --total-timesteps 1_000_000
    python benchmark/q_teacher.py --total-timesteps 300_000 --exploration-steps 60_000 \\
        --learning-rate 1e-4 --guide-path pretrained/PongNoFrameskip-v4/ppo_high.pt
    python collect_buffer.py --teacher-path checkpoints/PongNoFrameskip-v4/dqn.zip

Needs stable-baselines3, and takes its `CnnPolicy` as it is; the games are those of the four scripts
on ale-py's threads. Writes what Stable-Baselines3's own `save` writes, again and again, so that it
can be stopped at any time; games' returns go to TensorBoard.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import ConvertCallback, EveryNTimesteps
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ppo_atari_teacher import AtariEnvs, game_seeds, load_checkpoint, resolve_game, sample_actions


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the Atari game"""
    total_timesteps: int = 1_000_000
    """steps of training, all games together"""
    num_envs: int = 8
    """games played at once; each step of all of them is followed by one optimiser step"""
    learning_rate: float = 2e-4
    """Adam's learning rate"""
    n_steps: int = 3
    """rewards summed up before the target network's value is added"""
    exploration_steps: int = 100_000
    """steps in which epsilon falls to 0.02, from 1 or with a guide 0.1"""
    seed: int = 1
    """seed of weights, games and exploration"""
    guide_path: str | None = None
    """checkpoint of a high-capacity policy to begin from, where there is no time for DQN from
    scratch: the Q-network begins with its layers, its value and a small share of its logits, and
    the policy plays half of the games, with 1 in 10 actions at random"""
    save_path: str | None = None
    """file to write; default `checkpoints/{env_id}/dqn.zip`"""


class GuidedDQN(DQN):
    """DQN that stores FIRE where the games press it, and whose first games, half of all, are played
    by `guide` where there is one.
    """

    guide = None

    def _sample_action(self, learning_starts, action_noise=None, n_envs=1):
        action, stored = super()._sample_action(learning_starts, action_noise, n_envs)
        if self.guide is not None:
            guided = np.arange(n_envs) < n_envs // 2
            guided &= np.random.random(n_envs) >= 0.1
            with torch.no_grad():
                logits, _ = self.guide(torch.from_numpy(self._last_obs[guided]))
            action[guided] = stored[guided] = sample_actions(logits).numpy()
        games = self.env.unwrapped.games
        if games.forced.any():
            action[games.forced] = stored[games.forced] = games.fire
        return action, stored


def begin_with(q_network, policy):
    """Give SB3's Q-network the layers of a policy: Q = V + 0.02 (logits - their mean)."""
    cnn, linear = q_network.features_extractor.cnn, q_network.features_extractor.linear
    theirs = (cnn[0], cnn[2], cnn[4], linear[0])
    for layer, ours in zip(theirs, (0, 2, 4, 7), strict=True):
        layer.load_state_dict(policy.network[ours].state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            value, logit = getattr(policy.critic, name), getattr(policy.actor, name)
            getattr(q_network.q_net[0], name).copy_(value + 0.02 * (logit - logit.mean(0)))


class VectorGames(VecEnv):
    """The scripts' games behind Stable-Baselines3's interface, with rewards clipped to their sign."""

    def __init__(self, rom, num_envs, seed):
        self.games = AtariEnvs(rom, num_envs, 0.0, life_loss=False)
        self.first_seeds = game_seeds(num_envs, seed, 1)
        self.render_mode = None
        spaces = (self.games.single_observation_space, self.games.single_action_space)
        super().__init__(num_envs, *spaces)

    def reset(self):
        return self.games.reset(seed=self.first_seeds)[0]

    def step_async(self, actions):
        self.actions = np.asarray(actions)

    def step_wait(self):
        obs, reward, terminated, truncated, info = self.games.step(self.actions)
        infos = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(terminated | truncated):
            infos[i] = {
                "terminal_observation": info["final_obs"][i],
                "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
            }
        return obs, np.sign(reward).astype(np.float32), terminated | truncated, infos

    def close(self):
        self.games.close()

    def seed(self, seed=None):
        return [None] * self.num_envs

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs


if __name__ == "__main__":
    args = tyro.cli(Args)
    env_id, rom = resolve_game(args.env_id)
    save_path = Path(args.save_path or f"checkpoints/{env_id}/dqn.zip")
    model = GuidedDQN(
        "CnnPolicy",
        VecMonitor(VectorGames(rom, args.num_envs, args.seed)),
        seed=args.seed,
        learning_rate=args.learning_rate,
        n_steps=args.n_steps,
        buffer_size=100_000,
        learning_starts=10_000,
        train_freq=1,
        target_update_interval=500 * args.num_envs,
        exploration_final_eps=0.02,
        exploration_initial_eps=1.0 if args.guide_path is None else 0.1,
        exploration_fraction=min(1, args.exploration_steps / args.total_timesteps),
        policy_kwargs={"optimizer_kwargs": {"fused": True}},
        tensorboard_log=f"runs/{env_id}__q_teacher__{args.seed}",
        verbose=1,
    )
    if args.guide_path is not None:
        _, guide = load_checkpoint(args.guide_path, env_id, "name another --guide-path")
        # on the class, as the attributes of the model itself are saved with it
        GuidedDQN.guide = guide.to(memory_format=torch.channels_last)
        for q_network in (model.q_net, model.q_net_target):
            begin_with(q_network, guide)
    model.policy.to(memory_format=torch.channels_last)
    save = ConvertCallback(lambda _locals, _globals: model.save(save_path) or True)
    model.learn(args.total_timesteps, callback=EveryNTimesteps(20_000, save), log_interval=16)
    model.save(save_path)
    print(f"wrote {save_path}")
