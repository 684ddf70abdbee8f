"""Before a conversion: has what a plan makes of a model an ONNX form, as far as that is known?"""

from __future__ import annotations

from typing import Any

from reattend.mixers.config import BlockConfig
from reattend.mixers.sparse_config import SparseConfig
from reattend.targets.onnx.encoder import check_encoder_block
from reattend.targets.onnx.refusals import check_block
from reattend.targets.onnx.sparse_layout import sparse_form


def foresee(choices: list[Any]) -> None:
    """Stop where a block's description alone says that its export would be refused.

    What is chosen from statistics, and blocks of several head groups, are looked at by the export.

    Args:
        choices: from `reattend.preflight`.

    Raises:
        RefusedError: the first such block.
    """
    whole = all(c.site.binding is None or c.site.binding.cache is None for c in choices)
    for choice in choices:
        if choice.conversion is None or choice.options is None:
            continue
        outcome = choice.conversion.outcome(choice.config, choice.options)
        binding, path = choice.site.binding, choice.site.path
        if not isinstance(outcome, BlockConfig) or binding is None:
            continue
        if whole:
            check_encoder_block(path, outcome, binding)
            continue
        check_block(path, outcome, binding)
        if isinstance(outcome, SparseConfig):
            for head_class in outcome.classes:
                sparse_form(path, outcome, head_class)
