"""`python kernels/bench/families.py`: whole models converted by each family, beside the original.

Models of Llama's shapes with random bf16 weights (speed does not depend on them) are converted by
`reattend.convert` on this GPU; what is written is the time of the conversion, its peak memory, how
long a prompt takes, and how many tokens a second are decoded at equal batch and at equal memory (as
many sequences as fit). Everything runs as `generate` would run it: transformers' own forward and
caches, launched from Python, the original with torch's SDPA, which takes its flash kernel where it
can. `model.py` has the decode step alone, as a CUDA graph. Sequences beyond the first are copies of
it. Writes ``results/families-<device>.json`` after every row, beside the rows that are there: what
does not fit into `--minutes` is measured by another call, with `--continue`.
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
from kept import Kept, add_options, refusal
from record import head, no_gpu, place
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
AT = ("equal batch", "equal memory")


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


def prompted(model: Any, context: int, family: str, device: str) -> dict[str, Any]:
    """Milliseconds of a prompt, and the bytes of its cache after a step."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=device)
    times, cache = [], None
    for _ in range(3):  # the first warms up
        cache = None
        ms, cache = prefill(model, ids, family, device)
        times.append(ms)
    decode(model, cache, 1, device)  # what is dropped after the prompt is gone now
    held = cache_bytes(cache)
    return {
        "prefill_ms": round(min(times[1:]), 2), "cache_mb_per_sequence": round(held / 1e6, 6),
    }  # fmt: skip


def decoded(model: Any, row: dict[str, Any], most: int, batch: int, device: str) -> dict[str, Any]:
    """A step at one batch."""
    ids = torch.randint(0, model.config.vocab_size, (1, row["context"]), device=device)
    count = most if row["at"] == "equal memory" else min(batch, most)
    _, cache = prefill(model, ids, row["family"], device)
    step = decode(model, cache, count, device)
    found = {"batch": count, "step_ms": round(step, 3)}
    return found | {"tokens_per_s": round(1e3 * count / step, 1)}


def context_rows(
    kept: Kept, model: Any, base: dict[str, Any], context: int, options: argparse.Namespace
) -> None:
    """Prefill and decode at one length: the rows that are missing, as far as time goes."""
    jobs = [base | {"context": context, "at": at} for at in AT]
    prompt: dict[str, Any] = {}
    for job in [job for job in jobs if not kept.done(job)]:
        if not kept.fits(job):
            kept.leave(job)
            continue
        with kept.row(job) as row, torch.inference_mode():
            prompt = prompt or prompted(model, context, base["family"], options.device)
            row |= prompt
            most = int(free_bytes(options.device) / 1e6 / prompt["cache_mb_per_sequence"])
            row |= decoded(model, row, max(most, 1), options.batch, options.device)
        free_bytes(options.device)


def family_rows(kept: Kept, shape: str, family: str, options: argparse.Namespace) -> None:
    """Build and convert once, then every length; nothing where no row is missing."""
    base: dict[str, Any] = {"shape": shape, "family": family}
    jobs = [base | {"context": context, "at": at} for context in options.contexts for at in AT]
    jobs = [job for job in jobs if not kept.done(job)]
    told = [row for row in kept.report["rows"] if row["shape"] == shape]
    making = max((row.get("build_s", 0) + row.get("convert_s", 0) for row in told), default=0)
    if not any(kept.fits(job, making) for job in jobs):
        kept.leave(*jobs)
        return
    began = time.perf_counter()
    try:
        model = build(shape, options.device, max(options.contexts) + 64)
        wait(options.device)
        base["build_s"] = round(time.perf_counter() - began, 2)
        if family != "original":
            model, took = converted(model, family, shape, options.device)
            base |= took
    except Exception as error:  # a family that cannot be made is part of the result
        kept.add(base | {"refused": refusal(error)})
        return
    for context in options.contexts:
        context_rows(kept, model, base, context, options)
    del model
    free_bytes(options.device)


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:2])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=8, help="the equal batch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it")
    add_options(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        return no_gpu("run this on a machine with one; --device cpu --shapes tiny tries it here")
    report: dict[str, Any] = head("python kernels/bench/families.py", "transformers")
    report["equal_batch"] = options.batch
    path = place(report, options.out, "families-")
    kept = Kept(report, path, ("shape", "family", "context", "at"), options)
    for shape in options.shapes:
        for family in ("original", *options.families):
            family_rows(kept, shape, family, options)
    kept.finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
