"""Distillation against values worked by hand, against a plain training, and on real play."""

import functools
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import buffer_arrays, opinionated_agent, tensorboard_scalars

import actor_distill as distill
import collect_buffer as collect

KL, REVERSE = "kl", "reverse_kl"
SGD = {"optimizer": "sgd", "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
    "temperature, q, expected",
    [
        # e^1, e^0.5 and 1 over their sum; e^2, e^1 and 1 over theirs
        (0.01, [0.01, 0.005, 0.0], [0.506480391055654, 0.307195885718492, 0.186323723225854]),
        (1.0, [2.0, 1.0, 0.0], [0.665240955774822, 0.244728471054798, 0.090030573170381]),
    ],
)
def test_equation_2_equals_values_worked_by_hand(temperature, q, expected):
    targets = distill.make_targets(torch.tensor([q]), True, "kl", temperature)
    torch.testing.assert_close(targets, torch.tensor([expected]), atol=1e-6, rtol=0)
    # and Eq. 2 itself against a student that finds all actions alike: ln 3 less the entropy
    entropy = -sum(p * math.log(p) for p in expected)
    kl = distill.kl_divergence(targets, torch.zeros(1, 3))
    assert kl.item() == pytest.approx(math.log(3) - entropy, abs=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_sharpening_large_q_values_is_stable(scale):
    """Near 10,000 float32 tells steps of 1/1024 apart, a tenth of the temperature."""
    chance = 1 / (1 + math.exp(-(2**-10) / 0.01))
    rows = {(0.0, 1.0, -0.5): (0.0, 1.0, 0.0), (0.0, 2**-10): (1 - chance, chance)}
    for q, expected in rows.items():
        targets = distill.make_targets(scale + torch.tensor([q]), True, "kl", 0.01)
        torch.testing.assert_close(targets, torch.tensor([expected]))


def test_the_reverse_kl_is_that_of_torch_with_teacher_and_student_exchanged():
    targets = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    logits = torch.tensor([[0.3, 2.0, -1.0], [5.0, -9.0, 1.0], [0.2, 0.3, 0.5]]).log_softmax(-1)
    floor = targets.clamp(min=1e-8).log()
    expected = F.kl_div(floor, logits, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(distill.reverse_kl(targets, logits), expected)


@torch.no_grad()
def outputs_of(model, buffer, rows):
    """A low student's logits and values on some rows of a buffer, NumPy arrays of doubles."""
    agent = distill.Agent("low", 6)
    agent.load_state_dict(model)
    obs = buffer["frames"][buffer["stack_index"][rows]]
    return [x.double().numpy() for x in agent(torch.from_numpy(obs))]


def figures(model, buffer, rows):
    """What `validate` reports of a student on some rows, by NumPy in double precision."""
    logits, student_values = outputs_of(model, buffer, rows)
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    p = buffer["action_probs"][rows].astype(float)
    p /= p.sum(1, keepdims=True)
    student_entropy, entropy = (-(x * np.log(x)).sum(1).mean() for x in (q, p))
    return {
        "validation/kl": (p * np.log(p / q)).sum(1).mean(),
        "validation/reverse_kl": (q * np.log(q / p)).sum(1).mean(),
        "validation/agreement": (p.argmax(1) == q.argmax(1)).mean(),
        "validation/entropy_gap": student_entropy - entropy,
        "validation/value_loss": 0.5 * ((student_values - buffer["values"][rows]) ** 2).mean(),
    }


def untrained():
    """The weights that a low student of seed 1 starts from."""
    torch.manual_seed(1)
    return distill.Agent("low", 6).state_dict()


def distilled(buffer, **flags):
    """Distil a low student from a buffer's arrays, without an evaluation: its checkpoint."""
    np.savez("buffer.npz", **buffer)
    args = {"buffer_path": "buffer.npz", "save_path": "student.pt", "capacity": "low"}
    args |= {"eval_steps": 0, "overwrite": True}
    distill.main(distill.Args(**(args | flags)))
    os.remove("student.pt.lock")  # which this process would keep
    return torch.load("student.pt", weights_only=True)


def logged(student):
    """The scalars of a student's run: tag to values."""
    scalars = tensorboard_scalars(f"runs/{student['run_name']}")
    return {tag: [value for _, value in points] for tag, points in scalars.items()}


def test_validation_figures_equal_plain_numpy():
    """Over several batches, the last of them smaller; of probabilities, and of Q-values."""
    buffer, agent = buffer_arrays(1100), opinionated_agent(distill.Agent, "low", 6)
    expected = figures(agent.state_dict(), buffer, slice(None))
    logits, _ = outputs_of(agent.state_dict(), buffer, slice(None))
    q_values = np.log(buffer["action_probs"]) + 1  # whose softmax they are
    expected["validation/mse"] = ((q_values - logits) ** 2).sum(1).mean()
    losses = {"kl": distill.kl_divergence, "reverse_kl": distill.reverse_kl}
    for targets in (buffer["action_probs"], q_values):
        arrays = (buffer["frames"][buffer["stack_index"]], targets, buffer["values"])
        batch = functools.partial(lambda x, rows: [torch.from_numpy(y[rows]) for y in x], arrays)
        found = distill.validate(agent, batch, torch.arange(1100), losses)
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-4)
        losses = {"mse": distill.squared_error}
    assert "validation/mse" in found


def test_the_gradient_is_the_one_worked_by_hand():
    """d KL(p || q) / d logits is q - p, averaged over the batch, however large that is."""
    buffer, start = buffer_arrays(), untrained()
    logits, values = outputs_of(start, buffer, np.arange(19))
    q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradients = {
        "actor.bias": (q - buffer["action_probs"][:19]).mean(0),
        "critic.bias": 0.5 * (values - buffer["values"][:19]).mean(keepdims=True),
    }
    flags = {"epochs": 1, "loss": "kl", "anneal_lr": False, "value_coef": 0.5}
    flags |= {"optimizer": "sgd", "learning_rate": 1.0}
    once = distilled(buffer, **flags)["model"]
    for name, gradient in gradients.items():
        np.testing.assert_allclose(start[name] - once[name], gradient, atol=1e-6)
    for name in ("stack_index", "action_probs", "values", "episode_index"):
        buffer[name] = buffer[name].repeat(2, 0)
    twice = distilled(buffer, **flags)["model"]
    for name in once:
        torch.testing.assert_close(twice[name], once[name], atol=1e-5, rtol=0)


def plain_training(buffer, targets, losses, rates, optimizer, value_coef=0.0):
    """The weights after a step on rows 0 to 18 for each loss and rate, by torch's own losses."""
    obs = torch.from_numpy(buffer["frames"][buffer["stack_index"][:19]])
    targets, values = targets[:19], torch.from_numpy(buffer["values"][:19])
    agent = distill.Agent("low", 6)
    agent.load_state_dict(untrained())
    make = {"adam": torch.optim.Adam, "sgd": functools.partial(torch.optim.SGD, momentum=0.9)}
    optimizer = make[optimizer](agent.parameters(), lr=0.0)
    for name, rate in zip(losses, rates, strict=True):
        logits, student_values = agent(obs)
        log_p, log_q = targets.log(), logits.log_softmax(-1)
        loss = {
            KL: F.kl_div(log_q, log_p, reduction="batchmean", log_target=True),
            REVERSE: F.kl_div(log_p, log_q, reduction="batchmean", log_target=True),
            "nll": F.cross_entropy(logits, targets.argmax(-1)),
            "mse": 6 * F.mse_loss(logits, targets),
        }[name]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (loss + value_coef / 2 * F.mse_loss(student_values, values)).backward()
        optimizer.step()
    return agent.state_dict()


CONSTANT, ADAM = {"anneal_lr": False}, {"optimizer": "adam"}


@pytest.mark.parametrize(
    "flags, losses, shares",  # the loss of each epoch, and its share of --learning-rate
    [
        (
            {"eq3_fraction": 0.4, "warmup_fraction": 0.4},
            [KL, KL, REVERSE, REVERSE, REVERSE],
            [0, 1 / 2, 1, 2 / 3, 1 / 3],
        ),
        ({"eq3_fraction": 0, "warmup_fraction": 0}, [REVERSE] * 3, [1, 2 / 3, 1 / 3]),
        (CONSTANT | {"loss": KL, "value_coef": 0.5}, [KL] * 3, [1] * 3),
        (CONSTANT | {"loss": KL, "temperature": 2.0}, [KL] * 2, [1] * 2),
        (CONSTANT | ADAM | {"loss": "nll"}, ["nll"] * 2, [1] * 2),
        ({"loss": "mse", "warmup_fraction": 1}, ["mse"] * 2, [0, 1 / 2]),
    ],
)
def test_a_training_is_the_plain_one(flags, losses, shares):
    """All 19 rows to train on make one batch, so that an epoch is one step."""
    flags = {"optimizer": "sgd", "learning_rate": 0.01, "epochs": len(losses), **flags}
    buffer = buffer_arrays()
    targets = torch.from_numpy(buffer["action_probs"])
    if "mse" in losses:
        meta = {"env_id": "PongNoFrameskip-v4", "targets": "q_values"}
        buffer |= {"q_values": buffer.pop("action_probs"), "meta": np.array(json.dumps(meta))}
    if "temperature" in flags:
        targets = targets.sqrt() / targets.sqrt().sum(-1, keepdim=True)
    student, start = distilled(buffer, **flags), untrained()
    rates = 0.01 * np.array(shares)
    np.testing.assert_allclose(logged(student)["charts/learning_rate"], rates, rtol=1e-6)
    more = (flags["optimizer"], flags.get("value_coef", 0))
    for name, weight in plain_training(buffer, targets, losses, rates, *more).items():
        moved = (weight - start[name]).abs().max().item()
        assert (moved > 0) == (name[:6] != "critic" or "value_coef" in flags)
        torch.testing.assert_close(student["model"][name], weight, atol=0.005 * moved, rtol=0)


def test_each_name_holds_one_quantity_over_the_whole_run():
    """As a student shows that learns too slowly to change: by Eq. 3 first, then by the reverse."""
    buffer, flags = buffer_arrays(), {"epochs": 4, "eq3_fraction": 0.5, "warmup_fraction": 0.5}
    found = logged(distilled(buffer, learning_rate=1e-30, batch_size=6, **flags))
    trained, expected = (figures(untrained(), buffer, rows) for rows in (np.arange(18), [19]))
    for name in (KL, REVERSE, "value_loss"):
        expected[f"losses/{name}"] = trained[f"validation/{name}"]
    last_steps = np.arange(4) + 2 / 3  # of three steps in each epoch
    expected["charts/learning_rate"] = 1e-30 * np.minimum(last_steps / 2, 2 - last_steps / 2)
    expected["charts/epoch"] = [1, 2, 3, 4]
    assert found.keys() == expected.keys() | {"charts/SPS"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_bfloat16_is_only_what_the_network_computes_in():
    flags = SGD | CONSTANT | {"epochs": 3, "loss": KL, "value_coef": 0.5}
    plain, student = (distilled(buffer_arrays(), bf16=x, **flags) for x in (False, True))
    moments = [state["momentum_buffer"] for state in student["optimizer"]["state"].values()]
    assert len(moments) == 12 and all(x.dtype == torch.float32 for x in moments)
    for name, start in untrained().items():
        weight, expected = student["model"][name], plain["model"][name]
        assert weight.dtype == torch.float32
        assert 0 < (weight - expected).norm() < 0.1 * (expected - start).norm(), name


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_is_the_plain_one():
    flags = SGD | {"epochs": 2, "eq3_fraction": 0.5, "batch_size": 6, "value_coef": 0.5}
    plain, compiled = (distilled(buffer_arrays(), compile=x, **flags) for x in (False, True))
    for name, weight in plain["model"].items():
        torch.testing.assert_close(compiled["model"][name], weight, atol=1e-5, rtol=1e-4)
    assert compiled["validation"] == pytest.approx(plain["validation"], rel=1e-3)


def test_held_out_share_is_whole_episodes():
    episodes = np.repeat(np.arange(50), np.random.default_rng(0).integers(10, 30, 50))
    train, held_out = distill.split_episodes(episodes, 0.1, 1)
    assert not set(episodes[train]) & set(episodes[held_out])
    assert 0.1 <= len(held_out) / len(episodes) < 0.14
    assert set(held_out) != set(distill.split_episodes(episodes, 0.1, 2)[1])
    for games in (episodes, np.repeat([0, 1, 2], [10, 39, 51])):
        for seed in range(20):
            train, held_out = distill.split_episodes(games, 0.5, seed)
            assert len(train) and sorted([*train, *held_out]) == list(range(len(games)))


@pytest.mark.parametrize(
    "episodes, held_out", [([0] * 100, 5), ([0] * 50 + [1] * 50, 5), ([0, 0], 1), ([0] * 10, 1)]
)
def test_few_long_episodes_give_a_contiguous_stretch(episodes, held_out):
    parts = distill.split_episodes(np.array(episodes), 0.05, 1)
    assert [*map(len, parts)] == [len(episodes) - held_out, held_out]
    assert np.concatenate(parts).tolist() == list(range(len(episodes)))


@pytest.fixture(scope="module")
def real_play():
    """2,000 steps of Pong by a teacher with opinions, 100 in each game: a buffer's arrays."""
    torch.manual_seed(0)
    agent = opinionated_agent(collect.Agent, "low", 6)
    envs = collect.AtariEnvs("pong", 20, 0.0, life_loss=False)
    arrays = collect.collect(agent, envs, 2000, 1, False, None, "cpu")
    return {**arrays, "meta": buffer_arrays()["meta"]}


def split(buffer):
    """Rows to train on, those held out, and of these those unlike any to train on, to the byte."""
    train, held_out = distill.split_episodes(buffer["episode_index"], 0.1, 1)
    stacks = [buffer["frames"][index].tobytes() for index in buffer["stack_index"]]
    known = {stacks[row] for row in train}
    return train, held_out, [row for row in held_out if stacks[row] not in known]


LEARNING = {"batch_size": 32, "validation_fraction": 0.1}


def test_a_student_learns_held_out_play(real_play):
    """By default by KL(student || teacher), and without the critic."""
    student = distilled(real_play, epochs=4, learning_rate=1e-3, **LEARNING)
    train, _, unseen = split(real_play)
    start, end = (figures(x, real_play, unseen) for x in (untrained(), student["model"]))
    assert student["validation"] == pytest.approx(end, rel=1e-3, abs=1e-6)
    assert start["validation/reverse_kl"] > 0.15, "an untrained student is far from this teacher"
    assert end["validation/reverse_kl"] < start["validation/reverse_kl"] / 2
    assert end["validation/agreement"] > 0.7
    assert student["args"]["loss"] == REVERSE
    assert student["global_step"] == 4 * (len(train) // 32 * 32)
    assert torch.equal(student["model"]["critic.weight"], untrained()["critic.weight"])


def test_early_stopping_keeps_the_best_epoch(real_play, capsys):
    """Its figures are those of held-out samples that are unlike any to train on."""
    # at this rate the held-out KL bounces, so that some epoch is worse than the one before
    flags = {"epochs": 40, "learning_rate": 3e-3, "early_stop_patience": 1, "anneal_lr": False}
    student = distilled(real_play, loss=KL, **LEARNING, **flags)
    assert student["last_epoch"] == student["epoch"] + 1 < 40
    train, held_out, unseen = split(real_play)
    assert 0 < len(unseen) < len(held_out)
    expected = figures(student["model"], real_play, unseen)
    on_all = figures(student["model"], real_play, held_out)
    assert student["validation"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert student["validation"] != pytest.approx(on_all, rel=1e-3, abs=1e-6)
    assert student["global_step"] == len(train) // 32 * 32 * student["epoch"]
    output, kl = capsys.readouterr().out, student["validation"]["validation/kl"]
    assert f"{len(held_out)} samples, {len(unseen)} of them unlike any to train on" in output
    assert f"kept        epoch {student['epoch']}: validation/kl {kl:.4f}," in output
    found = logged(student)["validation/kl"]
    assert found[-2] == min(found) == pytest.approx(kl)
    last = figures(student["last_model"], real_play, unseen)
    assert found[-1] == pytest.approx(last["validation/kl"], rel=1e-3)


def test_early_stopping_waits_until_eq3_ends(real_play):
    """At a rate that changes nothing, so that the first epoch stays the best."""
    flags = {"epochs": 8, "early_stop_patience": 1, "eq3_fraction": 0.5, "learning_rate": 1e-20}
    for loss, last_epoch in ((REVERSE, 5), (KL, 2)):
        student = distilled(real_play, loss=loss, **flags, overwrite=True)
        assert (student["epoch"], student["last_epoch"]) == (1, last_epoch)


def test_a_buffer_whose_held_out_samples_are_all_seen_still_serves(real_play, capsys):
    """As a greedy teacher's games can be the same from start to end."""
    names = ("stack_index", "action_probs", "values")
    twice = {name: np.concatenate((real_play[name][:300], real_play[name][:300])) for name in names}
    twice |= {"frames": real_play["frames"], "episode_index": np.repeat([0, 1], 300)}
    student = distilled({**twice, "meta": real_play["meta"]}, epochs=1, validation_fraction=0.1)
    assert "held out    60 samples, 0 of them unlike any" in capsys.readouterr().out
    expected = figures(student["model"], twice, np.arange(540, 600))
    assert student["validation"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_resume_may_go_on_by_another_loss():
    """Whose best epoch is another one: the likelihood of one action is no KL."""
    distilled(buffer_arrays(), epochs=1, loss=KL)
    flags = {"epochs": 2, "loss": "nll", "resume": True, "early_stop_patience": 1}
    student = distilled(buffer_arrays(), **flags)
    assert student["epoch"] == 2 and "validation/nll" in student["validation"]


def test_student_and_teacher_are_compared_by_the_same_rules_only():
    """By their means, as a share of a score that begins below 0 says nothing."""
    rules = {"greedy": False, "repeat_action_probability": 0.0}
    student, teacher = {"mean": 9.0, **rules}, {"mean": 12.0, **rules}
    assert distill.compare(student, teacher) == "mean 9.00, its teacher's 12.00"
    below = {"mean": -5.0, **rules}
    assert distill.compare(below, teacher) == "mean -5.00, its teacher's 12.00"
    greedy, sticky = teacher | {"greedy": True}, teacher | {"repeat_action_probability": 0.25}
    for pair in ((student, greedy), (sticky, teacher), (student, None), (None, teacher)):
        assert distill.compare(*pair).startswith("not compared with its teacher")
