"""The relative position bias: the module, and blocks of models that have one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import zoo_models
from pydantic import ValidationError
from torch import Tensor, nn

import reattend.selfcheck as proof
from reattend import convert, find_attention, load
from reattend.capture import capture
from reattend.inputs import made_up
from reattend.mixers.config import CoreConfig, RelativeConfig
from reattend.mixers.relative import RelativeBias, relative_bias
from reattend.mixers.scores import attend
from reattend.passes.find.sites import Found, find
from reattend.passes.normalize import normalize
from reattend.spec import AttentionSpec

BUCKETS = (4, 3, 1, 0, 2)  # of distances -2..2


class TestModule:
    def test_rows_by_distance(self) -> None:
        table = torch.arange(10.0).reshape(5, 2)
        bias = relative_bias(table, BUCKETS, 3, 4)
        assert bias.shape == (1, 2, 3, 4)
        rows = [[1, 0, 2, 2], [3, 1, 0, 2], [4, 3, 1, 0]]
        assert torch.equal(bias[0, 0], 2.0 * torch.tensor(rows))
        assert torch.equal(bias[0, 1], bias[0, 0] + 1)

    def test_later_queries_are_the_last_rows(self) -> None:
        table = torch.randn(5, 2)
        whole = relative_bias(table, BUCKETS, 9, 9)
        assert torch.equal(relative_bias(table, BUCKETS, 2, 9, offset=7), whole[:, :, 7:])

    def test_gradient_reaches_the_table(self) -> None:
        module = RelativeBias(RelativeConfig(buckets=BUCKETS, rows=5), 2)
        module(3, 4).sum().backward()
        assert torch.equal(module.weight.grad[:, 0], torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0]))

    @pytest.mark.parametrize("buckets", [(0, 1), (0, 5, 1), (0, -1, 1)])
    def test_buckets_must_be_rows(self, buckets: tuple[int, ...]) -> None:
        with pytest.raises(ValidationError, match="rows of the table"):
            RelativeConfig(buckets=buckets, rows=5)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("form", ["none", "bool", "additive", "2-D"])
def test_bias_and_mask_combine(form: str, softcap: float) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    bias = torch.randn(1, 4, 5, 7)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, :3] = False
    mask: Any = {"none": None, "bool": valid[:, None, None], "2-D": valid.long()}.get(form)
    if form == "additive":
        mask = torch.where(valid, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    core = CoreConfig(
        heads=4, kv_heads=2, qk_head_dim=8, v_head_dim=8, scale=0.3, pattern="full", softcap=softcap
    )
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores + bias
    if form != "none":
        scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    expected = torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)
    assert (attend(q, k, v, core, mask, bias) - expected).abs().max() <= 1e-6


def test_a_row_that_sees_nothing_stays_finite() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    core = CoreConfig(heads=2, kv_heads=2, qk_head_dim=4, v_head_dim=4, scale=1.0, pattern="full")
    hidden = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    assert bool(attend(q, k, k, core, hidden, torch.randn(1, 2, 3, 5)).isfinite().all())


# ---- a model whose layers share one table -------------------------------------------------


def calls(model: Any) -> list[dict[str, Any]]:
    """The same model at two shapes, the second padded on both sides."""
    plain = made_up(model, 2, 19)
    padded = made_up(model, 3, 150)
    padded["attention_mask"][0, :4] = 0
    padded["attention_mask"][1, -3:] = 0
    padded["decoder_attention_mask"][2, :5] = 0
    return [plain, padded]


def largest_gap(one: Any, other: Any, inputs: dict[str, Any]) -> float:
    real = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        a, b = one(**inputs).logits, other(**inputs).logits
    assert bool(b.isfinite().all())
    return float((a - b)[real].abs().max())


PARTS = {
    "first": [{"sites": "*block.0.*", "to": "dense"}],
    "last": [{"sites": "*block.1.*", "to": "dense"}],
    "cross": [{"sites": "*EncDecAttention", "to": "dense"}],
}


@pytest.mark.daily
@pytest.mark.parametrize("which", PARTS)
def test_some_layers_only(which: str) -> None:
    """A first layer hands its bias to later ones that were not converted."""
    model = zoo_models.build("t5")
    converted = convert(model, plan={"rules": PARTS[which]}).model
    for inputs in calls(model):
        assert largest_gap(model, converted, inputs) <= 1e-4
    inputs = calls(model)[1]
    asked = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    run = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(**asked, **run), converted.generate(**asked, **run))


@pytest.mark.slow
def test_saves_loads_and_converts_again(tmp_path: Path) -> None:
    model = zoo_models.build("t5")
    out = tmp_path / "converted"
    convert(model, plan={"rules": PARTS["first"]}, out=out)
    loaded: Any = load(out)
    again = convert(loaded, plan="identity")
    assert again.report.totals.converted == 6
    for inputs in calls(model):
        assert largest_gap(model, loaded, inputs) <= 1e-4
        assert largest_gap(model, again.model, inputs) <= 1e-4
    table = loaded.encoder.block[0].layer[0].SelfAttention.mixer.relative.weight
    before = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(table, before)


def test_each_block_has_its_own_table() -> None:
    converted = convert(zoo_models.build("t5"), plan="identity").model
    tables = [p for n, p in converted.named_parameters() if n.endswith("relative.weight")]
    assert len({t.data_ptr() for t in tables}) == len(tables) == 4


# ---- the proof ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder_site() -> Any:
    captured = capture(zoo_models.build("t5"))
    normalize(captured.gm)

    def inputs_at(length: int | None, padded: bool) -> Any:
        return captured.placeholders(captured.probe(length, padded))

    sites = find(captured.gm, captured.placeholders(), inputs_at)
    found = next(s for s in sites if isinstance(s, Found) and s.spec.core.pattern.kind == "causal")
    return captured.gm, found, inputs_at


def checked(site: Any, spec: AttentionSpec) -> proof.SelfCheck:
    gm, found, inputs_at = site
    return proof.self_check(gm, replace(found, spec=spec), inputs_at)


def test_a_bias_read_right_passes(decoder_site: Any) -> None:
    assert checked(decoder_site, decoder_site[1].spec).error <= proof.TOLERANCE


@pytest.mark.parametrize("away", [0, 1, 7, 60, 113])
def test_one_wrong_bucket_is_caught(decoder_site: Any, away: int) -> None:
    spec: AttentionSpec = decoder_site[1].spec
    assert spec.core.bias is not None
    buckets = list(spec.core.bias.buckets)
    at = len(buckets) // 2 - away
    buckets[at] = (buckets[at] + 1) % spec.core.bias.rows
    bias = replace(spec.core.bias, buckets=tuple(buckets))
    wrong = replace(spec, core=replace(spec.core, bias=bias))
    assert "not understood" in checked(decoder_site, wrong).reason


def test_a_dropped_bias_is_caught(decoder_site: Any) -> None:
    spec = decoder_site[1].spec
    dropped = replace(spec, core=replace(spec.core, bias=None))
    assert "not understood" in checked(decoder_site, dropped).reason


# ---- hand-written spellings ---------------------------------------------------------------

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Grouped heads in the order h % G; the caller's mask already holds the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, 8).transpose(1, 2)
        k, v = (p(x).view(b, t, 2, 8).transpose(1, 2).repeat(1, 2, 1, 1) for p in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(b, t, WIDTH))


class Whole(nn.Module):
    """One mask for all layers: visibility and bias together."""

    def __init__(self, inlined: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.table = nn.Embedding(9, HEADS)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.inlined = inlined

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        x, n = self.embed(ids), ids.shape[1]
        away = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        bias = self.table(away.clamp(-4, 4) + 4).permute(2, 0, 1)[None]
        seen = (away <= 0)[None, None] & (valid != 0)[:, None, None]
        mask = torch.where(seen, bias, torch.finfo(bias.dtype).min)
        for block in self.blocks:
            x = x + (Block.forward(block, x, mask) if self.inlined else block(x, mask))
        return x


@pytest.mark.daily
@pytest.mark.parametrize("inlined", [False, True])
def test_a_mask_that_holds_the_bias_is_not_added_twice(inlined: bool) -> None:
    torch.manual_seed(6)
    model = Whole(inlined).eval()
    zoo_models.liven(model)
    inputs = {"ids": torch.randint(0, 50, (2, 17)), "valid": torch.ones(2, 17).long()}
    found = find_attention(model, inputs)
    assert [s.spec.core.bias is not None for s in found.sites] == [True, True]
    assert {s.owner for s in found.sites} == {"graph" if inlined else "module"}
    converted = convert(model, plan="identity", inputs=inputs).model
    ids, valid = torch.randint(0, 50, (3, 29)), torch.ones(3, 29).long()
    valid[0, 23:] = 0
    with torch.no_grad():
        gap = (converted(ids=ids, valid=valid) - model(ids=ids, valid=valid))[valid.bool()]
    assert gap.abs().max() <= 1e-4
