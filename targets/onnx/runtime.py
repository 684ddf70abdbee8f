"""Opening a file in ONNX Runtime, on the providers that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reattend.errors import MissingExtraError
from reattend.targets.onnx.library import CPU
from reattend.targets.onnx.requirements import need


def started(
    file: Path,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    prepare: Callable[[Any, list[str]], None] | None = None,
) -> Any:
    """An `InferenceSession`.

    Args:
        file: to open.
        providers: most wanted first; the CPU's when not given. All must really start: ONNX Runtime
            falls back silently.
        threads: compute threads; ONNX Runtime's choice when not given.
        prepare: is given the options and the providers before the file is opened.

    Raises:
        MissingExtraError: onnxruntime is not installed, or a provider did not start.
    """
    ort = need("onnxruntime", "running an exported model")
    wanted = list(providers or [CPU])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if prepare is not None:
        prepare(options, wanted)
    session = ort.InferenceSession(str(file), options, providers=wanted)
    running = session.get_providers()
    lost = [name for name in wanted if name not in running]
    if lost:
        raise MissingExtraError(
            f"the execution provider {lost[0]} did not start",
            why=f"ONNX Runtime runs with {', '.join(running)}",
            next_step="install the onnxruntime package for that device, or leave it out",
        )
    return session
