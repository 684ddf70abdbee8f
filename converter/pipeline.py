"""One conversion from start to end: the stages in order, each reported, resumable where long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reattend.allocation import allocate, waiting
from reattend.api import Result
from reattend.calibrate.ranks import agreed
from reattend.events import Event, OnEvent
from reattend.factory import read_inputs
from reattend.finder import FoundAttention, find_attention
from reattend.fingerprint import run_fingerprint
from reattend.inputs import is_hf
from reattend.lowering import check_choices, check_targets, lower
from reattend.materials import Materials, check_data, load_materials, text_block
from reattend.moments import site_moments
from reattend.outdir import check_claimable
from reattend.plan import Plan
from reattend.plan_target import target_name
from reattend.predict import Prediction, predict
from reattend.preflight import Choice, check_inplace, choose, preflight
from reattend.processes import is_main
from reattend.report.evidence import ParityCheck
from reattend.reporting import Evidence, build_report
from reattend.rewriting import Rewritten, rewrite
from reattend.runlog import RunLog
from reattend.source import Source, open_source
from reattend.statistics import SiteStatistics
from reattend.verify.balance import head_use
from reattend.verify.bounds import block_bounds
from reattend.verify.gates import check_gates, gate_error
from reattend.verify.parity import block_errors, decode_checks, exact_check, real_positions
from reattend.verify.rows import measured_rows
from reattend.verify.sample import sample_of
from reattend.workdir import Workdir, digest

if TYPE_CHECKING:
    from reattend.calibrate import StageResult


#: stages that report their own units
_COUNTED = frozenset({"statistics", "choose", "rewrite", "layerwise", "end-to-end"})


@dataclass
class Job:
    """The arguments of `convert` that do not concern opening the model.

    `inputs` may be a safetensors file, read once the model is open.
    """

    plan: Plan
    inputs: dict[str, Any] | Path | None = None
    data: Any = None
    seed: int = 0
    inplace: bool = False
    out: Path | None = None
    overwrite: bool = False
    on_event: OnEvent | None = None
    log: RunLog = field(default_factory=RunLog)

    def run(self, model: Any, **opening: Any) -> Result:
        """All stages; see `reattend.convert`.

        Started by torchrun or accelerate, every process does the same work and shares out the
        training; the first one writes and reports.
        """
        if not is_main():
            self.on_event = None
        check_targets(self.plan, self.out)
        source, found = self._look(model, opening)
        choices = preflight(found, self.plan)
        check_choices(self.plan, source.model, choices)
        materials = self._stage("data", lambda: self._materials(source, choices))
        self.log.predicted = self._predict(source, found, choices, materials).peaks
        with self._workdir(source, materials) as work:
            complete = work is not None and work.state == "complete"
            if self.out is not None and agreed(complete, source.device):
                return self._already_there(self.out.expanduser().absolute(), source)
            return self._convert(source, found, choices, materials, work)

    def dry_run(self, model: Any, **opening: Any) -> tuple[list[Choice], Prediction]:
        """What `run` would do with every site, and what that would cost; nothing is written.

        Refusals are in the choices; `preflight.enforce` raises them.
        """
        source, found = self._look(model, opening)
        choices = choose(found, self.plan)
        if not any(c.action == "refused" for c in choices):
            check_choices(self.plan, source.model, choices)
        materials = Materials()
        if self.data is not None or self.plan.calibrate.data not in (None, "self"):
            materials = self._materials(source, choices)
        return choices, self._predict(source, found, choices, materials)

    def _look(self, model: Any, opening: dict[str, Any]) -> tuple[Source, FoundAttention]:
        """Check what can be checked at once, then open the model and find its attention."""
        check_data(self.plan, self.data)
        check_inplace(self.plan, self.inplace)
        if self.out is not None:
            check_claimable(self.out.expanduser().absolute())
        torch.manual_seed(self.seed)
        from torch.export import _trace  # noqa: F401  (loaded code is no growth)

        if not isinstance(model, torch.nn.Module):
            import reattend.targets.huggingface  # noqa: F401  (likewise)
        self.log.begin()
        source = self._stage("open", lambda: open_source(model, **opening))
        if isinstance(self.inputs, Path):
            self.inputs = read_inputs(self.inputs, source.model)
        inputs = self.inputs
        return source, self._stage("find", lambda: find_attention(source.model, inputs))

    def _predict(
        self, source: Source, found: FoundAttention, choices: list[Choice], materials: Materials
    ) -> Prediction:
        return predict(
            source.model, choices, self.plan, found.capture.inputs, rows=materials.rows,
            text=text_block(self.plan, self.data), owned=source.owned,
        )  # fmt: skip

    def _convert(
        self,
        source: Source,
        found: FoundAttention,
        choices: list[Choice],
        materials: Materials,
        work: Workdir | None,
    ) -> Result:
        moments = self._stage(
            "statistics", lambda: self._statistics(source, found, choices, materials, work)
        )
        if waiting(choices):
            self._stage("choose", lambda: self._choose(source, choices, moments, materials, work))
        done = self._stage("rewrite", lambda: self._rewrite(source, found, choices, moments))
        stages: list[StageResult] = []
        if self.plan.calibrate.trains:
            stages = self._calibrate(source, done, materials, work)
        seen = (source, found, choices, done, materials)
        evidence = self._stage("verify", lambda: self._verify(*seen))
        evidence.stages = stages
        report = build_report(self.plan, self.seed, *seen, evidence)
        failed = [g for g in report.gates if g.verdict == "fail"]
        failed_checks = [p for p in report.parity if p.verdict == "fail"]
        if failed or failed_checks:
            raise gate_error(failed, failed_checks)
        result = Result(done.model, report, None, None, source.tokenizer, source.home)
        if work is not None:
            from reattend.publishing import publish_result

            self._stage("publish", lambda: publish_result(result, work))
            for target in self.plan.targets:
                stage = f"lower to {target_name(target)}"
                self._stage(stage, lambda target=target: lower(result, work, target))
            result.out = work.out
        result.run = self.log.finish(source, self.out)
        if work is not None:
            work.publish_bytes("run.json", result.run.to_json().encode())
            work.finish()
            self._tell("done", message=f"published to {work.out.name}")
        return result

    def _materials(self, source: Source, choices: list[Choice]) -> Materials:
        needed = any(c.needs for c in choices)
        return load_materials(source, self.plan, self.data, seed=self.seed, needed=needed)

    @contextmanager
    def _workdir(self, source: Source, materials: Materials) -> Iterator[Workdir | None]:
        if self.out is None or not is_main():
            return (yield None)
        with Workdir.open(
            self.out, run_fingerprint(source, self.plan, materials, self.seed), self.overwrite
        ) as work:
            if work.state == "resumed":
                self._tell("resume", message="continuing an interrupted run")
            yield work

    def _already_there(self, out: Path, source: Source) -> Result:
        from reattend.publishing import load_folder
        from reattend.report import Report

        self._tell("done", message=f"{out.name} is already complete: nothing to do")
        model, report = load_folder(out, None), Report.load(out)
        return Result(model, report, None, out, source.tokenizer, source.home)

    def _statistics(
        self,
        source: Source,
        found: FoundAttention,
        choices: list[Choice],
        materials: Materials,
        work: Workdir | None,
    ) -> dict[str, SiteStatistics]:
        wanted, data = [c for c in choices if c.needs], materials.statistics
        if not wanted or data is None:
            return {}

        def progress(tokens: int) -> None:
            self._tell("statistics", done=min(tokens, data.tokens), total=data.tokens)

        moments, reused = site_moments(
            source.model, source.state, found, wanted, data, self.plan.calibrate.batch_size,
            work, progress,
        )  # fmt: skip
        if reused:
            self._tell("statistics", message="reused from the interrupted run")
            self.log.reused("statistics")
        return moments

    def _choose(
        self,
        source: Source,
        choices: list[Choice],
        moments: dict[str, SiteStatistics],
        materials: Materials,
        work: Workdir | None,
    ) -> None:
        def progress(done: int, total: int, path: str) -> None:
            self._tell("choose", site=path, done=done, total=total)

        if allocate(
            source.model, source.state, choices, moments, materials.statistics, work, progress
        ):
            self._tell("choose", message="reused from the interrupted run")
            self.log.reused("choose")

    def _rewrite(
        self,
        source: Source,
        found: FoundAttention,
        choices: list[Choice],
        moments: dict[str, SiteStatistics],
    ) -> Rewritten:
        def progress(choice: Choice, done: int, total: int) -> None:
            self._tell("rewrite", site=choice.site.path, layer=choice.layer, done=done, total=total)

        return rewrite(
            source.model, choices, moments, capture=found.capture, inplace=self.inplace,
            owned=source.owned, spend=True, progress=progress,
        )  # fmt: skip

    def _calibrate(
        self, source: Source, done: Rewritten, materials: Materials, work: Workdir | None
    ) -> list[StageResult]:
        settings = self.plan.calibrate
        from reattend.calibrate import calibrate

        assert materials.training is not None
        # gates may change without training anew
        rules = [r.to_dict() for r in self.plan.rules]
        key = digest([source.state, rules, self.plan.on_refusal, materials.fingerprint, self.seed])
        stages = calibrate(
            source.model, done.model, materials.training, settings,
            seed=self.seed if settings.seed is None else settings.seed,
            workdir=work, inputs_hash=key, on_event=self.on_event, around=self.log.stage,
        )  # fmt: skip
        self.log.reused(*(s.name for s in stages if s.reused))
        return stages

    def _verify(
        self, source: Source, found: FoundAttention, choices: list[Choice], done: Rewritten,
        materials: Materials,
    ) -> Evidence:  # fmt: skip
        if self.inplace:
            return Evidence(notes=["inplace=True: the original is gone, so nothing was compared"])
        paths = list(done.built)
        sample = sample_of(source.model, materials, self.inputs)
        with head_use(done.model, real_positions(sample)) as used:
            errors = {} if done.graph else block_errors(source.model, done.model, paths, sample)
        trains = self.plan.calibrate.trains
        bounds = {} if trains else block_bounds(source.model, done, choices, sample)
        parity: list[ParityCheck] = []
        if all(b.exactness == "exact" for b in done.built.values()) and not trains:
            parity.append(exact_check(source.model, done.model, sample))
        if is_hf(source.model):
            parity += decode_checks(source.model, done.model, self.seed)
        rows, notes = measured_rows(
            source, done.model, choices, materials, self.seed, self.plan, found
        )
        gates = check_gates(self.plan.verify, rows)
        return Evidence(errors, bounds, used, parity, rows, gates, notes=notes)

    def _stage(self, name: str, work: Any) -> Any:
        self._tell(name)
        with self.log.stage(name):
            done = work()
        if name not in _COUNTED:
            self._tell(name, done=1, total=1)
        return done

    def _tell(self, stage: str, **what: Any) -> None:
        if self.on_event is not None:
            self.on_event(Event(stage, **what))
