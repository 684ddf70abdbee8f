"""`reattend::linear_attention` against its recurrence, token by token, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.kernels.linear_attention import linear_attention, reference

OP = torch.ops.reattend.linear_attention.default
#: (lag, block): causal, a sliding window of 1 and of 5, terraces of 3, of 70
SEEN = [(0, 1), (1, 1), (5, 1), (4, 3), (71, 70)]


def make(n: int, decay: bool, state: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """2 rows, 6 query heads over 3 key heads, 5 features, 7 values; the first 4 keys of row 1 are
    padding.
    """
    gen = torch.Generator().manual_seed(n)
    draw = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    k = draw(2, 3, n, 5).exp()
    k[1, :, :4] = 0
    given = {"q": draw(2, 6, n, 5).exp(), "k": k, "v": draw(2, 3, n, 7)}
    given["decay"] = -draw(2, 3, n).abs() * 0.2 if decay else None
    given["state"] = draw(2, 3, 5, 7) if state else None
    return {name: None if x is None else x.to(dtype) for name, x in given.items()}


def of_features(given: dict[str, Any], most: float = 0.2) -> dict[str, Any]:
    """A decay for every feature: some forget nothing, some up to everything."""
    gen = torch.Generator().manual_seed(3)
    decay = -(torch.rand(given["k"].shape, generator=gen, dtype=torch.float64) ** 4) * most
    return given | {"decay": decay.to(given["k"].dtype)}


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Any, state: Any, lag: int, block: int
) -> tuple[Tensor, Tensor]:
    """The textbook loop; what a query may not see yet is kept out of the state it reads."""
    b, g, n, f = k.shape
    if decay is not None:
        decay = (decay if decay.dim() == 4 else decay[..., None])[..., None]
    before = torch.zeros(b, g, f, v.shape[-1], dtype=q.dtype) if state is None else state
    rows, s = [], before
    for i in range(n):
        s = before
        for j in range(i + 1):
            s = s if decay is None else s * decay[:, :, j].exp()
            if j <= i // block * block - lag:
                s = s + k[:, :, j, :, None] * v[:, :, j, None]
        rows.append(torch.einsum("bgrf,bgfe->bgre", q[:, :, i].unflatten(1, (g, -1)), s))
    for i in range(n):
        before = before if decay is None else before * decay[:, :, i].exp()
        before = before + k[:, :, i, :, None] * v[:, :, i, None]
    return torch.stack(rows, 3).flatten(1, 2), before


def apart(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    pairs = zip(got, expected, strict=True)
    gaps = ((a - b).abs().max() / b.abs().max().clamp_min(1e-9) for a, b in pairs)
    return max(float(gap.detach()) for gap in gaps)


@pytest.mark.parametrize("most", [0.2, 400])
def test_every_feature_may_forget_by_itself(most: float) -> None:
    """Up to exp(-400) of it per token, which no product of two exponentials could hold."""
    for n in (1, 17, 149):
        given = of_features(make(n, True, True), most)
        plain = reference.linear_attention(*given.values())
        if n < 149:
            assert apart(plain, recurrence(*given.values(), 0, 1)) <= 1e-10
        assert apart(OP(*given.values()), plain) <= 1e-10
        narrow = {k: x.float() for k, x in given.items()}
        assert apart(OP(*narrow.values()), plain) <= 1e-4
    same = given | {"decay": given["decay"][..., :1].expand(-1, -1, -1, 5)}
    one = given | {"decay": given["decay"][..., 0]}
    assert apart(OP(*same.values()), OP(*one.values())) <= 1e-10


@pytest.mark.parametrize(("lag", "block"), SEEN)
@pytest.mark.parametrize(("decay", "state"), [(False, False), (True, True)])
def test_chunks_equal_the_recurrence(lag: int, block: int, decay: bool, state: bool) -> None:
    for n in (1, 17, 149):
        given = make(n, decay, state)
        expected = recurrence(*given.values(), lag, block) if n < 149 else None
        plain = reference.linear_attention(*given.values(), lag, block)
        if expected is not None:
            assert apart(plain, expected) <= 1e-10
        assert apart(OP(*given.values(), lag, block), plain) <= 1e-10
        narrow = {k: None if x is None else x.float() for k, x in given.items()}
        assert apart(OP(*narrow.values(), lag, block), plain) <= 1e-4


@pytest.mark.parametrize("normalize", [False, True])
def test_both_ways_every_query_reads_all_keys_and_the_state(normalize: bool) -> None:
    """Against the sums as they are written, and the gradient against autograd through them."""
    given = make(37, False, False)
    state = torch.rand(2, 3, 5, 8 if normalize else 7, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (given["q"], given["k"], given["v"], state)]
    q, k, v, s = leaves
    k_H, v_H, s_H = (x.repeat_interleave(2, 1) for x in (k, v, s))
    weight = torch.einsum("bhnf,bhmf->bhnm", q, k_H)
    want = weight @ v_H + torch.einsum("bhnf,bhfe->bhne", q, s_H[..., :7])
    if normalize:
        want = want / (weight.sum(-1) + torch.einsum("bhnf,bhf->bhn", q, s_H[..., 7]))[..., None]
    columns = torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v
    after = s + torch.einsum("bgnf,bgne->bgfe", k, columns)
    rules = (0, 1, normalize, True)
    for op in (OP, reference.linear_attention):
        assert apart(op(q, k, v, None, s, *rules), (want, after)) <= 1e-12
    found = []
    for y, left in ((want, after), OP(q, k, v, None, s, *rules)):
        loss = (y * torch.sin(torch.arange(y.numel()).reshape(y.shape))).sum() + (left**2).sum()
        found.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    assert apart(*found) <= 1e-10


@pytest.mark.parametrize("featured", [False, True])
def test_one_shot_equals_pieces_and_steps(featured: bool) -> None:
    given = make(150, True, False)
    given = of_features(given, 3) if featured else given
    whole, last = OP(*given.values(), 0, 1, True)
    for cuts in ((64, 86), (1, 3, 146), (1,) * 150):
        state, parts, at = None, [], 0
        for n in cuts:
            piece = [given[x][:, :, at : at + n] for x in ("q", "k", "v", "decay")]
            y, state = linear_attention(*piece, state, 0, 1, True)
            parts.append(y)
            at += n
        assert apart((torch.cat(parts, 2), state), (whole, last)) <= 1e-10
    ones = OP(given["q"], given["k"], torch.ones_like(given["v"]), given["decay"], None, 0, 1, True)
    assert (ones[0] - 1)[0].abs().max() <= 1e-12  # weights of a row sum to 1
    assert bool((ones[0][1, :, :4] == 0).all())  # a query that sees nothing gives 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("lag", "block", "featured"), [(0, 1, False), (5, 1, False), (71, 70, False), (0, 1, True)]
)
def test_gradients(lag: int, block: int, featured: bool, normalize: bool) -> None:
    """The closed form against autograd through the formula."""
    given = make(149, True, False)
    given = of_features(given) if featured else given
    given["state"] = torch.rand(2, 3, 5, 8 if normalize else 7, dtype=torch.float64)
    found = []
    for op in (OP, reference.linear_attention):
        leaves = [x.clone().requires_grad_() for x in given.values()]
        y, state = op(*leaves, lag, block, normalize)
        loss = (y * torch.sin(torch.arange(y.numel()).reshape(y.shape))).sum() + (state**2).sum()
        found.append(torch.autograd.grad(loss, leaves))
    assert apart(*found) <= 1e-9


def test_the_op_keeps_torchs_contract() -> None:
    for decay, state, normalize, lag in (
        (True, True, False, 2), (False, False, True, 2), (True, True, False, 0)
    ):  # fmt: skip
        made = make(9, decay, state)
        given = [
            None if x is None else x[:1, :, :5].clone().requires_grad_()
            for x in (made if lag else of_features(made)).values()
        ]
        torch.library.opcheck(OP, (*given, lag, 1, normalize))
    torch.library.opcheck(OP, (*given[:3], None, None, 0, 1, True, True))


def test_what_does_not_fit_is_named() -> None:
    given = make(9, True, True)
    with pytest.raises(ArgumentError, match="size 3 of state_BGfe"):
        OP(*given.values(), 0, 1, True)
    with pytest.raises(ArgumentError, match="lag must be 0"):
        OP(*given.values(), -1)
    with pytest.raises(ArgumentError, match="every feature needs lag 0"):
        OP(*of_features(given).values(), 2)
    with pytest.raises(ArgumentError, match="nothing decays and no key is left out"):
        OP(*given.values(), 0, 1, False, True)
    with pytest.raises(ArgumentError, match="decay_BGN must be a float tensor of 3"):
        OP(given["q"], given["k"], given["v"], given["decay"][0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_naive_loops_of_flash_linear_attention_say_the_same() -> None:
    """An oracle that others wrote (`fla-core`, where it is installed); it is float32."""
    featured = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    by_head = pytest.importorskip("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    for given, naive in (
        (of_features(make(149, True, True), 3), featured), (make(149, True, True), by_head)
    ):  # fmt: skip
        q, k, v, decay, state = given.values()
        k, v, decay, state = (x.repeat_interleave(2, 1) for x in (k, v, decay, state))
        turned = [x.transpose(1, 2).float() for x in (q * q.shape[-1] ** 0.5, k, v, decay)]
        y, after = naive(*turned, initial_state=state.float(), output_final_state=True)
        assert apart((y.transpose(1, 2), after), OP(q, k, v, decay, state)) <= 1e-4
