"""Export a policy to ONNX, checked and evaluated as the file that it becomes.

    pip install -r tools/requirements.txt
    python tools/export_onnx.py --checkpoint checkpoints/PongNoFrameskip-v4/distilled_low.pt
    python tools/export_onnx.py --checkpoint ... --int8 --buffer-path buffers/PongNoFrameskip-v4.npz
    python tools/export_onnx.py --checkpoint ... --int8 --eval

The model maps `obs`, uint8 [B, 4, 84, 84], the oldest frame first, to `action_probs`, float32
[B, A], or for a network of Q-values to `q_values`. B is free. Its metadata say which game it plays,
what its actions are called, and how the pictures are made. With `--int8`, weights and activations
have 8 bits, by ONNX Runtime's static quantisation, calibrated on observations of the buffer, or
without one on the policy's own.
"""

import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

for library in ("onnx", "onnxruntime", "onnxscript"):
    if importlib.util.find_spec(library) is None:
        sys.exit(f"{library} is missing; pip install -r tools/requirements.txt")

import numpy as np
import onnx
import onnxruntime
import torch
import tyro
from onnxruntime import quantization
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import actor_distill
import collect_buffer

PREPROCESSING = (
    "84x84 grey pictures, the maximum of the last two of four frames, the last four pictures; "
    "FIRE after a lost life in games that have it"
)


@dataclass
class Args:
    checkpoint: str
    """policy to export: of any phase, or any teacher that `collect_buffer.py` reads"""
    env_id: str = "PongNoFrameskip-v4"
    """gymnasium id of the game"""
    path: str | None = None
    """file to write; by default beside the checkpoint, ending in `.onnx` or `.int8.onnx`"""
    overwrite: bool = False
    """replace `path` if it exists"""
    int8: bool = False
    """quantise weights and activations to 8 bits"""
    buffer_path: str | None = None
    """buffer whose observations calibrate and check; without it, the policy plays some"""
    samples: int = 500
    """observations to calibrate and check on"""
    all_outputs: bool = False
    """let the model give `logits` and `value` too"""
    eval: bool = False
    """play the exported model by the project's rule"""
    eval_steps: int = 100_000
    """budget of that evaluation"""
    num_envs: int = 16
    """games played at once"""
    seed: int = 1
    """seed of the games and the actions"""


class Exported(nn.Module):
    """An agent whose outputs are those of the exported model, a tuple."""

    def __init__(self, agent, q_values, all_outputs):
        super().__init__()
        self.agent, self.q_values, self.all_outputs = agent, q_values, all_outputs
        self.names = ["q_values" if q_values else "action_probs"]
        self.names += ["logits", "value"] if all_outputs else []

    def forward(self, obs):
        logits, values = self.agent(obs)
        first = logits if self.q_values else logits.softmax(-1)
        return (first, logits, values) if self.all_outputs else (first,)


def real_observations(agent, rom, buffer_path, env_id, samples, seed, q_values=False):
    """Observations uint8 [samples, 4, 84, 84] of a buffer, or of games that the agent plays."""
    if buffer_path:
        frames, stack_index, *_ = actor_distill.load_buffer(buffer_path, env_id)
    else:
        envs = collect_buffer.AtariEnvs(rom, 16, 0.0, life_loss=False)
        epsilon = collect_buffer.Args.epsilon if q_values else None
        device = torch.device("cpu")
        played = collect_buffer.collect(agent, envs, 8 * samples, seed, False, epsilon, device)
        envs.close()
        frames, stack_index = played["frames"], played["stack_index"]
    rows = np.random.default_rng(seed).permutation(len(stack_index))[:samples]
    return frames[stack_index[rows]]


def export(model, path):
    """Write a model of `Exported` as ONNX, with 32 bits."""
    batch = torch.export.Dim("batch", min=1)
    obs = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    options = {"input_names": ["obs"], "output_names": model.names, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations within torch
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        shapes = ({0: batch},)
        program = torch.onnx.export(model, (obs,), dynamic_shapes=shapes, dynamo=True, **options)
    program.save(path)


def quantise(path, quantised, obs):
    """Write a model's copy with 8 bits, calibrated on observations."""

    class Reader(quantization.CalibrationDataReader):
        batches = iter(np.array_split(obs, max(1, len(obs) // 50)))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"obs": batch}

    prepared = f"{path}.prepared"
    quantization.shape_inference.quant_pre_process(path, prepared)
    # weights without a sign too: signed ones overflow on processors without VNNI; the softmax stays
    # as it is, or rare actions would have probability 0
    eight_bits = quantization.QuantType.QUInt8
    options = {"weight_type": eight_bits, "activation_type": eight_bits, "per_channel": True}
    options["op_types_to_quantize"] = ["Conv", "Gemm", "Relu"]
    quantization.quantize_static(prepared, quantised, Reader(), **options)


class Session:
    """An exported model as a policy: observations to (logits, None), for `play`."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.q_values = self.session.get_outputs()[0].name == "q_values"

    def __call__(self, obs):
        """Logits float32 [B, A] of observations uint8 [B, 4, 84, 84]."""
        outputs = torch.from_numpy(self.session.run(None, {"obs": obs.numpy()})[0])
        return outputs if self.q_values else outputs.clamp(min=1e-30).log(), None


def main(args):
    env_id, rom = collect_buffer.resolve_game(args.env_id)
    action_meanings = collect_buffer.AtariEnvs(rom, 1, 0.0, life_loss=False).action_meanings
    about, agent = collect_buffer.load_teacher(args.checkpoint, env_id, len(action_meanings))
    q_values = about["args"].get("loss") == "mse"
    model = Exported(agent, q_values, args.all_outputs).eval()
    suffix = ".int8.onnx" if args.int8 else ".onnx"
    path = args.path or str(Path(args.checkpoint).with_suffix(suffix))
    collect_buffer.lock_output(path, args.overwrite)
    obs = real_observations(agent, rom, args.buffer_path, env_id, args.samples, args.seed, q_values)
    with tempfile.TemporaryDirectory() as folder:
        written = f"{folder}/float.onnx"
        export(model, written)
        if args.int8:
            quantise(written, f"{folder}/int8.onnx", obs)
            written = f"{folder}/int8.onnx"
        saved = onnx.load(written)
    metadata = {
        "env_id": env_id,
        "action_meanings": json.dumps(action_meanings),
        "preprocessing": PREPROCESSING,
        "capacity": str(about["capacity"]),
        "checkpoint_sha256": about["sha256"],
    }
    onnx.helper.set_model_props(saved, metadata)
    onnx.checker.check_model(saved, full_check=True)
    contents = saved.SerializeToString()

    session = Session(contents)
    with torch.inference_mode():
        ours, theirs = agent(torch.from_numpy(obs))[0], session(torch.from_numpy(obs))[0]
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    if q_values:
        difference = (ours - theirs).abs().max().item()
    else:
        difference = (ours.softmax(-1) - theirs.softmax(-1)).abs().max().item()
    kl = actor_distill.kl_divergence(ours.softmax(-1), theirs).mean().item()
    print(
        f"compared    on {len(obs)} observations: largest difference {difference:.1e}, KL {kl:.1e} "
        f"nats, {agreement:.1%} the same action"
    )
    if difference > 1e-5 * max(1.0, ours.abs().max().item()) and not args.int8:
        sys.exit(f"{path}: not written, since the exported model differs from the checkpoint")
    Path(f"{path}.tmp").write_bytes(contents)
    os.replace(f"{path}.tmp", path)
    print(f"wrote       {path}, {len(contents) / 1e6:.2f} MB")
    if args.eval:
        envs = collect_buffer.AtariEnvs(rom, args.num_envs, 0.0, life_loss=False)
        device = torch.device("cpu")
        returns, lengths = collect_buffer.play(
            session, envs, args.eval_steps, args.seed, q_values, device
        )
        result = collect_buffer.summarize(returns)
        print(
            f"evaluation  mean {result['mean']:.2f} ± {result['std']:.2f}, 95% interval "
            f"{result['ci95']}, {len(returns)} games, {sum(lengths):,} steps"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
