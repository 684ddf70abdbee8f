"""The plan: which attention sites become what, then how to train, check and lower the result.

A `Plan` is what `convert(plan=...)` takes: the name of a preset, the path of a YAML file, a
dict, or a `Plan`. Nothing here imports torch; a conversion's module is loaded only to check
the options given to it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from ruamel.yaml import YAML

from reattend.errors import NothingFoundError, PlanError
from reattend.plan_rule import Rule, layer_of
from reattend.plan_sections import Calibrate, Verify
from reattend.plan_set import apply_settings
from reattend.plan_source import PLAN_VERSION, check_version, extended, fetch
from reattend.plan_target import Target
from reattend.plan_text import Section, unknown_name
from reattend.plan_words import nearest
from reattend.plans import preset_names

__all__ = ["PLAN_VERSION", "Calibrate", "Plan", "Rule", "Verify"]


class Plan(Section):
    """Ordered rules (the first that matches a site wins) and the settings of what follows.

    Attributes:
        version: of the plan format; a plan without it is read as version 1.
        extends: another plan (preset or path, relative to the extending file) to start from.
            Resolved on reading, so it is None afterwards: this plan's rules come before the
            other's, and its `calibrate` and `verify` keys replace the other's one by one.
        rules: at least one; a site that no rule takes stays as it is.
        on_refusal: `error` stops when a site cannot take its conversion; `keep` leaves it.
        calibrate: data and training.
        verify: quality gates.
        targets: what to lower to after a successful conversion: names, for example `onnx`, or
            a name with options, `{onnx: {flavour: ort}}`.
    """

    version: int = PLAN_VERSION
    extends: str | None = None
    rules: tuple[Rule, ...]
    on_refusal: Literal["error", "keep"] = "error"
    calibrate: Calibrate = Calibrate()
    verify: Verify = Verify()
    targets: tuple[str | Target, ...] = ()

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Plan) -> Plan:
        """Read a plan from a preset name, a YAML file, a mapping, or return a plan as it is.

        A text that is the name of a preset is the preset, even if a file of that name exists;
        write `./name` for the file.

        Raises:
            PlanError: no such preset or file, not YAML, unknown key, value that is not allowed.
        """
        if isinstance(source, Plan):
            return source
        if isinstance(source, Mapping):
            return cls._checked(dict(source), "plan", Path())
        if not isinstance(source, str | Path):
            raise PlanError(
                f"a plan cannot be a {type(source).__name__}",
                where="plan",
                next_step='give a preset, a path, or a dict: {"rules": [{"sites": "*", ...}]}',
            )
        return cls._checked(*fetch(source, Path()))

    @classmethod
    def _checked(cls, data: dict[str, Any], where: str, base: Path) -> Plan:
        data = extended(data, where, base, ())
        return cls.model_validate(data, context={"where": where})

    @classmethod
    def prepare(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Check the version, resolve `extends`, build the sections with their place in errors."""
        if data.get("extends") is not None:
            data = extended(data, where, Path(), ())
        check_version(data, where)
        if unknown := [key for key in data if key not in cls.model_fields]:
            raise unknown_name("key", unknown[0], cls.model_fields, where)
        if not isinstance(rules := data.get("rules"), Sequence) or isinstance(rules, str):
            raise PlanError(
                "the plan has no rules",
                where=where,
                why="`rules` must be a list with one rule or more",
                next_step='add for example `rules: [{sites: "*", to: mla, kv_keep: 0.5}]`',
            )
        if not rules:
            raise PlanError("the plan has no rules", where=where, why="`rules` is an empty list")
        data["rules"] = tuple(
            Rule.model_validate(rule, context={"where": f"{where}: rules.{i}"})
            for i, rule in enumerate(rules)
        )
        if isinstance(targets := data.get("targets"), list | tuple):
            data["targets"] = tuple(
                Target.read(t, f"{where}: targets.{i}") for i, t in enumerate(targets)
            )
        for name, kind in (("calibrate", Calibrate), ("verify", Verify)):
            value = {} if data.get(name) is None else data[name]
            data[name] = kind.model_validate(value, context={"where": f"{where}: {name}"})
        return data

    @staticmethod
    def presets() -> list[str]:
        """The names of the plans that are shipped."""
        return preset_names()

    def assign(self, paths: Sequence[str]) -> dict[str, tuple[Rule, ...]]:
        """Give every site path the rules that take it, in order.

        The first rule that matches wins; one with `heads` wins only those KV groups, and the rest
        goes on to the rules after it. So all but the last rule of a site have `heads`.

        Layers are counted as `reattend.plan_rule` says: within each stack of layers.

        Raises:
            PlanError: a rule matches no path at all, or names a layer that does not exist.
                Rules after a rule that takes every path are not checked.
        """
        layers = layer_of(paths)
        chosen: dict[str, list[Rule]] = {path: [] for path in paths}
        for index, rule in enumerate(self.rules):
            hits = [p for p in paths if rule.match(p, *layers[p])]
            if paths:
                _check_hits(rule, f"rules.{index}", hits, layers)
            for path in hits:
                if not chosen[path] or chosen[path][-1].heads is not None:
                    chosen[path].append(rule)
            if len(hits) == len(paths) and rule.heads is None:
                break
        return {path: tuple(rules) for path, rules in chosen.items()}

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, with what was given and no defaults."""
        out: dict[str, Any] = {"version": self.version, "rules": [r.to_dict() for r in self.rules]}
        if self.on_refusal != "error":
            out["on_refusal"] = self.on_refusal
        for name in ("calibrate", "verify"):
            if given := getattr(self, name).model_dump(mode="json", exclude_unset=True):
                out[name] = given
        if self.targets:
            out["targets"] = [t if isinstance(t, str) else t.to_dict() for t in self.targets]
        return out

    def to_yaml(self) -> str:
        """The plan as YAML text that `Plan.load` reads back to an equal plan."""
        text = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(self.to_dict(), text)
        return text.getvalue()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the plan with all its defaults filled in."""
        data = self.model_dump(mode="json", exclude={"extends"})
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_set(self, settings: Iterable[str]) -> Self:
        """A copy with `--set` settings applied: `key=value`, the value in YAML.

        The key is a dotted path (`rules.0.kv_lora_rank`, `calibrate.tokens`), a key of the plan
        (`on_refusal`), or the bare name of an option, which then goes to every rule whose
        conversion has it. `null` removes a key, so that its default holds again.

        Raises:
            PlanError: no `=`, no such key, or a value that is not allowed.
        """
        if isinstance(settings, str) or not isinstance(settings, Iterable):
            raise PlanError(
                "settings must be a list", where=f"with_set({settings!r})"[:200],
                next_step='for example with_set(["kv_keep=0.25"])',
            )  # fmt: skip
        data = self.to_dict()
        options = [set(type(r.options).model_fields) if r.options else set() for r in self.rules]
        apply_settings(data, settings, type(self).model_fields, options)
        return self.model_validate(data, context={"where": "plan after --set"})


def _check_hits(
    rule: Rule, name: str, hits: Sequence[str], layers: Mapping[str, tuple[int, int]]
) -> None:
    """Raise if a rule takes nothing, or names a layer that no stack has."""
    lengths = sorted({length for _, length in layers.values()})
    missing = [
        item
        for item in rule.layers or ()
        if isinstance(item, int) and not any(-n <= item < n for n in lengths)
    ]
    if missing:
        counts = ", ".join(map(str, lengths))
        raise NothingFoundError(
            f"layer {missing[0]} does not exist",
            where=name,
            why=f"the model's stacks of attention have {counts} layers, counted from 0",
            next_step="list the sites with `reattend find MODEL`",
        )
    if not hits:
        globs = [g.strip("*?") for g in rule.sites or ()]
        close = list(dict.fromkeys(p for g in globs for p in nearest(g, layers, 3, 0.3)))
        shown = close[:3] or list(layers)[:3]
        raise NothingFoundError(
            f"a rule matches no attention site ({rule.describe()})",
            where=name,
            why=f"nearest of the {len(layers)} sites: {', '.join(shown)}",
            next_step="list the sites with `reattend find MODEL`",
        )
