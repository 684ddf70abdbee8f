"""The adapter takes the owner's place in the model and calls the mixer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import ArgumentError, UnsupportedCacheError
from reattend.install.around import Around
from reattend.install.binding import (
    Binding,
    TableRef,
    by_name,
    pack,
    read,
    returns_bias,
    signature_of,
)
from reattend.install.handing import Handing, hand_on
from reattend.install.masking import within
from reattend.install.pieces import FixedLeaf
from reattend.install.stock import CrossState, StockState
from reattend.install.tables import component
from reattend.mixers.base import Context, Mixer, State
from reattend.mixers.scores import shown


class Adapter(nn.Module):
    """Speaks the owner's signature outside and the mixer's inside."""

    def __init__(
        self,
        mixer: Mixer,
        binding: Binding,
        signature: inspect.Signature,
        around: Around | None = None,
    ) -> None:
        super().__init__()
        self.mixer, self.binding, self.signature = mixer, binding, signature
        self.around = around

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the module that stood here."""
        return self.answer(by_name(self.signature, args, kwargs))

    def answer(self, arguments: dict[str, Any]) -> Any:
        """`forward` for arguments by name."""
        b = self.binding
        if arguments.get("output_attentions"):
            raise ArgumentError(
                "a converted layer does not form attention weights",
                where=f"{type(self.mixer).__name__} of layer {b.layer_idx}",
                next_step="call the model without output_attentions=True",
            )
        for name in b.absent:
            if isinstance(arguments.get(name), Tensor):
                raise ArgumentError(
                    f"a converted layer is given {name!r}, which it was converted without",
                    where=type(self.mixer).__name__,
                    next_step=f"convert again with inputs that reach {name!r}, or leave it out",
                )
        for leaf in b.fixed:
            _as_captured(leaf, read(arguments, leaf.path))
        if self.around is not None:
            arguments = self.around.prepare(arguments)
        x, memory = read(arguments, b.hidden), read(arguments, b.memory)
        mask = self._mask(arguments, x.shape[1])
        ctx = Context(
            mask=shown(mask) if b.mask_adds_bias and mask is not None else mask,
            rotation=self.rotation(arguments),
            position_BN=read(arguments, b.position),
            extras=self._extras(arguments, x),
        )
        state: State | None = self._state(arguments, mask is None or mask.dim() != 4)
        state = Handing(state) if b.hands else state
        if b.mask_window is not None and mask is not None and state is not None:
            _ends_with(mask, state.seen() + x.shape[1], b.layer_idx)
        added = self._added(x, mask, state, memory) if returns_bias(b.output) else None
        y = self.mixer(x, ctx, state, memory)
        if isinstance(state, Handing):
            for hand in b.hands:
                hand_on(hand, arguments, state)
        if self.around is not None:
            arguments = self.around.finish(arguments, y)
        return pack(b.output, y, arguments, added)

    def _extras(self, arguments: dict[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """What the block's own steps read beside."""
        found = []
        spare = dict(enumerate(self.binding.extras_spare))
        for number, path in enumerate(self.binding.extras):
            value = read(arguments, path)
            if value is None:
                dtype = spare.get(number)
                if not dtype:
                    raise ArgumentError(
                        f"a converted layer needs the argument {path[0]!r}",
                        why="the module it replaced was captured with it",
                        next_step=f"call the model so that {path[0]!r} is passed again",
                    )
                value = x.new_ones(x.shape[:2], dtype=getattr(torch, dtype))
            found.append(value)
        return tuple(found)

    def _mask(self, arguments: dict[str, Any], n: int) -> Tensor | None:
        mask = read(arguments, self.binding.mask)
        if self.binding.mask_hides and isinstance(mask, Tensor):
            return ~mask
        if isinstance(mask, Tensor) and mask.dim() == 4:
            if not mask.is_floating_point():
                mask = mask.bool()  # whole numbers say the same as truth values, and add nothing
            window = self.binding.mask_window
            return mask if window is None else within(mask, n, window)
        if mask is None or isinstance(mask, Tensor):
            return mask
        raise ArgumentError(
            f"an attention mask of type {type(mask).__name__} is not supported by converted layers",
            next_step='model.set_attn_implementation("sdpa")',
        )

    def _added(
        self, x: Tensor, mask: Tensor | None, state: State | None, memory: Tensor | None
    ) -> Tensor:
        """What this block adds to its scores [1, H, N, M]: the owner returned it to its caller."""
        n, seen = x.shape[1], state.seen() if state is not None else 0
        m = seen + n if memory is None else memory.shape[1]
        if mask is not None and mask.dim() == 4:
            m = mask.shape[-1]
        bias = self.mixer.score_bias(n, m, seen)
        return x.new_zeros(1, self.mixer.query_heads, n, m) if bias is None else bias

    def rotation(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """cos and sin [B or 1, N, P] that a call brings; None where positions are counted."""
        if self.binding.cos is None or self.binding.sin is None:
            return None
        cos, sin = _table(arguments, self.binding.cos), _table(arguments, self.binding.sin)
        return None if cos is None or sin is None else (cos, sin)

    def _state(self, arguments: dict[str, Any], filled_only: bool) -> Any:
        cache = read(arguments, self.binding.cache)
        if cache is None:
            return None
        number = self.binding.layer_idx + int(read(arguments, self.binding.layer_shift) or 0)
        if hasattr(cache, "reattend_state"):
            return cache.reattend_state(number)
        part = self.binding.cache_part
        layer = (
            getattr(cache, part, None) if part else getattr(cache, "self_attention_cache", cache)
        )
        if not hasattr(layer, "update"):
            wanted = "an EncoderDecoderCache" if part else "a Cache (DynamicCache, StaticCache)"
            raise UnsupportedCacheError(
                f"a converted layer was given a cache of type {type(cache).__name__}",
                next_step=f"pass transformers' {wanted} or none",
            )
        if part == "cross_attention_cache":
            return CrossState(cache, number, filled_only)
        state: StockState = StockState(layer, number, filled_only)
        if self.mixer.keeps:
            state = _keeping(self.mixer, layer, number)
        if not self.binding.stepwise and state.seen():
            raise UnsupportedCacheError(
                "a converted layer cannot continue from a cache",
                where=f"layer {number}",
                why="what the original module does besides attention mixes tokens or counts "
                "them, so it needs the whole sequence",
                next_step="pass use_cache=False",
            )
        return state


def _keeping(mixer: Mixer, cache: Any, layer_idx: int) -> StockState:
    """The state of a mixer that chooses which rows stay, or holds something else."""
    from reattend.install.held import HeldState
    from reattend.install.kept import KeptState
    from reattend.install.kept_groups import GroupedKeptState

    if len(mixer.head_groups) > 1:
        return GroupedKeptState(cache, layer_idx)
    return (HeldState if mixer.holds else KeptState)(cache, layer_idx)


def _as_captured(leaf: FixedLeaf, value: Any) -> None:
    """A model that was captured at one size of image computes nothing else."""
    sizes = tuple(value.shape) if isinstance(value, Tensor) and leaf.sizes else ()
    differs = any(n not in (None, size) for n, size in zip(leaf.sizes, sizes, strict=False))
    if differs or (leaf.number is not None and value != leaf.number):
        raise ArgumentError(
            "a converted layer was given an image of another size",
            where=".".join(map(str, leaf.path)),
            why="the sizes inside this model were too tangled to capture, so it was converted for "
            "images of the example's height and width",
            next_step="pass images of that size, or convert again with inputs of the other",
        )


def _ends_with(mask: Tensor, tokens: int, layer: int) -> None:
    """A window is counted from the last key, which must be the last token."""
    if mask.dim() == 4 and mask.shape[-1] != tokens:
        raise UnsupportedCacheError(
            "a converted layer cannot tell its window in a cache with empty slots",
            where=f"layer {layer}",
            why=f"the mask has {mask.shape[-1]} keys and there are {tokens} tokens",
            next_step="use transformers' DynamicCache, or none",
        )


def _table(arguments: dict[str, Any], ref: TableRef) -> Tensor | None:
    leaf = read(arguments, ref.path)
    if leaf is None:
        return None
    values = component(leaf, ref.part)
    if ref.columns == tuple(range(len(ref.columns))):  # no index to send to the device
        picked = values[..., : len(ref.columns)]
    else:
        columns = torch.tensor(ref.columns, device=values.device)
        picked = values.index_select(-1, columns)
    return picked.reshape(-1, *picked.shape[-2:]) if picked.dim() != 3 else picked


#: what others registered on a module: who records hidden states goes on doing so
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def install(
    owner: nn.Module, mixer: Mixer, binding: Binding, around: Around | None = None
) -> Adapter:
    """An adapter for `owner`; its plain attributes (layer_idx, config ...) and hooks stay.

    Weights that were the owner's own read as None: torch's layers look at those of their attention
    to choose a fused path, and without them take the one that calls it.

    Args:
        owner: the module that is replaced.
        mixer: what computes its block.
        binding: how its call maps to the mixer's.
        around: the programs that `binding.around` describes.
    """
    signature = signature_of(owner)
    adapter = Adapter(mixer, binding, signature, around)
    own = {"training", "mixer", "binding", "signature", "around"}
    for name, value in vars(owner).items():
        if not name.startswith("_") and name not in own:
            setattr(adapter, name, value)
    for name in owner._parameters:  # read by a caller who would compute without the mixer
        adapter.register_parameter(name, None)
    for name in _HOOKS:
        getattr(adapter, name).update(getattr(owner, name))
    adapter.train(owner.training)
    return adapter


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Set `model.<path>` (a dotted path; list indices included)."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, name, new)
    for module in model.modules():
        if isinstance(
            module, nn.TransformerEncoder
        ):  # reads its first layer's weights if this is on
            module.use_nested_tensor = False
