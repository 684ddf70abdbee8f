"""DuoAttention's alphas: exact at one, trained towards the heads that are needed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import HIDDEN, config, dense

from reattend import convert
from reattend.errors import TrainingError
from reattend.mixers.base import Context
from reattend.mixers.sparse import SparseAttention
from reattend.passes.rewrite.base import Subject
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_alpha import alphas, best, blended, ramp
from reattend.passes.rewrite.sparse_options import SparseOptions


def mixer() -> SparseAttention:
    options = SparseOptions(pattern={"sinks": 1, "window": 4})
    made = ToSparse().build(dense(config()), None, options).mixer
    assert isinstance(made, SparseAttention)
    return made


class Wanted:
    """A measure whose model wants given alphas; counts how often it ran."""

    def __init__(self, wanted: dict[str, list[float]]) -> None:
        self.wanted, self.runs = wanted, 0

    @contextmanager
    def trial(self, students: dict[str, Any]) -> Any:
        def gap() -> torch.Tensor:
            self.runs += 1
            gaps = [
                ((s.alpha_G - torch.tensor(self.wanted[p])) ** 2).sum() for p, s in students.items()
            ]
            return torch.stack(gaps).sum()

        yield gap


@pytest.mark.parametrize(("alpha", "like"), [(1.0, "full"), (0.0, "pattern")])
def test_the_ends_of_alpha_are_the_two_blocks(alpha: float, like: str) -> None:
    sparse = mixer()
    made = blended(sparse)
    made.alpha_G.data.fill_(alpha)
    x = torch.randn(2, 20, HIDDEN, dtype=torch.float64)
    expected = (dense(config()) if like == "full" else sparse)(x, Context())
    assert (made(x, Context()) - expected).abs().max() <= 1e-12
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["alpha_G"]


def test_training_finds_the_heads_that_are_wanted() -> None:
    measure: Any = Wanted({"a": [1.0, 0.0], "b": [0.2, 0.9]})
    found = alphas({"a": mixer(), "b": mixer()}, measure, steps=300)
    assert measure.runs == 300
    assert found["a"][0] > 0.9 and found["a"][1] == 0  # the price takes the last of it
    assert 0.05 < found["b"][0] < 0.2 and 0.75 < found["b"][1] < 0.9
    sites: list[Any] = [Subject(p, mixer(), None, None) for p in ("a", "b")]
    assert best(sites, found, 0.5) == [(0,), (1,)]
    assert best(sites, found, 0.75) == [(0,), (0, 1)]


def test_a_loss_that_is_no_number_stops_the_search() -> None:
    measure: Any = Wanted({"a": [float("nan"), 0.0]})
    with pytest.raises(TrainingError, match="diverged"):
        alphas({"a": mixer()}, measure, steps=2)


def test_the_rate_warms_up_and_cools_down() -> None:
    shares = [ramp(step, 100) for step in range(100)]
    assert shares[0] == 0.05 and shares[19] == 1.0 and shares[79] == 1.0
    assert shares[-1] == 0.1 and min(shares) == 0.05


def test_a_model_is_converted_by_alphas() -> None:
    """End to end: gradients reach the alphas through the model, and the model's stays as it was."""
    rule = {
        "sites": "*", "to": "sparse", "pattern": {"sinks": 1, "window": 4}, "keep_full": 0.5,
        "finder": "alpha", "steps": 3,
    }  # fmt: skip
    plan = {"rules": [rule], "calibrate": {"seq_len": 24, "statistics_tokens": 240}}
    original = decoder("llama", layers=2, groups=2)
    before = {name: p.clone() for name, p in original.named_parameters()}
    data = torch.randint(3, 97, (12, 24))
    model = convert(original, plan=plan, data=data).model
    classes = [c for layer in model.model.layers for c in layer.self_attn.mixer.config.classes]
    assert sum(len(c.kv_heads) for c in classes if c.pattern.full) == 2
    assert all(p.requires_grad for p in original.parameters())
    assert all(torch.equal(before[n], p) for n, p in original.named_parameters())
    assert not any("alpha" in name for name in model.state_dict())
