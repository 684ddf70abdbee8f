"""A KV cache quantised to 2, 4 or 8 bits, in transformers' own cache layer.

transformers' `QuantizedCache` leaves the arithmetic to optional packages (`optimum-quanto`: 2 and
4 bits; `hqq`: 1, 2, 3, 4 and 8). `MinMaxLayer` supplies the arithmetic itself, so the yardstick
runs wherever transformers runs; residual window, concatenation and flushing are inherited code.
`new_quantised_cache(backend="hqq")` or `"quanto"` builds transformers' own cache instead.

The arithmetic is the one that `quanto`'s MaxOptimizer uses along axis 0 (and `hqq` along axis 1
before it refines the zero point): groups of 64 numbers that lie next to each other, i.e. 64 / d
tokens of one head, each with scale = (max - min) / (2^bits - 1) and zero point = min, both kept as
float16. Codes are packed, so the bytes that the cache holds are the bytes that are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedCache, QuantizedLayer

from reattend.errors import ArgumentError, MissingExtraError

GROUP = 64
_TINY = 6.0e-8  # the smallest positive float16: a constant group still has a scale


class Packed:
    """One quantised tensor: packed codes, scale and zero point per group.

    Args:
        tensor_BGNd: float tensor; groups run along the flattened (N, d) of each (B, G), so rows of
            a batch never share one.
        bits: 2, 4 or 8.
        group: numbers per scale.
    """

    def __init__(self, tensor_BGNd: Tensor, bits: int, group: int = GROUP) -> None:
        self.shape, self.dtype, self.bits = tensor_BGNd.shape, tensor_BGNd.dtype, bits
        flat = tensor_BGNd.flatten(-2).float()
        gap = -flat.shape[-1] % group
        if gap:  # the last value again: it changes neither minimum nor maximum
            flat = torch.cat([flat, flat[..., -1:].expand(*flat.shape[:-1], gap)], dim=-1)
        grouped = flat.unflatten(-1, (-1, group))
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        if not bool(low.half().isfinite().all() & high.half().isfinite().all()):
            raise ArgumentError("Keys or values are too large for a float16 zero point.")
        self.zero = low.half()
        self.scale = ((high - low) / (2**bits - 1)).clamp(min=_TINY).half()
        codes = ((grouped - self.zero.float()) / self.scale.float()).round_()
        self.codes = _pack(codes.clamp_(0, 2**bits - 1).to(torch.uint8), bits)

    def dequantise(self) -> Tensor:
        """The tensor again, `(B, G, N, d)` in its own dtype."""
        codes = _unpack(self.codes, self.bits).float()
        flat: Tensor = (codes * self.scale.float() + self.zero.float()).flatten(-2)
        wanted = self.shape[-2] * self.shape[-1]
        return flat[..., :wanted].reshape(self.shape).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero))


class MinMaxLayer(QuantizedLayer):
    """transformers' quantised cache layer with min-max arithmetic of its own.

    The first call and every flush quantise all that is cached; between flushes up to
    `residual_length` - 1 newest tokens stay in the model's dtype.
    """

    def _quantize(self, tensor: Tensor, axis: int) -> Packed:  # type: ignore[override]
        return Packed(tensor, self.nbits, self.q_group_size)

    def _dequantize(self, q_tensor: Packed) -> Tensor:
        return q_tensor.dequantise()


def new_quantised_cache(
    config: Any, *, bits: int, residual: int, backend: str = "minmax"
) -> Callable[[], Cache]:
    """A maker of quantised caches for a model.

    Args:
        config: the model's config.
        bits: 2, 4 or 8.
        residual: tokens kept in full precision before they are quantised.
        backend: `minmax` (this file), or transformers' own `hqq` or `quanto`.

    Raises:
        ArgumentError: unknown backend, bits it does not have, or a model whose layers are not all
            full attention (transformers refuses those too).
        MissingExtraError: the backend's package is not installed.
    """
    if backend not in ("minmax", "hqq", "quanto") or bits not in (2, 4, 8):
        raise ArgumentError(
            "No such KV cache quantisation.",
            why=f"backend={backend!r}, bits={bits}",
            next_step="use minmax, hqq or quanto with 2, 4 or 8 bits.",
        )
    axis = 1 if backend == "hqq" else 0  # both: groups of neighbours in memory
    settings = {
        "nbits": bits, "axis_key": axis, "axis_value": axis,
        "q_group_size": GROUP, "residual_length": residual,
    }  # fmt: skip
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
        raise ArgumentError(
            "Only models with full attention in every layer have a quantised KV cache.",
            why=f"layer types {sorted(kinds)}, sliding window {text.sliding_window}",
        )
    if backend == "minmax":
        return lambda: Cache(
            layers=[MinMaxLayer(**settings) for _ in range(text.num_hidden_layers)]
        )
    try:
        QuantizedCache(backend, config, **settings)
    except ImportError as error:
        package = {"hqq": "hqq", "quanto": "optimum-quanto"}[backend]
        raise MissingExtraError(
            f"The {backend} KV cache needs a package.",
            next_step=f"pip install {package}, or 'reattend[eval]' for both",
        ) from error
    except ValueError as error:
        raise ArgumentError("transformers refuses this KV cache.", why=str(error)) from error
    return lambda: QuantizedCache(backend, config, **settings)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """8 / bits codes per byte along the last axis."""
    per = 8 // bits
    parts = codes.unflatten(-1, (-1, per))
    packed = torch.zeros_like(parts[..., 0])
    for index in range(per):
        packed |= parts[..., index] << (bits * index)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_pack`."""
    mask = 2**bits - 1
    parts = [(packed >> (bits * index)) & mask for index in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)
