"""What every part of a report is: frozen, closed, and free of surprises as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema

NON_FINITE = ("Infinity", "-Infinity", "NaN")

Number = Annotated[
    float, WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(NON_FINITE)}]})
]
"""A float that may be infinite or NaN: JSON has no word for those, so they travel as text.

A perplexity that overflowed is a result; dropping it to `null` would hide it.
"""


class Part(BaseModel):
    """Base of the models in this package: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def dumps(value: Any) -> str:
    """Write `value` as JSON whose bytes depend on the value alone.

    Keys are sorted, floats are Python's shortest `repr`, and a list of plain values takes one
    line, so that an energy curve of a thousand ranks does not take a thousand.

    Args:
        value: what `model_dump(mode="json", by_alias=True)` returns.

    Returns:
        The text, ending in one newline.
    """
    return _dump(value, "") + "\n"


def _dump(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, Mapping):
        if not value:
            return "{}"
        rows = [
            f"{deeper}{json.dumps(str(key), ensure_ascii=False)}: {_dump(value[key], deeper)}"
            for key in sorted(value, key=str)
        ]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_dump(item, deeper) for item in value]
        if not any(_nested(item) for item in value):
            return "[" + ", ".join(items) + "]"
        return "[\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}]"
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | Sequence) and not isinstance(value, str)
