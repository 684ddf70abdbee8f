"""`python kernels/bench/model.py`: decode steps of whole models, original against latent.

Llama-2-7B- and Llama-3-8B-shaped models with random bf16 weights (speed does not depend on them),
first with their own heads and a static cache read by SDPA (flash, then cuDNN), then with every
attention block replaced by `LatentAttention` of rank 512 + 64 (7 % of Llama-2-7B's cache) over a
`SpanCache`, which runs `reattend::latent_attention`. One step (embedding to next token) is a
replayed CUDA graph at a full context; measured at equal batch and at equal memory of the cache. It
is not a conversion (`families.py` is): nothing is said about its time or the model's quality.
Writes ``results/model-<device>.json`` after every row, beside the rows that are there: what does
not fit into `--minutes` is measured by another call, with `--continue`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from families import AT, SHAPES, build
from kept import Kept, add_options
from record import head, no_gpu, place
from timing import replay_ms
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reattend.install.adapter import install
from reattend.install.binding import Binding, TableRef
from reattend.install.spans import SpanCache
from reattend.mixers.config import CoreConfig, RotaryConfig, StreamConfig
from reattend.mixers.latent import LatentAttention
from reattend.mixers.latent_config import LatentConfig

RESULTS = Path(__file__).parent / "results"
RANK, ROPE = 512, 64
BACKENDS = {
    "original, flash": SDPBackend.FLASH_ATTENTION,
    "original, cudnn": SDPBackend.CUDNN_ATTENTION,
}
KINDS = (*BACKENDS, "latent")
ROOM = 64  # steps that fit after the context


class SdpaDecode(nn.Module):
    """The original block over a static cache, read by one SDPA kernel up to a fixed length."""

    def __init__(self, block: Any, length: int, backend: SDPBackend) -> None:
        super().__init__()
        self.block, self.length, self.backend = block, length, backend

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: StaticCache,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Same call as the block it stands for."""
        b, n, _ = hidden_states.shape
        q, k, v = (
            proj(hidden_states).view(b, n, -1, self.block.head_dim).transpose(1, 2)
            for proj in (self.block.q_proj, self.block.k_proj, self.block.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        keys, values = past_key_values.update(k, v, self.block.layer_idx)
        with sdpa_kernel([self.backend]):
            y = F.scaled_dot_product_attention(
                q,
                keys[:, :, : self.length],
                values[:, :, : self.length],
                enable_gqa=q.shape[1] != keys.shape[1],
            )
        return self.block.o_proj(y.transpose(1, 2).flatten(2)), None


def latent_block(block: Any) -> nn.Module:
    """The block replaced by a latent one with random weights."""
    heads, groups = block.config.num_attention_heads, block.config.num_key_value_heads
    d = block.head_dim
    pairs = tuple(range(d // 2))
    config = LatentConfig(
        hidden_size=block.config.hidden_size, memory_size=0, out_features=block.config.hidden_size,
        q=StreamConfig(), k=StreamConfig(), v=StreamConfig(),
        rotary=RotaryConfig(inv_freq=tuple(10000.0 ** (-2 * i / d) for i in pairs)),
        core=CoreConfig(
            heads=heads, kv_heads=groups, qk_head_dim=d, v_head_dim=d, scale=d**-0.5,
            softcap=0.0, pattern="causal",
        ),
        kv_lora_rank=RANK, qk_rope_head_dim=ROPE, rope_columns=tuple(range(ROPE // 2)),
    )  # fmt: skip
    cos, sin = (
        TableRef(path=("position_embeddings", i), part="all", columns=pairs) for i in (0, 1)
    )
    binding = Binding(
        hidden=("hidden_states",), mask=("attention_mask",), cache=("past_key_values",),
        layer_idx=block.layer_idx, output={"tuple": ["y", None]}, cos=cos, sin=sin,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        mixer = LatentAttention(config)
    torch.set_default_dtype(torch.float32)
    return install(block, mixer, binding)


def filled(cache: Any, batch: int, heads: tuple[int, int], length: int) -> Any:
    """The cache with random rows up to a length."""
    width = (128, 128) if heads[0] > 1 else (RANK, ROPE)
    for layer in cache.layers:
        new = [
            torch.empty(batch, h, 1, w, dtype=torch.bfloat16, device="cuda")
            for h, w in zip(heads, width, strict=True)
        ]
        layer.lazy_initialization(*new)
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length - 1)
    return cache


def step_ms(model: Any, cache: Any, batch: int, length: int) -> float:
    """Milliseconds of one decode step."""
    body = model.model
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")
    position = torch.full((1, 1), length - 1, device="cuda")

    def step() -> Tensor:
        x = body.embed_tokens(ids)
        turn = body.rotary_emb(x, position)
        for layer in body.layers:
            x = layer(x, attention_mask=None, position_embeddings=turn, past_key_values=cache)
            x = x[0] if isinstance(x, tuple) else x
        logits: Tensor = model.lm_head(body.norm(x)[:, -1])
        return logits.argmax(-1)

    with torch.inference_mode():
        return replay_ms([step], rounds=10, repeats=1)


def bytes_per_token(model: Any, latent: bool) -> int:
    """Cache bytes of one token in all layers."""
    config = model.config
    row = RANK + ROPE if latent else 2 * config.num_key_value_heads * 128
    return 2 * row * int(config.num_hidden_layers)


def times_faster(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens per second of the latent model over those of each original."""
    speed = {
        (row["shape"], row["context"], row["at"], row["model"]): row["tokens_per_s"]
        for row in rows
        if "tokens_per_s" in row
    }
    return {
        f"{kind}, {at}, {shape}, {context} tokens": round(
            speed[shape, context, at, "latent"] / n, 2
        )
        for (shape, context, at, kind), n in speed.items()
        if kind != "latent" and (shape, context, at, "latent") in speed
    }


def measure(model: Any, row: dict[str, Any], options: argparse.Namespace) -> None:
    """One kind of attention at one length and batch; adds to the row."""
    latent, heads = row["model"] == "latent", model.config.num_key_value_heads
    length = row["context"]
    capacity = length + ROOM
    for layer in model.model.layers:
        own = getattr(layer.self_attn, "block", layer.self_attn)
        made = latent_block(own) if latent else SdpaDecode(own, length, BACKENDS[row["model"]])
        layer.self_attn = made
    room = options.cache_gb * 1e9 / capacity
    per_token = bytes_per_token(model, latent)
    whole = int(room / bytes_per_token(model, False))
    batch = min(options.batch, whole) if row["at"] == "equal batch" else int(room / per_token)
    row |= {"batch": batch, "cache_bytes_per_token": per_token}
    torch.cuda.empty_cache()
    cache = (SpanCache if latent else StaticCache)(config=model.config, max_cache_len=capacity)
    filled(cache, batch, (1, 1) if latent else (heads, heads), length)
    ms = step_ms(model, cache, batch, length)
    row |= {"step_ms": round(ms, 3), "tokens_per_s": round(batch / ms * 1e3, 1)}


def shape_rows(kept: Kept, shape: str, options: argparse.Namespace) -> None:
    """Build once, then every kind and length; nothing where no row is missing."""
    jobs: list[dict[str, Any]] = [
        {"shape": shape, "model": kind, "context": context, "at": at}
        for kind in KINDS
        for context in options.contexts
        for at in AT
    ]
    jobs = [job for job in jobs if not kept.done(job)]
    if not any(map(kept.fits, jobs)):
        kept.leave(*jobs)
        return
    model = build(shape, "cuda", max(options.contexts) + ROOM)
    for job in jobs:
        if not kept.fits(job):
            kept.leave(job)
            continue
        with kept.row(job) as row:
            measure(model, row, options)
    del model
    torch.cuda.empty_cache()


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES)[:2], default=list(SHAPES)[:2])
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=8, help="the equal batch, where it fits")
    parser.add_argument("--cache-gb", type=float, default=103.5, help="memory for the cache")
    add_options(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        return no_gpu("run this on a machine with a CUDA or ROCm device")

    report: dict[str, Any] = head("python kernels/bench/model.py", "transformers") | {
        "rank": RANK, "rope": ROPE, "cache_gb": options.cache_gb, "equal_batch": options.batch,
    }  # fmt: skip
    path = place(report, options.out, "model-")
    kept = Kept(report, path, ("shape", "model", "context", "at"), options, times_faster)
    for shape in options.shapes:
        shape_rows(kept, shape, options)
    sys.stdout.write(f"latent is {report['times_faster']} times faster\n")
    kept.finish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
