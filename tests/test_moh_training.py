"""Training of routed blocks: from all heads to few, spread evenly, resumed to equal bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrated_pair import data, fresh, same, state, tiny_teacher
from mla_blocks import HIDDEN, config, dense
from moh_blocks import routed, shaken, wide

from reattend import convert
from reattend.calibrate import calibrate
from reattend.events import Event
from reattend.mixers.base import Context
from reattend.plan_sections import Calibrate
from reattend.workdir import Workdir

RULE: dict[str, Any] = {
    "sites": "*", "to": "moh", "shared": 2, "top_k": 1, "route": "head", "select_shared": "first",
}  # fmt: skip
SETTINGS = Calibrate(tokens=3000, batch_size=4, seq_len=24)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A teacher, and the same with routed heads; tests copy before they train."""
    teacher = tiny_teacher()
    return teacher, convert(teacher, plan={"rules": [RULE]}).model


def routers(model: Any) -> list[Any]:
    return [layer.self_attn.mixer.router for layer in model.model.layers]


def test_heads_are_left_out_little_by_little() -> None:
    mixer = routed(dense(wide(config())), shared=1, top_k=1, route="kv-group", anneal=0.5)
    assert mixer.router.k == 1
    found = []
    for share in (0.0, 0.1, 0.3, 0.4, 0.5, 1.0):
        mixer.trained(share)
        found.append(mixer.router.k)
    assert found == [3, 3, 2, 2, 1, 1]
    plain = routed(dense(wide(config())), shared=1, top_k=1, anneal=0)
    plain.trained(0.0)
    assert plain.router.k == 1 and not plain.anneals and mixer.anneals


def test_training_begins_as_the_original_and_ends_with_few_heads(pair: Any) -> None:
    """The first loss is that of the end's heads, untrained; training makes it smaller."""
    teacher, model, losses = pair[0], fresh(pair[1]), []

    def watch(event: Event) -> None:
        losses.append(event.values.get("loss", 0.0))

    layerwise, whole = calibrate(teacher, model, data(40, 3), SETTINGS, seed=0, on_event=watch)
    assert [router.k for router in routers(model)] == [1, 1]
    assert losses[0] < 1e-8  # all heads, router at zero
    assert min(first for first, _ in layerwise.sites.values()) > 1e-2
    assert whole.sites[""][1] < 0.9 * whole.sites[""][0]
    assert all(bool((p != 0).any()) for router in routers(model) for p in router.parameters())


def test_balance_is_k_where_tokens_are_spread_evenly() -> None:
    """Written out: f and P of each head as the router says, R sum f P; padding does not count."""
    mixer = routed(dense(wide(config())), shared=2, top_k=3, route="head", balance_loss=0.5)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    real = torch.arange(9)[None] >= torch.tensor([0, 4])[:, None]
    assert mixer.own_loss() is None
    mixer.trained(1.0)
    mixer(x, Context(mask=real))
    got = mixer.own_loss()
    z = (x @ mixer.router.routed.weight.T)[real].detach()
    p = z.softmax(-1)
    f = torch.zeros(6).double()
    for token in z:
        f[token.topk(3).indices] += 1 / len(z)
    assert float(got.detach()) == pytest.approx(0.5 * 6 * float((f * p.mean(0)).sum()), rel=1e-12)
    assert mixer.own_loss() is None
    flat = routed(dense(wide(config())), False, shared=0, top_k=4, route="kv-group", balance_loss=1)
    flat.trained(1.0)
    flat(x, Context())
    assert float(flat.own_loss().detach()) == pytest.approx(4)


def weighed(model: Any, weight: float) -> Any:
    """The model with another balance loss, and no annealing."""
    for router in routers(model):
        update = {"balance_loss": weight, "anneal": 0.0}
        router.config = router.config.model_copy(update=update)
    for layer in model.model.layers:
        layer.self_attn.mixer.config = layer.self_attn.mixer.router.config
    return model


def imbalance(model: Any, ids: torch.Tensor) -> float:
    """What the balance loss is above k on some rows, mean over layers."""
    mixers = [layer.self_attn.mixer for layer in weighed(model, 1.0).model.layers]
    for mixer in mixers:
        mixer.trained(1.0)
    model(ids)
    return sum(float(mixer.own_loss().detach()) - 1 for mixer in mixers) / len(mixers)


@pytest.mark.parametrize("stage", ["layerwise", "end-to-end"])
def test_the_balance_loss_spreads_tokens(pair: Any, stage: Any) -> None:
    ids, found = data(8, 5).blocks[0]["input_ids"], []
    for weight in (0.0, 10.0):
        model = weighed(shaken(fresh(pair[1])), weight)
        settings = Calibrate(tokens=1000, batch_size=4, stages=(stage,), lr=1e-2)
        calibrate(pair[0], model, data(40, 3), settings, seed=0)
        found.append(imbalance(model, ids))
    assert 0 <= found[1] < 0.6 * found[0]


class StopHereError(Exception):
    """What a test raises in the middle."""


def test_resumed_equals_uninterrupted(pair: Any, tmp_path: Any) -> None:
    """Half way, where fewer heads are used than at first."""
    teacher, whole, again = pair[0], fresh(pair[1]), fresh(pair[1])
    settings = SETTINGS.model_copy(update={"tokens": 1200})
    run: dict[str, Any] = {"settings": settings, "seed": 0, "inputs_hash": "x"}
    expected = calibrate(teacher, whole, data(40, 3), **run)

    def stop(event: Event) -> None:
        if event.stage == "end-to-end" and event.done >= 400:
            raise StopHereError

    with Workdir.open(tmp_path / "o", {}) as work, pytest.raises(StopHereError):
        calibrate(teacher, again, data(40, 3), workdir=work, on_event=stop, **run)
    with Workdir.open(tmp_path / "o", {}) as work:
        got = calibrate(teacher, again, data(40, 3), workdir=work, **run)
    assert got == expected
    assert same(state(again), state(whole))
