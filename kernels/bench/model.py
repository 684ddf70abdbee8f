"""`python kernels/bench/model.py`: decode steps of a whole model, original against latent.

A Llama-2-7B-shaped model with random bf16 weights (speed does not depend on them), first with its
own heads and a static cache read by SDPA (flash, then cuDNN), then with every attention block
replaced by `LatentAttention` of rank 512 + 64 (7 % of the cache) over a `SpanCache`, which runs
`reattend::latent_attention`. One step (embedding to next token) is a replayed CUDA graph at a
full context; measured at equal batch and at equal memory of the cache. It is not a conversion:
nothing is said about its time or the model's quality. Writes ``results/model-<device>.json``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import head, place, write
from timing import replay_ms
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
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


def build(layers: int, hidden: int) -> Any:
    """The model with random weights on the GPU."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, head_dim=128,
        vocab_size=32000, max_position_embeddings=1 << 20,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


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
                q, keys[:, :, : self.length], values[:, :, : self.length]
            )
        return self.block.o_proj(y.transpose(1, 2).flatten(2)), None


def latent_block(block: Any) -> nn.Module:
    """The block replaced by a latent one with random weights."""
    heads, d = block.config.num_attention_heads, block.head_dim
    pairs = tuple(range(d // 2))
    config = LatentConfig(
        hidden_size=block.config.hidden_size, memory_size=0, out_features=block.config.hidden_size,
        q=StreamConfig(), k=StreamConfig(), v=StreamConfig(),
        rotary=RotaryConfig(inv_freq=tuple(10000.0 ** (-2 * i / d) for i in pairs)),
        core=CoreConfig(
            heads=heads, kv_heads=heads, qk_head_dim=d, v_head_dim=d, scale=d**-0.5,
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
    ids = torch.randint(0, 32000, (batch, 1), device="cuda")
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


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8, help="the equal batch")
    parser.add_argument("--cache-gb", type=float, default=103.5, help="memory for the cache")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU: nothing to measure\n")
        return 5

    model = build(options.layers, options.hidden)
    heads, length = model.config.num_key_value_heads, options.context
    capacity = length + ROOM
    rows = []
    for kind in KINDS:
        latent = kind == "latent"
        for layer in model.model.layers:
            own = getattr(layer.self_attn, "block", layer.self_attn)
            layer.self_attn = (
                latent_block(own) if latent else SdpaDecode(own, length, BACKENDS[kind])
            )
        per_token = bytes_per_token(model, latent)
        most = int(options.cache_gb * 1e9 / (per_token * capacity))
        for memory, batch in (("equal batch", options.batch), ("equal memory", most)):
            torch.cuda.empty_cache()
            made = SpanCache if latent else StaticCache
            cache = made(config=model.config, max_cache_len=capacity)
            filled(cache, batch, (1, 1) if latent else (heads, heads), length)
            ms = step_ms(model, cache, batch, length)
            del cache
            row = {
                "model": kind, "at": memory, "batch": batch, "context": length,
                "cache_bytes_per_token": per_token, "step_ms": round(ms, 3),
                "tokens_per_s": round(batch / ms * 1e3, 1),
            }  # fmt: skip
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    speed = {(row["model"], row["at"]): row["tokens_per_s"] for row in rows}
    ratios = {
        f"{kind}, {at}": round(speed["latent", at] / speed[kind, at], 2)
        for kind in BACKENDS
        for at in ("equal batch", "equal memory")
    }
    report = {
        **head("python kernels/bench/model.py", "transformers"),
        "shape": {"layers": options.layers, "hidden": options.hidden, "heads": heads},
        "rank": RANK,
        "rope": ROPE,
        "rows": rows,
        "times_faster": ratios,
    }
    path = place(report, options.out, "model-")
    write(report, path)
    sys.stdout.write(f"latent is {ratios} times faster\nwrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
