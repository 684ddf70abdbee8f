"""Everything that is measured of a converted model beside its original, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reattend.inputs import is_hf
from reattend.report.evidence import Gate, ParityCheck, PeerCell, QualityRow
from reattend.verify.balance import head_use
from reattend.verify.bounds import block_bounds
from reattend.verify.gates import check_gates
from reattend.verify.parity import block_errors, decode_checks, exact_check, real_positions
from reattend.verify.rows import measured_rows
from reattend.verify.sample import sample_of
from reattend.verify.subject import Subject

if TYPE_CHECKING:
    from reattend.calibrate import StageResult


@dataclass
class Evidence:
    """What verification and calibration found; errors, bounds and use of heads by site path."""

    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    used: dict[str, tuple[float, ...]] = field(default_factory=dict)
    parity: list[ParityCheck] = field(default_factory=list)
    rows: list[QualityRow] = field(default_factory=list)
    peers: list[PeerCell] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    stages: list[StageResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(subject: Subject, inputs: dict[str, Any] | None, *, inplace: bool = False) -> Evidence:
    """Errors of the blocks, equality where the plan is exact, cached decoding, quality, gates.

    Args:
        subject: the conversion.
        inputs: example arguments, for models that nothing can be made up for.
        inplace: the original was changed, so there is nothing to compare with.
    """
    if inplace:
        return Evidence(notes=["inplace=True: the original is gone, so nothing was compared"])
    done, plan = subject.done, subject.plan
    original, converted = subject.source.model, done.model
    sample = sample_of(original, subject.materials, inputs)
    with head_use(converted, real_positions(sample)) as used:
        errors = {} if done.graph else block_errors(original, converted, list(done.built), sample)
    trains = plan.calibrate.trains
    bounds = {} if trains else block_bounds(original, done, subject.choices, sample)
    parity: list[ParityCheck] = []
    if all(b.exactness == "exact" for b in done.built.values()) and not trains:
        parity.append(exact_check(original, converted, sample))
    if is_hf(original):
        parity += decode_checks(original, converted, subject.seed)
    rows, peers, notes = measured_rows(subject)
    gates = check_gates(plan.verify, rows)
    learned = [path for path, b in done.built.items() if b.exactness == "learned"]
    if learned and not gates:
        notes = [
            *notes,
            f"{len(learned)} of {len(done.built)} converted blocks are learned, nothing bounds "
            "what they lose, and the plan sets no gate: set verify.max_ppl_increase and "
            "verify.min_recall",
        ]
    return Evidence(errors, bounds, used, parity, rows, peers, gates, notes=notes)
