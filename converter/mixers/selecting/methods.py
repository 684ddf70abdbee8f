"""Which method does what a selector describes."""

from __future__ import annotations

from torch import nn

from reattend.mixers.config import CoreConfig, RotaryConfig
from reattend.mixers.selecting.base import Method
from reattend.mixers.selecting.blocks import BlocksMethod
from reattend.mixers.selecting.channels import ChannelsMethod
from reattend.mixers.selecting.gate import GateMethod
from reattend.mixers.selecting.low_rank import LowRankMethod
from reattend.mixers.selecting.observed import ObservedMethod
from reattend.mixers.selecting.recorded import RecordedMethod
from reattend.mixers.selecting.segments import SegmentsMethod
from reattend.mixers.selecting.values import ValuesMethod
from reattend.mixers.selecting.vertical_slash import VerticalSlashMethod
from reattend.mixers.sparse_config import SparseConfig
from reattend.patterns.learned import Gate, LowRank, Segments, Values
from reattend.patterns.routing import Blocks, Observed
from reattend.patterns.selectors import AnySelector, Channels, Recorded


def methods(config: SparseConfig) -> nn.ModuleDict:
    """One for each class of heads that selects, by its number."""
    core, found = config.core, nn.ModuleDict()
    for number, c in enumerate(config.classes):
        if c.pattern.select is not None:
            group = core.heads // core.kv_heads
            heads = {"heads": group * len(c.kv_heads), "kv_heads": len(c.kv_heads)}
            own = core.model_copy(update=heads)
            found[str(number)] = method(c.pattern.select, own, config.rotary)
    return found


def method(selector: AnySelector, core: CoreConfig, rotary: RotaryConfig | None = None) -> Method:
    """The module that selects, for heads of this core, which are turned by `rotary`."""
    if isinstance(selector, Blocks):
        return BlocksMethod(selector, core, rotary)
    if isinstance(selector, Observed):
        return ObservedMethod(selector)
    if isinstance(selector, Channels):
        return ChannelsMethod(selector, core)
    if isinstance(selector, Gate):
        return GateMethod(selector, core)
    if isinstance(selector, Segments):
        return SegmentsMethod(selector, core)
    if isinstance(selector, LowRank):
        return LowRankMethod(selector, core)
    if isinstance(selector, Values):
        return ValuesMethod(selector, core)
    if isinstance(selector, Recorded):
        return RecordedMethod(selector)
    return VerticalSlashMethod(selector)
