"""Keep of a run folder what the tables and pictures need: one line of a file, read by `tables.py`.

    python benchmark/record.py runs/PongNoFrameskip-v4__tuned_low_1__1__20261129-142600-2074 \\
        benchmark/results/games/Pong.jsonl --name tuned_low_1

The line holds all of `eval.json`, `eval_before.json` as `before`, and as `curve` the mean return of
the last 100 games at each hundredth of the steps until the last game's end, or the held-out figures
of each epoch. It replaces a line of the same name.
"""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """run folder"""
    file: tyro.conf.Positional[Path]
    """file that gets the line"""
    name: str
    """name of the run in the tables: that of its row, and its seed"""
    command: str = ""
    """command line that made the run"""
    seconds: float | None = None
    """processor time in user mode"""


def curves(run):
    """Small curves of a run folder's TensorBoard events."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        if tag.startswith("validation/"):
            found[tag] = [round(point.value, 6) for point in points]
        if tag == "charts/episodic_return":
            steps = np.array([point.step for point in points])
            sums = np.cumsum([0, *(point.value for point in points)])
            at = np.linspace(0, steps[-1], 101)[1:]
            ends = np.searchsorted(steps, at, side="right")  # games that have ended by then
            begins = np.maximum(ends - 100, 0)
            means = (sums[ends] - sums[begins]) / np.maximum(ends - begins, 1)
            found["steps"] = at.round().tolist()
            found["return"] = [m if e else None for m, e in zip(means.tolist(), ends, strict=True)]
    return found


def main(args):
    line = {"name": args.name, "command": args.command, "seconds": args.seconds}
    line |= json.loads((args.run / "eval.json").read_text())
    before = args.run / "eval_before.json"
    line |= {"before": json.loads(before.read_text())} if before.exists() else {}
    line |= {"curve": curves(args.run)}
    args.file.parent.mkdir(parents=True, exist_ok=True)
    with args.file.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # runs side by side may end at once
        file.seek(0)
        others = [other for other in file if json.loads(other)["name"] != args.name]
        file.truncate(0)
        file.writelines([*others, json.dumps(line) + "\n"])


if __name__ == "__main__":
    main(tyro.cli(Args))
