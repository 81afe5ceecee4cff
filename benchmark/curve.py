"""Keep of a run folder what the tables and pictures need: its evaluations and two small curves.

    python benchmark/curve.py runs/PongNoFrameskip-v4__teacher__1__... benchmark/results/...

Copies `eval.json` and `eval_before.json`, and writes `curve.json`: the mean return of the last 100
games at every hundredth of the training, and each epoch's held-out figures.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def curves(run):
    """What `curve.json` holds, of a run folder's TensorBoard events."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        if tag.startswith("validation/"):
            found[tag] = [round(point.value, 6) for point in points]
        if tag == "charts/episodic_return":
            steps = np.array([point.step for point in points])
            sums = np.cumsum([point.value for point in points])
            at = np.linspace(0, steps[-1], 101)[1:]
            ends = np.searchsorted(steps, at, side="right")
            means = [
                (sums[e - 1] - (sums[e - 101] if e > 100 else 0)) / min(e, 100) if e else None
                for e in ends
            ]
            found["steps"], found["return"] = at.round().tolist(), means
    return found


if __name__ == "__main__":
    run, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    (target / "curve.json").write_text(json.dumps(curves(run)) + "\n")
    for path in run.glob("eval*.json"):
        shutil.copy(path, target)
