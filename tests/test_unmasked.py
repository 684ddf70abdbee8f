"""Masks of no fixed pattern: taken from the model call by call, and never made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import zoo_models
from torch import Tensor, nn

from reattend import Plan, convert
from reattend.capture import watch
from reattend.errors import ArgumentError, UnsupportedCacheError
from reattend.install.adapter import Adapter
from reattend.install.unmasked import unmasked
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import attend, refuse_opaque

WIDTH, HEADS = 32, 4
PAPER = Plan.load("transmla-paper").rules[0].to_dict() | {"kv_keep": None}
MLA = {"rules": [{**PAPER, "kv_lora_rank": 64, "qk_rope_head_dim": 0}]}


class Attention(nn.Module):
    """`without`: what no mask means here."""

    def __init__(self, without: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.without = without

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if mask is None and self.without == "error":
            raise ValueError("a mask, please")
        causal = mask is None and self.without == "causal"
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        if mask is None and self.without == "halved":
            y = y / 2
        return self.out(y.transpose(1, 2).flatten(2))


class Inlined(nn.Module):
    def __init__(self, without: str) -> None:
        super().__init__()
        self.ln, self.attn = nn.LayerNorm(WIDTH), Attention(without)

    def forward(self, x: Tensor, prefix: Tensor, valid: Tensor) -> Tensor:
        h, a = self.ln(x), self.attn
        q, k, v = a.qkv(h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, prefix_mask(prefix, valid))
        return x + F.linear(y.transpose(1, 2).flatten(2), a.out.weight, a.out.bias)


class Flat(Inlined):
    """The model runs its code without calling it: no submodule holds the attention."""


class Owned(nn.Module):
    def __init__(self, without: str) -> None:
        super().__init__()
        self.ln, self.attn = nn.LayerNorm(WIDTH), Attention(without)

    def forward(self, x: Tensor, prefix: Tensor, valid: Tensor) -> Tensor:
        return x + self.attn(self.ln(x), prefix_mask(prefix, valid))


def prefix_mask(prefix: Tensor, valid: Tensor) -> Tensor:
    """A prefix language model's: [B, 1, N, N], causal, and the prefix sees itself both ways."""
    j = torch.arange(valid.shape[1])
    seen = (j[None, :] <= j[:, None])[None] | (j[None, None, :] < prefix[:, None, None])
    return (seen & (valid != 0)[:, None, :])[:, None]


class Model(nn.Module):
    def __init__(self, block: type[nn.Module], without: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(block(without) for _ in range(2))

    def forward(self, ids: Tensor, prefix: Tensor, valid: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            run = block.forward if isinstance(block, Flat) else block
            x = run(x, prefix, valid)
        return x


def model(block: type[nn.Module] = Owned, without: str = "error") -> Model:
    torch.manual_seed(4)
    return Model(block, without).eval()


def inputs(length: int = 17, prefix: tuple[int, ...] = (4, 9), pad: int = 0) -> dict[str, Tensor]:
    valid = torch.ones(len(prefix), length, dtype=torch.long)
    valid[0, length - pad :] = 0
    ids = torch.arange(valid.numel()).reshape(valid.shape) % 50
    return {"ids": ids, "prefix": torch.tensor(prefix), "valid": valid}


@pytest.mark.parametrize("plan", ["identity", MLA], ids=["identity", "mla"])
@pytest.mark.parametrize("block", [Owned, Inlined, Flat])
def test_a_prefix_mask_is_kept_by_any_conversion(block: type[nn.Module], plan: Any) -> None:
    original = model(block)
    result = convert(original, plan=plan, inputs=inputs(), data=[inputs()])
    told = [(s.spec.pattern, s.owner.kind) for s in result.report.sites if s.spec and s.owner]
    assert told == [("opaque", "graph" if block is Flat else "module")] * 2
    converted = result.model
    for given in (inputs(), inputs(31, (7, 30, 0)), inputs(23, (11, 2), pad=5)):
        with torch.no_grad():
            expected, got = original(**given), converted(**given)
        assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("without", "kind"),
    [("full", "full"), ("causal", "causal"), ("error", ""), ("halved", "")],
)
def test_what_no_mask_means_is_seen_not_assumed(without: str, kind: str) -> None:
    original = model(Owned, without)
    path = "blocks.0.attn"
    call = watch(original, {path}, inputs())[path]
    owner = original.get_submodule(path)
    assert unmasked(owner, call, ("mask",), call.output) == kind


@pytest.mark.parametrize("without", ["causal", "error"])
def test_a_call_without_a_mask_does_what_the_original_does_or_fails(without: str) -> None:
    original = model(Owned, without)
    converted = convert(original, plan="identity", inputs=inputs()).model
    mine = converted.get_submodule("blocks.0.attn")
    assert isinstance(mine, Adapter)
    x = torch.randn(2, 11, WIDTH)
    with torch.no_grad():
        if without == "causal":
            assert (mine(x) - original.blocks[0].attn(x)).abs().max() <= 1e-5
        else:
            with pytest.raises(ArgumentError, match="attends by the model's own mask was given no"):
                mine(x)
        with pytest.raises(ArgumentError, match=r"given a mask of shape \(2, 11\)"):
            mine(x, torch.ones(2, 11))


def test_an_opaque_core_is_never_full_by_accident() -> None:
    core = CoreConfig(heads=1, kv_heads=1, qk_head_dim=4, v_head_dim=4, scale=1.0, pattern="opaque")
    x = torch.randn(1, 1, 1, 4)
    with pytest.raises(ArgumentError, match="no mask"):
        attend(x, x, x, core, None)
    with pytest.raises(UnsupportedCacheError, match="fixed-capacity"):
        refuse_opaque(core)


def test_a_mask_made_inside_a_block_is_made_there_again() -> None:
    """Nobody passes the mask to the block: how it is made is kept before the mixer."""

    class Inside(Attention):
        def forward(self, x: Tensor, prefix: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, prefix_mask(prefix, valid))

    original = model(Owned)
    for block in original.blocks:
        block.attn.__class__ = Inside
        block.forward = lambda x, p, v, b=block: x + b.attn(b.ln(x), p, v)
    converted = convert(original, plan="identity", inputs=inputs()).model
    blocks = [m for m in converted.modules() if isinstance(m, Adapter)]
    arounds = [m.binding.around for m in blocks if m.binding.around is not None]
    assert [list(a.before) for a in arounds] == [["mask"]] * 2
    given = inputs(31, (7, 30, 0))
    with torch.no_grad():
        assert (converted(**given) - original(**given)).abs().max() <= 1e-5


def vision_inputs(batch: int = 2, length: int = 23, pad: int = 0) -> dict[str, Any]:
    ids = torch.randint(10, 90, (batch, length), generator=torch.Generator().manual_seed(3))
    ids[0, 3:7] = 5
    ids[1:, 8:12] = 5
    attention = torch.ones_like(ids)
    attention[0, :pad] = 0
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids, "attention_mask": attention, "token_type_ids": (ids == 5).long(),
        "pixel_values": pixels,
    }  # fmt: skip


@pytest.mark.parametrize("how", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_images_in_the_example_make_an_opaque_mask(how: str) -> None:
    original = zoo_models.build("gemma3_vision", how)
    example = {**vision_inputs(), "use_cache": False}
    result = convert(original, plan="identity", inputs=example)
    assert {s.action for s in result.report.sites} == {"converted"}
    told = [s.spec.pattern for s in result.report.sites if "language" in s.path and s.spec]
    assert told == ["opaque", "opaque"]
    converted = result.model
    for given in (vision_inputs(), vision_inputs(3, 31, 2)):
        with torch.no_grad():
            expected, got = original(**given).logits, converted(**given).logits
        real = given["attention_mask"].bool()
        assert (got - expected)[real].abs().max() <= 1e-4 * expected.abs().max()
    for pad in (0, 2):
        run = {**vision_inputs(pad=pad), "max_new_tokens": 12, "do_sample": False}
        assert bool((original.generate(**run) == converted.generate(**run)).all())
