"""Distillation against values worked by hand, and on a small real buffer."""

import math
import shutil

import actor_distill as distill
import collect_buffer as collect
import numpy as np
import pytest
import torch
from conftest import opinionated_agent, run_main
from test_ppo import tensorboard_scalars


def test_kl_equals_values_worked_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2; p = (1, 0), q the same: ln 4
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    logits = torch.log(torch.tensor([[1.0, 3.0]])).expand(3, 2) + 5
    expected = [math.log(2) / 2 + math.log(2 / 3) / 2, math.log(4), 0.0]
    torch.testing.assert_close(distill.kl_divergence(probs, logits), torch.tensor(expected),
                               atol=1e-6, rtol=0)


def test_kl_is_directed_from_teacher_to_student():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert math.isclose(distill.kl_divergence(p, q.log()).item(), forward, abs_tol=1e-6)
    assert abs(forward - backward) > 0.1


def test_kl_survives_certain_teachers_and_extreme_students():
    probs = torch.eye(3)
    logits = torch.tensor([[200.0, 0, 0], [200.0, 0, 0], [0, 0, 0]]).requires_grad_()
    kl = distill.kl_divergence(probs, logits)
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.tensor([0.0, 200.0, math.log(3)]))
    assert logits.grad.isfinite().all()


def test_temperature_equals_values_worked_by_hand():
    probs = torch.tensor([[0.2, 0.8]])
    # p^2 / sum p^2 at temperature 1/2; sqrt at 2
    torch.testing.assert_close(distill.make_targets(probs, False, "kl", 0.5),
                               torch.tensor([[0.04 / 0.68, 0.64 / 0.68]]))
    root = math.sqrt(0.2) / (math.sqrt(0.2) + math.sqrt(0.8))
    torch.testing.assert_close(distill.make_targets(probs, False, "kl", 2.0),
                               torch.tensor([[root, 1 - root]]))
    assert distill.make_targets(probs, False, "kl", 1.0) is probs
    torch.testing.assert_close(distill.make_targets(torch.tensor([[0.0, 1.0]]), False, "kl", 0.01),
                               torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("temperature, gap, expected", [
    # softmax(Q / tau): e^1, e^0.5 and 1 over their sum at Q = 0.01, 0.005, 0 and tau = 0.01
    (0.01, 0.005, [0.506480391055654, 0.307195885718492, 0.186323723225854]),
    # e^2, e^1 and 1 over their sum at Q = 2, 1, 0 and tau = 1
    (1.0, 1.0, [0.665240955774822, 0.244728471054798, 0.090030573170381])])
def test_equation_2_equals_values_worked_by_hand(temperature, gap, expected):
    q = torch.tensor([[2 * gap, gap, 0.0]])
    targets = distill.make_targets(q, True, "kl", temperature)
    torch.testing.assert_close(targets, torch.tensor([expected]), atol=1e-6, rtol=0)
    # and Eq. 2 itself against a student that finds all actions alike: ln 3 less the entropy
    entropy = -sum(p * math.log(p) for p in expected)
    kl = distill.kl_divergence(targets, torch.zeros(1, 3))
    assert kl.item() == pytest.approx(math.log(3) - entropy, abs=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_sharpening_large_q_values_is_stable(scale):
    offsets = torch.tensor([0.0, 0.015625, -0.0078125])
    q = (torch.tensor(scale) + 64 * offsets).unsqueeze(0)  # apart by 1 and 0.5
    expected = (64 * offsets.double() / 0.01).softmax(-1).float().unsqueeze(0)
    targets = distill.make_targets(q, True, "kl", 0.01)
    torch.testing.assert_close(targets, expected)
    close = (torch.tensor(scale) + torch.tensor([0.0, 0.0009765625])).unsqueeze(0)
    expected = torch.tensor([0.0, 0.0009765625 / 0.01]).softmax(-1).unsqueeze(0)
    torch.testing.assert_close(distill.make_targets(close, True, "kl", 0.01), expected)
    logits = torch.zeros(1, 3, requires_grad=True)
    distill.kl_divergence(targets, logits).sum().backward()
    assert logits.grad.isfinite().all()
    assert distill.make_targets(q, True, "mse", None) is q


def test_the_other_losses_of_rusu_et_al():
    outputs, logits = torch.tensor([[0.2, 0.7, 0.1], [3.0, -1.0, 2.0]]), torch.randn(2, 3)
    targets = distill.make_targets(outputs, True, "nll", None)
    torch.testing.assert_close(
        distill.kl_divergence(targets, logits),
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0]), reduction="none"))
    student = torch.tensor([[0.0, 1.0, 0.5], [3.0, 1.0, 2.5]])
    # 0.04 + 0.09 + 0.16 and 0 + 4 + 0.25
    torch.testing.assert_close(distill.squared_error(outputs, student), torch.tensor([0.29, 4.25]))


def test_an_update_by_squared_error_moves_the_student_to_the_q_values():
    agent, (obs, _, values) = distill.Agent("low", 6), random_batch(8)
    optimizer, q = torch.optim.SGD(agent.parameters(), lr=0.0), torch.randn(8, 6)
    sums = distill.distill_update(agent, optimizer, distill.batch_loss, obs, q, values, 0.0,
                                  distill.squared_error)
    logits, _ = agent(obs)
    torch.testing.assert_close(agent.actor.bias.grad, 2 * (logits - q).mean(0), atol=1e-5, rtol=0)
    assert sums[0].item() == pytest.approx((logits - q).square().sum().item(), rel=1e-5)


def random_batch(size):
    return (torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8),
            torch.randn(size, 6).softmax(-1), torch.randn(size))


def gradients(agent, batch, value_coef):
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    distill.distill_update(agent, optimizer, distill.batch_loss, *batch, value_coef)
    return {name: p.grad for name, p in agent.named_parameters()}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_update_is_the_plain_one():
    """Same sums, gradients and weights, also for the smaller batch that ends an epoch."""
    outcomes = []
    for loss_function in (distill.batch_loss, distill.compiled(distill.batch_loss)):
        torch.manual_seed(0)
        agent = distill.Agent("low", 6).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
        sums = [distill.distill_update(agent, optimizer, loss_function, *random_batch(size), 0.5)
                for size in (32, 32, 20)]
        outcomes.append([*sums, *(x.grad for x in agent.parameters()), *agent.parameters()])
    for plain, other in zip(*outcomes):
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value_coef", [0.0, 0.5])
def test_doubling_the_batch_changes_no_gradient(value_coef):
    agent, batch = distill.Agent("low", 6), random_batch(8)
    once = gradients(agent, batch, value_coef)
    twice = gradients(agent, [torch.cat((x, x)) for x in batch], value_coef)
    for name in once:
        if name.startswith("critic") and not value_coef:
            assert once[name] is None, "without --value-coef the critic is not touched"
        else:
            torch.testing.assert_close(once[name], twice[name], atol=1e-6, rtol=1e-4)


def test_loss_is_the_sum_over_actions_averaged_over_the_batch():
    agent, (obs, probs, values) = distill.Agent("low", 6), random_batch(8)
    grads = gradients(agent, (obs, probs, values), 0.5)
    logits, student_values = agent(obs)
    student = torch.softmax(logits, -1)
    # d/dlogits of KL(p || q) is q - p; the actor's bias sees its mean over the batch
    torch.testing.assert_close(grads["actor.bias"], (student - probs).mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(grads["critic.bias"], 0.5 * (student_values - values).mean(0, True),
                               atol=1e-6, rtol=0)


def test_validation_metrics_equal_plain_numpy():
    agent = opinionated_agent(distill.Agent, "low", 6)
    obs, probs, values = random_batch(1500)
    found = distill.validate(agent, lambda rows: (obs[rows], probs[rows], values[rows]),
                             torch.arange(1500))
    with torch.no_grad():
        logits, student_values = (x.double().numpy() for x in agent(obs))
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    p = probs.double().numpy()
    entropy = [-(x * np.log(x)).sum(1).mean() for x in (q, p)]
    expected = {"validation/kl": (p * np.log(p / q)).sum(1).mean(),
                "validation/agreement": (p.argmax(1) == q.argmax(1)).mean(),
                "validation/entropy_gap": entropy[0] - entropy[1],
                "validation/value_loss": 0.5 * ((student_values - values.numpy()) ** 2).mean()}
    assert found == pytest.approx(expected, rel=1e-4)


def test_held_out_share_is_whole_episodes():
    episodes = np.repeat(np.arange(50), np.random.default_rng(0).integers(10, 30, 50))
    train, held_out = distill.split_episodes(episodes, 0.1, 1)
    assert sorted([*train, *held_out]) == list(range(len(episodes)))
    assert not set(episodes[train]) & set(episodes[held_out])
    assert 0.1 <= len(held_out) / len(episodes) < 0.14
    assert set(held_out) != set(distill.split_episodes(episodes, 0.1, 2)[1])


@pytest.mark.parametrize("lengths, fraction", [([10, 39, 51], 0.5), ([10], 0.5), ([2], 0.05)])
def test_something_is_always_left_to_train_on(lengths, fraction):
    episodes = np.repeat(np.arange(len(lengths)), lengths)
    for seed in range(20):
        train, held_out = distill.split_episodes(episodes, fraction, seed)
        assert len(train) and len(held_out)
        assert sorted([*train, *held_out]) == list(range(len(episodes)))


@pytest.mark.parametrize("episodes", [np.zeros(100, int), np.repeat([0, 1], 50)])
def test_few_long_episodes_give_a_contiguous_stretch(episodes):
    train, held_out = distill.split_episodes(episodes, 0.05, 1)
    assert held_out.tolist() == [95, 96, 97, 98, 99] and train.tolist() == list(range(95))


@pytest.fixture(scope="module")
def small_buffer(tmp_path_factory):
    """3,000 real Pong steps of a teacher with opinions, in a file of `collect_buffer.py`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    agent = opinionated_agent(collect.Agent, "high", 6)
    torch.save({"format_version": 1, "phase": "ppo", "env_id": "PongNoFrameskip-v4",
                "capacity": "high", "num_actions": 6, "global_step": 0, "args": {},
                "model": agent.state_dict(), "evaluation": None}, folder / "teacher.pt")
    path = folder / "buffer.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_main(collect, collect.Args(teacher_path="teacher.pt", buffer_path=str(path),
                                       num_samples=3000, num_envs=4, device="cpu"))
    return path


def distilled(small_buffer, folder, monkeypatch, **flags):
    monkeypatch.chdir(folder)
    run_main(distill, distill.Args(buffer_path=str(small_buffer), save_path="student.pt",
                                   capacity="low", eval_steps=0, device="cpu",
                                   validation_fraction=0.1, **flags))
    return torch.load(folder / "student.pt", weights_only=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_student_learns_held_out_play(small_buffer, optimizer, tmp_path, monkeypatch, capsys):
    student = distilled(small_buffer, tmp_path, monkeypatch, epochs=6, optimizer=optimizer)
    lines = capsys.readouterr().out.splitlines()
    start = float(next(x for x in lines if x.startswith("epoch 0 ")).split()[4].strip(","))
    assert start > 0.15, "an untrained student is far from this teacher"
    assert student["validation"]["validation/kl"] < start / 3
    assert student["validation"]["validation/agreement"] > 0.7
    assert student["global_step"] == 6 * 2700 and student["phase"] == "distilled"
    torch.manual_seed(1)
    untouched = distill.Agent("low", 6)
    assert torch.equal(student["model"]["critic.weight"], untouched.critic.weight)


def test_learning_rate_falls_to_zero_or_stays(small_buffer, tmp_path, monkeypatch):
    batches = -(-2700 // 64)
    for anneal, last in ((True, 1e-3 / (3 * batches)), (False, 1e-3)):
        student = distilled(small_buffer, tmp_path, monkeypatch, epochs=3, anneal_lr=anneal,
                            batch_size=64, learning_rate=1e-3, overwrite=True)
        rate = student["optimizer"]["param_groups"][0]["lr"]
        assert rate == pytest.approx(last, rel=1e-6)


def test_value_coef_fits_the_critic(small_buffer, tmp_path, monkeypatch):
    without = distilled(small_buffer, tmp_path, monkeypatch, epochs=2)
    with_values = distilled(small_buffer, tmp_path, monkeypatch, epochs=2, value_coef=0.5,
                            overwrite=True)
    name = "validation/value_loss"
    assert with_values["validation"][name] < without["validation"][name] / 4


def test_early_stopping_keeps_the_best_epoch(small_buffer, tmp_path, monkeypatch, capsys):
    # at this rate the held-out KL bounces, so that some epoch is worse than the one before
    student = distilled(small_buffer, tmp_path, monkeypatch, epochs=40, optimizer="adam",
                        learning_rate=3e-3, anneal_lr=False, early_stop_patience=1)
    assert student["epoch"] < 40
    lines = capsys.readouterr().out.splitlines()
    assert (f"kept        the weights of epoch {student['epoch']} of {student['last_epoch']}"
            in lines)
    buffer = distill.load_buffer(small_buffer, "PongNoFrameskip-v4",
                                 ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"], "")
    rows = distill.split_episodes(buffer["episode_index"], 0.1, 1)[1]
    agent = distill.Agent("low", 6)
    agent.load_state_dict(student["model"])
    obs = torch.from_numpy(buffer["frames"][buffer["stack_index"][rows]])
    with torch.no_grad():
        kl = distill.kl_divergence(torch.from_numpy(buffer["action_probs"][rows]),
                                   agent(obs)[0]).mean()
    assert any(x.startswith(f"epoch {student['epoch']:<5} held-out KL {kl:.4f}, ") for x in lines)
    assert student["global_step"] == 2700 * student["epoch"]
    assert student["validation"]["validation/kl"] == pytest.approx(kl.item(), rel=1e-3)
    scalars = tensorboard_scalars(next((tmp_path / "runs").iterdir()))["validation/kl"]
    assert scalars[-1][1] > kl + 1e-4, "the last epoch was a worse one"
    assert min(value for _, value in scalars) == pytest.approx(kl.item(), rel=1e-3)


def test_share_of_teacher():
    def result(mean, greedy=False):
        return {"mean": mean, "greedy": greedy, "repeat_action_probability": 0.0}

    def share(student, teacher):
        return distill.share_of_teacher(student, {"evaluation": teacher})

    assert share(result(9), result(12)) == "mean 9.00, its teacher's 12.00: 75.0% of its teacher"
    assert "not comparable" in share(result(9, greedy=True), result(12))
    for student, teacher in ((-5, -2), (5, -2), (-5, 2)):
        assert share(result(student), result(teacher)).endswith("not both are positive")
    assert "not both were evaluated" in share(result(9), None)
    assert "not both were evaluated" in share(None, result(12))
    assert "not both were evaluated" in distill.share_of_teacher(result(9), None)
