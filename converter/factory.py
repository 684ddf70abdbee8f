"""A model the command line builds by calling a function: `package.module:factory`.

Importing code runs it, so this happens for that explicit spelling alone, never for a name that
merely looks like a model's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reattend.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from torch import nn

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_SPELLING = re.compile(rf"(?P<where>.+\.py|{_NAME}):(?P<factory>{_NAME})")


def names_factory(given: str) -> bool:
    """Whether `given` is `package.module:factory` or `path/to/file.py:factory`."""
    return _SPELLING.fullmatch(given) is not None and not Path(given).is_dir()


def build(given: str, weights: Path | None = None) -> nn.Module:
    """Import, call the factory, load weights into what it returns.

    Args:
        given: a spelling that `names_factory` accepts.
        weights: a safetensors file with every tensor of the module; None keeps what the factory
            made.

    Raises:
        ArgumentError: nothing to import, no such attribute, not callable, it needs arguments, it
            raises, or does not return a module.
        ModelError: the weights cannot be read or do not fit.
    """
    found = _SPELLING.fullmatch(given)
    assert found is not None
    where, name = found["where"], found["factory"]
    with _beside(where):
        module = _imported(where, given)
        made = _called(_attribute(module, name, given), given)
    from torch import nn

    if not isinstance(made, nn.Module):
        raise ArgumentError(
            "the factory does not return a torch.nn.Module",
            where=given,
            why=f"it returns a {type(made).__name__}",
        )
    if weights is not None:
        _load(made, weights)
    return made.eval()


def read_inputs(file: Path, model: nn.Module) -> dict[str, Any]:
    """Example inputs from a safetensors file: its names are parameters of `model.forward`.

    Raises:
        ArgumentError: the file cannot be read, is empty, or has a name that forward does not.
    """
    tensors = _tensors(file, ArgumentError)
    parameters = inspect.signature(model.forward).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in tensors if name not in parameters]
    if unknown and not free:
        near = get_close_matches(unknown[0], parameters, 1)
        raise ArgumentError(
            f"{type(model).__name__}.forward has no parameter {unknown[0]!r}",
            where=str(file),
            why=f"its parameters: {', '.join(parameters)}",
            next_step=f"did you mean {near[0]!r}?" if near else "",
        )
    return tensors


@contextmanager
def _beside(where: str) -> Iterator[None]:
    """A file may import its neighbours while it is imported and called."""
    before = list(sys.path)
    if where.endswith(".py"):
        sys.path.insert(0, str(Path(where).expanduser().absolute().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def _imported(where: str, given: str) -> ModuleType:
    file = Path(where).expanduser()
    if where.endswith(".py") and not file.is_file():
        raise ArgumentError("no such Python file", where=where)
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        name = f"reattend_factory_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and inspect look classes up there
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        absent = isinstance(problem, ModuleNotFoundError) and where.startswith(problem.name or "?")
        raise ArgumentError(
            "there is no such module" if absent else "the module cannot be imported",
            where=given,
            why=f"{type(problem).__name__}: {problem}",
            next_step="install it, or give its file: path/to/file.py:factory" if absent else "",
        ) from problem
    return module


def _attribute(module: ModuleType, name: str, given: str) -> Callable[..., Any]:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            near = get_close_matches(part, dir(value), 1)
            raise ArgumentError(
                f"there is no {part!r} in {getattr(value, '__name__', value)}",
                where=given,
                next_step=f"did you mean {near[0]!r}?" if near else "",
            )
        value = getattr(value, part)
    if not callable(value):
        raise ArgumentError(
            "the factory is not callable",
            where=given,
            why=f"it is a {type(value).__name__}",
            next_step="name a function without arguments that returns the module",
        )
    called: Callable[..., Any] = value
    return called


def _called(factory: Callable[..., Any], given: str) -> Any:
    try:
        return factory()
    except (Exception, SystemExit) as problem:
        raise ArgumentError(
            "the factory raised an error",
            where=given,
            why=f"{type(problem).__name__}: {problem}",
            next_step="it is called without arguments and must return a torch.nn.Module",
        ) from problem


def _tensors(file: Path, error: type[ArgumentError | ModelError]) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(file)
    except (SafetensorError, OSError, ValueError) as problem:
        raise error(
            "this is not a readable safetensors file",
            where=str(file),
            why=str(problem),
            next_step="write it with safetensors.torch.save_file; other formats are not opened",
        ) from problem
    if not tensors:
        raise error("the file holds no tensor", where=str(file))
    return tensors


def _load(model: nn.Module, file: Path) -> None:
    """Every tensor of the module; one name of several tied ones is enough."""
    tensors = _tensors(file, ModelError)
    own = model.state_dict(keep_vars=True)
    unknown = sorted(set(tensors) - set(own))
    given = {id(own[name]) for name in tensors if name in own}
    missing = sorted(name for name, value in own.items() if id(value) not in given)
    why = f"it lacks {', '.join(missing[:3])}" if missing else ""
    if unknown:
        why = f"the module has no {', '.join(unknown[:3])}"
    for name in set(tensors) & set(own):
        if tensors[name].shape != own[name].shape:
            shapes = tuple(tensors[name].shape), tuple(own[name].shape)
            why = f"{name} is {shapes[0]}, the module's {shapes[1]}"
    if why:
        raise ModelError(
            "the weights do not fit the module the factory returns", where=str(file), why=why
        )
    model.load_state_dict(tensors, strict=False)
