"""Milliseconds per decoded token in ONNX Runtime: converted, original, and transformers' export.

    python kernels/bench/onnx_decode.py --out kernels/bench/results/onnx_decode.json

One thread, batch 1, float32, random weights (speed does not depend on them) in the geometry of the
shipped model with a longer context. Every variant runs in the same process, in turns, so that what
else the machine does hits all alike; figures are medians, read the ratios. Wall time and the time
the processor spent on the step are both kept: on a shared machine only the second is steady. The
states are filled with random rows: a step costs the same whatever they hold.

Variants:
    mla-50, mla-25      converted to MLA at 50 and 25 % of the original cache, exported by reattend
    original            plan identity (`to: dense`), exported by reattend
    ...-ort             the same in flavour `ort`: ONNX Runtime's own operators
    ...-custom          the portable file with reattend's kernels (build them: make onnx-library)
    transformers        the original by transformers' own exporter with its ONNX Runtime fusions
                        (GroupQueryAttention over a cache of fixed size, buffers shared in place)
    transformers-grow   the same with a cache that grows (DynamicCache), as generate() uses it
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx_theirs import ROOM, Step, Theirs
from table import decode_table
from transformers import LlamaConfig, LlamaForCausalLM

from reattend import convert
from reattend.targets.onnx import Artifact, Session, export_onnx
from reattend.targets.onnx.manifest import read_manifest

CONTEXTS = (512, 2048, 8192)
LIMIT = 1e-3  # largest logit difference from torch's
COMMAND = "python kernels/bench/onnx_decode.py --out kernels/bench/results/onnx_decode.json"
KEEP = {"mla-50": 0.5, "mla-25": 0.25}


def original(kv_heads: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=32,
        max_position_embeddings=max(CONTEXTS) + ROOM, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def converted(model: Any, kv_keep: float | None) -> Any:
    """The model with every site dense (None) or as MLA with this share of the cache."""
    if kv_keep is None:
        return convert(model, plan="identity").model
    plan = {"rules": [{"sites": "*", "to": "mla", "kv_keep": kv_keep}]}
    tokens = [torch.randint(0, model.config.vocab_size, (4, 256))]
    return convert(model, plan=plan, data=tokens).model


def exported(model: Any, name: str, folder: Path, flavour: str = "portable") -> Artifact:
    """The export of that name in `folder`, made if it is not there."""
    if not (folder / "manifest.json").is_file():
        return export_onnx(converted(model, KEEP.get(name)), folder, flavour=flavour)
    return Artifact(folder, read_manifest(folder))


class Ours:
    """A variant exported by reattend."""

    def __init__(self, name: str, artifact: Artifact, kernels: bool = False) -> None:
        self.name = name
        self.session = Session(artifact.path, threads=1, library=kernels)
        self.bytes_per_token = artifact.manifest.cache_bytes_per_token
        self.nodes = Counter(layer.form for layer in artifact.manifest.layers)

    def prepare(self, context: int) -> Step:
        """A step after `context` tokens."""
        session, token = self.session, np.array([[5]])
        session.prefill(np.full((1, 2), 5), reserve=context + ROOM)
        generator = np.random.default_rng(0)
        for value in session.states.values:
            value.update_inplace(generator.standard_normal(value.shape(), np.float32) * 0.1)

        def step() -> None:
            session._progress.seen = context
            session.step(token)

        return step

    def logits(self, ids: torch.Tensor) -> np.ndarray:
        """Logits of the last token, fed as a step after the others."""
        self.session.prefill(ids[:, :-1].numpy(), reserve=ROOM)
        return self.session.step(ids[:, -1:].numpy())


def measure(steps: dict[str, Step], rounds: int, block: int) -> dict[str, dict[str, float]]:
    """Median ms per step; variants take turns in blocks, the first step of a block warms up."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            for _ in range(block):
                start, busy = time.perf_counter(), time.thread_time()
                step()
                cpu[name].append(1000 * (time.thread_time() - busy))
                wall[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            "cpu": statistics.median(cpu[name]),
            "wall": statistics.median(wall[name]),
            "wall_best": min(wall[name]),
        }
        for name in steps
    }


def run(kv_heads: int, rounds: int, block: int, folder: Path) -> dict[str, Any]:
    model = original(kv_heads)
    variants: list[Any] = []
    for name in (*KEEP, "original"):
        portable = exported(model, name, folder / name)
        variants += [Ours(name, portable), Ours(f"{name}-custom", portable, kernels=True)]
    ort = exported(model, "original", folder / "original-ort", "ort")
    variants.append(Ours("original-ort", ort))
    failures = {}
    ids = torch.randint(0, model.config.vocab_size, (1, 65))
    with torch.no_grad():
        expected = model(ids).logits[:, -1:].numpy()
    same = [variant for variant in variants if variant.name.startswith("original")]
    parity = {v.name: float(np.abs(v.logits(ids) - expected).max()) for v in same}
    for name, fixed in (("transformers", True), ("transformers-grow", False)):
        theirs = Theirs(name, model, folder, fixed)
        try:
            parity[name] = float(np.abs(theirs.logits(ids) - expected).max())
        except Exception as error:  # what fails is part of the result
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        variants.append(theirs)
    if wrong := {name: error for name, error in parity.items() if not error <= LIMIT}:
        raise SystemExit(f"logits differ from torch's, nothing is timed: {wrong}")
    figures = {}
    for context in CONTEXTS:
        steps = {variant.name: variant.prepare(context) for variant in variants}
        figures[str(context)] = measure(steps, rounds, block)
    return {
        "kv_heads": kv_heads,
        "ms_per_token": figures,
        "cache_bytes_per_token": {v.name: v.bytes_per_token for v in variants},
        "nodes": {v.name: dict(v.nodes) for v in variants},
        "logit_difference_from_torch": parity,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--folder", type=Path, help="keep the exported files here and reuse them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    results = []
    heads: list[int] = arguments.kv_heads
    for kv_heads in heads:
        with tempfile.TemporaryDirectory() as made:
            folder = (arguments.folder or Path(made)) / f"kv-{kv_heads}"
            folder.mkdir(parents=True, exist_ok=True)
            results.append(run(kv_heads, arguments.rounds, arguments.block, folder))
    content = {
        "schema_version": 1,
        "command": COMMAND
        + ("" if heads == [2, 8] else f" --kv-heads {' '.join(map(str, heads))}"),
        "date": date.today().isoformat(),
        "threads": 1,
        "rounds": arguments.rounds,
        "block": arguments.block,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {p: version(p) for p in packages},
        "results": results,
    }
    arguments.out.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    sys.stdout.write(decode_table(content) + "\n")


if __name__ == "__main__":
    main()
