"""Models of a node or two in ONNX Runtime, one thread, states bound as input and output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from reattend.targets.onnx.functions import DOMAIN, OPSET, VERSION

Array = np.ndarray[Any, Any]
Call = Callable[[], Array]


def session(
    nodes: list[Any], inputs: dict[str, Array], outputs: list[str], functions: list[Any]
) -> Any:
    """A model of these nodes, opened with one thread."""
    given = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), [None] * v.ndim)
        for k, v in inputs.items()
    ]
    ranks = {"y_rows": 3}
    made = [
        helper.make_tensor_value_info(o, TensorProto.FLOAT, [None] * ranks.get(o, 4))
        for o in outputs
    ]
    domains = {"": OPSET, DOMAIN: VERSION, "com.microsoft": 1}
    model = helper.make_model(
        helper.make_graph(nodes, "bench", given, made),
        opset_imports=[helper.make_opsetid(k, v) for k, v in domains.items()],
        functions=functions, ir_version=11,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def bound(run: Any, inputs: dict[str, Array], states: dict[str, tuple[str, Array]]) -> Call:
    """A call of a session; `states`: input -> output and the buffer that is both."""
    binding = run.io_binding()
    for name, array in inputs.items():
        if name not in states:
            binding.bind_cpu_input(name, array)
    for name, (out, array) in states.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(out, value)
    first = next(o.name for o in run.get_outputs())
    binding.bind_output(first)

    def call() -> Array:
        run.run_with_iobinding(binding)
        y: Array = binding.get_outputs()[-1].numpy()  # what was bound last
        return y

    return call
