"""PPO's parts against independent computations, and PPO whole on real games."""

import copy
import functools
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import run_main, tensorboard_scalars

import finetune_student as finetune
import ppo_atari_teacher as teacher


def train_briefly(folder, monkeypatch, **flags):
    """Run the teacher's `main` in `folder`, without an evaluation, on a small network."""
    monkeypatch.chdir(folder)
    run_main(teacher, teacher.Args(capacity="low", eval_steps=0, save_path="ppo.pt", **flags))


def plain_gae(rewards, values, dones, last_value, gamma, lam):
    """Advantages of one game by the definition: the (gamma lam)-weighted sum of the deltas."""
    steps = len(rewards)
    following = [*values[1:], last_value]
    deltas = rewards + gamma * (1 - dones) * following - values
    advantages = []
    for t in range(steps):
        end = next((k for k in range(t, steps) if dones[k]), steps - 1)
        advantages.append(sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, end + 1)))
    return advantages


def test_gae_equals_the_definition():
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=(2, 40, 5))
    dones = (rng.random((40, 5)) < 0.15).astype(float)
    dones[-1] = [0, 1, 0, 1, 0]
    last_values = rng.normal(size=5)
    tensors = map(torch.from_numpy, (rewards, values, dones, last_values))
    computed = teacher.gae(*tensors, 0.97, 0.9)
    for e in range(5):
        game = rewards[:, e], values[:, e], dones[:, e], last_values[e]
        np.testing.assert_allclose(computed[:, e], plain_gae(*game, 0.97, 0.9), atol=1e-12)


def test_a_truncation_bootstraps_and_nothing_else_does(tmp_path, monkeypatch):
    """Breakout cut off after 50 steps: gamma V(last observation) enters its reward, sign(r)."""
    plain_init, plain_step = teacher.AtariVectorEnv.__init__, teacher.AtariVectorEnv.step
    cut_off = functools.partialmethod(plain_init, max_num_frames_per_episode=200)
    played, rollouts = [], []

    def step(envs, actions):
        played.append(plain_step(envs, actions))
        return played[-1]

    def gae(rewards, values, dones, *rest):
        rollouts.append((rewards.clone(), dones.clone()))
        return torch.zeros_like(rewards)

    monkeypatch.setattr(teacher.AtariVectorEnv, "__init__", cut_off)
    monkeypatch.setattr(teacher.AtariVectorEnv, "step", step)
    monkeypatch.setattr(teacher, "gae", gae)
    flags = {"num_envs": 8, "num_steps": 120, "total_timesteps": 960, "num_minibatches": 1}
    # nothing is learnt, so that the network saved is the network that played
    monkeypatch.setattr(teacher, "ppo_update", lambda *inputs: torch.zeros(6))
    train_briefly(tmp_path, monkeypatch, env_id="Breakout-v5", update_epochs=1, gamma=0.9, **flags)
    _, agent = teacher.load_checkpoint("ppo.pt", "BreakoutNoFrameskip-v4", "")
    obs = np.stack([x[0] for x in played])
    rewards, terminated, truncated = (np.stack([x[i] for x in played]) for i in (1, 2, 3))
    # a life that is lost on the very step of the cut may report `terminated` alone
    assert set(np.flatnonzero(truncated.any(1))) == {49, 99}
    assert truncated.sum() >= 12 and terminated.sum() > 8
    expected = np.sign(rewards).astype(float)
    for t, e in np.argwhere(truncated):
        final_obs = played[t][4]["final_obs"][e]
        assert (final_obs[:3] == obs[t - 1, e, 1:]).all(), "the stack that the cut game ended with"
        with torch.no_grad():
            value = agent(torch.from_numpy(final_obs[None]))[1].item()
        assert abs(value) > 0.01
        expected[t, e] += 0.9 * value
    np.testing.assert_allclose(rollouts[0][0], expected, atol=1e-5)
    np.testing.assert_array_equal(rollouts[0][1], terminated | truncated)


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_equals_a_plain_reference(clip_vloss):
    rng = np.random.default_rng(5)
    batch, num_actions, clip, ent_coef, vf_coef = 64, 6, 0.2, 0.03, 0.7
    logits = rng.normal(size=(batch, num_actions))
    values, advantages, returns = rng.normal(size=(3, batch))
    old_values = values + rng.normal(scale=0.3, size=batch)
    actions = rng.integers(0, num_actions, batch)
    policy, value, entropy, kl, k3, clipped = [], [], [], [], [], []
    old_logprobs = np.empty(batch)
    for i in range(batch):
        probs = np.exp(logits[i]) / np.exp(logits[i]).sum()
        old_logprobs[i] = math.log(probs[actions[i]]) + rng.normal(scale=0.3)
        ratio = probs[actions[i]] / math.exp(old_logprobs[i])
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        policy.append(-min(ratio * advantages[i], bounded * advantages[i]))
        error = (values[i] - returns[i]) ** 2
        if clip_vloss:
            moved = min(max(values[i], old_values[i] - clip), old_values[i] + clip)
            error = max(error, (moved - returns[i]) ** 2)
        value.append(error / 2)
        entropy.append(-sum(p * math.log(p) for p in probs))
        kl.append(-math.log(ratio))
        k3.append(ratio - 1 - math.log(ratio))
        clipped.append(abs(ratio - 1) > clip)
    expected = [np.mean(x) for x in (policy, value, entropy, kl, k3, clipped)]
    assert 0.1 < expected[5] < 0.9  # both sides of the clipping are in play
    rollout = map(torch.from_numpy, (actions, old_logprobs, advantages, returns, old_values))
    outputs = torch.from_numpy(logits), torch.from_numpy(values)
    coefficients = clip, clip_vloss, ent_coef, vf_coef
    loss, statistics = teacher.ppo_loss(*outputs, list(rollout), *coefficients)
    np.testing.assert_allclose(statistics, expected, atol=1e-12)
    total = expected[0] - ent_coef * expected[2] + vf_coef * expected[1]
    np.testing.assert_allclose(loss, total, atol=1e-12)


COEFFICIENTS = (0.1, True, 0.01, 0.5)  # clip_coef, clip_vloss, ent_coef, vf_coef


def random_minibatch(size=32, num_actions=6):
    """Observations, and actions, log-probabilities, advantages, returns, values."""
    obs = torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8)
    actions = torch.randint(0, num_actions, (size,))
    return obs, [actions, torch.full((size,), -1.8), *torch.randn(3, size)]


def update(agent, optimizer, obs, batch, loss_function=teacher.minibatch_loss):
    return teacher.ppo_update(agent, optimizer, loss_function, obs, batch, COEFFICIENTS, 0.5)


def small_training():
    """A small network and its optimiser, as `main` makes them."""
    agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
    return agent, torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)


def test_a_column_of_values_is_refused():
    """Values of shape [B, 1] against returns of shape [B] would broadcast to [B, B]."""
    _, batch = random_minibatch()
    with pytest.raises(AssertionError, match="broadcast"):
        teacher.ppo_loss(torch.randn(32, 6), torch.randn(32, 1), batch, *COEFFICIENTS)


def test_an_update_bounds_the_gradient():
    agent = teacher.Agent("low", 6)
    before = copy.deepcopy(agent)
    obs, batch = random_minibatch()
    batch[2] *= 1e4
    update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), obs, batch)
    moved = [a - b for a, b in zip(agent.parameters(), before.parameters(), strict=True)]
    assert torch.cat([x.flatten() for x in moved]).norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_update_is_the_plain_one():
    """Same statistics, gradients and weights; the outputs of earlier calls stay as they were."""
    compiled = torch.compile(teacher.minibatch_loss, mode="reduce-overhead", dynamic=False)
    outcomes = []
    for loss_function in (teacher.minibatch_loss, compiled):
        torch.manual_seed(0)
        agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
        minibatches = [random_minibatch(), random_minibatch()]
        statistics = [update(agent, optimizer, *mb, loss_function) for mb in minibatches]
        outcomes.append([*statistics, *(x.grad for x in agent.parameters()), *agent.parameters()])
    for plain, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-4)
    assert not torch.equal(*outcomes[1][:2])


def test_a_loaded_training_goes_on_bit_for_bit(tmp_path):
    """Also with contiguous moments, as a file written by other code may hold them.

    And from the state as it was when it was taken, whatever was trained between that and saving.
    """
    minibatches = [random_minibatch() for _ in range(5)]
    agent, optimizer = small_training()
    for minibatch in minibatches[:3]:
        update(agent, optimizer, *minibatch)
    state = teacher.training_state(agent, optimizer)
    for minibatch in minibatches[3:]:
        update(agent, optimizer, *minibatch)
    for moments in state["optimizer"]["state"].values():
        moments |= {name: moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
    args, path = teacher.Args(capacity="low"), str(tmp_path / "saved.pt")
    about = {"phase": "ppo", "env_id": "a game", "capacity": "low", "args": vars(args)}
    teacher.save_checkpoint(path, {**about, **state})
    saved, loaded = teacher.load_checkpoint(path, "a game", "")
    resumed, resumed_optimizer = small_training()
    resumed.load_state_dict(loaded.state_dict())
    teacher.restore(saved, "ppo", args, resumed, resumed_optimizer)
    for minibatch in minibatches[3:]:
        update(resumed, resumed_optimizer, *minibatch)
    for a, b in zip(agent.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_logged_returns_are_raw_rewards_over_full_games(tmp_path, monkeypatch):
    """Against the same play of ale-py's own games, where a lost life ends nothing.

    And FIRE is what was played after each lost life.
    """
    flags = {"num_envs": 2, "num_steps": 900, "total_timesteps": 1800, "num_minibatches": 2}
    train_briefly(tmp_path, monkeypatch, env_id="Breakout-v5", update_epochs=1, **flags)
    scalars = tensorboard_scalars(next((tmp_path / "runs").iterdir()))

    teacher.set_up_torch(1, False, True)
    games = teacher.AtariVectorEnv("breakout", 2, autoreset_mode="SameStep", reward_clipping=False)
    agent = teacher.Agent("low", games.single_action_space.n)
    agent = agent.to(memory_format=torch.channels_last)
    obs, info = games.reset(seed=teacher.game_seeds(2, 1, 1, 0))
    total, began, must_fire = np.zeros(2), np.zeros(2), np.zeros(2, bool)
    returns, lengths = [], []
    for t in range(900):
        action = teacher.act(agent, torch.from_numpy(obs))[0].numpy()
        lives = info["lives"]
        obs, reward, terminated, truncated, info = games.step(np.where(must_fire, 1, action))
        must_fire = (info["lives"] < lives) & ~terminated & ~truncated
        total += reward
        for e in np.flatnonzero(terminated | truncated):
            returns.append((2 * t + 2, total[e]))
            lengths.append((2 * t + 2, t + 1 - began[e]))
            total[e], began[e] = 0, t + 1
    assert len(returns) >= 4 and max(total for _, total in returns) > 1
    assert scalars["charts/episodic_return"] == returns
    assert scalars["charts/episodic_length"] == lengths


def test_every_pass_sees_the_whole_rollout_once(tmp_path, monkeypatch):
    """What training hands to its updates, put back in order: each sample once a pass.

    Rewards are signs, advantages normalised over the rollout; a step that FIRE was forced on has
    advantage 0, and FIRE is what was played.
    """
    plain_gae, plain_step, plain_order = teacher.gae, teacher.AtariEnvs.step, torch.randperm
    base_step = teacher.AtariVectorEnv.step
    rollouts, raw_rewards, played, forced, orders, minibatches = [], [], [], [], [], []

    def gae(*inputs):
        rollouts.append(inputs)
        return plain_gae(*inputs)

    def step(envs, actions):
        forced.append(envs.forced.copy())
        outcome = plain_step(envs, actions)
        raw_rewards.append(outcome[1])
        return outcome

    def what_is_played(envs, actions):
        played.append(actions.copy())
        return base_step(envs, actions)

    def randperm(*arguments, **options):
        orders.append(plain_order(*arguments, **options))
        return orders[-1]

    def no_update(agent, optimizer, loss_function, obs, batch, *rest):
        minibatches.append((obs, *batch))
        return torch.zeros(6)

    monkeypatch.setattr(teacher, "gae", gae)
    monkeypatch.setattr(teacher.AtariEnvs, "step", step)
    monkeypatch.setattr(teacher.AtariVectorEnv, "step", what_is_played)
    monkeypatch.setattr(teacher.torch, "randperm", randperm)
    monkeypatch.setattr(teacher, "ppo_update", no_update)
    flags = {"num_envs": 4, "num_steps": 100, "total_timesteps": 400, "num_minibatches": 8}
    train_briefly(tmp_path, monkeypatch, env_id="Qbert-v5", update_epochs=3, **flags)
    _, agent = teacher.load_checkpoint("ppo.pt", "QbertNoFrameskip-v4", "")

    rewards, values = rollouts[0][:2]
    assert max(x.max() for x in raw_rewards) >= 25
    assert set(rewards.unique().tolist()) == {0.0, 1.0}
    advantages = plain_gae(*rollouts[0])
    returns = (advantages + values).flatten()
    normalised = ((advantages - advantages.mean()) / (advantages.std() + 1e-5)).flatten()
    forced, played = np.concatenate(forced), torch.from_numpy(np.concatenate(played))
    assert forced.sum() >= 2 and (played[forced] == 1).all()

    assert len(orders) == 3 and len(minibatches) == 24
    assert all(len(x) == 50 for minibatch in minibatches for x in minibatch)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    for i, order in enumerate(orders):
        assert order.sort()[0].tolist() == list(range(400))
        columns = zip(*minibatches[8 * i : 8 * i + 8], strict=True)
        obs, *rest = (torch.cat(column)[order.argsort()] for column in columns)
        actions, logprobs, advs, rets, old_values = rest
        assert torch.equal(actions[~forced], played[~forced])
        assert (actions[forced] != 1).any(), "the policy wanted something else"
        assert (advs[forced] == 0).all()
        torch.testing.assert_close(advs[~forced], normalised[~forced])
        torch.testing.assert_close(rets, returns)
        torch.testing.assert_close(old_values, values.flatten())
        with torch.no_grad():
            logits, found = agent(obs)
        torch.testing.assert_close(old_values, found, atol=1e-5, rtol=0)
        chosen = logits.log_softmax(-1)[range(400), actions]
        torch.testing.assert_close(logprobs, chosen, atol=1e-5, rtol=0)
    scalars = tensorboard_scalars(next((tmp_path / "runs").iterdir()))
    explained = 1 - np.var((returns - values.flatten()).numpy()) / np.var(returns.numpy())
    assert scalars["losses/explained_variance"] == [(400, pytest.approx(explained, rel=1e-3))]


def test_no_explained_variance_where_returns_do_not_vary(tmp_path, monkeypatch):
    """The first steps of Pong have no reward: without a discounted future all returns are 0."""
    flags = {"num_envs": 2, "num_steps": 8, "total_timesteps": 32, "num_minibatches": 1}
    train_briefly(tmp_path, monkeypatch, gamma=0, update_epochs=1, **flags)
    scalars = tensorboard_scalars(next((tmp_path / "runs").iterdir()))
    assert len(scalars["losses/value_loss"]) == 2
    assert "losses/explained_variance" not in scalars
    assert all(math.isfinite(value) for points in scalars.values() for _, value in points)


def test_a_diverged_training_is_not_saved(tmp_path, monkeypatch):
    """What stays is the file of the last iteration before."""
    plain_update, updates = teacher.ppo_update, []

    def update(agent, optimizer, *rest):
        updates.append(1)
        if len(updates) == 3:  # the first of two in the second iteration
            optimizer.param_groups[0]["lr"] = 1e30
        return plain_update(agent, optimizer, *rest)

    monkeypatch.setattr(teacher, "ppo_update", update)
    flags = {"num_envs": 2, "num_steps": 8, "total_timesteps": 48, "num_minibatches": 2}
    with pytest.raises(SystemExit, match="diverged at step 32; lower --learning-rate"):
        train_briefly(tmp_path, monkeypatch, update_epochs=1, checkpoint_interval=1, **flags)
    saved = torch.load("ppo.pt", weights_only=True)
    assert saved["global_step"] == 16
    assert max(weight.abs().max() for weight in saved["model"].values()) < 10


def test_critic_warm_up_is_not_held_back_by_value_clipping(tmp_path, monkeypatch):
    """Returns of 10: after ten iterations the critic is there, and the policy has not moved.

    The critic reaches 9.98; with value clipping during the warm-up it reaches 6.4.
    """
    seen = []

    def gae(rewards, values, *rest):
        seen.append(values.mean().item())
        return 10 - values

    monkeypatch.setattr(finetune, "gae", gae)
    args = finetune.Args(
        num_envs=4,
        num_steps=16,
        total_timesteps=20 * 64,
        num_minibatches=8,
        update_epochs=2,
        learning_rate=6e-3,
        critic_warmup_updates=10,
    )
    envs = finetune.AtariEnvs("pong", 4, True, 0.0)
    agent, optimizer = small_training()
    start = copy.deepcopy(agent.state_dict())
    device = torch.device("cpu")
    bar = finetune.progress(total=args.total_timesteps)
    iterations = finetune.train(args, agent, optimizer, envs, bar, device)
    for _ in itertools.islice(iterations, 10):
        pass
    changed = {name for name, x in agent.state_dict().items() if not torch.equal(x, start[name])}
    assert changed == {"critic.weight", "critic.bias"}
    next(iterations)
    bar.close()
    assert seen[0] < 1 and seen[10] == pytest.approx(10, abs=0.2)
    assert all(not torch.equal(x, start[name]) for name, x in agent.state_dict().items())


class Stripes:
    """A small game: one of four stripes of the picture is bright, and its action earns a point."""

    num_envs = 16

    def reset(self, seed):
        self.rng, self.forced = np.random.default_rng(seed), np.zeros(16, bool)
        self.game_over = self.forced
        return self.draw(), {}

    def draw(self):
        self.right = self.rng.integers(0, 4, 16)
        obs = np.zeros((16, 4, 84, 84), np.uint8)
        for picture, stripe in zip(obs, self.right, strict=True):
            picture[-1, :, 21 * stripe : 21 * stripe + 21] = 200
        return obs

    def step(self, actions):
        reward, ended = (actions == self.right) * 10, self.rng.random(16) < 0.1
        return self.draw(), reward, ended, np.zeros(16, bool), {}


def test_ppo_learns_to_read_the_picture(tmp_path, monkeypatch):
    """From one point in four to eight in ten, in 20 iterations of 512 steps."""
    earned, plain_gae = [], teacher.gae
    monkeypatch.setattr(
        teacher,
        "gae",
        lambda rewards, *x: (earned.append(rewards.mean()), plain_gae(rewards, *x))[1],
    )
    args = teacher.Args(num_steps=32, num_minibatches=4, update_epochs=4, learning_rate=1e-3)
    agent = teacher.Agent("low", 4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    bar, device = teacher.progress(total=20 * 512), torch.device("cpu")
    for _ in teacher.train(args, agent, optimizer, Stripes(), bar, device):
        pass
    assert earned[0] < 0.35 and earned[-1] > 0.8, earned
