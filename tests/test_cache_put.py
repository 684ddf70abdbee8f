"""Cache writes: the functional op and the in-place function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.kernels.cache_put import cache_put, cache_put_


def slow_put(cache: Tensor, new: Tensor, start: list[int], axis: int) -> Tensor:
    out = cache.clone().movedim(axis, 1)
    for b, row in enumerate(start):
        for i in range(new.shape[axis]):
            out[b, row + i] = new.movedim(axis, 1)[b, i]
    return out.movedim(1, axis)


SHAPES = {
    "heads": ((3, 2, 9, 4), 2, -2),
    "heads-positive-axis": ((3, 2, 9, 4), 1, 2),
    "latent": ((3, 9, 5), 3, 1),
    "last-axis": ((3, 5, 9), 2, -1),
    "full": ((3, 9, 5), 9, 1),
    "none": ((3, 9, 5), 0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
def test_writes_where_it_should_and_nowhere_else(name: str, dtype: torch.dtype) -> None:
    shape, n, axis = SHAPES[name]
    cache = torch.randn(shape).to(dtype)
    new_shape = list(shape)
    new_shape[axis] = n
    new = torch.randn(new_shape).to(dtype)
    for start in ([0, 9 - n, (9 - n) // 2], [(9 - n) // 3] * 3):
        want = slow_put(cache, new, start, axis)
        before = cache.clone()
        for index_dtype in (torch.int64, torch.int32):
            got = cache_put(cache, new, torch.tensor(start, dtype=index_dtype), axis)
            assert torch.equal(got, want)
        assert torch.equal(cache, before)
        target = cache.clone()
        assert cache_put_(target, new, torch.tensor(start), axis) is target
        assert torch.equal(target, want)


def test_in_place_keeps_the_storage_and_accepts_views() -> None:
    storage = torch.zeros(2, 6, 3, 4)
    view = storage.transpose(1, 2)  # (B, heads, rows, width)
    pointer = storage.data_ptr()
    cache_put_(view, torch.ones(2, 3, 2, 4), torch.tensor([1, 4]), -2)
    assert storage.data_ptr() == pointer
    assert storage.sum() == 2 * 3 * 2 * 4
    assert storage[0, 1:3].eq(1).all()
    assert storage[1, 4:6].eq(1).all()


def test_gradcheck_and_opcheck() -> None:
    cache = torch.randn(2, 3, 7, 2, dtype=torch.float64, requires_grad=True)
    new = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1, 5])
    assert torch.autograd.gradcheck(lambda c, n: cache_put(c, n, start, -2), (cache, new))
    torch.library.opcheck(torch.ops.reattend.cache_put.default, (cache, new, start, -2))


def test_export_with_dynamic_dims() -> None:
    class Step(torch.nn.Module):
        def forward(self, cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
            return cache_put(cache, new, start, 1) + 1

    B, N, M = (torch.export.Dim(x, min=2, max=64) for x in ("B", "N", "M"))
    args = (torch.randn(2, 9, 4), torch.randn(2, 3, 4), torch.tensor([0, 5]))
    shapes = ({0: B, 1: M}, {0: B, 1: N}, {0: B})
    program = torch.export.export(Step(), args, dynamic_shapes=shapes)
    args = (torch.randn(3, 12, 4), torch.randn(3, 5, 4), torch.tensor([0, 5, 7]))
    assert torch.equal(program.module()(*args), Step()(*args))


@pytest.mark.parametrize("function", [cache_put, cache_put_])
def test_compile_fullgraph(function: object) -> None:
    torch._dynamo.reset()

    def step(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
        return function(cache, new, start, 1) + 1  # type: ignore[operator]

    args = (torch.randn(2, 9, 4), torch.randn(2, 3, 4), torch.tensor([0, 5]))
    want = step(args[0].clone(), *args[1:])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(args[0].clone(), *args[1:]), want)


def test_autocast_keeps_the_dtype_of_the_cache() -> None:
    cache, new = torch.zeros(1, 4, 2), torch.ones(1, 1, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert cache_put(cache, new, torch.tensor([2]), 1).dtype == torch.float32


@pytest.mark.parametrize("function", [cache_put, cache_put_])
@pytest.mark.parametrize(
    ("shape", "dtype", "start", "axis", "message"),
    [
        ((2, 3, 4), torch.float32, [0, 7], 1, "rows 0 to 10 of a capacity of 9"),
        ((2, 3, 4), torch.float32, [-1, 0], 1, "rows -1 to 3"),
        ((2, 3, 4), torch.float32, [0, 0], 0, "other than the batch"),
        ((2, 3, 4), torch.float32, [0, 0], 3, "other than the batch"),
        ((2, 3, 5), torch.float32, [0, 0], 1, "dimension 2"),
        ((2, 3, 4, 1), torch.float32, [0, 0], 1, "as many dimensions"),
        ((2, 3, 4), torch.float16, [0, 0], 1, "one dtype"),
        ((2, 3, 4), torch.float32, [0], 1, "batch of the cache"),
    ],
)
def test_wrong_arguments_are_named(
    function: object,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    start: list[int],
    axis: int,
    message: str,
) -> None:
    cache = torch.zeros(2, 9, 4)
    with pytest.raises(ArgumentError, match=message):
        function(cache, torch.ones(shape, dtype=dtype), torch.tensor(start), axis)  # type: ignore[operator]
    assert cache.eq(0).all()
