"""The proof must catch every small mistake in reading a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo_models

import reattend.selfcheck as subject
from reattend.capture import capture
from reattend.passes.find.sites import Found, find
from reattend.passes.normalize import normalize
from reattend.spec import AttentionSpec, Norm, Rotary, Stream

_SEEN: dict[str, tuple[Any, Found, Any]] = {}


def first_site(name: str) -> tuple[Any, Found, Any]:
    if name not in _SEEN:
        spelling = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"  # all its class has
        captured = capture(zoo_models.build(name, spelling))
        normalize(captured.gm)

        def inputs_at(length: int | None, padded: bool) -> Any:
            return captured.placeholders(captured.probe(length, padded))

        found = find(captured.gm, captured.placeholders(), inputs_at)[0]
        assert isinstance(found, Found)
        _SEEN[name] = (captured.gm, found, inputs_at)
    return _SEEN[name]


def check(name: str, change: Callable[[AttentionSpec], AttentionSpec]) -> subject.SelfCheck:
    gm, found, inputs_at = first_site(name)
    return subject.self_check(gm, replace(found, spec=change(found.spec)), inputs_at)


def on_streams(change: Callable[[Any], Any], names: str = "qk") -> Callable[..., AttentionSpec]:
    def apply(spec: AttentionSpec) -> AttentionSpec:
        changed: dict[str, Any] = {}
        for name in names:
            stream: Stream = getattr(spec, name)
            changed[name] = replace(stream, steps=tuple(change(s) for s in stream.steps))
        return replace(spec, **changed)

    return apply


def core(**values: Any) -> Callable[[AttentionSpec], AttentionSpec]:
    return lambda spec: replace(spec, core=replace(spec.core, **values))


def window(by: int) -> Callable[[AttentionSpec], AttentionSpec]:
    def apply(spec: AttentionSpec) -> AttentionSpec:
        pattern = replace(spec.core.pattern, window=spec.core.pattern.window + by)
        return replace(spec, core=replace(spec.core, pattern=pattern))

    return apply


def swapped_pairs(step: Any) -> Any:
    if not isinstance(step, Rotary):
        return step
    flat = [i for pair in step.pairs for i in pair]
    half = len(flat) // 2
    return replace(
        step, pairs=tuple(zip(sorted(flat)[::2], sorted(flat)[1::2], strict=True))[:half]
    )


def backwards(step: Any) -> Any:
    if not isinstance(step, Rotary):
        return step
    return replace(step, pairs=tuple((b, a) for a, b in step.pairs))


def ten_eps(step: Any) -> Any:
    return replace(step, eps=step.eps * 10) if isinstance(step, Norm) else step


def without_bias(step: Any) -> Any:
    return replace(step, bias=None) if hasattr(step, "bias") else step


def swapped_heads(step: Any) -> Any:
    if not hasattr(step, "rows"):
        return step
    width = step.width
    return replace(step, rows=step.rows[width:] + step.rows[:width])


MUTATIONS: dict[str, tuple[str, Callable[[AttentionSpec], AttentionSpec]]] = {
    "scale": ("llama", lambda s: replace(s, core=replace(s.core, scale=s.core.scale * (1 + 1e-6)))),
    "window + 1": ("mistral", window(1)),
    "window - 1": ("mistral", window(-1)),
    "pairing": ("llama", on_streams(swapped_pairs)),
    "sense of rotation": ("llama", on_streams(backwards)),
    "eps": ("qwen3", on_streams(ten_eps)),
    "key norm missing": (
        "qwen3",
        lambda s: replace(
            s, k=replace(s.k, steps=tuple(x for x in s.k.steps if not isinstance(x, Norm)))
        ),
    ),
    "value bias": ("qwen2", on_streams(without_bias, "v")),
    "query bias": ("qwen2", on_streams(without_bias, "q")),
    "head order": ("gpt_neox", on_streams(swapped_heads, "q")),
    "softcap": ("gemma2", core(softcap=49.0)),
    "no sinks": ("gpt_oss", core(sinks=None)),
    "slopes": (
        "falcon_alibi",
        lambda s: replace(
            s,
            core=replace(
                s.core,
                bias=replace(s.core.bias, slopes=tuple(x * 1.000001 for x in s.core.bias.slopes)),  # type: ignore[type-var, union-attr]
            ),
        ),
    ),
    "heads of slopes": (
        "falcon_alibi",
        lambda s: replace(
            s,
            core=replace(s.core, bias=replace(s.core.bias, slopes=s.core.bias.slopes[::-1])),  # type: ignore[type-var, union-attr]
        ),
    ),
    "output bias": ("gpt2", lambda s: replace(s, out=replace(s.out, bias=None))),
}


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_oss", "falcon_alibi"]
)
def test_a_site_read_right_passes(name: str) -> None:
    proof = check(name, lambda spec: spec)
    assert proof.reason == ""
    assert proof.error <= 1e-14
    assert proof.native <= 8 * max(proof.floor, 1e-6)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    name, change = MUTATIONS[mutation]
    proof = check(name, change)
    assert "not understood" in proof.reason


def test_a_second_length_is_tried_beyond_two_windows() -> None:
    _, found, inputs_at = first_site("mistral")
    longer = subject.second_length(found, inputs_at)
    assert longer is not None
    assert longer > 2 * found.spec.core.pattern.window


def test_bfloat16_is_judged_by_its_own_noise() -> None:
    model = zoo_models.build("llama").to(torch.bfloat16)
    captured = capture(model)
    normalize(captured.gm)

    def inputs_at(length: int | None, padded: bool) -> Any:
        return captured.placeholders(captured.probe(length, padded))

    found = find(captured.gm, captured.placeholders(), inputs_at)[0]
    assert isinstance(found, Found)
    proof = subject.self_check(captured.gm, found, inputs_at)
    assert proof.reason == ""
    assert proof.native > 1e-4  # bfloat16 is coarse, and that is not held against the site
