"""What was found as a table for people: one row a block, narrow enough for 80 columns."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from reattend.found import AttentionSite, FoundAttention, RefusedSite
from reattend.passes.evaluate import attribute
from reattend.proof import pattern_text
from reattend.selfcheck_weights import weight_names
from reattend.spec import Added, Alibi, Gate, Joined, Norm, Opaque, RelativeBias, Rotary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HEADS = ("Block", "Kind", "H/KV×d", "Mask", "Position", "Norm", "Params", "Verified")
#: from this width on there is room for what else a block does
ROOMY = 120


def show_found(found: FoundAttention, out: Console) -> None:
    """Print the blocks that were found, those that were refused, and how many there are."""
    from rich.text import Text

    roomy = out.width >= ROOMY
    if found.sites:
        table = _table(*HEADS, *(["Also"] if roomy else []))
        for s in found.sites:
            table.add_row(*(Text(cell) for cell in (*row(found, s), *([also(s)] if roomy else []))))
        out.print(table)
        if not roomy:
            for text, count in Counter(filter(None, map(also, found.sites))).items():
                out.print(Text(f"{count} with {text}", style="dim"))
    latent = [r for r in found.refused if r.latent is not None]
    missed = [r for r in found.refused if r.latent is None]
    for title, rows in (("Already latent", latent), ("Not understood", missed)):
        if rows:
            _show_refused(title, rows, out)
    already = f"{len(latent)} already latent, " if latent else ""
    told = f"{len(found.sites)} found, {already}{len(missed)} not understood"
    deferred = next((s.deferred for s in found.sites if s.deferred), "")
    out.print(Text(told, style="bold"))
    if deferred:
        out.print(Text(f"deferred: {deferred}"))
    elif missed:
        out.print(Text("more: reattend find MODEL --why BLOCK", style="dim"))


def _show_refused(title: str, rows: list[RefusedSite], out: Console) -> None:
    from rich.text import Text

    table = _table(title, "Step", "Reason")
    for r in rows:
        reason = f"{r.reason} ✓" if r.verified else r.reason
        table.add_row(Text(r.path or "(model)"), Text(r.step), Text(reason))
    out.print(table)


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def row(found: FoundAttention, site: AttentionSite) -> tuple[str, ...]:
    """A block in the columns of `HEADS`."""
    spec, core = site.spec, site.spec.core
    width = f"{core.qk_head_dim}"
    if core.v_head_dim != core.qk_head_dim:
        width += f"/{core.v_head_dim}"
    norms = "".join(
        n for n, s in (("q", spec.q), ("k", spec.k), ("v", spec.v)) if s.first(Norm) is not None
    )
    return (
        site.path,
        spec.kind,
        f"{core.heads}/{core.kv_heads}×{width}",
        "own steps" if isinstance(core.bias, Added) else pattern_text(core.pattern),
        _position(site),
        norms or "-",
        short(parameters(found, site)),
        f"✓ {site.error:.0e}" if site.verified else "deferred" if site.deferred else "no",
    )


def _position(site: AttentionSite) -> str:
    """How the block knows where tokens stand; `-` where it does not."""
    rotary, bias = site.spec.q.first(Rotary), site.spec.core.bias
    known = [f"rope {rotary.width}"] if isinstance(rotary, Rotary) else []
    known += ["ALiBi"] if isinstance(bias, Alibi) else []
    known += [f"bias {bias.rows}"] if isinstance(bias, RelativeBias) else []
    return ", ".join(known) or "-"


def also(site: AttentionSite) -> str:
    """What a block does that has no column; empty if nothing."""
    spec, core = site.spec, site.spec.core
    streams = (("q", spec.q), ("k", spec.k), ("v", spec.v))
    own = [n for n, s in streams if isinstance(s.proj, Opaque)]
    biased = [n for n, s in streams if s.proj.bias]
    biased += ["o"] if spec.out is not None and spec.out.bias else []
    told = [f"{'/'.join(own)} by own steps"] if own else []
    told += [f"{'/'.join(biased)} bias"] if biased else []
    told += [f"softcap {core.softcap:g}"] if core.softcap else []
    told += ["logit sinks"] if core.sinks is not None else []
    told += [f"{spec.join.act} gate"] if isinstance(spec.join, Gate) else []
    told += ["own steps before o"] if isinstance(spec.join, Joined) else []
    told += ["more in its module"] if site.surrounding is not None else []
    told += [f"{site.cores} cores"] if site.cores > 1 else []
    return ", ".join(told)


def parameters(found: FoundAttention, site: AttentionSite) -> int:
    """Numbers in the stored tensors that a block reads; a fused one counts whole."""
    gm = (site.capture or found.capture).gm
    return sum(attribute(gm, name).numel() for name in set(weight_names(site.spec)))


def short(number: int) -> str:
    """`41.9M`."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
