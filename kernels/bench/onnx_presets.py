"""Presets of linear attention as ONNX files on a CPU, beside their softmax original.

    python kernels/bench/onnx_presets.py --out kernels/bench/results/onnx_presets.json

Whole blocks, projections and the presets' own new matrices included: a Llama of two layers, 8 heads
of 64, with hardly any MLP (width 16) and vocabulary (16), random weights. Converted and exported as
a user would, one thread, batch 1, float32. All ways run in one process and take turns; figures are
medians of processor time. Logits are compared with torch's first.

Ways:
    original     `identity` in flavour `ort`: ONNX Runtime's GroupQueryAttention over all keys
    lolcats, liger, lightning, mamba2    the presets, portable
    flowformer   that preset with `direction: causal`
    hybrid       that preset, one layer of the two linear; in flavour `ort`, as the original
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_run import main
from table import onnx_presets_table
from timing import in_turns
from transformers import LlamaConfig, LlamaForCausalLM

from reattend import convert
from reattend.plan import Plan
from reattend.targets.onnx import Session, export_onnx

COMMAND = "python kernels/bench/onnx_presets.py --out kernels/bench/results/onnx_presets.json"
WAYS = ("original", "lolcats", "liger", "lightning", "mamba2", "flowformer", "hybrid")
LENGTHS, WORDS = (512, 2048, 8192), 16
#: tokens that are decoded at most behind a prompt
ROOM = 512
#: tokens that are compared with torch, and the largest difference of a logit
COMPARED, LIMIT = 200, 1e-3


@dataclass(frozen=True)
class Case:
    """A prompt of M tokens, or a token behind so many."""

    name: str
    m: int
    token: bool


CASES = tuple(
    Case(f"{what} {m}", m, token)
    for what, token in (("prompt of", False), ("token", True))
    for m in LENGTHS
)


def plan(way: str) -> Any:
    """What a user would write."""
    if way == "original":
        return "identity"
    if way != "flowformer":
        return way
    rule = Plan.load(way).to_dict()["rules"][0] | {"direction": "causal"}
    return {"rules": [rule]}


@cache
def session(way: str) -> Session:
    """The file of that way, opened, after its logits were compared with torch's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=512, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=8, head_dim=64,
            max_position_embeddings=max(LENGTHS) + ROOM, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    data = [torch.randint(0, WORDS, (4, COMPARED))]
    made = convert(model, plan=plan(way), data=data).model
    flavour: Any = "ort" if way in ("original", "hybrid") else "portable"
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_onnx(made, Path(folder) / way, flavour=flavour)
        opened = Session(artifact.path, threads=1)
    ids = data[0][:1]
    error = np.abs(opened.logits(ids.numpy()) - made(ids).logits.numpy()).max()
    if not error <= LIMIT:
        raise SystemExit(f"{way} gives other logits than torch, by {error:.2g}")
    return opened


def run(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    ids, one = np.full((1, case.m), 5), np.array([[5]])
    calls = {}
    for way in WAYS:
        opened = session(way)
        if case.token:
            opened.prefill(ids, reserve=ROOM)
            calls[way] = lambda opened=opened: opened.step(one)
        else:
            calls[way] = lambda opened=opened: opened.prefill(ids)
    found = in_turns(calls, rounds)
    ratios = {
        way: round(found["original"]["cpu_ms"] / row["cpu_ms"], 2)
        for way, row in found.items()
        if way != "original"
    }
    sys.stdout.write(f"{case.name}: {found['original']['cpu_ms']} ms, {ratios}\n")
    return {"case": case.name, "ms": found, "times_faster": ratios}


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, onnx_presets_table, 7, ("onnx", "onnxruntime"))
