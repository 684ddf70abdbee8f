"""Rewrite a captured graph to the normal forms of `forms.py`, one small pass after another."""

from __future__ import annotations

from torch import fx

from reattend.passes.base import PassResult
from reattend.passes.normalize.batch_first import BatchFirst
from reattend.passes.normalize.blend import BlendToWhere
from reattend.passes.normalize.cores import FuseSdpa
from reattend.passes.normalize.eager import FuseEager
from reattend.passes.normalize.einsum import ToMatmul
from reattend.passes.normalize.folded import UnfoldLinear
from reattend.passes.normalize.inplace import ToFunctional
from reattend.passes.normalize.linear import ToLinear
from reattend.passes.normalize.merge import MergeValues
from reattend.passes.normalize.noops import DropNoops, ViewToReshape
from reattend.passes.normalize.norms import FuseRmsNorm
from reattend.passes.normalize.pointwise import PointwiseToLinear
from reattend.passes.normalize.regroup import RegroupFirst
from reattend.passes.normalize.sinks import FoldSinkFactor
from reattend.passes.normalize.softmax import ToSoftmax
from reattend.passes.normalize.writes import WritesToScatter

PIPELINE = (
    ToFunctional(), WritesToScatter(), DropNoops(), ViewToReshape(), ToMatmul(),
    PointwiseToLinear(), ToLinear(), UnfoldLinear(), FuseRmsNorm(), FuseSdpa(), ToSoftmax(),
    BlendToWhere(), FuseEager(), FoldSinkFactor(), MergeValues(), BatchFirst(), RegroupFirst(),
)  # fmt: skip


def normalize(gm: fx.GraphModule) -> list[PassResult]:
    """Run the pipeline in place and return what each pass did."""
    return [step(gm) for step in PIPELINE]
