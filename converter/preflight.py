"""Before any weight moves: match the plan with the sites and list *every* refusal at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from reattend.errors import ArgumentError, NothingFoundError, RefusedError
from reattend.finder import AttentionSite, FoundAttention
from reattend.mixers.dense import DenseConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Conversion, Cost, dense_cost
from reattend.passes.rewrite.mixed import Mixed, MixedOptions, PartOptions
from reattend.passes.rewrite.registry import conversion
from reattend.plan import Plan, Rule
from reattend.plan_rule import KEEP, layer_of
from reattend.statistics import Need
from reattend.weights import dense_config


@dataclass
class Choice:
    """What happens to one site, and why."""

    site: AttentionSite
    config: DenseConfig
    layer: int
    action: str
    conversion: Conversion | None = None
    options: Any = None
    reason: str = ""
    rule: Rule | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics to collect for this site."""
        if self.conversion is None or self.options is None:
            return frozenset()
        return self.conversion.wants(self.config, self.options)

    @property
    def before(self) -> Cost:
        """The original block's cost."""
        return dense_cost(self.config)

    @property
    def after(self) -> Cost:
        """What it will cost; unchanged sites cost the same."""
        if self.conversion is None:
            return self.before
        return self.conversion.cost(self.config, self.options)


def check_inplace(plan: Plan, inplace: bool) -> None:
    """What needs the original beside the result cannot have it changed in place.

    Raises:
        ArgumentError: the plan trains or has gates.
    """
    trains = plan.calibrate.trains
    wants = "training" if trains else ", ".join(plan.verify.gates)
    if inplace and wants:
        raise ArgumentError(
            "inplace=True leaves no original to compare with",
            where="calibrate" if trains else "verify",
            why=f"the plan asks for {wants}",
            next_step="set inplace=False, or leave these out of the plan",
        )


def preflight(found: FoundAttention, plan: Plan) -> list[Choice]:
    """One choice per site, in the order they were found.

    Raises:
        NothingFoundError: no site was understood, none would be converted, or a rule matches none.
        RefusedError: some site cannot take its conversion and the plan says `on_refusal: error`.
    """
    choices = choose(found, plan)
    enforce(choices, plan)
    return choices


def choose(found: FoundAttention, plan: Plan) -> list[Choice]:
    """What the plan would do with every site, refusals included.

    Raises:
        NothingFoundError: no site was understood, or a rule matches none.
    """
    if not found.sites:
        reasons = "; ".join(f"{r.path}: {r.reason}" for r in found.refused[:5])
        raise NothingFoundError(
            "no attention block was found that could be converted",
            why=reasons or "the graph has no softmax attention",
            next_step="run `reattend find MODEL` for the list of blocks and reasons",
        )
    paths = [s.path for s in found.sites]
    layers = layer_of(paths)
    assigned = plan.assign(paths)
    longest = longest_text(found.capture.model)
    choices = [_choose(s, assigned[s.path], *layers[s.path], longest) for s in found.sites]
    return _joined(_units(_adapted(_related(choices, plan), plan)))


def enforce(choices: list[Choice], plan: Plan) -> None:
    """Stop where the plan says so.

    Raises:
        NothingFoundError: no site would be converted.
        RefusedError: some site cannot take its conversion and the plan says `on_refusal: error`.
    """
    refused = [c for c in choices if c.action == "refused"]
    if refused and plan.on_refusal == "error":
        raise RefusedError(
            f"{len(refused)} of {len(choices)} sites cannot take the conversion the plan asks for",
            where=_grouped(refused),
            next_step="change the options, set on_refusal: keep, or put these rules first:\n"
            + "\n".join(f'  - {{sites: "{c.site.path}", to: keep}}' for c in refused),
        )
    if not any(c.action == "converted" for c in choices):
        raise NothingFoundError(
            "no site would be converted by this plan",
            where=_grouped(refused) if refused else "",
            why="" if refused else "the plan keeps every site, or no rule matches it",
            next_step="another plan (`reattend plans list`), or rules that match these sites",
        )


def longest_text(model: nn.Module) -> int | None:
    """The most tokens that a model's config says it reads; None where it does not say."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _choose(
    site: AttentionSite, rules: tuple[Rule, ...], layer: int, layers: int, longest: int | None
) -> Choice:
    """The rules that take a site, in order; the first that takes a KV group wins it."""
    config = dense_config(site.spec, site.hidden_size, site.memory_size)
    groups = config.core.kv_heads
    taken: dict[int, Rule] = {}
    for rule in rules:
        missing = [h for h in rule.heads or () if h >= groups]
        if missing:
            reason = f"heads {missing}: the block has {groups} KV groups (0 to {groups - 1})"
            return Choice(site, config, layer, "refused", reason=reason)
        for head in range(groups) if rule.heads is None else rule.heads:
            taken.setdefault(head, rule)
    if not taken:
        return Choice(site, config, layer, "unmatched", reason="no rule of the plan matches")
    if all(rule.to == KEEP for rule in taken.values()):
        return Choice(site, config, layer, "kept", reason="the plan keeps it")
    parts = _parts(taken, groups)
    for i, p in enumerate(parts):
        options = conversion(p.to)().for_layer(p.options, layer, layers)
        if isinstance(options, Refusal):
            return Choice(site, config, layer, "refused", reason=options.reason)
        parts[i] = p.model_copy(update={"options": options})
    refusal = _shared(site, [p.to for p in parts])
    if refusal is not None:
        return Choice(site, config, layer, "refused", reason=refusal.reason)
    if len(parts) == 1:
        chosen, given = conversion(parts[0].to)(), parts[0].options
    else:
        chosen, given = Mixed(), MixedOptions(groups=tuple(parts))
    refusal = chosen.check(config, given)
    if refusal is None and longest is not None:
        refusal = chosen.check_within(config, given, longest)
    tokens = site.region.core.args[0].meta["val"].shape[2]
    if refusal is None and isinstance(tokens, int):  # of images of one size; of texts a symbol
        refusal = chosen.check_tokens(config, given, tokens)
    if refusal is not None:
        return Choice(site, config, layer, "refused", reason=refusal.reason)
    return Choice(site, config, layer, "converted", chosen, given, rule=taken.get(0))


def _parts(taken: dict[int, Rule], groups: int) -> list[PartOptions]:
    """One part per rule; KV groups that stay as they are become one dense part."""
    dense = conversion("dense")
    unchanged = PartOptions(heads=(), to=dense.name, options=dense.Options())
    parts: dict[int, PartOptions] = {}
    for head in range(groups):
        rule = taken.get(head)
        key, part = 0, unchanged
        if rule is not None and rule.options is not None and rule.to != dense.name:
            key, part = id(rule), PartOptions(heads=(), to=rule.to, options=rule.options)
        part = parts.get(key, part)
        parts[key] = part.model_copy(update={"heads": (*part.heads, head)})
    return list(parts.values())


def _shared(site: AttentionSite, wanted: list[str]) -> Refusal | None:
    """Why a block of several that read one block's keys and values cannot take a conversion."""
    other = next((name for name in wanted if not conversion(name).shared), None)
    if other is None:
        return None
    if site.spec.k.site:
        return Refusal(
            f"its keys and values are those of {site.spec.k.site}, and `to: {other}` makes its own"
        )
    if site.region.handed:
        return Refusal(f"other blocks read its keys and values, which `to: {other}` does not keep")
    return None


def _related(choices: list[Choice], plan: Plan) -> list[Choice]:
    """Refuse the sites that `calibrate.relations` cannot compare."""
    if not plan.calibrate.relations:
        return choices
    from reattend.calibrate.relations import unrelated

    for choice in choices:
        if choice.conversion is None:
            continue
        after = choice.conversion.outcome(choice.config, choice.options)
        why = unrelated(plan.calibrate, choice.config, after)
        if why is not None:
            choice.action, choice.conversion, choice.reason = "refused", None, why
    return choices


def _adapted(choices: list[Choice], plan: Plan) -> list[Choice]:
    """Refuse the sites in which `calibrate.lora_rank` would train nothing."""
    if plan.calibrate.lora_rank is None or not plan.calibrate.trains:
        return choices
    for choice in choices:
        if choice.conversion is not None and not choice.conversion.adapts:
            choice.action, choice.conversion = "refused", None
            choice.reason = (
                "calibrate.lora_rank adapts linear layers, and what this block becomes has none "
                "with weights of its own; drop lora_rank"
            )
    return choices


def _joined(choices: list[Choice]) -> list[Choice]:
    """Tell conversions whose blocks depend on one another who is in; they may refuse."""
    rules: dict[int, list[Choice]] = {}
    for choice in choices:
        if choice.conversion is not None and choice.conversion.joins:
            rules.setdefault(id(choice.rule), []).append(choice)
    for group in rules.values():
        chosen = group[0].conversion
        assert chosen is not None
        told = chosen.join([(c.site.path, c.config, c.options) for c in group])
        if any(isinstance(options, Refusal) for options in told):  # none goes without the others
            reason = next(options.reason for options in told if isinstance(options, Refusal))
            for choice, options in zip(group, told, strict=True):
                choice.action, choice.conversion = "refused", None
                own = options.reason if isinstance(options, Refusal) else ""
                choice.reason = own or f"it is built together with others: {reason}"
        else:
            for choice, options in zip(group, told, strict=True):
                choice.options = options
    return choices


def _units(choices: list[Choice]) -> list[Choice]:
    """Sites that share key or value weights convert together: if one does not, none does."""
    staying = [c for c in choices if c.action != "converted"]
    while staying:
        first = staying.pop()
        for choice in choices:
            shared = _kv_weights(first) & _kv_weights(choice)
            if choice.action == "converted" and shared:
                choice.action, choice.conversion = "refused", None
                what = ", ".join(sorted(shared))
                choice.reason = f"shares {what} with {first.site.path} ({first.reason})"
                staying.append(choice)  # and so do those that share with it
    return choices


def _kv_weights(choice: Choice) -> set[str]:
    """What its keys and values are made of: names of stored tensors, and the block that does it."""
    spec = choice.site.spec
    source = spec.k.site or choice.site.path
    return {spec.k.proj.weight, spec.v.proj.weight, f"the keys and values of {source}"} - {""}


def _grouped(refused: list[Choice]) -> str:
    lines: dict[str, list[str]] = {}
    for choice in refused:
        lines.setdefault(choice.reason, []).append(choice.site.path)
    return "\n" + "\n".join(f"    {', '.join(paths)}: {why}" for why, paths in lines.items())
