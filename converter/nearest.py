"""The understood form that a core which could not be read comes closest to, in words."""

from __future__ import annotations

from torch import fx

#: what the normalising passes take for a core
CORE_FORM = "softmax(scale q k^T + mask) v, or torch's scaled_dot_product_attention"
#: words of a reason, and the form of the part it is about
_FORMS = (
    (("the core", "its projection"), "reshapes, a gate or steps of the block's own, then one "
     "linear layer"),
    (("heads meet",), "as many query heads as key and value heads, or a multiple"),
    (("mask", "pattern", "bias", "scores"), "a mask that is full, causal, sliding or chunked, plus "
     "a bias per distance, ALiBi, or steps of the block's own inputs"),
    (("projections", "no projection", "row map"), "each of q, k and v from one linear layer of one "
     "tensor"),
    (("rotated", "rotation"), "queries and keys rotated alike in pairs, values not"),
    (("norm",), "one norm per stream, over a head or the whole stream"),
    (("scaled", "factor"), "one constant factor per stream"),
    (("windows", "axes", "different tensors"), "streams of [batch, tokens, width] from one tensor "
     "for queries and one for keys and values"),
)  # fmt: skip


def nearest_form(reason: str, core: fx.Node) -> str:
    """Heads and width as the core shows them, and the form that the failing part would have.

    Windows that stand beside heads make their number a size of the input: then it is left out.
    """
    _, heads, _, width = core.meta["val"].shape
    form = next((f for words, f in _FORMS if any(w in reason for w in words)), CORE_FORM)
    known = f"{heads} heads" if isinstance(heads, int) else "heads"
    return f"softmax attention with {known} of width {width}, and {form}"
