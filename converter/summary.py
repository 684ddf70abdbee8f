"""A block in one line."""

from __future__ import annotations

from reattend.spec import (
    Added,
    Alibi,
    AttentionSpec,
    Gate,
    Joined,
    Norm,
    Opaque,
    RelativeBias,
    Rotary,
    Scale,
)


def summary(spec: AttentionSpec) -> str:
    """One line for people."""
    c = spec.core
    parts = [f"{spec.kind}-attention", f"{c.heads} heads"]
    if c.kv_heads != c.heads:
        parts.append(f"{c.kv_heads} kv heads")
    parts.append(
        f"width {c.qk_head_dim}" + (f"/{c.v_head_dim}" if c.v_head_dim != c.qk_head_dim else "")
    )
    rotary = spec.q.first(Rotary)
    if isinstance(rotary, Rotary):
        parts.append(f"rotary {rotary.width} ({rotary.pairing})")
    if spec.q.first(Norm) or spec.k.first(Norm):
        parts.append("q/k norm")
    own = [n for n in "qkv" if isinstance(getattr(spec, n).proj, Opaque)]
    if spec.k.site:
        parts.append(f"keys and values of {spec.k.site}")
        own = [n for n in own if not getattr(spec, n).site]
    if own:
        parts.append(f"{'/'.join(own)} by the model's own steps")
    scale = spec.q.first(Scale)
    if isinstance(scale, Scale) and scale.growth is not None:
        how = "from" if scale.growth.smooth else "every"
        parts.append(f"queries that grow {how} {scale.growth.period} tokens")
    if isinstance(spec.join, Gate):
        parts.append(f"{spec.join.act} gate per {'head' if spec.join.per_head else 'dimension'}")
    if isinstance(spec.join, Joined):
        parts.append("joined by the model's own steps")
    if spec.whole:
        parts.append("own steps over all tokens")
    if c.softcap:
        parts.append(f"softcap {c.softcap:g}")
    if isinstance(c.bias, RelativeBias):
        parts.append(f"relative position bias ({c.bias.rows} buckets)")
    if isinstance(c.bias, Alibi):
        parts.append("ALiBi")
    if isinstance(c.bias, Added):
        parts.append("scores added to by the model's own steps")
    if c.sinks is not None:
        parts.append("logit sinks")
    parts.append(c.pattern.kind + (f" {c.pattern.window}" if c.pattern.window else ""))
    if any(s.proj.bias for s in (spec.q, spec.k, spec.v)):
        parts.append("bias")
    return ", ".join(parts)
