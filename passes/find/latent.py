"""Blocks that already are multi-head latent attention: recognised and measured, not converted.

DeepSeek-V2, arXiv 2405.04434. Keys and values of every head come up from one narrow projection of
the hidden states; beside it stands a rotated key that all heads share. That is seen in how the
projections behind a core depend on each other, whatever the layers are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from reattend.passes.normalize.forms import aten, is_op, is_projection, rms_norm

_COPIES = (aten.copy_,)
_PARTS = (aten.slice, aten.select, aten.narrow)
#: what may stand between a projection down and the projection up from it
_PLAIN = (
    rms_norm, aten.layer_norm, aten.reshape, aten.view, aten.transpose, aten.permute,
    aten.split_with_sizes, aten.split, aten.slice, aten.narrow, aten.unsqueeze, aten.squeeze,
    aten.clone, aten.contiguous, aten.to,
)  # fmt: skip


@dataclass(frozen=True)
class LatentForm:
    """The sizes of an MLA block.

    Attributes:
        heads: query heads.
        kv_lora_rank: width of the latent that keys and values share.
        qk_rope_head_dim: width of the rotated key that all heads share.
        q_lora_rank: width of the queries' own latent, None without one.
    """

    heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    q_lora_rank: int | None

    @property
    def reason(self) -> str:
        """Why there is nothing to convert."""
        queries = f", q_lora_rank {self.q_lora_rank}" if self.q_lora_rank else ""
        return (
            f"already latent: multi-head latent attention with {self.heads} heads, kv_lora_rank "
            f"{self.kv_lora_rank}, qk_rope_head_dim {self.qk_rope_head_dim}{queries}"
        )


def read_latent(core: fx.Node) -> LatentForm | None:
    """The sizes of the MLA block around a normalised core; None if it is not one."""
    q, k, v = core.args[:3]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    values = _projections(v)
    if len(values) != 1:
        return None
    up = values.pop()
    down = _below(up)
    keys = _projections(k)
    ups = {p for p in keys if _below(p) is down and p is not down}
    if down is None or not ups or any(_inner(p) != _inner(up) for p in ups):
        return None
    queries = _projections(q)
    if len(queries) != 1 or queries & {down} or _below(next(iter(queries))) is down:
        return None  # the "latent" is only the layer that every stream starts from
    shared = keys - ups
    if len(shared) > 1 or any(p.args[0] is not down.args[0] for p in shared):
        return None
    rank = _inner(up)
    rope = sum(_outer(p) - (rank if p is down else 0) for p in shared)
    (query,) = queries
    q_rank = _inner(query) if _below(query) is not None else None
    return LatentForm(int(core.meta["val"].shape[1]), rank, rope, q_rank)


def _projections(start: fx.Node) -> set[fx.Node]:
    """The nearest projections behind a value."""
    return {n for n in _behind(start) if is_projection(n)}


def _below(projection: fx.Node) -> fx.Node | None:
    """The one projection whose output, normalised and cut at most, this one reads."""
    source = projection.args[0]
    assert isinstance(source, fx.Node)
    if is_projection(source):
        return source
    between = _behind(source, lambda n: not _plain(n))
    ends = [n for n in between if not _plain(n) and not _constant(n)]
    return ends[0] if len(ends) == 1 and is_projection(ends[0]) else None


def _plain(node: fx.Node) -> bool:
    scaled = is_op(node, aten.mul) and isinstance(node.args[1], int | float)
    return scaled or is_op(node, *_PLAIN) or getattr(node.target, "__name__", "") == "getitem"


def _constant(node: fx.Node) -> bool:
    """A gain or a size."""
    return node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor)


def _behind(start: fx.Node, stop: Callable[[fx.Node], bool] = is_projection) -> set[fx.Node]:
    """`start` and what it is computed from, up to where `stop` holds; what is copied into it too.

    Keys are often made by copying two parts into an empty tensor, which no argument shows.
    """
    seen: set[fx.Node] = set()
    todo = [start]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if stop(node):
            continue
        todo += node.all_input_nodes
        for part in [node, *[u for u in node.users if is_op(u, *_PARTS)]]:
            written = [u for u in part.users if is_op(u, *_COPIES) and u.args[0] is part]
            todo += [u.args[1] for u in written if isinstance(u.args[1], fx.Node)]
    return seen


def _inner(projection: fx.Node) -> int:
    """Input features."""
    return int(projection.args[0].meta["val"].shape[-1])


def _outer(projection: fx.Node) -> int:
    """Output features."""
    return int(projection.meta["val"].shape[-1])
