"""How many keys do neighbouring queries choose together, where every query chooses by itself?

    python examples/neighbours.py --model examples/models/pycode-gqa

A row of 512 tokens of the model's calibration text, a quarter of the keys each where a name does
not say else, blocks of 16; the last 256 queries count. Printed: the share of the keys before a
block of 1, 16 or 64 queries that some query of the block has chosen, mean over heads and layers. A
gather for it reads that share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reattend import convert
from reattend.mixers.selecting.base import Asked, Chosen, Method

BLOCK = {"kind": "blocks", "block": 16, "ratio": 0.25}
LEARNS = ("seer", "dhsa", "dma")
METHODS: dict[str, dict[str, Any]] = {
    "moba": BLOCK,
    "longheads": {**BLOCK, "key": "attended", "first": 1, "last": 2},
    "seer": {"kind": "gate", "block": 16, "gate_dim": 32, "ratio": 0.25},
    "dhsa": {"kind": "segments", "local": 32, "ratio": 0.25},
    "dma": {"kind": "values", "ratio": 0.25},
    "double-sparsity, a sixteenth": {
        "kind": "channels", "share": 1 / 8, "ratio": 1 / 16, "phase": "both",
    },
}  # fmt: skip
BLOCKS, TOKENS, STEPS = (1, 16, 64), 512, 30


def watched(method: Any, found: dict[int, list[float]]) -> None:
    """Let a method note what its choices come to; changes `method`."""
    choose = method.choose

    def noting(asked: Asked) -> Chosen:
        chosen: Chosen = choose(asked)
        n = asked.q_BHNd.shape[2]
        past = torch.ones(n, n, dtype=torch.bool).tril()
        seen = (chosen.mask() & past) | torch.eye(n, dtype=torch.bool)
        seen, past = seen[:, :, n // 2 :], past[n // 2 :]
        for c in BLOCKS:
            some = seen.unflatten(2, (-1, c)).any(3).sum(-1).double().mean()
            every = past.unflatten(0, (-1, c)).any(1).sum(-1).double().mean()
            found[c].append(float(some / every))
        return chosen

    method.choose = noting


def main() -> None:
    """Convert and run once for each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    path = parser.parse_args().model
    torch.set_num_threads(1)
    text = (path / "calibration.txt").read_text("utf-8")[:20_000]
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, -TOKENS:]
    for name, select in METHODS.items():
        rule: dict[str, Any] = {"sites": "*", "to": "sparse", "pattern": {"select": select}}
        if name in LEARNS:
            rule |= {"finder": "gate", "steps": STEPS}
        original = AutoModelForCausalLM.from_pretrained(path).eval()
        model = convert(original, plan={"rules": [rule]}, data=[ids, ids.roll(TOKENS // 2)]).model
        found: dict[int, list[float]] = {c: [] for c in BLOCKS}
        for module in model.modules():
            if isinstance(module, Method):
                watched(module, found)
        with torch.no_grad():
            model(ids, use_cache=False)
        shares = ", ".join(f"{c}: {sum(x) / len(x):.1%}" for c, x in found.items())
        sys.stdout.write(f"{name}: {shares}\n")


if __name__ == "__main__":
    main()
