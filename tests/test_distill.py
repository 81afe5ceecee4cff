"""Distillation against values worked by hand, and on a small real buffer."""

import functools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import opinionated_agent, run_main, tensorboard_scalars

import actor_distill as distill
import collect_buffer as collect


def test_kl_equals_values_worked_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2; p = (1, 0), q the same: ln 4
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    logits = torch.log(torch.tensor([[1.0, 3.0]])).expand(3, 2) + 5
    expected = [math.log(2) / 2 + math.log(2 / 3) / 2, math.log(4), 0.0]
    kl = distill.kl_divergence(probs, logits)
    torch.testing.assert_close(kl, torch.tensor(expected), atol=1e-6, rtol=0)


def test_kl_survives_certain_teachers_and_extreme_students():
    logits = torch.tensor([[200.0, 0, 0], [200.0, 0, 0], [0, 0, 0]]).requires_grad_()
    kl = distill.kl_divergence(torch.eye(3), logits)
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.tensor([0.0, 200.0, math.log(3)]))
    assert logits.grad.isfinite().all()


def test_temperature_equals_values_worked_by_hand():
    probs = torch.tensor([[0.2, 0.8]])
    sharp, soft = (distill.make_targets(probs, False, "kl", t) for t in (0.5, 2.0))
    # p^2 / sum p^2 at temperature 1/2; sqrt at 2
    torch.testing.assert_close(sharp, torch.tensor([[0.04 / 0.68, 0.64 / 0.68]]))
    root = math.sqrt(0.2) / (math.sqrt(0.2) + math.sqrt(0.8))
    torch.testing.assert_close(soft, torch.tensor([[root, 1 - root]]))
    assert distill.make_targets(probs, False, "kl", 1.0) is probs
    certain = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(distill.make_targets(certain, False, "kl", 0.01), certain)


@pytest.mark.parametrize(
    "temperature, gap, expected",
    [
        # softmax(Q / tau): e^1, e^0.5 and 1 over their sum at Q = 0.01, 0.005, 0 and tau = 0.01
        (0.01, 0.005, [0.506480391055654, 0.307195885718492, 0.186323723225854]),
        # e^2, e^1 and 1 over their sum at Q = 2, 1, 0 and tau = 1
        (1.0, 1.0, [0.665240955774822, 0.244728471054798, 0.090030573170381]),
    ],
)
def test_equation_2_equals_values_worked_by_hand(temperature, gap, expected):
    targets = distill.make_targets(torch.tensor([[2 * gap, gap, 0.0]]), True, "kl", temperature)
    torch.testing.assert_close(targets, torch.tensor([expected]), atol=1e-6, rtol=0)
    # and Eq. 2 itself against a student that finds all actions alike: ln 3 less the entropy
    entropy = -sum(p * math.log(p) for p in expected)
    kl = distill.kl_divergence(targets, torch.zeros(1, 3))
    assert kl.item() == pytest.approx(math.log(3) - entropy, abs=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_sharpening_large_q_values_is_stable(scale):
    """Near 10,000 float32 tells steps of 1/1024 apart, a tenth of the temperature."""
    q = scale + torch.tensor([[0.0, 1.0, -0.5]])
    torch.testing.assert_close(
        distill.make_targets(q, True, "kl", 0.01), torch.tensor([[0.0, 1.0, 0.0]])
    )
    close = scale + torch.tensor([[0.0, 2**-10]])
    chance = 1 / (1 + math.exp(-(2**-10) / 0.01))
    torch.testing.assert_close(
        distill.make_targets(close, True, "kl", 0.01), torch.tensor([[1 - chance, chance]])
    )


def test_the_reverse_kl_is_that_of_torch_with_teacher_and_student_exchanged():
    targets = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    logits = torch.tensor([[0.3, 2.0, -1.0], [5.0, -9.0, 1.0], [0.2, 0.3, 0.5]]).log_softmax(-1)
    floor = targets.clamp(min=1e-8).log()
    expected = torch.nn.functional.kl_div(floor, logits, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(distill.reverse_kl(targets, logits), expected)
    same = distill.reverse_kl(targets[:1], targets[:1].log())
    assert same.item() == pytest.approx(0, abs=1e-6)
    # a chance of 1% for what the teacher never does costs more than by Eq. 3
    certain, careless = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.99, 0.01]]).log()
    assert distill.reverse_kl(certain, careless) > 10 * distill.kl_divergence(certain, careless)


def test_the_reverse_kl_takes_over_after_a_fifth_by_eq_3(small_buffer, tmp_path, monkeypatch):
    path, _ = small_buffer
    used, batch_loss = [], distill.batch_loss

    def recorded(*batch):
        used.append(batch[-1])
        return batch_loss(*batch)

    monkeypatch.setattr(distill, "batch_loss", recorded)
    distilled(path, tmp_path, monkeypatch, loss=None, epochs=5, batch_size=256)
    steps = len(used) // 5
    assert used == [distill.kl_divergence] * steps + [distill.reverse_kl] * 4 * steps
    used.clear()
    flags = {"loss": "kl", "epochs": 5, "batch_size": 256, "save_path": "kl.pt"}
    distilled(path, tmp_path, monkeypatch, **flags)
    assert used == [distill.kl_divergence] * 5 * steps


def test_by_default_a_policy_is_learned_by_the_reverse_kl(small_buffer, tmp_path, monkeypatch):
    path, buffer = small_buffer
    flags = {"loss": None, "epochs": 4, "batch_size": 32, "learning_rate": 1e-3}
    student = distilled(path, tmp_path, monkeypatch, **flags)
    assert student["args"]["loss"] == "reverse_kl"
    _, _, unseen = held_out_rows(buffer)
    p = buffer["action_probs"][unseen].astype(np.float64)
    agent = distill.Agent("low", 6)

    def distance(model):
        agent.load_state_dict(model)
        logits, _ = outputs_of(agent, buffer["frames"][buffer["stack_index"][unseen]])
        q = torch.from_numpy(logits).double().softmax(-1).numpy()
        return (q * np.log(q / p)).sum(1).mean()

    found = student["validation"]["validation/reverse_kl"]
    assert found == pytest.approx(distance(student["model"]), rel=1e-3)
    torch.manual_seed(1)
    assert found < distance(distill.Agent("low", 6).state_dict()) / 2


def test_the_other_losses_of_rusu_et_al():
    outputs, logits = torch.tensor([[0.2, 0.7, 0.1], [3.0, -1.0, 2.0]]), torch.randn(2, 3)
    nll = distill.kl_divergence(distill.make_targets(outputs, True, "nll", None), logits)
    best = torch.tensor([1, 0])
    expected = torch.nn.functional.cross_entropy(logits, best, reduction="none")
    torch.testing.assert_close(nll, expected)
    student = torch.tensor([[0.0, 1.0, 0.5], [3.0, 1.0, 2.5]])
    # 0.04 + 0.09 + 0.16 and 0 + 4 + 0.25
    error = distill.squared_error(distill.make_targets(outputs, True, "mse", None), student)
    torch.testing.assert_close(error, torch.tensor([0.29, 4.25]))


def random_batch(size):
    """Observations, a teacher's probabilities and values."""
    obs = torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8)
    return obs, torch.randn(size, 6).softmax(-1), torch.randn(size)


def gradients(agent, *batch):
    """By one update; `batch` is what `batch_loss` takes after the agent."""
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    distill.distill_update(agent, optimizer, distill.batch_loss, *batch)
    return {name: p.grad for name, p in agent.named_parameters()}


def test_loss_is_the_sum_over_actions_averaged_over_the_batch():
    agent, (obs, probs, values) = distill.Agent("low", 6), random_batch(8)
    grads = gradients(agent, obs, probs, values, 0.5)
    logits, student_values = agent(obs)
    # d/dlogits of KL(p || q) is q - p; the actor's bias sees its mean over the batch
    expected = (logits.softmax(-1) - probs).mean(0)
    torch.testing.assert_close(grads["actor.bias"], expected, atol=1e-6, rtol=0)
    expected = 0.5 * (student_values - values).mean(0, True)
    torch.testing.assert_close(grads["critic.bias"], expected, atol=1e-6, rtol=0)
    q = torch.randn(8, 6)
    grads = gradients(agent, obs, q, values, 0.0, distill.squared_error)
    expected = 2 * (logits - q).mean(0)
    torch.testing.assert_close(grads["actor.bias"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value_coef", [0.0, 0.5])
def test_doubling_the_batch_changes_no_gradient(value_coef):
    agent, batch = distill.Agent("low", 6), random_batch(8)
    once = gradients(agent, *batch, value_coef)
    twice = gradients(agent, *(torch.cat((x, x)) for x in batch), value_coef)
    for name in once:
        if name.startswith("critic") and not value_coef:
            assert once[name] is None, "without --value-coef the critic is not touched"
        else:
            torch.testing.assert_close(once[name], twice[name], atol=1e-6, rtol=1e-4)


def test_a_column_of_values_is_refused():
    """Values of shape [B, 1] against the teacher's of shape [B] would broadcast to [B, B]."""
    obs, probs, values = random_batch(4)
    with pytest.raises(AssertionError, match="broadcast"):
        distill.batch_loss(lambda obs: (probs, values[:, None]), obs, probs, values, 0.5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_update_is_the_plain_one():
    """Same sums, gradients and weights, also for the smaller batch that ends an epoch."""
    compiled = torch.compile(distill.batch_loss, mode="reduce-overhead", dynamic=False)
    outcomes = []
    for loss_function in (distill.batch_loss, compiled):
        torch.manual_seed(0)
        agent = distill.Agent("low", 6).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
        step = functools.partial(distill.distill_update, agent, optimizer, loss_function)
        sums = [step(*random_batch(size), 0.5) for size in (32, 32, 20)]
        outcomes.append([*sums, *(x.grad for x in agent.parameters()), *agent.parameters()])
    for plain, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-4)


def plain_figures(logits, student_values, probs, values):
    """What `validate` reports for the KL, by NumPy in double precision."""
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    p = probs.astype(float) / probs.sum(1, keepdims=True, dtype=float)
    entropy = [-(x * np.log(x)).sum(1).mean() for x in (q, p)]
    return {
        "validation/kl": (p * np.log(p / q)).sum(1).mean(),
        "validation/agreement": (p.argmax(1) == q.argmax(1)).mean(),
        "validation/entropy_gap": entropy[0] - entropy[1],
        "validation/value_loss": 0.5 * ((student_values - values) ** 2).mean(),
    }


@torch.no_grad()
def outputs_of(agent, obs):
    """Logits and values of uint8 observations, NumPy arrays of doubles."""
    parts = [agent(torch.from_numpy(part)) for part in np.array_split(obs, -(-len(obs) // 500))]
    return [torch.cat(column).double().numpy() for column in zip(*parts, strict=True)]


def test_validation_metrics_equal_plain_numpy():
    """Over several batches, the last of them smaller."""
    agent = opinionated_agent(distill.Agent, "low", 6)
    obs, probs, values = random_batch(1100)
    rows = torch.arange(1100)
    found = distill.validate(agent, lambda rows: (obs[rows], probs[rows], values[rows]), rows)
    expected = plain_figures(*outputs_of(agent, obs.numpy()), probs.numpy(), values.numpy())
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
    """3,000 real Pong steps of a teacher with opinions, 150 in each game: path and arrays."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    agent = opinionated_agent(collect.Agent, "low", 6)
    about = {"phase": "ppo", "env_id": "PongNoFrameskip-v4", "capacity": "low", "args": {}}
    torch.save({**about, "global_step": 0, "model": agent.state_dict()}, folder / "teacher.pt")
    path = str(folder / "buffer.npz")
    args = {"teacher_path": "teacher.pt", "buffer_path": path, "eval_steps": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_main(collect, collect.Args(**args, num_samples=3000, num_envs=20))
    with np.load(path) as file:
        return path, dict(file)


def distilled(path, folder, monkeypatch, **flags):
    """Distil into `student.pt` of a folder, without an evaluation."""
    monkeypatch.chdir(folder)
    args = {"buffer_path": path, "save_path": "student.pt", "capacity": "low", "eval_steps": 0}
    args |= {"validation_fraction": 0.1, "loss": "kl"}
    run_main(distill, distill.Args(**(args | flags)))
    return torch.load(folder / "student.pt", weights_only=True)


def held_out_rows(buffer):
    """Rows to train on, and those held out whose four frames are no training row's, byte for byte."""
    train, held_out = distill.split_episodes(buffer["episode_index"], 0.1, 1)
    stacks = [buffer["frames"][index].tobytes() for index in buffer["stack_index"]]
    known = {stacks[row] for row in train}
    return train, held_out, [row for row in held_out if stacks[row] not in known]


def held_out_figures(model, buffer, rows):
    """What a student's figures on some rows are, computed apart from the script."""
    agent = distill.Agent("low", 6)
    agent.load_state_dict(model)
    outputs = outputs_of(agent, buffer["frames"][buffer["stack_index"][rows]])
    return plain_figures(*outputs, buffer["action_probs"][rows], buffer["values"][rows])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_student_learns_held_out_play(small_buffer, optimizer, tmp_path, monkeypatch):
    path, buffer = small_buffer
    flags = {"optimizer": optimizer, "learning_rate": {"sgd": 0.03, "adam": 1e-3}[optimizer]}
    student = distilled(path, tmp_path, monkeypatch, epochs=4, batch_size=32, **flags)
    train, _, unseen = held_out_rows(buffer)
    torch.manual_seed(1)
    untrained = distill.Agent("low", 6).state_dict()
    start = held_out_figures(untrained, buffer, unseen)["validation/kl"]
    assert start > 0.15, "an untrained student is far from this teacher"
    assert student["validation"]["validation/kl"] < start / 2
    assert student["validation"]["validation/agreement"] > 0.7
    assert student["global_step"] == 4 * (len(train) // 32 * 32)
    assert torch.equal(student["model"]["critic.weight"], untrained["critic.weight"])


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rate_falls_to_zero_or_stays(small_buffer, anneal, tmp_path, monkeypatch):
    path, buffer = small_buffer
    rates = []

    def update(agent, optimizer, *batch):
        rates.append(optimizer.param_groups[0]["lr"])
        return torch.zeros(2)

    monkeypatch.setattr(distill, "distill_update", update)
    flags = {"epochs": 3, "batch_size": 64, "learning_rate": 1e-3, "anneal_lr": anneal}
    distilled(path, tmp_path, monkeypatch, **flags)
    done = np.arange(126) / 126
    assert 126 == 3 * (len(held_out_rows(buffer)[0]) // 64)
    shares = np.interp(done, [0, 1 / 11, 1], [0, 10 / 11, 0]) if anneal else np.ones(126)
    np.testing.assert_allclose(rates, 1e-3 * shares, rtol=1e-12, atol=1e-18)


def test_value_coef_fits_the_critic(small_buffer, tmp_path, monkeypatch):
    path, buffer = small_buffer
    student = distilled(path, tmp_path, monkeypatch, epochs=2, value_coef=0.5)
    torch.manual_seed(1)
    untrained = distill.Agent("low", 6).state_dict()
    start = held_out_figures(untrained, buffer, held_out_rows(buffer)[2])
    found = student["validation"]["validation/value_loss"]
    assert found < start["validation/value_loss"] / 4


def test_early_stopping_keeps_the_best_epoch(small_buffer, tmp_path, monkeypatch, capsys):
    """Its figures are those of held-out samples that are unlike any to train on."""
    path, buffer = small_buffer
    # at this rate the held-out KL bounces, so that some epoch is worse than the one before
    flags = {"epochs": 40, "batch_size": 32, "learning_rate": 3e-3, "early_stop_patience": 1}
    flags["anneal_lr"] = False
    student = distilled(path, tmp_path, monkeypatch, **flags)
    assert student["last_epoch"] == student["epoch"] + 1 < 40
    train, held_out, unseen = held_out_rows(buffer)
    assert 0 < len(unseen) < len(held_out)
    expected = held_out_figures(student["model"], buffer, unseen)
    on_all = held_out_figures(student["model"], buffer, held_out)
    assert student["validation"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert student["validation"] != pytest.approx(on_all, rel=1e-3, abs=1e-6)
    assert student["global_step"] == len(train) // 32 * 32 * student["epoch"]
    output = capsys.readouterr().out
    counts = re.search(r"held out +(\d+) samples, (\d+) of them unlike any to train on", output)
    assert [int(count) for count in counts.groups()] == [len(held_out), len(unseen)]
    kept = re.search(r"kept +epoch (\d+): validation/kl (\S+),", output).groups()
    assert kept == (str(student["epoch"]), f"{student['validation']['validation/kl']:.4f}")
    scalars = tensorboard_scalars(next((tmp_path / "runs").iterdir()))["validation/kl"]
    logged = [value for _, value in scalars]
    assert logged[-2] == min(logged) == pytest.approx(expected["validation/kl"], rel=1e-3)
    last = held_out_figures(student["last_model"], buffer, unseen)
    assert logged[-1] == pytest.approx(last["validation/kl"], rel=1e-3)


def test_a_buffer_whose_held_out_samples_are_all_seen_still_serves(
    small_buffer, tmp_path, monkeypatch, capsys
):
    """As a greedy teacher's games can be the same from start to end."""
    _, buffer = small_buffer
    names = ("stack_index", "action_probs", "values")
    twice = {name: np.concatenate((buffer[name][:300], buffer[name][:300])) for name in names}
    twice |= {"frames": buffer["frames"], "episode_index": np.repeat([0, 1], 300)}
    np.savez(tmp_path / "twice.npz", **twice, meta=buffer["meta"])
    student = distilled("twice.npz", tmp_path, monkeypatch, epochs=1)
    assert "held out    60 samples, 0 of them unlike any" in capsys.readouterr().out
    expected = held_out_figures(student["model"], twice, np.arange(540, 600))
    assert student["validation"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_resume_may_go_on_with_another_loss_and_teacher(
    small_buffer, tmp_path, monkeypatch, capsys
):
    path, buffer = small_buffer
    distilled(path, tmp_path, monkeypatch, epochs=1)
    (tmp_path / "student.pt.lock").unlink()
    meta = json.loads(str(buffer["meta"]))
    meta["teacher"]["sha256"] = "other"
    np.savez(tmp_path / "other.npz", **{**buffer, "meta": np.array(json.dumps(meta))})
    flags = {"epochs": 2, "loss": "reverse_kl", "resume": True, "early_stop_patience": 1}
    student = distilled("other.npz", tmp_path, monkeypatch, **flags)
    assert student["epoch"] == 2 and "validation/reverse_kl" in student["validation"]
    printed = capsys.readouterr().out
    assert "with --loss reverse_kl; it was kl" in printed and "with --teacher other;" in printed


def test_share_of_teacher():
    def result(mean, greedy=False):
        return {"mean": mean, "greedy": greedy, "repeat_action_probability": 0.0}

    share = distill.share_of_teacher
    text = "mean 9.00, its teacher's 12.00: 75.0% of its teacher"
    assert share(result(9), result(12)) == text
    for student, teacher in ((-5, -2), (5, -2), (-5, 2)):
        text = share(result(student), result(teacher))
        assert text == f"mean {student:.2f}, its teacher's {teacher:.2f}"
    for pair in ((result(9), None), (None, result(12))):
        assert share(*pair) == "no share of its teacher, since not both are evaluated"
