"""PPO's parts against independent computations, and PPO whole on real games."""

import copy
import math
import shutil
import sys

import numpy as np
import ppo_atari_teacher as teacher
import pytest
import torch
from conftest import run_main, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def plain_gae(rewards, values, kinds, final_values, last_value, gamma, lam):
    """Advantages of one game by the definition: the (gamma lam)-weighted sum of the deltas.

    kinds[t] is "" within an episode, "life" or "over" where it terminated, "cut" where truncated.
    """
    steps = len(rewards)
    deltas = []
    for t in range(steps):
        following = values[t + 1] if t + 1 < steps else last_value
        following = {"": following, "cut": final_values[t]}.get(kinds[t], 0.0)
        deltas.append(rewards[t] + gamma * following - values[t])
    advantages = []
    for t in range(steps):
        total, weight = 0.0, 1.0
        for k in range(t, steps):
            total += weight * deltas[k]
            if kinds[k]:
                break
            weight *= gamma * lam
        advantages.append(total)
    return advantages


def test_gae_equals_the_definition_with_lost_lives_game_ends_and_truncations():
    rng = np.random.default_rng(3)
    steps, games = 40, 5
    rewards, values, final_values = rng.normal(size=(3, steps, games))
    last_values = rng.normal(size=games)
    kinds = rng.choice(["", "life", "over", "cut"], (steps, games), p=[0.8, 0.08, 0.06, 0.06])
    kinds[-1] = ["", "life", "over", "cut", ""]
    tensors = [torch.from_numpy(x) for x in (
        rewards, values, (kinds != "").astype(float), np.where(kinds == "cut", final_values, 0),
        last_values)]
    computed = teacher.gae(*tensors, 0.97, 0.9)
    for e in range(games):
        expected = plain_gae(rewards[:, e], values[:, e], kinds[:, e], final_values[:, e],
                             last_values[e], 0.97, 0.9)
        np.testing.assert_allclose(computed[:, e], expected, atol=1e-12)


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
        policy.append(-min(ratio * advantages[i],
                           min(max(ratio, 1 - clip), 1 + clip) * advantages[i]))
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
    loss, statistics = teacher.ppo_loss(
        *map(torch.from_numpy, (logits, values, actions, old_logprobs, advantages, returns,
                                old_values)), clip, clip_vloss, ent_coef, vf_coef)
    np.testing.assert_allclose(statistics, expected, atol=1e-12)
    np.testing.assert_allclose(
        loss, expected[0] - ent_coef * expected[2] + vf_coef * expected[1], atol=1e-12)


COEFFICIENTS = dict(max_grad_norm=0.5, clip_coef=0.1, clip_vloss=True, ent_coef=0.01, vf_coef=0.5)


def random_minibatch(size=32, num_actions=6):
    obs = torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8)
    return (obs, torch.randint(0, num_actions, (size,)), torch.full((size,), -1.8),
            *torch.randn(3, size))


def test_update_bounds_the_gradient():
    agent = teacher.Agent("low", 6)
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    before = copy.deepcopy(agent)
    obs, actions, logprobs, advantages, returns, values = random_minibatch()
    teacher.ppo_update(agent, optimizer, teacher.minibatch_loss, obs, actions, logprobs,
                       1e4 * advantages, returns, values, **COEFFICIENTS)
    moved = [a - b for a, b in zip(agent.parameters(), before.parameters())]
    assert math.isclose(torch.cat([x.flatten() for x in moved]).norm().item(), 0.5, rel_tol=1e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_compiled_update_is_the_plain_one(bf16):
    """Same statistics, gradients and weights; the outputs of earlier calls stay as they were."""
    tolerance = dict(atol=3e-3, rtol=0.05) if bf16 else dict(atol=1e-5, rtol=1e-4)
    outcomes = []
    for loss_function in (teacher.minibatch_loss, teacher.compiled(teacher.minibatch_loss)):
        torch.manual_seed(0)
        agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
        agent.bf16 = bf16
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
        statistics = [teacher.ppo_update(agent, optimizer, loss_function, *random_minibatch(),
                                         **COEFFICIENTS) for _ in range(2)]
        outcomes.append([*statistics, *(x.grad for x in agent.parameters()), *agent.parameters()])
    for plain, other in zip(*outcomes):
        torch.testing.assert_close(other, plain, **tolerance)
    assert not torch.equal(*outcomes[1][:2])


@pytest.mark.skipif(sys.platform != "linux", reason="CXX names the compiler on Linux")
def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    result = run_script(tmp_path, "ppo_atari_teacher.py", "--compile", "--num-envs", 2,
                        "--num-steps", 8, "--num-minibatches", 2, "--total-timesteps", 16,
                        "--capacity", "low", "--eval-steps", 0, "--device", "cpu")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: --compile: ") and "no-such-compiler" in last
    assert not list(tmp_path.glob("checkpoints/**/*.pt"))


def test_frozen_body_leaves_the_policy_bit_identical():
    agent = teacher.Agent("medium", 6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5, fused=True)
    obs = random_minibatch()[0]
    logits, values = agent(obs)
    agent.network.requires_grad_(False)
    agent.actor.requires_grad_(False)
    for _ in range(3):
        teacher.ppo_update(agent, optimizer, teacher.minibatch_loss, *random_minibatch(),
                           **COEFFICIENTS)
    new_logits, new_values = agent(obs)
    assert torch.equal(logits, new_logits)
    assert not torch.allclose(values, new_values)


def test_loaded_optimizer_goes_on_as_if_never_saved(tmp_path):
    batches = [random_minibatch() for _ in range(6)]
    agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)
    for batch in batches[:3]:
        teacher.ppo_update(agent, optimizer, teacher.minibatch_loss, *batch, **COEFFICIENTS)
    # contiguous moments, as a file written by other code may hold them
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    args = teacher.Args(capacity="low", learning_rate=1e-3)
    torch.save({**teacher.training_state(agent, optimizer), "optimizer": state, "phase": "ppo",
                "run_name": "x", "args": vars(args)}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
    resumed_optimizer = torch.optim.Adam(resumed.parameters(), lr=1e-3, eps=1e-5, fused=True)
    teacher.restore("saved.pt", saved, "ppo", args, resumed, resumed_optimizer)
    for batch in batches[3:]:
        teacher.ppo_update(agent, optimizer, teacher.minibatch_loss, *batch, **COEFFICIENTS)
        teacher.ppo_update(resumed, resumed_optimizer, teacher.minibatch_loss, *batch,
                           **COEFFICIENTS)
    for a, b in zip(agent.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_a_kept_training_state_is_not_moved_by_later_updates():
    """A signal in mid-iteration writes the state after the last whole one, nothing under way."""
    agent = teacher.Agent("low", 6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)
    teacher.ppo_update(agent, optimizer, teacher.minibatch_loss, *random_minibatch(),
                       **COEFFICIENTS)
    state = teacher.training_state(agent, optimizer)
    before = copy.deepcopy(state)
    teacher.ppo_update(agent, optimizer, teacher.minibatch_loss, *random_minibatch(),
                       **COEFFICIENTS)
    for name, weight in agent.state_dict().items():
        assert torch.equal(state["model"][name], before["model"][name])
        assert not torch.equal(state["model"][name], weight)
    for i, moments in before["optimizer"]["state"].items():
        for name, moment in moments.items():
            assert torch.equal(state["optimizer"]["state"][i][name], moment)


def tensorboard_scalars(folder):
    """Every scalar below `folder`: tag to a list of (step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("game, rom, num_steps", [("Breakout", "breakout", 900),
                                                  ("Pong", "pong", 1500)])
def test_logged_returns_are_raw_rewards_over_full_games(game, rom, num_steps, tmp_path,
                                                        monkeypatch):
    """One rollout's logged returns against the same play where no life loss ends anything."""
    monkeypatch.chdir(tmp_path)
    args = teacher.Args(env_id=f"{game}NoFrameskip-v4", num_envs=2, num_steps=num_steps,
                        total_timesteps=2 * num_steps, num_minibatches=2, update_epochs=1,
                        capacity="low", eval_steps=0, device="cpu")
    run_main(teacher, args)
    scalars = tensorboard_scalars(next((tmp_path / "runs").iterdir()))

    teacher.set_up_torch(args)
    (games, _), = teacher.make_envs(rom, 2, False, 0.0)
    agent = teacher.Agent("low", games.single_action_space.n)
    agent = agent.to(memory_format=torch.channels_last)
    obs, _ = games.reset(seed=teacher.game_seeds(2, args.seed, 1, 0))
    total, returns, lengths, began = np.zeros(2), [], [], np.zeros(2)
    for t in range(num_steps):
        with torch.no_grad():
            action = teacher.sample_actions(agent(torch.from_numpy(obs))[0])
        obs, reward, terminated, truncated, _ = games.step(action.numpy())
        total += reward
        for e in np.flatnonzero(terminated | truncated):
            returns.append((2 * t + 2, total[e]))
            lengths.append((2 * t + 2, t + 1 - began[e]))
            total[e], began[e] = 0, t + 1
    assert len(returns) >= 2
    assert scalars["charts/episodic_return"] == returns
    assert scalars["charts/episodic_length"] == lengths


def test_truncation_bootstraps_and_nothing_else_does(tmp_path, monkeypatch):
    """Breakout cut off after 50 steps: what the training hands to GAE."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "preprocessing", lambda plain=teacher.preprocessing: {
        **plain(), "max_num_frames_per_episode": 200})
    seen = []
    monkeypatch.setattr(teacher, "gae", lambda *inputs: (seen.append(inputs),
                                                         torch.zeros_like(inputs[0]))[1])
    run_main(teacher, teacher.Args(env_id="BreakoutNoFrameskip-v4", num_envs=8, num_steps=170,
                              total_timesteps=8 * 170, num_minibatches=1, update_epochs=1,
                              capacity="low", eval_steps=0, device="cpu"))
    rewards, values, ends, bootstraps, last_values = (x.numpy() for x in seen[0][:5])
    assert set(np.unique(rewards)) <= {-1.0, 0.0, 1.0}
    for e in range(8):
        cut = np.flatnonzero(bootstraps[:, e])  # no value is exactly 0
        lost = np.flatnonzero(ends[:, e] * (bootstraps[:, e] == 0))
        # a life that is lost on the very step of the cut reports `terminated` alone
        assert set(cut) <= {49, 99, 149}
        assert len(cut) + np.isin([49, 99, 149], lost).sum() == 3
        assert ends[cut, e].all()
        # the final observation of a cut game looks like the one before it, and so does its value
        assert np.abs(bootstraps[cut, e] - values[cut, e]).max() < 0.2
    assert ends.sum() > 24, "lost lives end episodes too"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_pass_sees_the_whole_rollout_once(device, tmp_path, monkeypatch):
    """What training hands to the update: every sample once a pass, its parts still together.

    Also with the games in two groups as on a GPU.
    """
    monkeypatch.chdir(tmp_path)
    minibatches, agents, rollouts, make_envs = [], [], [], teacher.make_envs
    monkeypatch.setattr(teacher, "make_envs",
                        lambda *games, **_: make_envs(*games, device=device))

    def update(agent, optimizer, loss_function, *batch, **coefficients):
        agents.append(agent)
        minibatches.append(batch)
        return torch.zeros(6)

    plain_gae = teacher.gae
    monkeypatch.setattr(teacher, "ppo_update", update)
    monkeypatch.setattr(teacher, "gae", lambda *inputs: (rollouts.append(inputs),
                                                         plain_gae(*inputs))[1])
    run_main(teacher, teacher.Args(env_id="UpNDownNoFrameskip-v4", num_envs=4, num_steps=40,
                              total_timesteps=160, num_minibatches=8, update_epochs=3,
                              capacity="low", eval_steps=0, device="cpu"))
    assert len(minibatches) == 24 and all(len(x) == 20 for batch in minibatches for x in batch)
    rewards = rollouts[0][0]
    assert set(rewards.unique().tolist()) == {0.0, 1.0}, "this game's rewards are 10 and more"
    advantages = plain_gae(*rollouts[0])
    returns = advantages + rollouts[0][1]
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
    for epoch in range(3):
        obs, actions, logprobs, advs, rets, values = (
            torch.cat(x) for x in zip(*minibatches[8 * epoch:8 * epoch + 8]))
        torch.testing.assert_close(advs.sort()[0], normalised.flatten().sort()[0])
        torch.testing.assert_close(rets.sort()[0], returns.flatten().sort()[0])
        with torch.no_grad():
            logits, found = agents[0](obs)
        torch.testing.assert_close(values, found, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            logprobs, logits.log_softmax(-1)[range(160), actions], atol=1e-5, rtol=0)
        pairs = {(a, b) for a, b in zip(normalised.flatten().tolist(), returns.flatten().tolist())}
        assert {(a, b) for a, b in zip(advs.tolist(), rets.tolist())} == pairs
    orders = [torch.cat([batch[4] for batch in minibatches[8 * i:8 * i + 8]]) for i in range(3)]
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])


def test_ppo_learns_up_n_down(tmp_path, monkeypatch):
    """24,576 steps of a small network beat its own beginning, beyond both intervals."""
    monkeypatch.chdir(tmp_path)
    means = {}
    for steps in (1024, 24_576):
        run_main(teacher, teacher.Args(
            env_id="UpNDownNoFrameskip-v4", capacity="low", total_timesteps=steps, num_steps=64,
            num_minibatches=4, update_epochs=4, learning_rate=1e-3, eval_steps=4000, device="cpu",
            save_path=f"{steps}.pt"))
        means[steps] = torch.load(f"{steps}.pt", weights_only=True)["evaluation"]["ci95"]
    assert means[24_576][0] > means[1024][1], means
