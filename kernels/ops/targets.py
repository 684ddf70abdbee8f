"""The GPUs the Triton kernels are shipped for: listed here and nowhere else.

Limits are per thread block and from the vendors' documents (CUDA C programming guide, table of
technical specifications; CDNA3 ISA guide). The compiler does not enforce the shared-memory
limit, so `reattend.kernels.aot` does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    Attributes:
        name: how reports and the configuration table call it.
        backend: Triton backend, ``cuda`` or ``hip``.
        arch: what the backend calls it (90 or "gfx942").
        warp_size: threads per warp (wavefront).
        shared_limit: bytes of shared memory (LDS) one block may use.
        register_limit: registers per thread above which the compiler spills.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    register_limit: int


SM_80 = Target("sm_80", "cuda", 80, 32, 166_912, 255)
SM_90 = Target("sm_90", "cuda", 90, 32, 232_448, 255)
SM_100 = Target("sm_100", "cuda", 100, 32, 232_448, 255)
GFX942 = Target("gfx942", "hip", "gfx942", 64, 65_536, 512)

TARGETS = (SM_80, SM_90, SM_100, GFX942)
SMALL_SHARED_LIMIT = 101_376  # sm_86, sm_89 and sm_120 use the sm_80 table


def target_named(name: str) -> Target:
    """The shipped target of that name."""
    return next(t for t in TARGETS if t.name == name)


def target_of_device(backend: str, arch: int | str) -> Target | None:
    """The shipped target whose configurations a device uses.

    Args:
        backend: ``cuda`` or ``hip``.
        arch: compute capability as an integer (89 for 8.9), or the gfx name.

    Returns:
        The target, or None when the device is older than every shipped one.
    """
    if backend == "hip":
        return GFX942 if str(arch).startswith("gfx94") or str(arch).startswith("gfx95") else None
    if not isinstance(arch, int) or arch < 80:
        return None
    if arch == 90:
        return SM_90
    return SM_100 if arch in (100, 103) else SM_80
