"""Launch of the Triton kernels of `reattend::linear_attention`.

Letters as in `reference.py`; T chunks of C tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.kernels.configs import KernelConfig, find_config
from reattend.kernels.launching import (
    device_target,
    interpreting,
    next_power_of_two,
    on_device,
    unit_stride,
)
from reattend.kernels.linear_attention import launch_channels
from reattend.kernels.linear_attention.gradient import from_the_end, moved_by_decays
from reattend.kernels.linear_attention.reference import LEAST
from reattend.kernels.linear_attention.triton_backward import linear_read_back, linear_state_back
from reattend.kernels.linear_attention.triton_kernel import linear_read
from reattend.kernels.linear_attention.triton_state import linear_state, linear_step

KERNELS = ("state", "read", "state_back", "read_back", "step")
Configs = dict[str, KernelConfig]


class Inputs(NamedTuple):
    """The arguments of a call."""

    q_BHNf: Tensor
    k_BGNf: Tensor
    v_BGNe: Tensor
    decay_BGN: Tensor | None
    state_BGfe: Tensor | None
    lag: int
    block: int
    normalize: bool

    @property
    def featured(self) -> bool:
        """Whether every feature decays by itself."""
        return self.decay_BGN is not None and self.decay_BGN.dim() == 4

    @property
    def for_gradient(self) -> Inputs:
        """The call as its gradient is made: fp32 where `linear_channels` would round what fp16
        cannot hold, gradients divided by small sums.
        """
        if not self.featured or not self.normalize or self.q_BHNf.dtype != torch.float16:
            return self
        q, k, v = (t.float() for t in self[:3])
        return self._replace(q_BHNf=q, k_BGNf=k, v_BGNe=v)

    @property
    def sums(self) -> launch_channels.Sums:
        """The call as those kernels take it."""
        q, k, v, decay, _ = self[:5]
        assert decay is not None
        return launch_channels.Sums(q, k, v, decay, _before(self))


class _Chunked(NamedTuple):
    """What the kernels over chunks share.

    `states` [B, G, T, f, columns]: before each chunk, bf16 where that is what the products read,
    else fp32: where outputs are divided, and since sums may leave the range of fp16. `after` [B, G,
    f, columns], fp32; `within` [B, G, T, C]: sums of log decays; `sizes`: n, T; `heads`: H, H / G.
    """

    states: Tensor
    after: Tensor
    within: Tensor
    sizes: tuple[int, int]
    heads: tuple[int, int]

    def across(self, turned: bool) -> tuple[int, int, int]:
        """Numbers of a state, and how far its rows and columns are apart; `turned`: transposed."""
        rows, columns = self.states.shape[3:]
        return (rows * columns, 1, columns) if turned else (rows * columns, columns, 1)


def configs_for(x: Inputs) -> Configs | None:
    """The shipped configurations for these tensors, or None: then torch computes the op."""
    target, size = device_target(x.q_BHNf.device), x.q_BHNf.element_size()
    if target is None or size not in (2, 4):
        return None
    width = max(x.q_BHNf.shape[3], x.v_BGNe.shape[3] + x.featured * x.normalize)
    names = ("channels", "step") if x.featured else KERNELS
    found = {name: find_config(target.name, f"linear_{name}", width, size) for name in names}
    return {name: c for name, c in found.items() if c is not None} if all(found.values()) else None


def launch(x: Inputs, configs: Configs) -> tuple[Tensor, Tensor]:
    """``y_BHNe`` in the dtype of q, and the state after all keys in fp32.

    Args:
        x: the call.
        configs: tile sizes of every kernel; those over chunks have equally many rows.
    """
    if x.q_BHNf.shape[2] == 1:
        return _step(x, configs["step"])
    if x.featured:
        return launch_channels.forward(x.sums, x.normalize, configs["channels"])
    made = _scanned(x, configs["state"])
    y, _ = _read(x, made, configs["read"], x.q_BHNf.dtype)
    return y, made.after


def launch_backward(dy: Tensor, dstate: Tensor, x: Inputs, configs: Configs) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay (empty where there is none) and state.

    Args:
        dy: of y.
        dstate: of the state after all keys.
        x: the call.
        configs: see `launch`.
    """
    if x.featured:
        return launch_channels.backward(dy, dstate, x.sums, x.normalize, configs["channels"])
    x = x._replace(q_BHNf=x.q_BHNf.contiguous(), k_BGNf=x.k_BGNf.contiguous())
    x = x._replace(v_BGNe=x.v_BGNe.contiguous())
    q, k, v = x[:3]
    made = _scanned(x, configs["state"])
    mass = added = made.within
    if x.normalize:
        y, mass = _read(x, made, configs["read"], torch.float32)
        added = torch.where(mass > LEAST, -(dy.float() * y).sum(-1), 0)
    dy = dy.to(q.dtype).contiguous()
    # what decays get is a long sum of small differences of these
    kind = q.dtype if x.decay_BGN is None else torch.float32
    dq = torch.empty_like(q, dtype=kind)
    _launch_read((dy, v, k), (dq, mass, added), made, x, configs["read"], True)
    (b, g, f, columns), chunks = made.after.shape, made.sizes[1]
    later = made.after.new_empty(b, g, chunks + 1, f, columns)
    later[:, :, -1] = dstate
    common = (*made.sizes, *made.heads, x.lag, x.block)
    with on_device(q):
        back = configs["state_back"]
        tiles = -(-q.shape[3] // back.keys) * -(-v.shape[3] // back.keys)
        linear_state_back[(tiles * k.shape[0] * k.shape[1],)](
            q, dy, later, made.within, mass, added, *common,
            F=q.shape[3], E=v.shape[3], ONES=x.normalize, **_options(x, back),
        )  # fmt: skip
    dk, dv = torch.empty_like(k, dtype=kind), torch.empty_like(v)
    for given, out, turned in (((k, q, dy), dv, False), ((v, dy, q), dk, True)):
        config = configs["read_back"]
        programs = -(-out.shape[3] // config.keys) * made.sizes[1] * k.shape[0] * k.shape[1]
        with on_device(q):
            linear_read_back[(programs,)](
                *given, out, later, made.within, mass, added, *common, *made.across(turned),
                F=given[0].shape[3], E=out.shape[3], ONES=x.normalize,
                ADDED=turned and x.normalize, **_options(x, config),
            )  # fmt: skip
    ddecay = q.new_zeros(0)
    if x.decay_BGN is not None:
        ddecay = _decay_gradient(x, made, dq, dk, later)
    return dq, dk, dv, ddecay, later[:, :, 0].contiguous()


def _decay_gradient(x: Inputs, made: _Chunked, dq: Tensor, dk: Tensor, later: Tensor) -> Tensor:
    """Of the decays [B, G, N], fp32: what moves, summed from the end.

    Where chunks ask those before them by states alone, a state times its gradient is the sum behind
    it: no rounding is carried from chunk to chunk.

    Args:
        x: the call, made.. of it by `_scanned`.
        dq, dk: gradients, fp32.
        later: those of the states, [B, G, T + 1, f, columns].
    """
    moved = moved_by_decays(x.q_BHNf, dq, x.k_BGNf, dk).sum(-1)
    tail = (later[:, :, -1] * made.after).sum((-1, -2))
    n, chunks = made.sizes
    rows = made.within.shape[-1]
    if x.lag or rows % x.block:
        return from_the_end(moved, tail)
    ends = (made.states[:, :, 1:] * later[:, :, 1:-1]).sum((-1, -2))
    parts = F.pad(moved, (0, chunks * rows - n)).unflatten(2, (chunks, rows))
    summed = from_the_end(parts, torch.cat([ends, tail[..., None]], 2), 3)
    return summed.flatten(2)[..., :n]


def _options(x: Inputs, config: KernelConfig) -> dict[str, Any]:
    return {
        "HAS_DECAY": x.decay_BGN is not None,
        # the interpreter holds bf16 as integers: compute in fp32 there
        "UPCAST": interpreting() and x.q_BHNf.dtype == torch.bfloat16,
        "PRECISION": "ieee",
        "BLOCK_ROWS": config.rows,
        "BLOCK_F": config.keys,
        "BLOCK_E": config.keys,
        "enable_fp_fusion": True,
        **config.launch,
    }


def _before(x: Inputs) -> Tensor:
    """The state before the call, fp32 and contiguous."""
    if x.state_BGfe is not None:
        return x.state_BGfe.float().contiguous()
    columns = x.v_BGNe.shape[3] + (1 if x.normalize else 0)
    return x.k_BGNf.new_zeros(*x.k_BGNf.shape[:2], x.k_BGNf.shape[3], columns, dtype=torch.float32)


def _scanned(x: Inputs, config: KernelConfig) -> _Chunked:
    """The states before every chunk."""
    k, v = unit_stride(x.k_BGNf), unit_stride(x.v_BGNe)
    (b, g, n, f), h = k.shape, x.q_BHNf.shape[1]
    chunks, before = -(-n // config.rows), _before(x)
    kind = k.dtype if k.dtype == torch.bfloat16 and not x.normalize else torch.float32
    states = before.new_empty(b, g, chunks, *before.shape[2:], dtype=kind)
    after = torch.empty_like(before)
    within = before
    if x.decay_BGN is not None:
        fill = F.pad(x.decay_BGN.float(), (0, chunks * config.rows - n))
        within = fill.unflatten(-1, (chunks, config.rows)).cumsum(-1).contiguous()
    tiles = -(-f // config.keys) * -(-v.shape[3] // config.keys)
    with on_device(k):
        linear_state[(tiles * b * g,)](
            k, v, before, states, after, within, n, chunks, g, *k.stride()[:3], *v.stride()[:3],
            F=f, E=v.shape[3], ONES=x.normalize, **_options(x, config),
        )  # fmt: skip
    return _Chunked(states, after, within, (n, chunks), (h, h // g))


def _read(
    x: Inputs, made: _Chunked, config: KernelConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs, and what they were divided by (if they were)."""
    q, k, v = (unit_stride(t) for t in x[:3])
    y = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
    mass = q.new_empty(q.shape[:3], dtype=torch.float32) if x.normalize else made.within
    _launch_read((q, k, v), (y, mass, mass), made, x, config, False)
    return y, mass


def _launch_read(
    given: tuple[Tensor, Tensor, Tensor],
    made_of: tuple[Tensor, Tensor, Tensor],
    made: _Chunked,
    x: Inputs,
    config: KernelConfig,
    turned: bool,
) -> None:
    """`linear_read`; `turned`: for the gradient of the queries.

    Args:
        given: what stands for q, k and v.
        made_of: y, mass and added.
        made: of `_scanned`.
        x: the call.
        config: tile sizes.
    """
    (q, k, v), (y, mass, added) = given, made_of
    programs = -(-v.shape[3] // config.keys) * made.sizes[1] * q.shape[0] * q.shape[1]
    with on_device(q):
        linear_read[(programs,)](
            q, k, v, y, mass, made.states, made.within, added, *made.sizes, *made.heads,
            x.lag, x.block, *made.across(turned), *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], F=q.shape[3], E=v.shape[3], ONES=x.normalize and not turned,
            ADDED=x.normalize and turned, **_options(x, config),
        )  # fmt: skip


def _step(x: Inputs, config: KernelConfig) -> tuple[Tensor, Tensor]:
    """One token."""
    q, k, v = (unit_stride(t) for t in x[:3])
    (b, h, _, f), g, e = q.shape, k.shape[1], v.shape[3]
    before = _before(x)
    after, y = torch.empty_like(before), q.new_empty(b, h, 1, e)
    decay = before if x.decay_BGN is None else x.decay_BGN.float().contiguous()
    options = _options(x, config)
    for name in ("UPCAST", "PRECISION", "BLOCK_ROWS"):
        del options[name]
    options["BLOCK_F"] = next_power_of_two(f)
    with on_device(q):
        linear_step[(-(-e // config.keys) * g * b,)](
            q, k, v, y, before, after, decay, h, h // g, *q.stride()[:2], *k.stride()[:2],
            *v.stride()[:2], F=f, E=e, ONES=x.normalize, OWN=x.lag == 0,
            FEATURED=x.featured, **options,
        )  # fmt: skip
    return y, after
