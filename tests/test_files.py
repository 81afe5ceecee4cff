"""Bad flags and bad files: one line on stderr that names them, status 2, nothing written."""

import contextlib
import importlib
import io
import json
import os
import pickle
import resource
import shlex
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import actor_distill as distill
import numpy as np
import ppo_atari_teacher as teacher
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, SMALL_PPO, run_main, run_script

GAME = "PongNoFrameskip-v4"
MEANINGS = ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]


def checkpoint(**changes):
    agent = teacher.Agent("low", 6)
    return {"format_version": 1, "phase": "ppo", "env_id": GAME, "capacity": "low",
            "num_actions": 6, "global_step": 1, "model": agent.state_dict(), "args": {},
            "evaluation": None, **changes}


def saved(path, content):
    torch.save(content, path)
    return path


def broken_weights(**changes):
    return {**teacher.Agent("low", 6).state_dict(), **changes}


def nested(depth):
    """A list of ten times the same list of ten times the same list ...: small to store."""
    inner = [0] * 10
    for _ in range(depth):
        inner = [inner] * 10
    return inner


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


BAD_CHECKPOINTS = {
    "foreign dict": lambda: {"model": {}},
    "a tensor": lambda: torch.zeros(3),
    "later format": lambda: checkpoint(format_version=2),
    "other game": lambda: checkpoint(env_id="BreakoutNoFrameskip-v4"),
    "other number of actions": lambda: checkpoint(model=teacher.Agent("low", 4).state_dict()),
    "weights of another capacity": lambda: checkpoint(capacity="medium"),
    "unknown capacity": lambda: checkpoint(capacity="huge"),
    "unhashable capacity": lambda: checkpoint(capacity=[1]),
    "missing layer": lambda: checkpoint(model={}),
    "additional layer": lambda: checkpoint(model=broken_weights(more=torch.zeros(1))),
    "wrong shape": lambda: checkpoint(
        model=broken_weights(**{"actor.bias": torch.zeros(7)})),
    "no tensor": lambda: checkpoint(model=broken_weights(**{"actor.bias": "zero"})),
    "no state dict": lambda: checkpoint(model=5),
    "flags that are no dict": lambda: checkpoint(args=[]),
    "step that is no number": lambda: checkpoint(global_step="x"),
    "double precision": lambda: checkpoint(
        model={name: x.double() for name, x in broken_weights().items()}),
    "half precision": lambda: checkpoint(
        model={name: x.half() for name, x in broken_weights().items()}),
    "tensor among the plain values": lambda: checkpoint(args={"seed": torch.zeros(2)}),
    "evaluation without a mean": lambda: checkpoint(evaluation={"greedy": False}),
    "mean that is text": lambda: checkpoint(evaluation={"mean": "12", "greedy": False}),
    "mean that is not finite": lambda: checkpoint(
        evaluation={"mean": float("nan"), "greedy": False}),
    "evaluation by a protocol that is a number": lambda: checkpoint(
        evaluation={"mean": 1.0, "protocol": 5}),
    "teacher's evaluation by a protocol that is text": lambda: checkpoint(
        teacher={"evaluation": {"mean": 1.0, "protocol": "x"}}),
    "validation that is text": lambda: checkpoint(validation={
        "validation/kl": "1", "validation/agreement": 1, "validation/entropy_gap": 1}),
    "the same list over and over": lambda: checkpoint(args={"a": nested(9)}),
    "last model in double precision": lambda: checkpoint(
        last_model={name: x.double() for name, x in broken_weights().items()}),
    "last model that is none": lambda: checkpoint(last_model=3),
    "last model without layers": lambda: checkpoint(last_model={}),
    "negative step": lambda: checkpoint(global_step=-1),
    "weight not finite": lambda: checkpoint(
        model=broken_weights(**{"critic.bias": torch.tensor([float("nan")])})),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_by_name(kind, tmp_path):
    path = saved(tmp_path / "x.pt", BAD_CHECKPOINTS[kind]())
    with pytest.raises(teacher.UsageError) as refusal:
        teacher.load_checkpoint(path, GAME, 6, "python make.py")
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_errors_are_refused_and_refusals_and_signals_pass():
    for error, expected, message in (
            (ValueError("bad\nbytes"), teacher.UsageError, r"outer (ValueError('bad\nbytes'))"),
            (teacher.UsageError("inner"), teacher.UsageError, "inner"),
            (KeyboardInterrupt(2), KeyboardInterrupt, "2")):
        with pytest.raises(expected) as raised:
            with teacher.refuse("outer"):
                raise error
        assert str(raised.value) == message


def test_good_checkpoint_loads_equal(tmp_path):
    content = checkpoint()
    found, agent = teacher.load_checkpoint(saved(tmp_path / "x.pt", content), GAME, 6, "")
    assert found.keys() == content.keys() | {"protocol"}, "files from before there was one"
    assert found["protocol"] == teacher.default_protocol()
    assert all(torch.equal(x, content["model"][name]) for name, x in agent.state_dict().items())


def test_damaged_checkpoints_are_refused(tmp_path):
    """Every truncation, and flipped bits all over the file: refused, or loaded as it was."""
    path = saved(tmp_path / "x.pt", checkpoint())
    content, reference = path.read_bytes(), checkpoint()["args"]
    original = torch.load(path, weights_only=True)["model"]
    rng = np.random.default_rng(0)
    damaged = [b"", *(content[:int(share * len(content))] for share in (0.01, 0.3, 0.9, 0.999))]
    for position in rng.integers(0, len(content), 40):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    refused = 0
    for text in damaged:
        path.write_bytes(text)
        try:
            _, agent = teacher.load_checkpoint(path, GAME, 6, "python make.py")
        except teacher.UsageError as refusal:
            assert str(path) in str(refusal)
            refused += 1
        else:
            state = agent.state_dict()
            assert all(torch.equal(state[name], original[name]) for name in original)
    assert refused > 40 and reference == {}


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path):
    target = tmp_path / "the-bomb-went-off"
    path = saved(tmp_path / "x.pt", checkpoint(args=Bomb(target)))
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Bomb(target)))
    for bomb in (path, tmp_path / "y.pt"):
        with pytest.raises(teacher.UsageError):
            teacher.load_checkpoint(bomb, GAME, 6, "python make.py")
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the bomb is a real one"


def buffer_arrays(**changes):
    probs = np.full((20, 6), 1 / 6, np.float32)
    index = np.arange(80, dtype=np.int32).reshape(20, 4) % 21
    meta = {"format_version": 1, "env_id": GAME, "action_meanings": MEANINGS,
            "preprocessing": teacher.preprocessing(), "teacher": {"evaluation": None}}
    meta.update(changes.pop("meta", {}))
    arrays = {"frames": np.zeros((21, 84, 84), np.uint8), "stack_index": index,
              "action_probs": probs, "values": np.zeros(20, np.float32),
              "episode_index": np.zeros(20, np.int32), "meta": np.array(json.dumps(meta))}
    return {name: x for name, x in (arrays | changes).items() if x is not None}


def with_row(array, row, value):
    array = array.copy()
    array[row] = value
    return array


GOOD = buffer_arrays()
BAD_BUFFERS = {
    "no frames": (buffer_arrays(frames=None), "frames"),
    "no meta": (buffer_arrays(meta_only=None) | {"meta": np.array("{")}, "damaged"),
    "meta is a list": (GOOD | {"meta": np.array("[]")}, "damaged"),
    "pickled meta": (GOOD | {"meta": np.array({"a": 1}, object)}, "damaged"),
    "no teacher": (buffer_arrays(meta={"teacher": {}}), "damaged"),
    "teacher's mean is text": (buffer_arrays(meta={"teacher": {"evaluation": {
        "mean": "12", "greedy": False}}}), "damaged"),
    "teacher's mean is true": (buffer_arrays(meta={"teacher": {"evaluation": {
        "mean": True, "greedy": False}}}), "damaged"),
    "many more frames than samples": (buffer_arrays(
        frames=np.zeros((5000, 84, 84), np.uint8)), "array frames"),
    "teacher's evaluation by a protocol that is a list": (buffer_arrays(meta={"teacher": {
        "evaluation": {"mean": 1.0, "protocol": [1]}}}), "damaged"),
    "a teacher of too many values": (buffer_arrays(meta={"teacher": {
        "evaluation": None, "more": [0] * 20_000}}), "damaged"),
    "huge probabilities": (buffer_arrays(action_probs=with_row(
        GOOD["action_probs"], 8, np.finfo(np.float32).max)), "row 8"),
    "teacher's evaluation is a number": (buffer_arrays(meta={"teacher": {"evaluation": 5}}),
                                         "damaged"),
    "array without an axis": (buffer_arrays(stack_index=np.array(3, np.int32)), "stack_index"),
    "no samples": ({name: x if name in ("meta", "frames") else x[:0] for name, x in GOOD.items()},
                   "too few samples"),
    "other game": (buffer_arrays(meta={"env_id": "BreakoutNoFrameskip-v4"}), "Breakout"),
    "other actions": (buffer_arrays(meta={"action_meanings": MEANINGS[::-1]}), "action_meanings"),
    "other preprocessing": (buffer_arrays(meta={"preprocessing": {}}), "preprocessing"),
    "later format": (buffer_arrays(meta={"format_version": 2}), "format_version"),
    "float frames": (buffer_arrays(frames=np.zeros((21, 84, 84), np.float32)), "frames"),
    "small frames": (buffer_arrays(frames=np.zeros((21, 42, 42), np.uint8)), "frames"),
    "too few probabilities": (buffer_arrays(action_probs=GOOD["action_probs"][:-1]),
                              "action_probs"),
    "another number of actions": (buffer_arrays(action_probs=np.full((20, 4), 0.25, np.float32)),
                                  "action_probs"),
    "index past the frames": (buffer_arrays(stack_index=with_row(GOOD["stack_index"], 7, 21)),
                              "row 7"),
    "negative index": (buffer_arrays(stack_index=with_row(GOOD["stack_index"], 3, -1)), "row 3"),
    "NaN probability": (buffer_arrays(action_probs=with_row(GOOD["action_probs"], 9, np.nan)),
                        "row 9"),
    "probabilities of sum 0.5": (
        buffer_arrays(action_probs=with_row(GOOD["action_probs"], 4, 1 / 12)), "row 4"),
    "negative probability": (buffer_arrays(
        action_probs=with_row(GOOD["action_probs"], 5, [-0.5, 1.5, 0, 0, 0, 0])), "row 5"),
    "infinite value": (buffer_arrays(values=with_row(GOOD["values"], 2, np.inf)), "row 2"),
    "episodes out of order": (buffer_arrays(
        episode_index=with_row(GOOD["episode_index"], 6, -1)), "row 6"),
}


@pytest.mark.parametrize("kind", BAD_BUFFERS)
def test_bad_buffers_are_refused_by_name(kind, tmp_path):
    arrays, named = BAD_BUFFERS[kind]
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **arrays)
    with pytest.raises(distill.UsageError) as refusal:
        distill.load_buffer(path, GAME, MEANINGS, "python make.py")
    message = str(refusal.value)
    assert str(path) in message and named in message and "\n" not in message


def test_good_buffer_loads_equal(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", **GOOD)
    found = distill.load_buffer(tmp_path / "x.npz", GAME, MEANINGS, "")
    for name in ("frames", "stack_index", "action_probs", "values", "episode_index"):
        np.testing.assert_array_equal(found[name], GOOD[name])


def test_a_file_that_is_no_archive_is_no_buffer(tmp_path):
    for name, content in (("empty", b""), ("start", b"PK"), ("pickle", pickle.dumps([1]))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(distill.UsageError, match="damaged"):
            distill.load_buffer(tmp_path / name, GAME, MEANINGS, "python make.py")
    np.save(tmp_path / "y.npy", np.zeros(3))
    with pytest.raises(distill.UsageError, match="damaged"):
        distill.load_buffer(tmp_path / "y.npy", GAME, MEANINGS, "python make.py")


def mutants(content, count, rng):
    """Truncations, flipped bits, overwritten, moved and doubled stretches of a file's bytes."""
    for i in range(count):
        text = bytearray(content)
        start, length = int(rng.integers(len(text))), int(rng.integers(1, 200))
        match i % 5:
            case 0:
                del text[start:]
            case 1:
                text[start] ^= 1 << int(rng.integers(8))
            case 2:
                text[start:start + length] = rng.bytes(length)
            case 3:
                text[start:start] = text[start:start + length]
            case 4:
                del text[start:start + length]
        yield bytes(text)


def field_mutants(content, count, rng):
    """Dicts with the values of two fields swapped, at the top or one level down."""
    for _ in range(count):
        changed = dict(content)
        inner = [name for name in changed if isinstance(changed[name], dict) and changed[name]]
        if inner and rng.random() < 0.4:
            name = inner[rng.integers(len(inner))]
            part = changed[name] = dict(changed[name])
        else:
            part = changed
        names = list(part)
        one, two = names[rng.integers(len(names))], names[rng.integers(len(names))]
        part[one], part[two] = part[two], part[one]
        yield changed


def full_checkpoint():
    """A distilled student's checkpoint with all its fields, and the flags to resume it with."""
    agent = distill.Agent("low", 6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)
    distill.distill_update(agent, optimizer, distill.batch_loss,
                           torch.zeros((2, 4, 84, 84), dtype=torch.uint8),
                           torch.full((2, 6), 1 / 6), torch.zeros(2), 0.5)
    args = distill.Args(capacity="low")
    state = distill.training_state(agent, optimizer)
    validation = {f"validation/{name}": 0.5
                  for name in ("kl", "agreement", "entropy_gap", "value_loss")}
    evaluation = {"mean": 1.0, "std": 1.0, "greedy": False, "repeat_action_probability": 0.0}
    return checkpoint(**state, phase="distilled", last_model=state["model"], epoch=1, last_epoch=1,
                      validation=validation, teacher={"evaluation": evaluation, "steps": 5},
                      evaluation=evaluation, run_name="x", wandb_id=None, checkpoint="x.pt",
                      buffer_sha256="0" * 64, args=vars(args)), args


def test_200_mutated_checkpoints_load_equal_or_are_refused(tmp_path):
    path, (content, args) = tmp_path / "x.pt", full_checkpoint()
    original = torch.load(saved(path, content), weights_only=True)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused, loaded = 0, 0
    altered = [*mutants(whole, 150, rng), *field_mutants(content, 100, rng)]
    for i, mutant in enumerate([whole, *altered]):
        if i == 1:  # whatever torch imports at its first use is in memory by now
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if isinstance(mutant, bytes):
            path.write_bytes(mutant)
        else:
            torch.save(mutant, path)
        agent = distill.Agent("low", 6).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)
        try:
            found, _ = distill.load_checkpoint(path, GAME, 6, "python make.py", "low")
            distill.restore(path, found, "distilled", args, agent, optimizer)
            if isinstance(mutant, bytes):
                assert all(torch.equal(x, original["model"][name])
                           for name, x in agent.state_dict().items())
                assert found["args"] == original["args"]
            distill.share_of_teacher(found["evaluation"], found["teacher"])
            json.dumps({"evaluation": found["evaluation"], "validation": found["validation"]})
            loaded += 1
        except distill.UsageError as refusal:
            assert str(path) in str(refusal) and "\n" not in str(refusal)
            refused += 1
    assert refused > 150 and loaded > 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 2 * len(whole) + 30e6, "peak memory"


def test_200_mutated_buffers_load_equal_or_are_refused(tmp_path):
    rng, path = np.random.default_rng(1), tmp_path / "x.npz"
    good = GOOD | {"frames": rng.integers(0, 255, (21, 84, 84), np.uint8)}
    np.savez_compressed(path, **good)
    content, size = path.read_bytes(), sum(x.nbytes for x in good.values())
    refused, loaded = 0, 0
    distill.load_buffer(path, GAME, MEANINGS, "")  # whatever it imports at its first use
    tracemalloc.start()
    for mutant in [*mutants(content, 150, rng), *field_mutants(good, 100, rng)]:
        if isinstance(mutant, bytes):
            path.write_bytes(mutant)
        else:
            np.savez_compressed(path, **mutant)
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        try:
            found = distill.load_buffer(path, GAME, MEANINGS, "python make.py")
        except distill.UsageError as refusal:
            assert str(path) in str(refusal) and "\n" not in str(refusal)
            refused += 1
        else:
            loaded += 1
            for name in found.keys() - {"meta"}:
                np.testing.assert_array_equal(found[name], good[name])
        assert tracemalloc.get_traced_memory()[1] - start < 2 * size + 1e6
    tracemalloc.stop()
    assert refused > 150 and loaded > 5


def npy(dtype, shape, content=b""):
    """A `.npy` file with a header of our choice."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


@pytest.mark.parametrize("kind", ["claims 32 GiB", "inflates 1000 times", "negative length",
                                  "needs pickle", "larger than the machine", "huge meta",
                                  "huge header"])
def test_hostile_buffers_are_refused_before_memory_is_taken(kind, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **{name: x for name, x in GOOD.items()
                                 if name not in ("frames", "meta")})
    meta, frames = GOOD["meta"], npy("|u1", (21, 84, 84), bytes(21 * 84 * 84))
    match kind:
        case "claims 32 GiB":
            frames = npy("|u1", (2**22, 84, 84))
        case "inflates 1000 times":
            frames = npy("|u1", (21, 84, 84), bytes(300_000_000))
        case "negative length":
            frames = npy("|u1", (-21, -84, 84), bytes(21 * 84 * 84))
        case "needs pickle":
            frames = npy("|O", (21, 84, 84), bytes(8 * 21 * 84 * 84))
        case "larger than the machine":
            monkeypatch.setattr(os, "sysconf", lambda name: 300)
        case "huge header":
            frames = b"\x93NUMPY\x02\x00" + (10**8).to_bytes(4, "little") + b" " * 10**8
        case "huge meta":
            meta = np.array("x" * 2**16)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames.npy", frames)
        with archive.open("meta.npy", "w") as member:
            np.save(member, meta)
    del frames
    tracemalloc.start()
    with pytest.raises(distill.UsageError) as refusal:
        distill.load_buffer(path, GAME, MEANINGS, "python make.py")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert peak < 20e6


def test_a_checkpoint_that_inflates_is_refused_before_memory_is_taken(tmp_path):
    path = saved(tmp_path / "x.pt", checkpoint())
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(
            tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in archive.infolist():
            bomb.writestr(member.filename, archive.read(member))
        bomb.writestr("archive/data/99", bytes(500_000_000))
    start = time.time()
    with pytest.raises(teacher.UsageError, match="bomb.pt: damaged"):
        teacher.load_checkpoint(tmp_path / "bomb.pt", GAME, 6, "python make.py")
    assert time.time() - start < 1


@pytest.mark.parametrize("content", [
    b"", b"\x80\x04K\x01.", bytes(1000), b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_archive_is_no_checkpoint(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(teacher.UsageError, match="x.pt: "):
        teacher.load_checkpoint(tmp_path / "x.pt", GAME, 6, "python make.py")


@pytest.mark.parametrize("changes", [
    {"optimizer": {}}, {"optimizer": {"state": {0: {}}, "param_groups": []}}, {"optimizer": 3},
    {"rng": {}}, {"rng": {"torch": torch.zeros(3, dtype=torch.uint8), "cuda": None}}, {"rng": None},
    {"run_name": "../x"}, {"run_name": ".."}, {"run_name": None}, {"run_name": "a/b"},
    {"run_name": "a\ud800"}, {"run_name": "\u00e9" * 128},
    {"phase": "ppo"}, {"optimizer": {"state": {}, "param_groups": []}},
    {"optimizer": {"state": {0: {"step": 1.0, "exp_avg": [[0] * 10] * 10, "exp_avg_sq": 0}}}}])
def test_a_training_state_that_does_not_fit_is_refused(changes, tmp_path):
    content, args = full_checkpoint()
    path = saved(tmp_path / "x.pt", {**content, **changes})
    found, agent = distill.load_checkpoint(path, GAME, 6, "python make.py")
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)
    if "run_name" in changes and changes["run_name"] is None:
        found.pop("run_name")
    with pytest.raises(distill.UsageError, match="x.pt: "):
        distill.restore(path, found, "distilled", args, agent, optimizer)


@pytest.mark.parametrize("spoil", ["shape", "nan", "step", "negative", "expanded", "double",
                                   "missing", "none"])
def test_moments_that_do_not_fit_are_refused(spoil, tmp_path):
    content, args = full_checkpoint()
    moments = content["optimizer"]["state"][0]
    match spoil:
        case "shape":
            moments["exp_avg"] = torch.zeros(1)  # it would broadcast
        case "nan":
            moments["exp_avg_sq"][0] = float("nan")
        case "step":
            moments["step"] = torch.tensor(-1.0)
        case "negative":
            moments["exp_avg_sq"][0] = -1.0
        case "expanded":
            moments["exp_avg"] = torch.zeros(1).expand(10**9)
        case "missing":
            del content["optimizer"]["state"][3]
        case "none":
            content["optimizer"]["state"] = {}
        case "double":
            moments["exp_avg"] = moments["exp_avg"].double()
    path = saved(tmp_path / "x.pt", content)
    found, agent = distill.load_checkpoint(path, GAME, 6, "python make.py")
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)
    with pytest.raises(distill.UsageError, match="x.pt: its training cannot be restored"):
        distill.restore(path, found, "distilled", args, agent, optimizer)


@pytest.mark.parametrize("name", ["a b.pt", "größe 学生.pt", "[a]*?.pt", "'quoted\".pt",
                                  "folder/../x.pt"])
def test_any_name_can_be_written_and_read(name, tmp_path):
    path = tmp_path / name
    teacher.check_output(path, False)
    teacher.save_checkpoint(path, checkpoint())
    teacher.load_checkpoint(path, GAME, 6, "")
    with pytest.raises(teacher.UsageError, match="exists already"):
        teacher.check_output(path, False)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "x.pt").symlink_to(tmp_path / "real" / "y.pt")
    teacher.check_output(tmp_path / "x.pt", False)
    teacher.save_checkpoint(tmp_path / "x.pt", checkpoint())
    assert (tmp_path / "x.pt").is_symlink() and (tmp_path / "real" / "y.pt").is_file()
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    with contextlib.suppress(teacher.UsageError):
        teacher.check_output(tmp_path / "loop.pt", True)


def test_an_output_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(teacher.UsageError, match="pipe.pt: is a folder or a device"):
        teacher.check_output(tmp_path / "pipe.pt", True)


def test_an_output_that_is_an_input_is_refused(tmp_path):
    (tmp_path / "x.pt").touch()
    (tmp_path / "link.pt").symlink_to(tmp_path / "x.pt")
    with pytest.raises(teacher.UsageError, match="is read as well"):
        teacher.check_output(tmp_path / "x.pt", True, tmp_path / "link.pt")


def test_only_temporary_files_of_dead_processes_are_swept(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".x.pt.{dead.pid}0000000000000000.tmp").touch()
    (tmp_path / ".x.pt.4194303.tmp").mkdir()
    names = {".x.pt.1.tmp": True, f".x.pt.{dead.pid}.tmp": False, f".y.pt.{dead.pid}.tmp": True,
             ".x.pt.abc.tmp": True}
    for name in names:
        (tmp_path / name).touch()
    teacher.check_output(tmp_path / "x.pt", False)
    assert {name: (tmp_path / name).exists() for name in names} == names


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_cost_their_text_alone(chain, closed, tmp_path):
    """No file may take the place of a stream that the caller has closed, and get its text."""
    student = chain[0] / f"checkpoints/{GAME}/distilled_medium.pt"
    script = shlex.join([sys.executable, str(ROOT / SCRIPTS[2]), "--eval-only", str(student),
                         "--eval-steps", "8", "--num-envs", "2"])
    result = subprocess.run(f"{script} {closed}", shell=True, cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert bool(result.stdout) == (">&-" not in closed.split())
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "eval.json").read_text())["episodes"] >= 2


@pytest.mark.parametrize("script, flags, named", [
    (SCRIPTS[0], "--env-id Nonsense", "--env-id Nonsense"),
    (SCRIPTS[0], "--env-id PongNoFrameskip-v0", "--env-id"),
    (SCRIPTS[0], "--num-envs 0", "--num-envs"),
    (SCRIPTS[0], "--learning-rate nan", "--learning-rate"),
    (SCRIPTS[0], "--device cuda", "--device cuda"),
    (SCRIPTS[0], "--seed -1", "--seed"),
    (SCRIPTS[0], "--gamma 1.1", "--gamma"),
    (SCRIPTS[0], "--clip-coef inf", "--clip-coef"),
    (SCRIPTS[0], "--ent-coef -0.1", "--ent-coef"),
    (SCRIPTS[0], "--checkpoint-interval 0", "--checkpoint-interval"),
    (SCRIPTS[0], "--eval-only low.pt --eval-steps 0", "--eval-steps"),
    (SCRIPTS[0], "--num-minibatches 33", "--num-minibatches"),
    (SCRIPTS[0], "--total-timesteps 1000", "--total-timesteps"),
    (SCRIPTS[0], "--exp-name a/b --total-timesteps 32768", "--exp-name"),
    (SCRIPTS[0], f"--exp-name {'x' * 300} --total-timesteps 32768", "--exp-name"),
    (SCRIPTS[0], "--num-steps 1000000 --total-timesteps 1000000000", "--num-steps"),
    (SCRIPTS[0], "--eval-only missing.pt", "missing.pt"),
    (SCRIPTS[0], "--save-path .", "is a folder"),
    (SCRIPTS[0], "--save-path /proc/no/x.pt", "/proc/no/x.pt"),
    (SCRIPTS[0], "--save-path text.txt/x.pt", "text.txt/x.pt"),
    (SCRIPTS[0], f"--save-path {'x' * 250}.pt", "File name too long"),
    (SCRIPTS[0], "--save-path low.pt", "--overwrite"),
    (SCRIPTS[0], "--env-id Combat-v5", "--env-id Combat-v5"),
    (SCRIPTS[0], "--save-path distilled.pt --resume", "no ppo training"),
    (SCRIPTS[1], "--env-id Alien-v5", "python ppo_atari_teacher.py --env-id AlienNoFrameskip-v4"),
    (SCRIPTS[1], "--num-samples 1", "--num-samples"),
    (SCRIPTS[1], "--teacher-path text.txt", "text.txt"),
    (SCRIPTS[2], "--env-id Alien-v5", "python collect_buffer.py --env-id AlienNoFrameskip-v4"),
    (SCRIPTS[2], "--buffer-path text.txt", "text.txt"),
    (SCRIPTS[2], "--buffer-path good.npz --batch-size 1000", "--batch-size"),
    (SCRIPTS[2], "--validation-fraction 0.9", "--validation-fraction"),
    (SCRIPTS[1], "--teacher-path low.pt --buffer-path low.pt --overwrite", "is read as well"),
    (SCRIPTS[2], "--buffer-path good.npz --save-path good.npz --overwrite", "is read as well"),
    (SCRIPTS[3], "--student-path low.pt --save-path low.pt --overwrite", "is read as well"),
    (SCRIPTS[2], "--epochs 0", "--epochs"),
    (SCRIPTS[2], "--temperature 0", "--temperature"),
    (SCRIPTS[2], "--buffer-path good.npz --batch-size 4 --save-path low.pt --resume --capacity low",
     "no distilled training"),
    (SCRIPTS[2], "--eval-only low.pt --capacity high", "low.pt"),
    (SCRIPTS[2], "--env-id Breakout-v5 --eval-only low.pt", "its env_id is 'PongNoFrameskip-v4'"),
    (SCRIPTS[3], "--env-id Alien-v5",
     "python actor_distill.py --env-id AlienNoFrameskip-v4 --capacity medium"),
    (SCRIPTS[3], "--student-path low.pt --capacity medium", "low.pt"),
    (SCRIPTS[3], "--critic-warmup-updates -1", "--critic-warmup-updates"),
])
def test_bad_input_is_refused_before_anything_is_written(script, flags, named, tmp_path,
                                                          monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no checkpoint and no buffer")
    saved("low.pt", checkpoint())
    saved("distilled.pt", checkpoint(phase="distilled"))
    np.savez_compressed("good.npz", **GOOD)
    before = sorted(tmp_path.iterdir())
    module = importlib.import_module(script[:-3])
    with pytest.raises(module.UsageError) as refusal:
        run_main(module, tyro.cli(module.Args, args=flags.split()))
    message = str(refusal.value)
    assert named in message and "\n" not in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_refusal_is_one_line_on_stderr_with_status_2(script, tmp_path):
    result = run_script(tmp_path, script, "--env-id", "Pomg-v5")
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --env-id Pomg-v5: no such game; the closest names are "
                           "PongNoFrameskip-v4, ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flags_exit_with_status_2(script, tmp_path):
    result = run_script(tmp_path, script, "--no-such-flag", 3)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_atomic_write_leaves_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(OSError):
        with teacher.atomic_write(path) as file:
            file.write(b"half of the new")
            raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_training_that_diverges_stops_before_it_saves(tmp_path):
    result = run_script(tmp_path, SCRIPTS[0], *SMALL_PPO, "--capacity", "low", "--learning-rate",
                        "1000", "--max-grad-norm", "1e12", "--vf-coef", "1e6")
    assert result.returncode == 2 and "diverged" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.pt"))


def test_buffer_members_are_plain_npy_files(chain):
    with zipfile.ZipFile(chain[0] / "buffers" / f"{GAME}.npz") as archive:
        assert archive.testzip() is None
        assert all(name.endswith(".npy") for name in archive.namelist())


def test_too_little_memory_is_told_in_one_line(tmp_path):
    """A batch that the allocator refuses, under a limit on this process's own memory."""
    command = [sys.executable, str(ROOT / "actor_distill.py"), "--capacity", "high",
               "--batch-size", "20000", "--epochs", "1", "--eval-steps", "0"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30)))
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory (") and "smaller batches" in last
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("checkpoints/*/*"))


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_buffers_of_other_compressions_are_refused(how, tmp_path):
    """bzip2 and LZMA members inflate without a limit, whatever size they claim."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", how) as archive:
        archive.writestr("meta.npy", bytes(1000))
    with pytest.raises(distill.UsageError, match="another compression"):
        distill.load_buffer(tmp_path / "x.npz", GAME, MEANINGS, "python make.py")


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_checkpoints_are_refused_before_anything_inflates(how, tmp_path):
    path = saved(tmp_path / "x.pt", checkpoint())
    content = io.BytesIO()
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(content, "w", how) as archive:
        for member in plain.infolist():
            archive.writestr(member.filename, plain.read(member))
    pad = bytes(path.stat().st_size)  # so that the sum of the members' sizes fits in the file
    with pytest.raises(ValueError, match="CRC"):
        teacher.load_tensors(pad + content.getvalue())


def test_a_teacher_that_says_too_much_is_refused_before_anything_is_recorded(tmp_path):
    saved(tmp_path / "x.pt", checkpoint(evaluation={"mean": 1.0, "note": "x" * 17_000}))
    result = run_script(tmp_path, SCRIPTS[1], "--teacher-path", "x.pt", "--num-samples", 10)
    assert result.returncode == 2 and "error: x.pt: what it says of itself" in result.stderr
    assert not (tmp_path / "buffers" / f"{GAME}.npz").exists()
