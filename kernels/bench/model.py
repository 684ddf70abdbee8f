"""`python kernels/bench/model.py`: decode steps of whole models, original against latent.

Llama-2-7B- and Llama-3-8B-shaped models with random bf16 weights (speed does not depend on them),
first with their own heads and a static cache read by SDPA (flash, then cuDNN), then with every
attention block replaced by `LatentAttention` of rank 512 + 64 (7 % of Llama-2-7B's cache) over a
`SpanCache`, which runs `reattend::latent_attention`. One step (embedding to next token) is a
replayed CUDA graph at a full context; measured at equal batch and at equal memory of the cache. It
is not a conversion (`families.py` is): nothing is said about its time or the model's quality.
Writes ``results/model-<device>.json`` after every row; `--minutes` ends a run early.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from families import SHAPES, build
from record import head, no_gpu, place, write
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


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES)[:2], default=list(SHAPES)[:2])
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=8, help="the equal batch, where it fits")
    parser.add_argument("--cache-gb", type=float, default=103.5, help="memory for the cache")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        return no_gpu("run this on a machine with a CUDA or ROCm device")

    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = head("python kernels/bench/model.py", "transformers") | {
        "rank": RANK, "rope": ROPE, "cache_gb": options.cache_gb, "rows": [],
    }  # fmt: skip
    path = place(report, options.out, "model-")
    for shape in options.shapes:
        model = build(shape, "cuda", max(options.contexts) + ROOM)
        for kind in KINDS:
            for context in options.contexts:
                if time.monotonic() > deadline:
                    sys.stdout.write(f"no time for {shape}, {kind}, {context} tokens\n")
                    continue
                report["rows"] += rows_of(model, shape, kind, context, options)
                report["times_faster"] = times_faster(report["rows"])
                write(report, path)
        del model
        torch.cuda.empty_cache()
    sys.stdout.write(f"latent is {report.get('times_faster')} times faster\nwrote {path}\n")
    return 0


def rows_of(
    model: Any, shape: str, kind: str, length: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both batches of one kind of attention at one length."""
    latent, heads = kind == "latent", model.config.num_key_value_heads
    capacity, rows = length + ROOM, []
    for layer in model.model.layers:
        own = getattr(layer.self_attn, "block", layer.self_attn)
        layer.self_attn = latent_block(own) if latent else SdpaDecode(own, length, BACKENDS[kind])
    per_token = bytes_per_token(model, latent)
    fits = int(options.cache_gb * 1e9 / (per_token * capacity))
    whole = int(options.cache_gb * 1e9 / (bytes_per_token(model, False) * capacity))
    for memory, batch in (("equal batch", min(options.batch, whole)), ("equal memory", fits)):
        torch.cuda.empty_cache()
        made = SpanCache if latent else StaticCache
        row = {
            "shape": shape, "model": kind, "at": memory, "batch": batch, "context": length,
            "cache_bytes_per_token": per_token,
        }  # fmt: skip
        try:
            cache = made(config=model.config, max_cache_len=capacity)
            filled(cache, batch, (1, 1) if latent else (heads, heads), length)
            ms = step_ms(model, cache, batch, length)
            row |= {"step_ms": round(ms, 3), "tokens_per_s": round(batch / ms * 1e3, 1)}
        except Exception as error:  # what does not fit or run is part of the result
            row["refused"] = f"{type(error).__name__}: {str(error)[:200]}"
        cache = None
        rows.append(row)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    return rows


if __name__ == "__main__":
    sys.exit(main())
