"""Feature maps of keys in ONNX's textual syntax, as `reattend.mixers.features` has them.

Lines turn ``raw`` [B, G, 1, m, d] into ``mapped`` [B, G, S / G or 1, m, f], with the inputs
``weight`` [S, rows, d] and ``bias`` [S, rows] where the map has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

#: feature maps by the number that the attribute `feature_map` says
MAPS = ("identity", "elu+1", "relu", "exp", "softmax", "hedgehog", "t2r", "sigmoid", "hedgehog-fla")
_LEARNED = """
{p}weight_t = Transpose <perm = [0, 2, 1]> (weight)
{p}sizes = Shape <start = 1> ({p}weight_t)
{p}grouped = Concat <axis = 0> (g, others, {p}sizes)
{p}weight_5 = Reshape ({p}weight_t, {p}grouped)
{p}u = MatMul (raw, {p}weight_5)"""
_BIASED = (
    _LEARNED
    + """
{p}rows = Shape <start = 1> (bias)
{p}bias_shape = Concat <axis = 0> (g, others, one_1, {p}rows)
{p}bias_5 = Reshape (bias, {p}bias_shape)
{p}moved = Add ({p}u, {p}bias_5)"""
)
_MAPS = {
    "identity": "\n{p}out = Identity (raw)",
    "elu+1": """
{p}one = Constant <value_float = 1.0> ()
{p}bent = Elu (raw)
{p}out = Add ({p}bent, {p}one)""",
    "relu": "\n{p}out = Relu (raw)",
    "exp": """
{p}last = Constant <value_ints = [-1]> ()
{p}top = ReduceMax <keepdims = 1> (raw, {p}last)
{p}less = Sub (raw, {p}top)
{p}out = Exp ({p}less)""",
    "sigmoid": "\n{p}out = Sigmoid (raw)",
    "softmax": "\n{p}out = Softmax <axis = -1> (raw)",
    "hedgehog": _LEARNED
    + """
{p}negative = Neg ({p}u)
{p}first = Softmax <axis = -1> ({p}u)
{p}second = Softmax <axis = -1> ({p}negative)
{p}out = Concat <axis = -1> ({p}first, {p}second)""",
    "hedgehog-fla": _BIASED
    + """
{p}two = Constant <value_float = 2.0> ()
{p}twice = Mul ({p}moved, {p}two)
{p}negative = Neg ({p}twice)
{p}both = Concat <axis = -1> ({p}twice, {p}negative)
{p}out = Softmax <axis = -1> ({p}both)""",
    "t2r": _BIASED + "\n{p}out = Relu ({p}moved)",
}


def feature_lines(used: Sequence[str]) -> str:
    """Lines for the maps that the nodes of a file have, chosen by ``feature_kind``.

    Args:
        used: names of `MAPS`, at least one.
    """
    last, *rest = used
    text, result = _lines(last), f"m{MAPS.index(last)}_out"
    for name in rest:
        text, result = _either(name, text, result)
    return f"{text}\n          mapped = Identity ({result})"


def _lines(name: str) -> str:
    text = _MAPS[name].strip().replace("{p}", f"m{MAPS.index(name)}_")
    return "\n" + indent(text, " " * 10)


def _either(name: str, other: str, result: str) -> tuple[str, str]:
    """Lines that choose between a map and lines that make another; and what they make."""
    index = MAPS.index(name)
    out = f"chosen_{index}"
    text = f"""
          number_{index} = Constant <value_int = {index}> ()
          is_{index} = Equal (feature_kind, number_{index})
          {out} = If (is_{index}) <
            then_branch = map_{index} () => (then_{index})
            {{{_lines(name)}
              then_{index} = Identity (m{index}_out)
            }},
            else_branch = no_map_{index} () => (else_{index})
            {{{other}
              else_{index} = Identity ({result})
            }}
          >"""
    return text, out
