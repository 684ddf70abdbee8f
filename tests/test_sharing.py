"""Copy-on-write between two models: one address until somebody writes, then two values."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import zoo_models
from torch import nn

from reattend import convert
from reattend.sharing import address, is_shared, share_in_place, twins

MLA = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]}


def digest(model: nn.Module) -> dict[str, str]:
    """Hash by name, read without asking for a pointer."""
    return {
        n: hashlib.sha256(bytes(t.detach().clone().view(torch.uint8).numpy())).hexdigest()
        for n, t in model.state_dict().items()
    }


def train(model: Any, steps: int = 2) -> None:
    """By hand, as a user would; every parameter moves."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def data() -> torch.Tensor:
    return torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.daily
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_and_original_share_until_one_is_trained(dtype: torch.dtype) -> None:
    original = zoo_models.build("llama").to(dtype)
    result = convert(original, plan=MLA, data=data())
    ours = dict(result.model.named_parameters())
    common = {n: p for n, p in original.named_parameters() if n in ours and "self_attn" not in n}
    assert len(common) > 8
    for name, p in common.items():
        assert address(p) == address(ours[name]), name
        assert is_shared(p) and is_shared(ours[name]), name
    before, converted = digest(original), digest(result.model)
    train(result.model)
    assert digest(original) == before
    moved = digest(result.model)
    assert [n for n in converted if moved[n] == converted[n] and "inv_freq" not in n] == []
    for name, p in common.items():
        assert address(p) != address(ours[name]), name
    train(original)
    assert digest(result.model) == moved
    assert digest(original) != before


def test_identity_shares_attention_too_and_writes_to_the_original_stay_there() -> None:
    original = zoo_models.build("llama")
    result = convert(original, plan="identity")
    q = original.get_parameter("model.layers.0.self_attn.v_proj.weight")
    ours = result.model.get_parameter("model.layers.0.self_attn.mixer.v_proj.weight")
    assert address(q) == address(ours)
    before = digest(result.model)
    with torch.no_grad():
        for p in original.parameters():
            p[0].add_(1.0)  # through a view
    assert digest(result.model) == before


def test_inplace_shares_with_nobody_and_keeps_the_given_objects() -> None:
    original = zoo_models.build("llama")
    head = original.get_parameter("lm_head.weight")
    result = convert(original, plan="identity", inplace=True)
    assert result.model is original
    assert result.model.get_parameter("lm_head.weight") is head
    assert not is_shared(head)


@pytest.mark.slow
def test_a_second_conversion_leaves_the_first_shared() -> None:
    original = zoo_models.build("llama")
    first = convert(original, plan="identity").model
    second = convert(original, plan="identity").model
    name = "model.layers.0.mlp.up_proj.weight"
    places = {address(m.get_parameter(name)) for m in (original, first, second)}
    assert len(places) == 1


def test_ties_and_aliases_are_kept_on_each_side() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(12.0).reshape(4, 3)
            self.top, self.all = nn.Parameter(whole[:2]), nn.Parameter(whole)
            self.same = self.all

    module = Tied()
    given = module.all
    share_in_place(module)
    assert module.same is module.all is not given
    assert address(module.all) == address(given)
    with torch.no_grad():
        module.top.add_(100)
    assert module.all[0, 0].item() == 100
    assert given[0, 0].item() == 0


def test_foreign_memory_is_taken_over_or_copied(tmp_path: Any) -> None:
    """safetensors hands out memory that torch cannot share; aliases of it must survive."""
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.ones(5), "b": torch.ones(5)}, tmp_path / "x.safetensors")
    held = load_file(tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError):
        torch._lazy_clone(held["a"])
    alone, aliased = nn.Parameter(held.pop("a")), nn.Parameter(held["b"])
    made = twins([alone, aliased])
    assert address(made[id(alone)]) == address(alone)
    assert address(made[id(aliased)]) != address(aliased)
    with torch.no_grad():
        held["b"].add_(1)
        alone.add_(1)
    assert aliased.tolist() == [2.0] * 5
    assert made[id(aliased)].tolist() == made[id(alone)].tolist() == [1.0] * 5


def test_a_model_loaded_from_a_folder_is_shared_without_a_second_copy(shipped_path: Any) -> None:
    """transformers leaves bf16 weights where safetensors put them."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(shipped_path)
    weights = {id(p): p for p in original.parameters()}
    result = convert(original, plan="identity")
    assert all(id(p) in weights for p in original.parameters())
    ours = dict(result.model.named_parameters())
    common = [n for n, _ in original.named_parameters() if n in ours]
    assert len(common) > 8
    assert all(address(original.get_parameter(n)) == address(ours[n]) for n in common)
