"""What `find_attention` returns: blocks that were proven, and blocks that were refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reattend.capture import Capture
from reattend.install.binding import Binding
from reattend.passes.base import CORES
from reattend.passes.find.latent import LatentForm
from reattend.passes.find.sites import Found, Missed, Region
from reattend.spec import AttentionSpec
from reattend.surround import Surrounding

#: what a block has to pass, in order
STEPS = {
    "normalise": "its core becomes one attention node",
    "read": "its streams, mask and exit are of known forms",
    "new": "it is no latent attention, and no earlier conversion replaced it",
    "own": "a module of the model carries it",
    "prove": "rebuilt from what was read, it gives the same in float64",
    "lengths": "it does so at lengths it was not captured at",
    "owner": "with what its owner does besides, it gives the same",
    "call": "called as the model calls its owner, it gives the same",
    "calls": "every call of its module does the same",
    "watch": "every softmax that averages values while the model runs was seen in the graph",
}


@dataclass
class AttentionSite:
    """One attention block of a model.

    Attributes:
        path: dotted path of the module it lies in (`#k` appended where that holds several). A
            module that is called several times is one site.
        spec: what it computes.
        verified: it passed the self-check (`error` is its relative error in float64).
        hidden_size, memory_size: input widths; memory 0 for self-attention.
        owner: `module` if a submodule is exactly this block, else `graph`.
        binding: how the owning module's call maps to a mixer's; None for `graph`.
        region: the block in the captured graph.
        follows_padding: the model's own mask hides padded tokens here.
        surrounding: what the owner does besides the block, None where it is exactly the block.
        cores: softmax cores of one run of the model that it stands for: two where a block weighs
            its values in two calls, and those of every call of the module.
        deferred: why it was not proven though nothing speaks against it: the model has no weights.
        capture: of the graph it was read in, where that is not the model's (`reattend.alone`).
    """

    path: str
    spec: AttentionSpec
    verified: bool
    error: float
    hidden_size: int
    memory_size: int
    owner: Literal["module", "graph"]
    binding: Binding | None
    region: Region = field(repr=False)
    follows_padding: bool = False
    surrounding: Surrounding | None = field(default=None, repr=False)
    cores: int = 1
    deferred: str = ""
    capture: Capture | None = field(default=None, repr=False, compare=False)


@dataclass
class RefusedSite:
    """A core that was seen but not understood, or not provable.

    `latent` holds the sizes of a block that already is multi-head latent attention. `verified`: it
    was understood and passed the self-check (a latent one read as keys and values of full width),
    and is refused for where it lives or what it is.

    `step` is what failed: one of `STEPS`. `node`: where in the graph, by name; the core if nothing
    nearer is known. `nearest`: the understood form that comes closest. `item`: what was read.
    """

    path: str
    reason: str
    latent: LatentForm | None = None
    verified: bool = False
    step: str = ""
    node: str = ""
    nearest: str = ""
    item: Found | Missed | None = field(default=None, repr=False, compare=False)


@dataclass
class FoundAttention:
    """Everything `find_attention` saw, and the capture it was seen in."""

    capture: Capture = field(repr=False)
    sites: list[AttentionSite] = field(default_factory=list)
    refused: list[RefusedSite] = field(default_factory=list)


def cores_of(item: Found) -> int:
    """Softmax cores of one run of the model that a block stands for."""
    return int(item.region.core.meta.get(CORES, 1))
