"""Copy the blocks that several scripts share, from the script in which you changed them.

    python tools/copy_blocks.py ppo_atari_teacher.py

Each top-level function, class or constant of that file replaces the one of the same name in the
other three, except what is each script's own: Args, main, train and collect.
"""

import ast
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ppo_atari_teacher.py", "collect_buffer.py", "actor_distill.py", "finetune_student.py")
OWN = ("Args", "main", "train", "collect")


def blocks(text):
    """The shared blocks of a script: name to its source, decorators included."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        source = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = source
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = source
        elif isinstance(node, ast.If):
            found[f"{lines[node.lineno - 1]} ({'top' if len(found) == 0 else 'end'})"] = source
    return {name: source for name, source in found.items() if name not in OWN}


def main(source: tyro.conf.Positional[str]):
    changed = blocks((ROOT / source).read_text())
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        for name, block in blocks(text).items():
            if changed.get(name, block) != block:
                text = text.replace(block, changed[name])
                print(f"{script}: {name}")
        (ROOT / script).write_text(text)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
