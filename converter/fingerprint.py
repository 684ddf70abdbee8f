"""What decides the result of a run: equal fingerprints mean equal folders."""

from __future__ import annotations

import torch

from reattend.materials import Materials
from reattend.plan import Plan
from reattend.source import Source
from reattend.workdir import VERSIONS, digest


def run_fingerprint(source: Source, plan: Plan, materials: Materials, seed: int) -> dict[str, str]:
    """Hashes by name: weights as loaded (dtype, device), plan, data, seed, computing versions."""
    import transformers

    from reattend import __version__

    versions = (__version__, torch.__version__, transformers.__version__)
    return {
        "weights": digest(source.state),
        "plan": plan.fingerprint(),
        "data": materials.fingerprint,
        "seed": str(seed),
        **dict(zip(VERSIONS, versions, strict=True)),
    }
