"""Linear attention: exact with a window over everything, else the papers' formulas; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import CASES, HIDDEN, config, dense
from pydantic import ValidationError
from torch import Tensor

from reattend.mixers.base import Context
from reattend.mixers.kinds import build_mixer
from reattend.mixers.rotary import rotate, rotation
from reattend.passes.rewrite.linear import LinearOptions, ToLinear

PLAIN = {"feature_map": "elu+1", "window": 0}
WAYS: dict[str, dict[str, Any]] = {
    "lolcats": {"window": 4, "feature_dim": 6, "feature_init": "uniform"},
    "sliding": {"window": 3, "window_form": "sliding", "state": "per-kv-head"},
    "blended": {"window": 2, "mix_form": "blended", "mix_start": 0.9},
    "terraced": {"window": 3, "rope": "window-only", "feature_map": "softmax", "mix": "fixed"},
    "decayed": {"window": 2, "decay": "fixed", "feature_map": "exp", "state": "per-kv-head"},
    "hedgehog": {"window": 0},
    "t2r": {"window": 0, "feature_map": "t2r", "feature_dim": 5},
    "hedgehog-fla": {"window": 2, "feature_map": "hedgehog-fla", "state": "per-kv-head"},
    "supra": {
        "window": 0, "feature_map": "relu", "rope": "after", "normalize": "group",
        "decay": "fixed",
    },
    "liger": {
        "window": 3, "window_form": "sliding", "feature_map": "softmax", "normalize": "none",
        "decay": "gated", "mix": "fixed", "mix_start": 0.4, "mix_form": "averaged",
        "rope": "window-only", "state": "per-kv-head",
    },
    "lightning": {
        "window": 0, "feature_map": "silu", "rope": "after", "normalize": "rms", "decay": "fixed",
    },
    "gated": {"window": 0, "feature_map": "t2r", "decay": "gated", "gate_divisor": 2.0},
    "averaged": {"window": 2, "decay": "fixed", "mix_form": "averaged"},
}  # fmt: skip
TAKEN = [
    name for name in CASES
    if name not in ("softcap", "window", "alibi", "relative") and "sinks" not in name
]  # fmt: skip


def linear(block: Any, trained: bool = True, **options: Any) -> Any:
    """The mixer; `trained` shakes what starts at a fixed value."""
    mixer = ToLinear().build(block, None, LinearOptions(**options)).mixer
    if trained:
        torch.manual_seed(7)
        for name, parameter in mixer.named_parameters():
            if name.startswith(("features", "mix")):
                parameter.data = parameter + 0.5 * torch.randn_like(parameter)
    return mixer


def inputs(n: int, pads: tuple[int, ...] = (0, 5)) -> tuple[Tensor, Tensor]:
    """Hidden states and validity, padded on the left."""
    x = torch.randn(len(pads), n, HIDDEN, dtype=torch.float64)
    return x, torch.arange(n)[None] >= torch.tensor(pads)[:, None]


def gap(a: Tensor, b: Tensor, real: Tensor) -> float:
    return float((a - b)[real].abs().max() / b[real].abs().max())


@pytest.mark.parametrize("form", ["terraced", "sliding"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_window_over_everything_is_softmax_attention(name: str, form: str) -> None:
    """Whatever the features are, and the weight of the window."""
    block = dense(CASES[name])
    x, real = inputs(40)
    ctx = Context(mask=real)
    for mixer in (
        linear(block, window=40, window_form=form),
        linear(block, **ToLinear().exact_setting(CASES[name]).model_dump()),
    ):
        with torch.no_grad():
            assert gap(mixer(x, ctx), block(x, ctx), real) <= 1e-12


def by_the_formula(mixer: Any, x_ND: Tensor) -> Tensor:
    """One text, query by query and key by key, from the mixer's own projections."""
    c, x = mixer.config, x_ND[None]
    recurrent, gated = c.kind == "recurrent", getattr(c, "decay_by", "none") == "keys"
    (q, f), new = mixer.project(x, x, Context(), None)
    k, v = new.rows[0][0], new.rows[1][0]
    turn = rotation(c.rotary, Context(), None, x)
    plain = k if c.rope == "before" else rotate(k[None], (turn[0], -turn[1]), c.rotary.pairs)[0]
    gates = torch.sigmoid(plain) ** (1 / c.gate_divisor) if gated else None
    heads, groups, w = c.core.heads, c.core.kv_heads, c.window
    per, out = heads // groups, []
    for h in range(heads):
        g = h // per
        s = h if c.state == "per-query-head" else g
        fk = mapped(mixer.features_k, s, plain[g])
        if c.rope == "after":
            fk = rotate(fk[None, None], turn, c.rotary.pairs)[0, 0]
        mix = c.mix if mixer.mix_H is None else float(mixer.mix_H[h].sigmoid())
        rest = 1 - mix if c.blended else 1.0
        for n in range(len(x_ND)):
            low = n - w + 1 if c.window_form == "sliding" else (n // w - 1) * w if w else n + 1
            near = [j for j in range(max(low, 0), n + 1) if w]
            far = range(max(low, 0)) if w and not recurrent else range(n + 1)
            if c.direction == "bidirectional":
                far = range(len(x_ND))
            top = max((float(q[0, h, n] @ k[g, j]) * c.core.scale for j in near), default=0.0)
            weight, own = torch.zeros(2, len(x_ND), dtype=x.dtype)
            for j in near:
                own[j] = torch.exp(q[0, h, n] @ k[g, j] * c.core.scale - top)
                if not recurrent:
                    weight[j] = mix * torch.exp(q[0, h, n] @ k[g, j] * c.core.scale - top)
            for j in far:
                left = torch.tensor(c.decay[s] * (n - j) if c.decay else 0.0, dtype=x.dtype).exp()
                if gated:
                    left = gates[g, j + 1 : n + 1].prod(0)
                weight[j] = rest * (f[0, h, n] @ (fk[j] * left))
            y = weight @ v[g]
            if c.normalize == "sum":
                y = y / weight.sum().clamp_min(1e-12)  # all features may be 0
            elif c.normalize == "group":
                y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
            if recurrent and w:
                y = mix * (own / own.sum()) @ v[g] + (1 - mix) * y
            out.append(y)
    y = torch.stack(out).unflatten(0, (heads, -1))[None]
    if c.normalize == "rms":
        y = y / (y.square().mean((1, 3), keepdim=True) + 1e-5).sqrt()
    return mixer.o_proj(y.transpose(1, 2).flatten(2))[0]


def mapped(features: Any, head: int, x: Tensor) -> Tensor:
    """The maps once more, in the papers' words."""
    if features.name == "hedgehog-fla":
        u = 2 * (x @ features.weight_hfd[0].t() + features.bias_hf[0])
        e = torch.exp(torch.cat([u, -u], -1))
        return e / e.sum(-1, keepdim=True)
    if features.weight_hfd is not None:
        x = torch.einsum("fd,nd->nf", features.weight_hfd[head], x)
    if features.name == "t2r":
        return torch.clamp(x + features.bias_hf[head], min=0)
    if features.name == "hedgehog":
        e = torch.exp(x), torch.exp(-x)
        return torch.cat([part / part.sum(-1, keepdim=True) for part in e], -1)
    return {
        "elu+1": lambda: torch.where(x > 0, x + 1, x.exp()),
        "silu": lambda: x / (1 + torch.exp(-x)),
        "relu": lambda: x.clamp(min=0),
        "exp": lambda: torch.exp(x - x.max(-1, keepdim=True).values),
        "softmax": lambda: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
    }[features.name]()


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_the_papers(way: str) -> None:
    mixer = linear(dense(config()), **WAYS[way])
    x, _ = inputs(17, (0,))
    with torch.no_grad():
        expected = by_the_formula(mixer, x[0])
        got = mixer(x, Context())[0]
        assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
        padded, real = inputs(22, (5,))  # left padding moves nothing
        padded[0, 5:] = x[0]
        position = (real.long().cumsum(-1) - 1).clamp_min(0)
        again = mixer(padded, Context(mask=real, position_BN=position))[0, 5:]
        assert (again - expected).abs().max() <= 1e-10 * expected.abs().max()


BOTH: tuple[dict[str, Any], ...] = (
    {"feature_dim": 5, "feature_init": "uniform"},
    {"feature_map": "elu+1", "state": "per-kv-head", "rope": "window-only"},
    {"feature_map": "relu", "rope": "after", "normalize": "group"},
)


@pytest.mark.parametrize("options", BOTH, ids=("hedgehog", "elu+1", "relu"))
def test_both_ways_every_query_reads_one_sum_over_real_tokens(options: dict[str, Any]) -> None:
    mixer = linear(dense(pattern("full")), direction="bidirectional", window=0, **options)
    x, _ = inputs(13, (0,))
    position = torch.arange(19)[None]
    with torch.no_grad():
        expected = by_the_formula(mixer, x[0])
        padded, real = torch.cat([x, inputs(6, (0,))[0]], 1), torch.arange(19)[None] < 13
        for mask in (real, real[:, None, None, :].expand(1, 1, 19, 19)):
            got = mixer(padded, Context(mask=mask, position_BN=position))[0, :13]
            assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_a_stored_description_builds_the_same_mixer() -> None:
    mixer = linear(dense(config(bias=True)), **WAYS["lolcats"])
    again = build_mixer(**mixer.described()).double()
    again.load_state_dict(mixer.state_dict())
    x, _ = inputs(11)
    assert torch.equal(again(x, Context()), mixer(x, Context()))


def test_feature_maps_start_without_statistics() -> None:
    start = linear(dense(config()), trained=False)
    assert torch.equal(start.features_q.weight_hfd[1], torch.eye(8, dtype=torch.float64))
    assert float(start.mix_H.detach().sigmoid()[2]) == pytest.approx(0.1)
    small = linear(dense(config()), trained=False, feature_dim=64, feature_init="uniform")
    wide = small.features_q.weight_hfd.detach()
    assert wide.shape == (4, 64, 8)
    assert float(wide.square().mean()) == pytest.approx(2 / (64 * 8), rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_map_of_flash_linear_attention_says_the_same() -> None:
    theirs = pytest.importorskip("fla.modules.feature_map").HedgehogFeatureMap(8).double()
    map_q = linear(dense(config()), feature_map="hedgehog-fla", window=2).features_q
    with torch.no_grad():
        theirs.layer.weight.copy_(map_q.weight_hfd[0])
        theirs.layer.bias.copy_(map_q.bias_hf[0])
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    assert torch.allclose(map_q(x), theirs(x), atol=1e-12)


def pattern(name: str, **more: Any) -> Any:
    core = config().core.model_copy(update={"pattern": name, **more})
    return config().model_copy(update={"core": core})


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "not causal": (pattern("full"), {}),
    "would show later tokens": (config(), {"direction": "bidirectional", "window": 0}),
    "own pattern is sliding": (CASES["window"], {}),
    "own pattern is chunked": (pattern("chunked", chunk=4), {}),
    "the mask is the model's own": (
        pattern("opaque"), {"direction": "bidirectional", "window": 0},
    ),
    "capped by tanh": (CASES["softcap"], {}),
    "a logit of no key": (CASES["sinks"], {}),
    "a position bias": (CASES["alibi"], {}),
    "cross-attention": (config().model_copy(update={"memory_size": 9}), {}),
    "needs feature_dim 8": (config(), {"feature_dim": 6, "feature_init": "identity"}),
    "feature_dim must be 8": (
        config(),
        {"feature_map": "t2r", "feature_dim": 6, "rope": "after", "normalize": "group",
         "window": 0},
    ),
    "a number for each feature": (
        config(), {"feature_map": "t2r", "feature_dim": 6, "decay": "gated", "window": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused(reason: str) -> None:
    cfg, options = REFUSED[reason]
    refusal = ToLinear().check(cfg, LinearOptions(**options))
    assert refusal is not None and reason in refusal.reason


def test_options_that_contradict_each_other_are_named() -> None:
    for wrong, words in (
        ({"feature_map": "identity"}, "zero or negative"),
        ({"normalize": "group", "window": 8}, "shares the sum"),
        ({"mix_form": "averaged", "window": 0}, "give a window"),
        ({"decay": "gated", "feature_map": "relu"}, "holds keys back"),
        ({"decay": "gated", "window": 0}, "another feature_map than hedgehog"),
        ({"feature_map": "relu", "feature_dim": 8}, "no weights to give a size"),
        ({"rope": "after", "normalize": "none", "window": 0}, "two for each number"),
    ):
        with pytest.raises(ValidationError, match=words):
            LinearOptions(**wrong)
    told = ToLinear().check_within(config(), LinearOptions(window=128), 128)
    assert told is not None and "nothing would be linear" in told.reason
