"""`python kernels/bench/families.py`: whole models converted by each family, beside the original.

Models of Llama's shapes with random bf16 weights (speed does not depend on them) are converted by
`reattend.convert` on this GPU; what is written is the time of the conversion, its peak memory, how
long a prompt takes, and how many tokens a second are decoded at equal batch and at equal memory (as
many sequences as fit). Everything runs as `generate` would run it: transformers' own forward and
caches, launched from Python, the original with torch's SDPA, which takes its flash kernel where it
can. `model.py` has the decode step alone, as a CUDA graph. Sequences beyond the first are copies of
it. Rows are written as they come, and `--minutes` ends a run early. Writes
``results/families-<device>.json``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import head, no_gpu, place, write
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from reattend import convert
from reattend.install.spans import SpanCache
from reattend.memory import peak_memory

RESULTS = Path(__file__).parent / "results"
#: hidden, inner, layers, heads, KV heads, vocabulary
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 96, 2, 8, 8, 97),
}
#: one plan of every family, nothing trained; ranks and features as for heads of 128
FAMILIES: dict[str, dict[str, Any]] = {
    "latent": {"to": "mla", "kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "sparse": {"to": "sparse", "pattern": {"sinks": 4, "window": 1020}},
    "routed": {"to": "moh", "route": "kv-group", "shared": 0.25, "top_k": 0.65},
    "linear": {"to": "linear", "feature_map": "hedgehog", "window": 64, "mix_form": "blended"},
}
TINY: dict[str, dict[str, Any]] = {
    "latent": {"kv_lora_rank": 24, "qk_rope_head_dim": 4},
    "sparse": {"pattern": {"sinks": 4, "window": 8}},
    "linear": {"window": 8},
}
ROOM = 0.85  # of the memory that is free, for a cache and the copy that each step makes of it
STEPS = 8


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def build(shape: str, device: str, longest: int) -> Any:
    """The model with random weights."""
    hidden, inner, layers, heads, kv, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, vocab_size=vocabulary,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        max_position_embeddings=longest, attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def converted(model: Any, family: str, shape: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The model after `reattend.convert`, and what that took."""
    rule = {"sites": "*"} | FAMILIES[family] | (TINY.get(family, {}) if shape == "tiny" else {})
    ids = torch.randint(0, SHAPES[shape][-1], (4, 64 if shape == "tiny" else 512))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = convert(model, {"version": 1, "rules": [rule]}, data=ids, inplace=True)
    wait(device)
    row: dict[str, Any] = {
        "convert_s": round(time.perf_counter() - began, 2),
        "host_peak_gb": round(peak_memory() / 1e9, 2),
    }
    if device == "cuda":
        row["device_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return result.model, row


def prefill(model: Any, ids: Tensor, family: str, device: str) -> tuple[float, Any]:
    """Milliseconds of a prompt, and its cache: of latents one of fixed size, which has kernels."""
    cache: Any = DynamicCache(config=model.config)
    if family == "latent":
        cache = SpanCache(model.config, ids.shape[1] + 2 * STEPS)
    wait(device)
    began = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    wait(device)
    return 1e3 * (time.perf_counter() - began), cache


def repeat(cache: Any, batch: int) -> None:
    """So many copies of the one sequence."""
    if not isinstance(cache, SpanCache):
        cache.batch_repeat_interleave(batch)
        return
    layer: Any
    for layer in cache.layers:
        layer.keys = layer.keys.repeat_interleave(batch, 0)
        layer.values = layer.values.repeat_interleave(batch, 0)
        layer.max_batch_size = batch


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that a cache's layers hold."""
    found: dict[int, int] = {}

    def add(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)) and depth:
            for one in value:
                add(one, depth - 1)
        elif isinstance(value, dict) and depth:
            add(list(value.values()), depth)
        elif hasattr(value, "__dict__") and depth:
            add(list(vars(value).values()), depth - 1)

    for layer in cache.layers:
        add(layer, 4)
    return sum(found.values())


def decode(model: Any, cache: Any, batch: int, device: str) -> float:
    """Milliseconds of a step of so many copies of the cache's one sequence (median)."""
    repeat(cache, batch)
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device=device)
    times = []
    for _ in range(STEPS + 2):
        wait(device)
        began = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        wait(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def free_bytes(device: str) -> float:
    """Memory that a cache may take: each step copies it while it grows."""
    if device != "cuda":
        return 4e6
    gc.collect()
    torch.cuda.empty_cache()
    return ROOM / 2 * torch.cuda.mem_get_info()[0]


def context_rows(
    model: Any, base: dict[str, Any], context: int, batch: int, device: str
) -> list[dict[str, Any]]:
    """Prefill and decode at one length."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=device)
    rows, times, cache, family = [], [], None, base["family"]
    for _ in range(3):  # the first warms up
        cache = None
        ms, cache = prefill(model, ids, family, device)
        times.append(ms)
    decode(model, cache, 1, device)  # what is dropped after the prompt is gone now
    held = cache_bytes(cache)
    del cache
    most = max(int(free_bytes(device) / held), 1)
    for at, count in (("equal batch", min(batch, most)), ("equal memory", most)):
        row = base | {
            "context": context,
            "prefill_ms": round(min(times[1:]), 2),
            "at": at,
            "batch": count,
        }
        row["cache_mb_per_sequence"] = round(held / 1e6, 3)
        try:
            _, cache = prefill(model, ids, family, device)
            step = decode(model, cache, count, device)
            row |= {"step_ms": round(step, 3), "tokens_per_s": round(1e3 * count / step, 1)}
        except torch.OutOfMemoryError as error:
            row["refused"] = str(error)[:160]
        cache = None
        free_bytes(device)
        rows.append(row)
    return rows


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:2])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=8, help="the equal batch")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        return no_gpu("run this on a machine with one; --device cpu --shapes tiny tries it here")
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = head("python kernels/bench/families.py", "transformers") | {"rows": []}
    path = place(report, options.out, "families-")
    jobs = [(s, f) for s in options.shapes for f in ("original", *options.families)]
    for shape, family in jobs:
        if time.monotonic() > deadline:
            sys.stdout.write(f"no time for {shape}, {family}\n")
            continue
        base: dict[str, Any] = {"shape": shape, "family": family}
        model = build(shape, options.device, max(options.contexts) + 64)
        try:
            if family != "original":
                model, took = converted(model, family, shape, options.device)
                base |= took
            for context in options.contexts:
                if time.monotonic() > deadline:
                    break
                with torch.inference_mode():
                    found = context_rows(model, base, context, options.batch, options.device)
                report["rows"] += found
                for row in found:
                    sys.stdout.write(f"{row}\n")
                sys.stdout.flush()
                write(report, path)
        except Exception as error:  # a family that cannot be run is part of the result
            report["rows"].append(base | {"refused": f"{type(error).__name__}: {str(error)[:300]}"})
            sys.stdout.write(f"{report['rows'][-1]}\n")
        del model
        free_bytes(options.device)
        write(report, path)
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
