"""PPO's parts and whole iterations of it against independent computations, on real games."""

import copy
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import opinionated_agent, run_main, tensorboard_scalars
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter

import finetune_student as finetune
import ppo_atari_teacher as teacher

SMALL = {"num_envs": 4, "num_steps": 16, "total_timesteps": 64, "num_minibatches": 2}
SMALL |= {"update_epochs": 2, "capacity": "low", "eval_steps": 0, "save_path": "ppo.pt"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved():
    return torch.load("ppo.pt", weights_only=True)


def train_briefly(**flags):
    """Run the teacher's `main` on a small network: what it logs."""
    run_main(teacher, teacher.Args(**(SMALL | flags)))
    return tensorboard_scalars(f"runs/{saved()['run_name']}")


def trained(module, checkpoint=None, **flags):
    """The small agent that a script's `train` returns."""
    args, device = module.Args(**(SMALL | flags)), torch.device("cpu")
    with SummaryWriter("log") as writer:
        return module.train(args, "pong", checkpoint or {"global_step": 0}, writer, device)


def recorded(monkeypatch, owner, name):
    """A list that gets the inputs and the outcome of every call of `owner.name`."""
    calls, plain = [], getattr(owner, name)

    def call(*inputs, **options):
        calls.append((inputs, plain(*inputs, **options)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, call)
    return calls


def plain_gae(rewards, values, dones, last_values, gamma, lam):
    """Advantages by the definition, a game in a column: the weighted sum of the deltas."""
    steps, games = rewards.shape
    following = np.concatenate([values[1:], last_values[None]])
    deltas = rewards + gamma * (1 - dones) * following - values
    advantages = np.zeros((steps, games))
    for t, e in np.ndindex(steps, games):
        end = next((k for k in range(t, steps) if dones[k, e]), steps - 1)
        advantages[t, e] = sum((gamma * lam) ** (k - t) * deltas[k, e] for k in range(t, end + 1))
    return advantages


def test_gae_equals_the_definition():
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=(2, 40, 5))
    dones = (rng.random((40, 5)) < 0.15).astype(float)
    dones[-1] = [0, 1, 0, 1, 0]
    game = rewards, values, dones, rng.normal(size=5)
    computed = teacher.gae(*map(torch.from_numpy, game), 0.97, 0.9)
    np.testing.assert_allclose(computed, plain_gae(*game, 0.97, 0.9), atol=1e-12)


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_equals_a_plain_reference(clip_vloss):
    rng, clip = np.random.default_rng(5), 0.2
    logits, actions = rng.normal(size=(64, 6)), rng.integers(0, 6, 64)
    values, advantages, returns = rng.normal(size=(3, 64))
    old_values = values + rng.normal(scale=0.3, size=64)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    old_logprobs = np.log(probs[range(64), actions]) + rng.normal(scale=0.3, size=64)
    ratio = probs[range(64), actions] / np.exp(old_logprobs)
    bounded = np.clip(ratio, 1 - clip, 1 + clip)
    error = (values - returns) ** 2
    if clip_vloss:
        near = np.clip(values, old_values - clip, old_values + clip)
        error = np.maximum(error, (near - returns) ** 2)
    policy = -np.minimum(ratio * advantages, bounded * advantages)
    entropy = -(probs * np.log(probs)).sum(1)
    clipped = abs(ratio - 1) > clip
    figures = policy, error / 2, entropy, -np.log(ratio), ratio - 1 - np.log(ratio), clipped
    assert 0.1 < clipped.mean() < 0.9, "both sides of the clipping are in play"
    batch = logits, values, actions, old_logprobs, advantages, returns, old_values
    found = teacher.ppo_loss(*map(torch.from_numpy, batch), clip, clip_vloss)
    np.testing.assert_allclose(found, np.mean(figures, 1), atol=1e-12)


def test_a_column_of_values_is_refused():
    """Values of shape [B, 1] against returns of shape [B] would broadcast to [B, B]."""
    with pytest.raises(AssertionError, match="broadcast"):
        teacher.ppo_loss(torch.randn(3, 6), torch.randn(3, 1), *torch.randn(5, 3), 0.1, True)


def plain_update(agent, optimizer, batch, clip, max_norm):
    """One step of PPO, by torch.distributions; the gradient's norm before it is bounded."""
    obs, actions, logprobs, advantages, returns, old_values = batch
    logits, values = agent(obs)
    policy = Categorical(logits=logits)
    ratio = (policy.log_prob(actions) - logprobs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages).mean()
    near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2
    loss = 0.7 * error - gain - 0.03 * policy.entropy().mean()
    gradient = torch.autograd.grad(loss, list(agent.parameters()))
    norm = math.sqrt(sum(float((x.double() ** 2).sum()) for x in gradient))
    for parameter, x in zip(agent.parameters(), gradient, strict=True):
        parameter.grad = x * min(1, max_norm / norm)
    optimizer.step()
    return norm


@pytest.fixture(scope="module", params=[("breakout", True, 108_000), ("qbert", False, 240)])
def run(request, tmp_path_factory):
    """All that passed in two iterations of four games, of Qbert cut off after 60 steps."""
    init, found = teacher.AtariVectorEnv.__init__, SimpleNamespace()
    found.game, found.norm_adv, frames = request.param
    game_id = f"{found.game.title()}-v5"
    found.cut = {"max_num_frames_per_episode": frames}

    def cut_off(*inputs, **options):
        init(*inputs, **(options | found.cut))

    flags = {"num_steps": 100, "total_timesteps": 899, "num_minibatches": 7, "update_epochs": 3}
    flags |= {"ent_coef": 0.03, "vf_coef": 0.7, "max_grad_norm": 0.3, "clip_coef": 0.05}
    flags |= {"learning_rate": 1e-3, "gamma": 0.97, "gae_lambda": 0.9, "seed": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        patch.setattr(teacher.AtariVectorEnv, "__init__", cut_off)
        starts = recorded(patch, teacher.AtariEnvs, "reset")
        chosen = recorded(patch, teacher.AtariEnvs, "step")
        played = recorded(patch, teacher.AtariVectorEnv, "step")
        orders = recorded(patch, torch, "randperm")
        found.scalars = train_briefly(env_id=game_id, norm_adv=found.norm_adv, **flags)
        found.weights = saved()["model"]
    *arrays, found.infos = zip(*(outcome for _, outcome in played), strict=True)
    obs, found.rewards, found.terminated, found.truncated = map(np.stack, arrays)
    first_obs, first_info = starts[0][1]
    found.obs = np.concatenate([first_obs[None], obs])
    lives = np.stack([first_info["lives"], *(info["lives"] for info in found.infos[:-1])])
    found.forced = np.diff(lives, axis=0, prepend=lives[:1]) < 0
    found.wanted, found.done = (np.stack([x[1] for x, _ in calls]) for calls in (chosen, played))
    found.orders = [order for _, order in orders]
    return found


def test_fire_is_played_after_a_lost_life_and_whole_games_are_logged(run):
    """As in ale-py's own games, where a lost life ends nothing."""
    np.testing.assert_array_equal(run.done, np.where(run.forced, 1, run.wanted))
    assert (run.wanted[run.forced] != 1).sum() >= 2, "the policy wanted something else"
    options = {"autoreset_mode": "SameStep", "reward_clipping": False, **run.cut}
    games = teacher.AtariVectorEnv(run.game, 4, **options)
    games.reset(seed=teacher.game_seeds(4, 3, 1, 0, 0))
    total, began, returns, lengths = np.zeros(4), np.zeros(4), [], []
    for t, actions in enumerate(run.done):
        _, reward, terminated, truncated, _ = games.step(actions)
        total += reward
        for e in np.flatnonzero(terminated | truncated):
            returns.append((4 * t + 4, total[e]))
            lengths.append((4 * t + 4, t + 1 - began[e]))
            total[e], began[e] = 0, t + 1
    assert len(returns) >= 3 and max(total for _, total in returns) >= 1
    assert run.scalars["charts/episodic_return"] == returns
    assert run.scalars["charts/episodic_length"] == lengths


def test_two_iterations_equal_a_plain_computation(run):
    """The same weights, passes and rates; a step on which FIRE was forced has advantage 0.

    Rewards are signs. A game cut off would have gone on: gamma V(last observation) enters.
    """
    if run.game == "qbert":
        assert run.rewards.max() >= 25 and run.truncated.sum() >= 8
    torch.manual_seed(3)
    agent = teacher.Agent("low", len(run.weights["actor.bias"]))
    start = copy.deepcopy(agent.state_dict())
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, foreach=False)
    norms, explained = [], []
    for first in (0, 100):
        steps = slice(first, first + 100)
        obs = torch.from_numpy(run.obs[first : first + 101]).flatten(0, 1)
        rewards = np.sign(run.rewards[steps]).astype(float)
        with torch.no_grad():
            logits, values = agent(obs)
            for t, e in np.argwhere(run.truncated[steps]):
                final_obs = run.infos[first + t]["final_obs"][e]
                assert (final_obs[:3] == run.obs[first + t, e, 1:]).all()
                rewards[t, e] += 0.97 * agent(torch.from_numpy(final_obs[None]))[1].item()
        actions = torch.from_numpy(run.wanted[steps].flatten())
        logprobs = Categorical(logits=logits[:400]).log_prob(actions)
        values = values.double().numpy().reshape(101, 4)
        ends = (run.terminated | run.truncated)[steps].astype(float)
        advantages = plain_gae(rewards, values[:100], ends, values[100], 0.97, 0.9)
        returns = advantages + values[:100]
        explained.append(1 - np.var(advantages) / np.var(returns))
        if run.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-5)
        advantages[run.forced[steps]] = 0
        floats = [
            torch.from_numpy(x).flatten().float() for x in (advantages, returns, values[:100])
        ]
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - first / 200)
        for order in run.orders[3 * first // 100 :][:3]:
            assert sorted(order.tolist()) == list(range(400))
            for mb in order.split(58):  # seven minibatches, the last of them smaller
                batch = [x[mb] for x in (obs, actions, logprobs, *floats)]
                norms.append(plain_update(agent, optimizer, batch, 0.05, 0.3))
    assert min(norms) < 0.3 < max(norms), "some gradients were bounded, and some were not"
    assert len({tuple(order.tolist()) for order in run.orders}) == len(run.orders) == 6
    for name, weight in agent.state_dict().items():
        moved, error = (weight - start[name]).norm(), (weight - run.weights[name]).norm()
        assert error < 0.02 * moved, name
    rates = [rate for _, rate in run.scalars["charts/learning_rate"]]
    logged = [x for _, x in run.scalars["losses/explained_variance"]]
    assert rates == pytest.approx([1e-3, 5e-4]) and logged == pytest.approx(explained, rel=1e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_update_is_the_plain_one():
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        outcomes.append(trained(teacher, compile=compiled).parameters())
    for plain, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("discounts", [(0.99, 0.95), (0.999, 0.9)])
def test_the_critic_is_fitted_to_the_returns_that_its_own_values_give(discounts):
    """Against NumPy's least squares, the ridge as rows of its own, and V and returns in turns."""
    agent = opinionated_agent(finetune.Agent, "low", 6)
    policy = agent.actor.weight.clone()
    obs = torch.randint(256, (41, 5, 4, 84, 84), dtype=torch.uint8)
    rng = np.random.default_rng(3)
    rewards, dones = rng.normal(1, 1, (40, 5)), (rng.random((40, 5)) < 0.02).astype(float)
    tensors = map(torch.from_numpy, (rewards, dones))
    fitted = finetune.fit_critic(agent, obs[:-1], obs[-1], *tensors, *discounts)
    images = obs.flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(agent(images)[1].view(41, 5), fitted, atol=1e-4, rtol=1e-3)
        hidden = agent.network(images / 255).double().numpy()
    x = np.column_stack((hidden, np.ones(len(hidden))))
    ridge = np.sqrt(1e-3 * (x[:200] ** 2).sum() / x.shape[1]) * np.eye(x.shape[1])
    values = np.zeros((41, 5))
    for _ in range(1000):
        targets = plain_gae(rewards, values[:-1], dones, values[-1], *discounts) + values[:-1]
        targets = np.concatenate((targets.ravel(), np.zeros(len(ridge))))
        weights, *_ = np.linalg.lstsq(np.concatenate((x[:200], ridge)), targets, rcond=None)
        values = (x @ weights).reshape(41, 5)
    np.testing.assert_allclose(fitted, values, rtol=1e-3, atol=1e-3 * values.std())
    assert torch.equal(agent.actor.weight, policy)


@pytest.mark.parametrize("fit", [True, False])
def test_finetuning_fits_the_critic_once(fit, monkeypatch):
    """Before its first update, which learns from the values that the fit gives."""
    fits = recorded(monkeypatch, finetune, "fit_critic")
    losses = recorded(monkeypatch, finetune, "ppo_loss")
    student = opinionated_agent(teacher.Agent, "low", 6).state_dict()
    checkpoint = {"global_step": 0, "model": student, "student": student}
    trained(finetune, checkpoint, fit_critic=fit, total_timesteps=128, update_epochs=1)
    assert len(fits) == fit
    if fit:
        old_values = torch.cat([inputs[6] for inputs, _ in losses[:2]])
        assert torch.equal(old_values.sort()[0], fits[0][1][:-1].flatten().sort()[0])


def test_finetuning_is_pulled_to_the_student(monkeypatch):
    """By KL(policy ‖ student) on the rollout's observations."""
    policy, student = (opinionated_agent(teacher.Agent, "low", 6) for _ in range(2))

    def distances(kl_coef, rate):
        played = recorded(monkeypatch, finetune.AtariVectorEnv, "step")
        models = {"model": policy.state_dict(), "student": student.state_dict()}
        flags = {"kl_coef": kl_coef, "learning_rate": rate, "total_timesteps": 256, "num_envs": 8}
        trained(finetune, {"global_step": 0, **models}, fit_critic=False, **flags)
        return played, [x for _, x in tensorboard_scalars("log")["losses/student_kl"]][-2:]

    played, (logged, _) = distances(1.0, 1e-20)
    obs = torch.from_numpy(np.concatenate([played[i][1][0] for i in range(15)]))
    with torch.no_grad():
        policies = [Categorical(logits=agent(obs)[0]) for agent in (policy, student)]
    expected = torch.distributions.kl_divergence(*policies).mean()
    assert logged == pytest.approx(expected.item(), rel=0.15), "but for the first observation"
    free, pulled = (distances(kl_coef, 3e-4)[1] for kl_coef in (0.0, 10.0))
    assert pulled[1] < 0.8 * free[1]
    norms = recorded(monkeypatch, finetune.nn.utils, "clip_grad_norm_")
    distances(1e6, 1e-20)
    first, second = np.reshape([float(norm) for _, norm in norms], (2, -1)).mean(1)
    assert 0.35 < second / first < 0.7, "the weight falls with the rate, here to a half"


class Stripes:
    """A small game: one of four stripes of the picture is bright, and its action earns a point."""

    num_envs, action_meanings, points = 16, ["0", "1", "2", "3"], []

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
        self.points.append(actions == self.right)
        ended = self.rng.random(16) < 0.1
        return self.draw(), 10 * self.points[-1], ended, np.zeros(16, bool), {}


def test_ppo_learns_to_read_the_picture(monkeypatch):
    """From one point in four to eight in ten, in 20 iterations of 256 steps."""
    envs = Stripes()
    monkeypatch.setattr(teacher, "AtariEnvs", lambda *_, **__: envs)
    trained(teacher, num_envs=16, update_epochs=4, learning_rate=2e-3, total_timesteps=20 * 256)
    earned = np.reshape(envs.points, (20, 256)).mean(1)
    assert earned[0] < 0.35 and earned[-1] > 0.8, earned


def test_bfloat16_stays_inside_the_network(monkeypatch):
    """Which computes in it, near float32; weights, moments, log-probabilities, losses do not."""
    losses = recorded(monkeypatch, teacher, "ppo_loss")
    for bf16 in (True, False):
        trained(teacher, bf16=bf16)
        (logits, values, _, *rest), outcome = losses[-1]
        moments = [x for state in saved()["optimizer"]["state"].values() for x in state.values()]
        weights = saved()["model"].values()
        for tensor in (logits, values, *rest[:-2], *outcome, *weights, *moments):
            assert tensor.dtype == torch.float32
        for outputs in (logits, values):
            assert torch.equal(outputs.bfloat16().float(), outputs) == bf16
        assert losses[-4][1][4] < 1e-5, "the first ratio is 1: rollout and update compute alike"

    agent = opinionated_agent(teacher.Agent, "low", 6)
    obs = torch.randint(256, (64, 4, 84, 84), dtype=torch.uint8)
    exact, _ = agent(obs)
    with torch.autocast("cpu", torch.bfloat16):
        near, _ = agent(obs)
    assert near.dtype == torch.float32 and exact.std() > 0.3
    torch.testing.assert_close(near, exact, atol=0.02 * exact.abs().max().item(), rtol=0)
