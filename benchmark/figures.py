"""Draw the README's pictures from the files that the runs wrote. Needs matplotlib.

    python benchmark/figures.py

Reads TensorBoard events and `eval.json` below `benchmark/results/{env_id}/`: `ppo_high/` and, where
the teacher was trained on from there, `finetuned_high/`, its run folders, and
`distill_{capacity}_{epochs}/`, those of `benchmark/epochs.sh`, `table3/`, those of
`benchmark/pong_table.sh`, and `batches/`, those of `benchmark/batches.sh`. Pictures whose runs are not
there are left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    """game whose results are drawn"""
    results: str = "benchmark/results"
    """folder of the results"""
    figures: str = "benchmark/figures"
    """folder to write to"""
    parts: tuple[str, ...] = ("ppo_high", "finetuned_high")
    """run folders of the teacher's training, in their order"""
    steps: tuple[int, ...] = (972_800, 1_398_784)
    """how many steps the shipped teacher took in each; what came after is left out"""


def scalar(folder, tag):
    """Steps and values of one TensorBoard tag in a run folder, as two arrays."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars(tag)
    return np.array([x.step for x in events]), np.array([x.value for x in events])


def game_returns(parts):
    """The steps at which full games ended, and their returns, over folders one after another."""
    steps, returns, begin = [], [], 0
    for folder, length in parts:
        at, found = scalar(folder, "charts/episodic_return")
        steps.append(begin + at[at <= length])
        returns.append(found[at <= length])
        begin += length
    return np.concatenate(steps), np.concatenate(returns)


def moving_mean(steps, returns, window=100):
    """The mean return of the last `window` games, at the steps at which it is known."""
    window = min(window, len(returns))
    return steps[window - 1 :], np.convolve(returns, np.ones(window) / window, "valid")


def learning_curve(parts, path):
    """Every full game's return over the teacher's training, and the mean of the last 100.

    Args:
        parts: run folders one after another, each with the steps that the teacher took in it.
        path: picture to write.

    Returns:
        The evaluation in the last folder.
    """
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for begin in np.cumsum([length for _, length in parts])[:-1]:
        axes.axvline(begin, linewidth=0.7, color="0.4")
    steps, returns = game_returns(parts)
    folder = parts[-1][0]
    axes.plot(steps, returns, ".", markersize=2, color="0.75", label="one game")
    axes.plot(*moving_mean(steps, returns), color="C3", label="mean of the last 100 games")
    result = json.loads((folder / "eval.json").read_text())
    label = f"shipped checkpoint, {result['episodes']} games: {result['mean']:.2f}"
    axes.axhline(result["mean"], linestyle="--", linewidth=1, color="k", label=label)
    axes.set(
        xlabel="environment steps",
        ylabel="raw return of a full game",
        title=f"{result['env_id']}: PPO teacher, one seed",
    )
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    return result


def capacities_figure(folder, teacher_parts, path):
    """Returns over direct training by capacity, one seed each: the shape of the paper's Fig. 2."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    curves = {"high, the teacher": (teacher_parts, "C3")}
    for capacity, color in (("medium", "C4"), ("low", "C0")):
        for run in sorted(folder.glob(f"direct_{capacity}_*"))[:1]:
            curves[capacity] = ([(run, np.inf)], color)
    if len(curves) == 1:
        return
    for label, (parts, color) in curves.items():
        axes.plot(*moving_mean(*game_returns(parts)), color=color, label=label)
    axes.set(
        xlabel="environment steps",
        ylabel="mean return of the last 100 games",
        title="Trained directly, one seed each",
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def critics_figure(folder, path):
    """Returns while a distilled medium student is fine-tuned from three kinds of critic."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name, label, color in (
        ("tuned_medium", "untrained critic, as in the paper", "C4"),
        ("tuned_warmup_medium", "critic first, 10 iterations", "C1"),
        ("tuned_value_medium", "distilled with --value-coef 0.5", "C2"),
    ):
        for i, run in enumerate(sorted(folder.glob(f"{name}_[0-9]*"))):
            curve = moving_mean(*scalar(run, "charts/episodic_return"), window=50)
            axes.plot(*curve, color=color, label=None if i else label)
    if axes.lines:
        axes.set(
            xlabel="environment steps of fine-tuning",
            title="Does the untrained critic hurt?",
            ylabel="mean return of the last 50 games",
        )
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)


def batches_figure(folder, path):
    """Return, approx_kl, clipfrac and time by the readings of "batch sizes of 32"."""
    runs = {32: "32 minibatches of 1,024", 1024: "1,024 minibatches of 32"}
    if not list(folder.glob("batches_*")):
        return
    figure, rows = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    panels = rows.flatten()
    for (minibatches, label), color in zip(runs.items(), ("C0", "C3")):
        for i, run in enumerate(sorted(folder.glob(f"batches_{minibatches}_*"))):
            events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
            curve = moving_mean(*scalar(run, "charts/episodic_return"), window=50)
            panels[0].plot(*curve, color=color, label=None if i else label)
            panels[1].plot(*scalar(run, "losses/approx_kl"), "o-", color=color)
            panels[2].plot(*scalar(run, "losses/clipfrac"), "o-", color=color)
            ends = events.Scalars("losses/approx_kl")
            # unix time and processor seconds until then
            at, spent = np.loadtxt(run / "processor_seconds.txt").T
            at, spent = [events.FirstEventTimestamp(), *at], [0, *spent]
            steps, wall = [x.step for x in ends], np.array([x.wall_time for x in ends])
            panels[3].plot(steps, np.interp(wall, at, spent) / 60, "o-", color=color)
            panels[3].plot(steps, (wall - at[0]) / 60, ":", color=color)
    panels[0].legend(fontsize=8)
    panels[1].set_yscale("log")
    minutes = "minutes: processor, and dotted wall"
    labels = ("mean return of the last 50 games", "approx_kl", "clipfrac", minutes)
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
    for axes in panels[2:]:
        axes.set_xlabel("thousand environment steps")
        axes.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:.0f}")
    figure.suptitle('"Batch sizes of 32": 16 games, 2,048 steps, 10 epochs', fontsize=10)
    figure.savefig(path, dpi=120)


def epochs_figure(folder, teacher, path):
    """Held-out KL and score over the epochs of distillation: the shape of the paper's Fig. 3."""
    if not list(folder.glob("distill_*")):
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for capacity, color in (("medium", "C4"), ("low", "C0")):
        runs = sorted(folder.glob(f"distill_{capacity}_*"), key=lambda x: int(x.name.split("_")[2]))
        epochs = [int(run.name.split("_")[2]) for run in runs]
        results = [json.loads((run / "eval.json").read_text()) for run in runs]
        means = np.array([result["mean"] for result in results])
        low, high = np.array([result["ci95"] for result in results]).T
        kl = [scalar(run, "validation/kl")[1][-1] for run in runs]
        left.plot(epochs, kl, "o-", color=color, label=capacity)
        style = {"fmt": "o-", "capsize": 3, "color": color}
        label = f"{capacity}, 95% interval of the mean"
        right.errorbar(epochs, means, yerr=(means - low, high - means), label=label, **style)
    left.set(xscale="log", yscale="log", xlabel="epochs", ylabel="held-out KL, nats")
    right.axhline(teacher["mean"], linestyle="--", linewidth=1, color="k", label="teacher")
    right.set(xscale="log", xlabel="epochs", ylabel="mean return")
    for axes in (left, right):
        axes.set_xticks(epochs, map(str, epochs))
        axes.minorticks_off()
        axes.legend(fontsize=8)
    figure.suptitle(f"{teacher['env_id']}: a fresh student per point, one seed each", fontsize=10)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    results, figures = Path(args.results, args.env_id), Path(args.figures)
    figures.mkdir(parents=True, exist_ok=True)
    parts = [(results / name, steps) for name, steps in zip(args.parts, args.steps)]
    teacher = learning_curve(parts, figures / f"{args.env_id}_teacher.png")
    capacities_figure(results / "table3", parts, figures / f"{args.env_id}_capacities.png")
    critics_figure(results / "table3", figures / f"{args.env_id}_critics.png")
    batches_figure(results / "batches", figures / f"{args.env_id}_batches.png")
    epochs_figure(results, teacher, figures / f"{args.env_id}_epochs.png")
