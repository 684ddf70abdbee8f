"""What a block that was read has to pass before it counts: one gate after another.

A gate returns why the block is refused, or None. The first refusal is the one that is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from reattend.callcheck import call_check, mask_of
from reattend.found import AttentionSite, RefusedSite, cores_of
from reattend.locate import Place
from reattend.missed import already, located_at
from reattend.ownercheck import owner_check
from reattend.passes.find.latent import read_latent
from reattend.passes.find.sites import Found
from reattend.search import Search
from reattend.selfcheck import SelfCheck, self_check
from reattend.sizecheck import size_check
from reattend.spec import Added, Joined, Opaque


@dataclass
class Case:
    """A block on trial. `proof` is set by the gate `proven`; `place` may lose its binding."""

    search: Search
    item: Found
    place: Place
    proof: SelfCheck | None = None

    @property
    def own_steps(self) -> bool:
        """Keys or values are made by the model's own steps, as those of a latent block are."""
        return any(isinstance(s.proj, Opaque) for s in (self.item.spec.k, self.item.spec.v))

    @property
    def carries_steps(self) -> bool:
        """The model's own operations stay around or inside the block."""
        spec = self.item.spec
        own = self.own_steps or isinstance(spec.q.proj, Opaque) or isinstance(spec.join, Joined)
        return own or isinstance(spec.core.bias, Added) or self.place.surrounding is not None

    def refused(self, reason: str, verified: bool = False) -> RefusedSite:
        """This block, refused."""
        return RefusedSite(self.place.path, reason, verified=verified)

    def understood(self) -> bool:
        """Whether it passes the self-check, for blocks that are refused for something else."""
        if self.search.deferred:
            return False
        return not self_check(self.search.gm, self.item, self.search.inputs_at).reason


def judged(search: Search, item: Found) -> tuple[Case, RefusedSite | None]:
    """The block after its trial, and the refusal of the gate it failed, if any."""
    case = Case(search, item, search.place(item))
    for gate in (not_latent, not_converted) if search.deferred else STEP_OF:
        refusal = gate(case)
        if refusal is not None:
            return case, located_at(refusal, refusal.step or STEP_OF[gate], item)
    return case, None


def not_latent(case: Case) -> RefusedSite | None:
    """It is not multi-head latent attention already."""
    latent = read_latent(case.item.region.core) if case.own_steps else None
    if latent is None:
        return None
    return RefusedSite(case.place.path, latent.reason, latent, case.understood())


def not_converted(case: Case) -> RefusedSite | None:
    """No earlier conversion replaced it; a dense group of a mixed block is an input again."""
    ours = case.search.ours.get(case.place.path)
    if ours is None or ours.mixer.kind == "dense":
        return None
    return already(case.place.path, ours)


def owned(case: Case) -> RefusedSite | None:
    """A module carries it, where the graph cannot take the model's place."""
    place = case.place
    if place.binding is not None or not case.search.whole:
        return None
    ends = any_length(case)  # what is true of the example only is not understood
    beyond = next(iter(case.search.captured.outside().values()), "")
    reason = f"{place.reason} (read {beyond})" if beyond else place.reason
    return ends or case.refused(reason, case.understood())


def proven(case: Case) -> RefusedSite | None:
    """Rebuilt from its spec it gives the same."""
    search = case.search
    try:
        case.proof = self_check(search.gm, case.item, search.inputs_at)
    except RuntimeError as problem:
        first_line = (str(problem).splitlines() or [""])[0][:120]
        return case.refused(f"not understood: the rebuilt block cannot be run: {first_line}")
    return case.refused(case.proof.reason) if case.proof.reason else None


def any_length(case: Case) -> RefusedSite | None:
    """What the block does at the captured length it does at another one too.

    One near it, for the model's own steps; and those from which on the graph does not hold.
    """
    captured = case.search.captured
    if case.place.binding is None:
        reason = case.search.graph_ends()
        return replace(case.refused(reason), step="lengths") if reason else None
    if case.place.number:
        return None
    near = [captured.sizes.get("N", 0) + 6] if case.carries_steps else []
    for length in (*near, *captured.outside()):
        call = case.search.elsewhere(case.place.path, length)
        reason = "" if call is None else size_check(captured, case.item, case.place, call, length)
        if reason:
            return case.refused(reason)
    return None


def owner_proven(case: Case) -> RefusedSite | None:
    """What its owner does besides is right too; else the graph has to take the model's place."""
    place = case.place
    if place.surrounding is None or place.number:
        return None
    reason = owner_check(case.search.watched, case.item, place)
    if reason and case.search.whole:
        return case.refused(reason)
    if reason:
        case.place = Place(place.path, reason=reason)
    return None


def call_proven(case: Case) -> RefusedSite | None:
    """Called as the model calls it, an owner that is exactly the block gives the same."""
    place, watched = case.place, case.search.watched
    if place.binding is None or place.surrounding or place.number or place.path in case.search.ours:
        return None
    inputs = watched.inputs(None, True)
    mask = mask_of(watched.captured, case.item, inputs)
    call = watched.call(place.path, None, True)
    reason = call_check(watched.captured, case.item, place, call, mask)
    return case.refused(reason) if reason else None


#: the gates in order, and the step of `reattend.found.STEPS` that each is
STEP_OF: dict[Callable[[Case], RefusedSite | None], str] = {
    not_latent: "new", not_converted: "new", owned: "own", proven: "prove", any_length: "lengths",
    owner_proven: "owner", call_proven: "call",
}  # fmt: skip


def _unsplit(case: Case) -> bool:
    """Whether own steps of a block with a cache were never seen to run on a part of the tokens.

    A graph of one length cannot be split; a model without a cache is never called in parts.
    """
    place, length = case.place, case.item.region.hidden.meta["val"].shape[1]
    cached = place.binding is not None and place.binding.cache is not None
    return cached and case.carries_steps and isinstance(length, int)


def site_of(case: Case) -> AttentionSite:
    """A block that passed every gate."""
    item, place, deferred = case.item, case.place, case.search.deferred
    memory, binding = item.region.memory, place.binding
    if binding is not None and (item.spec.whole or _unsplit(case)):
        binding = binding.model_copy(update={"whole": True})
    return AttentionSite(
        path=place.path,
        spec=item.spec,
        verified=case.proof is not None,
        error=math.nan if case.proof is None else case.proof.error,
        hidden_size=int(item.region.hidden.meta["val"].shape[-1]),
        memory_size=0 if memory is None else int(memory.meta["val"].shape[-1]),
        owner="module" if deferred or binding is not None else "graph",
        binding=binding,
        surrounding=place.surrounding,
        region=item.region,
        follows_padding=item.follows_padding,
        cores=cores_of(item),
        deferred=deferred,
        capture=case.search.captured if case.search.apart else None,
    )
