"""How much of a strong teacher its students keep: a table from the files of single students.

    python benchmark/students.py

Reads `benchmark/results/students/*.json`, one student each, writes `table.md` beside them. A
student's share of its teacher has a 95% interval by the delta method: the variances of both means,
each over its games, relative to the means' squares, add up.
"""

import json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results" / "students"
CAPACITIES = ("medium", "low")


def share(student, teacher):
    """Ratio of two evaluations' means with the 95% interval, three numbers."""
    ratio = student["mean"] / teacher["mean"]
    relative = [x["std"] ** 2 / x["episodes"] / x["mean"] ** 2 for x in (student, teacher)]
    half = 1.96 * ratio * np.sqrt(sum(relative))
    return ratio, ratio - half, ratio + half


def table(students):
    """Markdown, a row a student."""
    columns = (
        "teacher | its score | student | loss | samples × epochs | learned on | seed | "
        "score (95% interval) | of its teacher (95% interval) | held-out loss"
    )
    lines = [f"| {columns} |", "|" + "---|" * 10]
    key = ("game", "teacher_name", "capacity", "loss", "seed")
    for x in sorted(students, key=lambda x: [x[name] for name in key]):
        student, teacher = x["student"], x["teacher"]
        ratio, low, high = share(student, teacher)
        games = f"{student['ci95'][0]:,.0f} to {student['ci95'][1]:,.0f}"
        cells = (
            f"{x['game']}, {x['teacher_name']}",
            f"{teacher['mean']:,.0f} ± {teacher['std']:,.0f}, {teacher['episodes']} games",
            x["capacity"],
            x["loss"],
            f"{x['samples']:,} × {x['epochs']}",
            x["cost"],
            str(x["seed"]),
            f"{student['mean']:,.0f} ({games})",
            f"**{ratio:.0%}** ({low:.0%} to {high:.0%})",
            f"{x['held_out']:.4f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    (RESULTS / "table.md").write_text(table(found))
    print(table(found))
