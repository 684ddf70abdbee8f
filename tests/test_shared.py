"""Blocks that read the keys and values of an earlier one, handed on in a mapping (Gemma 3n)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import reattend.callcheck as callcheck
from reattend import convert, find_attention
from reattend.errors import RefusedError
from reattend.install.pieces import HandedOn

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """`makes`: its keys and values are its own. `form`: what it leaves for others of its keys."""

    def __init__(self, makes: bool, form: float) -> None:
        super().__init__()
        self.makes, self.form = makes, form
        self.q, self.o = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        if makes:
            self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        q = self.q(x).unflatten(-1, (2 * HEADS, -1)).transpose(1, 2)
        if self.makes:  # heads in another order than the normal form's
            k, v = self.kv(x).unflatten(-1, (2, HEADS, -1)).transpose(1, 3).unbind(2)
            k, v = k.roll(1, 1), v.roll(1, 1)
            shared["last"] = (k if self.form == 1.0 else k * self.form, v)
        else:
            k, v = shared["last"]
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, form: float = 1.0) -> None:
        super().__init__()
        kinds = (True, True, False, True, False)  # nothing reads the first one's
        self.layers = nn.ModuleList([Attention(makes, form) for makes in kinds])

    def forward(self, x: Tensor) -> Tensor:
        shared: dict[str, Any] = {}
        for layer in self.layers:
            x = x + layer(x, shared)
        return x


def made(form: float = 1.0) -> Model:
    torch.manual_seed(5)
    return Model(form).eval()


def inputs(batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))}


def test_readers_name_the_maker_and_identity_hands_on() -> None:
    model = made()
    found = find_attention(model, inputs())
    assert not found.refused
    assert [s.spec.k.site for s in found.sites] == ["", "", "layers.1", "", "layers.3"]
    assert all(s.verified and s.owner == "module" for s in found.sites)
    assert [s.spec.core.kv_heads for s in found.sites] == [HEADS] * 5
    result = convert(model, plan="identity", inputs=inputs())
    cost = [s.cost for s in result.report.sites]  # who makes keys and values is who caches them
    cached = HEADS * 2 * (WIDTH // HEADS)
    assert [c.before.cache_numbers_per_token for c in cost if c] == [cached, cached, 0, cached, 0]
    assert [c.after for c in cost if c] == [c.before for c in cost if c]
    converted = result.model
    for batch, length in ((2, 7), (3, 12)):
        given = inputs(batch, length)
        with torch.no_grad():
            assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5


@pytest.mark.parametrize("to", ["mla", "sparse"])
def test_what_makes_its_own_keys_is_refused_for_all_of_them(to: str) -> None:
    plan = {"rules": [{"sites": "*", "to": to}]}
    with pytest.raises(RefusedError) as refused:
        convert(made(), plan=plan, inputs=inputs())
    text = str(refused.value)
    assert f"those of layers.3, and `to: {to}` makes its own" in text
    assert "layers.1, layers.3: other blocks read its keys and values" in text


def test_one_that_stays_keeps_the_others() -> None:
    plan = {"rules": [{"sites": "layers.2", "to": "keep"}, {"sites": "*", "to": "dense"}]}
    with pytest.raises(RefusedError, match=r"shares the keys and values of layers\.1 with"):
        convert(made(), plan=plan, inputs=inputs())


def test_keys_left_in_another_form_are_not_understood() -> None:
    found = find_attention(made(0.5), inputs())
    assert {r.path for r in found.refused} >= {"layers.1", "layers.3"}
    assert "which is not its keys or values" in found.refused[0].reason


def test_a_wrong_hand_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = callcheck.Adapter

    def swapped(mixer: Any, binding: Any, *rest: Any) -> Any:
        hands = tuple(
            HandedOn(**{**h.model_dump(), "streams": h.streams[::-1]}) for h in binding.hands
        )
        return real(mixer, binding.model_copy(update={"hands": hands}), *rest)

    monkeypatch.setattr(callcheck, "Adapter", swapped)
    reasons = [r.reason for r in find_attention(made(), inputs()).refused]
    assert reasons == [f"layers.{i} hands on other keys or values than the model's" for i in (1, 3)]


TINY = {
    "vocab_size": 99, "vocab_size_per_layer_input": 99, "hidden_size": 32, "pad_token_id": 0,
    "hidden_size_per_layer_input": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
#: what their configs have besides
MORE = {
    "Gemma3n": {
        "intermediate_size": [48] * 4, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma4": {"intermediate_size": 48, "global_head_dim": 16},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_a_model_that_shares_writes_the_same_with_a_cache(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig")(**TINY, **MORE[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=2 / parameter.shape[-1] ** 0.5)
    found = find_attention(model)
    assert [s.spec.k.site for s in found.sites][2:] == [
        f"model.layers.{i}.self_attn" for i in (0, 1)
    ]
    converted = convert(model, plan="identity").model
    ids = torch.randint(1, 99, (2, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **asked), converted.generate(ids, **asked))
