"""reattend's own ONNX Runtime kernels: what the torch ops mean, on every instruction set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_library import InstructionSets, build_script, built

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from reattend.kernels.attention import attention  # noqa: E402
from reattend.kernels.latent_attention import latent_attention  # noqa: E402
from reattend.targets.onnx.functions import DOMAIN, OPSET, VERSION, function_proto  # noqa: E402

OPS: dict[str, Any] = {"Attention": attention, "LatentAttention": latent_attention}
RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": 0},
    "window": {"sliding_window": 5},
    "softcap": {"softcap": 2.0},
}
PLAIN = {"scale": 0.3, "causal": 1, "sliding_window": 0, "softcap": 0.0}


@pytest.fixture
def sets() -> Iterator[InstructionSets]:
    found = InstructionSets(built())
    yield found
    found.reset()


def inputs(name: str, n: int, capacity: int, length: int, dtype: Any) -> dict[str, np.ndarray]:
    """Odd widths; row 1 begins with pads, row 2 holds only pads, row 3 is shorter."""
    b, h, g = 4, 6, 2
    shapes = {"q": (b, h, n, 24), "key": (b, g, capacity, 24), "value": (b, g, capacity, 37)}
    if name == "LatentAttention":
        shapes = {
            "q_nope": (b, h, n, 37), "q_rope": (b, h, n, 6),
            "latent": (b, capacity, 37), "rope": (b, capacity, 6),
        }  # fmt: skip
    random = np.random.default_rng(0)
    feed = {k: random.standard_normal(s).astype(dtype) for k, s in shapes.items()}
    feed["kv_start"] = np.array([0, 3, length, 1])
    feed["kv_len"] = np.array([length, length, length, length - 2])
    return feed


def session(
    name: str,
    feed: dict[str, np.ndarray],
    attributes: dict[str, Any],
    threads: int = 1,
    **more: Any,
) -> Any:
    """One node and its function body, with the library registered."""
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    given = [
        helper.make_tensor_value_info(
            k, kinds.get(v.dtype.name, TensorProto.INT64), [None] * v.ndim
        )
        for k, v in feed.items()
    ]
    kind = kinds[next(iter(feed.values())).dtype.name]
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node(name, list(feed), ["y"], domain=DOMAIN, **(PLAIN | attributes))],
            "one_node", given, [helper.make_tensor_value_info("y", kind, list("bhne"))],
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function_proto(name)], ir_version=11,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(built()))
    for key, value in more.items():
        setattr(options, key, value)
    return onnxruntime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def expected(name: str, feed: dict[str, np.ndarray], attributes: dict[str, Any]) -> np.ndarray:
    tensors = [torch.from_numpy(v) for v in feed.values()]
    tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    given = PLAIN | attributes
    found = OPS[name](*tensors, **(given | {"causal": bool(given["causal"])}))[0].numpy()
    assert np.abs(found).max() > 0.1
    return found


@pytest.mark.parametrize("target", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 3e-6), (np.float16, 5e-3)])
def test_kernels_mean_what_the_torch_ops_mean(
    sets: InstructionSets, target: str, name: str, dtype: Any, limit: float
) -> None:
    """Decode and a chunk; caches in one span, and in several that are merged."""
    sets.use(target)
    for n, capacity, length in ((1, 12, 9), (5, 70, 67), (1, 2200, 2100)):
        feed = inputs(name, n, capacity, length, dtype)
        for rule, attributes in RULES.items():
            got = session(name, feed, attributes).run(None, feed)[0]
            wanted = expected(name, feed, attributes)
            assert got.dtype == dtype
            error = np.abs(got.astype(np.float64) - wanted).max()
            assert error <= limit, (n, rule)
            assert (got[2] == 0).all()  # sees nothing


@pytest.mark.parametrize("name", OPS)
def test_long_chunks_and_more_threads(name: str) -> None:
    """Many tiles of queries; the same bits for every number of threads."""
    feed = inputs(name, 83, 160, 151, np.float32)
    for attributes in RULES.values():
        one, two = (session(name, feed, attributes, k).run(None, feed)[0] for k in (1, 2))
        np.testing.assert_array_equal(one, two)
        assert np.abs(one - expected(name, feed, attributes)).max() <= 3e-6


@pytest.mark.parametrize("name", OPS)
def test_rows_that_do_not_count_may_hold_anything(name: str) -> None:
    feed = inputs(name, 2, 2200, 2100, np.float32)
    running = session(name, feed, {})
    before = running.run(None, feed)[0]
    assert np.isfinite(before).all()
    for key in ("key", "value", "latent", "rope"):
        if key in feed:
            feed[key][..., 2100:, :] = np.nan
            feed[key][1, ..., :3, :] = np.nan
            feed[key][2] = np.nan
    np.testing.assert_array_equal(running.run(None, feed)[0], before)


@pytest.mark.parametrize("name", OPS)
def test_the_kernel_takes_over_from_the_function_body(name: str, tmp_path: Path) -> None:
    feed = inputs(name, 1, 12, 9, np.float32)
    running = session(
        name, feed, {}, enable_profiling=True, profile_file_prefix=str(tmp_path / "p")
    )
    running.run(None, feed)
    events = json.loads(Path(running.end_profiling()).read_text())
    assert {e["args"]["op_name"] for e in events if e.get("cat") == "Node"} == {name}


def test_shapes_that_do_not_fit_are_an_error() -> None:
    feed = inputs("Attention", 1, 12, 9, np.float32)
    running = session("Attention", feed, {})
    feed["value"] = feed["value"][:, :, :5]
    with pytest.raises(Exception, match="shapes do not fit together"):
        running.run(None, feed)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = build_script()
    monkeypatch.setattr("sys.argv", ["build.py", "--headers", str(tmp_path)])
    assert "libonnxruntime-dev" in script.missing(tmp_path) or "g++" in script.missing(tmp_path)
    assert script.main() == 5
    assert not list(tmp_path.iterdir())
