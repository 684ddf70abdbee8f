"""Inputs and calls of the benchmark's problems: our ops, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from cases import Case, bytes_of, new_bytes
from correctness import paged
from patterns import layout_of, read_by
from torch import Tensor

import reattend.kernels.attention
import reattend.kernels.latent_attention
import reattend.kernels.linear_attention
import reattend.kernels.routed_attention
import reattend.kernels.sparse_attention  # noqa: F401  (each registers its op)

Call = Callable[[], Any]
DEVICE = "cuda"
ROOM = 60_000_000_000  # bytes that inputs of one problem may take


class Work(NamedTuple):
    """What a problem must do at least: arithmetic, and bytes to read and write."""

    flops: int
    bytes: int


def work_of(case: Case) -> Work:
    """Of a case, its pattern looked at."""
    if not case.pattern:
        return Work(case.flops, bytes_of(case))
    read = read_by(case)
    rows = case.size * case.b * 2 * case.d * read.rows
    return Work(case.b * read.pairs * 4 * case.d, rows + new_bytes(case))


class Problem:
    """A case with its tensors on a device."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        device = self.device = DEVICE
        self.make = torch.Generator(device=device).manual_seed(seed)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        build = {"latent_attention": self._latent, "linear_attention": self._linear}
        self.data: tuple[Any, ...] = build.get(case.op, self._heads)()
        self.kept: tuple[Tensor, ...] | None = None
        start = torch.zeros(case.b, dtype=torch.int64, device=device)
        self.rest: tuple[Any, ...] = (start, start + case.m)
        self.scalars: dict[str, Any] = {"scale": (case.d + case.rope) ** -0.5}
        if case.op == "sparse_attention":
            layout = layout_of(case).to(device)
            scale = self.scalars.pop("scale")
            self.rest = (*layout.tensors, *self.rest, layout.block, layout.first, scale, 0.0)
        elif case.op == "routed_attention":
            order = torch.rand(case.b, case.g, case.n, generator=self.make, device=device)
            self.rest = (order.argsort(1) < case.used, *self.rest)
        elif case.op == "linear_attention":
            self.rest, self.scalars = (0, 1, False, False), {}
        elif case.page:
            new = len(self.data) - 2
            pages, table = paged(self.data[new:], case.page, self.make)
            self.data, self.rest = (*self.data[:new], *pages), (*self.rest, table)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.make, device=self.device).to(self.dtype)

    def _heads(self) -> tuple[Tensor, ...]:
        c = self.case
        cache = (c.b, c.g, c.m, c.d)
        return self._draw(c.b, c.h, c.n, c.d), self._draw(*cache), self._draw(*cache)

    def _latent(self) -> tuple[Tensor, ...]:
        c = self.case
        queries = self._draw(c.b, c.h, c.n, c.d), self._draw(c.b, c.h, c.n, c.rope)
        return (*queries, self._draw(c.b, c.m, c.d), self._draw(c.b, c.m, c.rope))

    def _linear(self) -> tuple[Any, ...]:
        c, scale = self.case, self.case.d**-0.5
        q, k, v = (self._draw(c.b, x, c.n, c.d) for x in (c.h, c.g, c.g))
        shape = {"head": (c.b, c.g, c.n), "feature": (c.b, c.g, c.n, c.d)}.get(c.decay)
        decay = state = None
        if shape is not None:
            decay = -torch.rand(shape, generator=self.make, device=self.device) / 8
        if c.n == 1:
            state = torch.randn(c.b, c.g, c.d, c.d, generator=self.make, device=self.device)
        return q * scale, k * scale, v, decay, state

    def forward(self) -> tuple[Tensor, ...]:
        """Our op."""
        op = getattr(torch.ops.reattend, self.case.op)
        found: tuple[Tensor, ...] = op(*self.data, *self.rest, **self.scalars)
        return found

    def backward(self) -> tuple[Tensor, ...]:
        """The gradient alone, of what `forward` gave the first time this was called."""
        if self.kept is None:
            found = self.forward()
            grads = torch.randn_like(found[0]), torch.randn_like(found[1])
            linear = self.case.op == "linear_attention"
            self.kept = grads if linear else (*grads, *found)
        op = getattr(torch.ops.reattend, f"{self.case.op}_backward")
        made: tuple[Tensor, ...] = op(*self.kept, *self.data, *self.rest, **self.scalars)
        return made

    def config(self) -> dict[str, int] | None:
        """The tile sizes of the kernel that runs this problem; None: torch does."""
        module = f"reattend.kernels.{self.case.op}.launch"
        launch = import_module(module)
        if self.case.op == "linear_attention":
            found = launch.configs_for(launch.Inputs(*self.data, *self.rest[:3])) or {}
            names = ("step",) if self.case.n == 1 else ("channels", "read")
            chosen = next((found[name] for name in names if name in found), None)
        elif self.case.op == "sparse_attention":
            *layout, start, end, block, first, _, _ = self.rest
            given = launch.Inputs(*self.data, tuple(layout), (start, end), block, first)
            chosen = launch.config_for(given, "forward")
        elif self.case.op == "routed_attention":
            chosen = launch.config_for(launch.Inputs(*self.data, *self.rest))
        else:
            chosen = launch.config_for(self.data[0], self.data[1 if self.case.rope else 2])
        return None if chosen is None else chosen.told


def small(case: Case) -> Case:
    """The same kernels on less: where a problem is large, compiling need not run all of it."""
    if work_of(case).bytes < ROOM // 60:
        return case
    m = min(case.m, 4096)
    return replace(case, b=min(case.b, 2), n=min(case.n, m), m=m)


def compile_case(case: Case) -> None:
    """In a worker: run once, which leaves the compiled kernels on disk."""
    problem = Problem(small(case))
    problem.forward()
    if case.backward:
        problem.backward()
    torch.cuda.synchronize()
