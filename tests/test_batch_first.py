"""torch's own attention modules: tokens first or batch first, every mask, every fused path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from reattend import convert, find_attention
from reattend.errors import ArgumentError, RefusedError
from reattend.passes.normalize import normalize
from reattend.passes.normalize.batch_first import BatchFirst
from reattend.passes.normalize.forms import aten, is_op
from reattend.running import evaluation

D, B, N, M = 16, 2, 11, 7
PLAN = {"rules": [{"sites": "*", "to": "dense"}]}


class Net(nn.Module):
    """A residual around attention; `cross`: keys and values from elsewhere."""

    def __init__(self, batch_first: bool, need_weights: bool, cross: bool = False) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(D, 4, batch_first=batch_first)
        self.need_weights, self.cross = need_weights, cross

    def forward(self, x: Tensor, memory: Any = None, pad: Any = None, mask: Any = None) -> Tensor:
        source = memory if self.cross else x
        y, _ = self.att(
            x, source, source, key_padding_mask=pad, attn_mask=mask, need_weights=self.need_weights
        )
        return x + y


def alive(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        scale = 1.5 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3
        p.data = torch.randn(p.shape, generator=generator) * scale
    return model.eval()


def tokens(batch_first: bool, length: int = N, batch: int = B) -> Tensor:
    x = torch.randn(batch, length, D, generator=torch.Generator().manual_seed(length))
    return x if batch_first else x.transpose(0, 1).contiguous()


def padding(length: int, *hidden: int) -> Tensor:
    """[B, length], True where hidden."""
    pad = torch.zeros(B, length, dtype=torch.bool)
    for row, count in enumerate(hidden):
        pad[row, length - count :] = True
    return pad


def gap(model: nn.Module, converted: nn.Module, inputs: dict[str, Any]) -> float:
    with torch.no_grad(), evaluation(model):
        want = model(**inputs)
    with torch.no_grad():
        return float((converted(**inputs) - want).abs().max())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_and_its_padding(batch_first: bool, need_weights: bool) -> None:
    model = alive(Net(batch_first, need_weights))
    inputs = {"x": tokens(batch_first), "pad": padding(N)}
    (site,) = find_attention(model, inputs).sites
    assert (site.path, site.owner, site.follows_padding) == ("att", "module", True)
    converted = convert(model, PLAN, inputs=inputs).model
    assert gap(model, converted, inputs) <= 1e-6
    assert gap(model, converted, inputs | {"pad": padding(N, 0, 4)}) <= 1e-6
    with pytest.raises(ArgumentError, match="attn_mask"):
        converted(**inputs, mask=torch.zeros(N, N))


@pytest.mark.daily
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_reads_rows_of_one_weight(batch_first: bool) -> None:
    model = alive(Net(batch_first, False, cross=True))
    inputs = {"x": tokens(batch_first), "memory": tokens(batch_first, M), "pad": padding(M)}
    (site,) = find_attention(model, inputs).sites
    assert (site.owner, site.spec.kind) == ("module", "cross")
    assert site.spec.k.proj.rows[0] == D and site.spec.v.proj.rows[0] == 2 * D
    converted = convert(model, PLAN, inputs=inputs).model
    assert gap(model, converted, inputs | {"pad": padding(M, 3, 1)}) <= 1e-6


def test_a_mask_of_the_caller_is_whatever_is_passed() -> None:
    model = alive(Net(True, False))
    causal = nn.Transformer.generate_square_subsequent_mask(N)
    inputs = {"x": tokens(True), "mask": causal}
    (site,) = find_attention(model, inputs).sites
    assert site.spec.core.pattern.kind == "opaque"
    converted = convert(model, PLAN, inputs=inputs).model
    other = torch.zeros(N, N).masked_fill(torch.rand(N, N) < 0.4, -torch.inf).fill_diagonal_(0.0)
    assert gap(model, converted, {"x": tokens(True), "mask": other}) <= 1e-6


@pytest.mark.daily
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_stack_of_layers_takes_its_slow_path(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 4, 24, batch_first=batch_first)
    model = alive(nn.TransformerEncoder(layer, 2))
    inputs = {"src": tokens(batch_first), "src_key_padding_mask": padding(N)}
    found = find_attention(model, inputs)
    assert torch.backends.mha.get_fastpath_enabled()
    assert [s.path for s in found.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
    converted = convert(model, PLAN, inputs=inputs).model
    padded = inputs | {"src_key_padding_mask": padding(N, 0, 3)}
    real = ~padded["src_key_padding_mask"] if batch_first else ~padded["src_key_padding_mask"].T
    with torch.no_grad():
        got, fused = converted(**padded), model(**padded)
    assert float((got - fused)[real].abs().max()) <= 1e-5
    assert converted.train()(**padded).shape == got.shape


def test_layers_that_are_no_attention_keep_their_axes() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(x.transpose(0, 1)).relu().transpose(0, 1)

    gm: Any = torch.export.export(Mixer(), (tokens(True),), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    normalize(gm)
    assert not BatchFirst()(gm).modified
    assert sum(is_op(n, aten.transpose) for n in gm.graph.nodes) == 2


class Widths(nn.Module):
    """Keys and values of widths of their own, from the same tokens."""

    def __init__(self, kdim: int, vdim: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(D, kdim), nn.Linear(D, vdim)
        self.att = nn.MultiheadAttention(D, 4, batch_first=True, kdim=kdim, vdim=vdim)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.att(x, self.keys(x), self.values(x), need_weights=False)
        return x + y


@pytest.mark.daily
@pytest.mark.parametrize("widths", [{"kdim": 12, "vdim": 10}, {"kdim": 12, "vdim": 12}])
def test_keys_and_values_of_other_widths(widths: dict[str, int]) -> None:
    model = alive(Widths(**widths))
    inputs = {"x": tokens(True)}
    result = convert(model, plan=PLAN, inputs=inputs)
    assert [site.action for site in result.report.sites] == ["converted"]
    for length, batch in ((N, B), (5, 3)):
        assert gap(model, result.model, {"x": tokens(True, length, batch)}) <= 1e-6


@pytest.mark.daily
@pytest.mark.parametrize("more", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_that_are_no_tokens_are_the_models_own_steps(more: dict[str, bool]) -> None:
    """A learned or empty key beside the tokens': identity carries it, what needs tokens refuses."""
    model = Net(batch_first=True, need_weights=False)
    model.att = nn.MultiheadAttention(D, 4, batch_first=True, **more)
    alive(model)
    inputs = {"x": tokens(True)}
    result = convert(model, plan=PLAN, inputs=inputs)
    assert [site.action for site in result.report.sites] == ["converted"]
    for length, batch in ((N, B), (5, 3)):
        assert gap(model, result.model, {"x": tokens(True, length, batch)}) <= 1e-6
    for rule, why in (
        ({"to": "mla", "kv_keep": 0.5}, "the model's own steps, not by a projection"),
        ({"to": "sparse", "pattern": {"window": 2}}, "keys are not one for each token"),
    ):
        with pytest.raises(RefusedError, match=why):
            convert(model, plan={"rules": [{"sites": "*", **rule}]}, inputs=inputs)
