"""Moments: one pass, padding left out, memory that does not grow with the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_models

from reattend import find_attention, statistics
from reattend.errors import ModelError
from reattend.plan import Plan
from reattend.preflight import preflight
from reattend.rewriting import normal_forms


def setup(name: str = "qwen2") -> tuple[Any, dict[str, Any]]:
    model = zoo_models.build(name)
    plan = Plan.load({"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]})
    choices = preflight(find_attention(model), plan)
    forms = normal_forms(model, choices)
    return model, {c.site.path: (forms[c.site.path], c.site.binding) for c in choices}


def batches(count: int, pad: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 97, (4, 24), generator=generator)
        mask = torch.ones_like(ids)
        if pad:
            mask[:, :pad] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def test_gram_is_the_second_moment_of_keys_and_values() -> None:
    model, sites = setup()
    path = "model.layers.1.self_attn"
    seen: list[torch.Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    found = statistics.collect(model, sites, batches(3))[path]
    handle.remove()
    x = torch.cat([s.flatten(0, 1) for s in seen])
    y = torch.cat([x @ module.k_proj.weight.t(), x @ module.v_proj.weight.t()], -1).double()
    assert found.count == 3 * 4 * 24
    assert torch.allclose(found.gram, y.t() @ y, rtol=1e-10, atol=1e-6)
    assert torch.allclose(found.total, y.sum(0), rtol=1e-10, atol=1e-6)
    assert found.gram.dtype == torch.float64


def test_padding_is_left_out() -> None:
    model, sites = setup()
    padded = statistics.collect(model, sites, batches(2, pad=9))
    other = batches(2, pad=9)
    for batch in other:
        batch["input_ids"][:, :9] = 50  # whatever stands there must not count
    again = statistics.collect(model, sites, other)
    for path, moments in padded.items():
        assert moments.count == 2 * 4 * 15
        assert bool((moments.gram == again[path].gram).all())


def test_memory_does_not_depend_on_the_number_of_tokens() -> None:
    model, sites = setup()
    few = statistics.collect(model, sites, batches(1))
    many = statistics.collect(model, sites, batches(6))
    for path in few:
        sizes = [sum(t.numel() for t in f[path].tensors().values()) for f in (few, many)]
        assert sizes[0] == sizes[1]
        assert many[path].count == 6 * few[path].count


def test_query_moments_only_where_asked() -> None:
    model, sites = setup()
    path = "model.layers.0.self_attn"
    found = statistics.collect(model, sites, batches(1), needs={path: frozenset({"queries"})})
    assert found[path].query_gram is not None
    assert found["model.layers.1.self_attn"].query_gram is None


def test_normalised_keys_are_measured_after_their_norm() -> None:
    model, sites = setup("qwen3")
    found = statistics.collect(model, sites, batches(2))
    for path, (dense, _) in sites.items():
        core = dense.config.core
        width = core.kv_heads * core.qk_head_dim
        energy = float(torch.diagonal(found[path].gram)[:width].sum()) / found[path].count
        gain = float(dense.k_norm.weight.detach().double().square().sum())
        assert energy == pytest.approx(core.kv_heads * gain, rel=0.5)


def test_storage_round_trips() -> None:
    model, sites = setup()
    found = statistics.collect(model, sites, batches(1))["model.layers.0.self_attn"]
    back = statistics.SiteStatistics.from_tensors(found.tensors())
    assert bool((back.gram == found.gram).all())
    assert back.count == found.count


def test_infinity_in_the_activations_is_named() -> None:
    model, sites = setup()
    model.model.embed_tokens.weight.data[50] = float("inf")
    bad = batches(1)
    bad[0]["input_ids"][0, 0] = 50
    with pytest.raises(ModelError, match="NaN or infinity"):
        statistics.collect(model, sites, bad)


def test_hooks_are_removed() -> None:
    model, sites = setup()
    statistics.collect(model, sites, batches(1))
    assert not any(m._forward_pre_hooks for m in model.modules())
