"""Owners that do more than their attention: in hand-written modules and in a transformers Llama."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    repeat_kv,
)

WIDTH, HEADS = 32, 4


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(nn.Module):
    """The block alone; subclasses do more around it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def attend(self, x: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        if mask is not None:
            causal = False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


Result = tuple[Tensor, Tensor | None]


class ResidualInside(Attention):
    """Bloom: the residual is an argument, and added inside."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        return self.attend(x, mask) + residual, None


class NormAfter(Attention):
    """BERT: the residual and its norm are inside."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        return self.norm(self.attend(x, mask) + x), None


class NormBefore(Attention):
    """The owner receives what is not normalised yet."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        return self.attend(self.norm(x), mask), None


class Parallel(Attention):
    """A norm before, and an MLP of the normed states beside the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        h = self.norm(x)
        return x + self.attend(h, mask) + self.drop(F.gelu(self.mlp(h))), None


class ValidityOnly(Attention):
    """The owner is told which tokens are real and makes its mask itself."""

    def forward(
        self, x: Tensor, residual: Tensor, mask: Tensor, valid: Tensor, *_: Tensor
    ) -> Result:
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril() & (valid[:, None, None, :] != 0)
        return self.attend(x, mask) + residual, None


class MaskInside(Attention):
    """The same from an additive row."""

    def forward(
        self, x: Tensor, residual: Tensor, mask: Tensor, valid: Tensor, row: Tensor, *_: Tensor
    ) -> Result:
        n = x.shape[1]
        hidden = torch.full((n, n), -1e38).triu(1)
        return self.attend(x, hidden + row[:, None, None, :]) + residual, None


class AnglesInside(Attention):
    """Rotary angles are an argument; the owner makes cos and sin of them."""

    def forward(
        self, x: Tensor, residual: Tensor, mask: Tensor, valid: Tensor, row: Tensor, angle: Tensor
    ) -> Result:
        cos, sin = angle.cos(), angle.sin()

        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), None


class TwoCores(Attention):
    """Two blocks in one module."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        return self.attend(self.attend(self.norm(x), mask), mask), None


class Leaking(Attention):
    """Something leaves the module by another way than its result."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        self.kept.append(torch.tanh(x))
        return self.attend(self.norm(x), mask), None

    kept: list[Tensor] = []  # noqa: RUF012


class Reaching(Attention):
    """Something enters the module by another way than its arguments."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        return self.attend(x, mask) + self.seen[-1], None

    seen: list[Tensor] = []  # noqa: RUF012


class KeysToo(Attention):
    """The keys leave the module beside the output."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), k


class InPlace(Attention):
    """Writes into a tensor that is read again."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        h = self.norm(x)
        y = self.attend(h, mask)
        return y + h.mul_(2.0) + h, None


class UnderView(Attention):
    """Writes into a tensor of which a view of an unusual kind is read afterwards."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        h = self.norm(x)
        half = h.chunk(2, -1)[0]
        y = self.attend(x, mask)
        return y + h.mul_(2.0) + half.repeat(1, 1, 2), None


class Wider(Attention):
    """The result has another dtype than what it is made of."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        return (self.attend(x, mask) + residual).double(), None


class Windows(Attention):
    """Swin: tokens of a square are regrouped to windows and back."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> Result:
        b, n, d = x.shape
        side, w = 8, 4
        grid = self.norm(x).view(b, side // w, w, side // w, w, d).permute(0, 1, 3, 2, 4, 5)
        y = self.attend(grid.reshape(-1, w * w, d), causal=False)
        y = y.view(b, side // w, side // w, w, w, d).permute(0, 1, 3, 2, 4, 5)
        return x + y.reshape(b, n, d), None


class Tower(nn.Module):
    """Two blocks behind an embedding; padding is hidden by a mask made at the top."""

    def __init__(self, block: type[Attention]) -> None:
        super().__init__()
        self.kind = block
        self.embed = nn.Embedding(50, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        n = ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        mask = mask & (attention_mask[:, None, None, :] != 0)
        row = (attention_mask == 0) * -1e38
        angle = torch.arange(n)[:, None] * 0.3 ** torch.arange(4)
        x = self.embed(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            Reaching.seen[:] = [x * 0.5]
            seen = None if issubclass(self.kind, ValidityOnly | MaskInside) else mask
            given = None if issubclass(self.kind, MaskInside) else attention_mask
            y, more = block(norm(x), x, seen, given, row, angle)
            x = (y if more is None else y + more).float()
            x = x + Leaking.kept.pop() if Leaking.kept else x
        return self.head(x)


def tower(block: type[Attention]) -> Tower:
    torch.manual_seed(4)
    model = Tower(block).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def example(length: int = 17, pad: int = 0, batch: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if pad:
        mask[0, -pad:] = 0
    return {"ids": ids, "attention_mask": mask}


class InlinedLayer(LlamaDecoderLayer):
    """A Llama layer whose attention is written out in the layer: nothing smaller holds it."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.self_attn
        return heads(a.q_proj(x)), heads(a.k_proj(x), 2), heads(a.v_proj(x), 2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        q, k, v = self.project(self.input_layernorm(hidden_states))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.self_attn.layer_idx)
        k, v = repeat_kv(k, 2), repeat_kv(v, 2)
        causal = attention_mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal)
        x = hidden_states + self.self_attn.o_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class ShiftingLayer(InlinedLayer):
    """RWKV's token shift before attention: a token also sees the one before it."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(0.5 * (x + F.pad(x, (0, 0, 1, 0))[:, :-1]))


class CountingLayer(InlinedLayer):
    """The layer itself counts its tokens, from zero in every call."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x + 0.1 * torch.arange(x.shape[1])[None, :, None])


def llama(layer: type[InlinedLayer], layers: int = 2) -> Any:
    """A Llama with other layers; the weights are in the same places."""
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=97, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for i, own in enumerate(model.model.layers):
        other = layer(config, i)
        other.load_state_dict(own.state_dict())
        model.model.layers[i] = other.eval()
    model.generation_config.eos_token_id = None
    return model


def prompts() -> dict[str, Tensor]:
    """Three left-padded rows."""
    ids = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 7)):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}
