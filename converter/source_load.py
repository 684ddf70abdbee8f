"""Load a model that the user named: a folder, or a model id already on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from reattend.errors import ArgumentError, ModelError
from reattend.weight_files import check_files, read_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_source(
    given: str, *, tokenizer: Any, device: Any, device_map: Any, dtype: Any, trust_remote_code: bool
) -> tuple[nn.Module, Any, Path | None, Path]:
    """The model in eval mode, its tokenizer, its folder if it was one, and where its files lie.

    Raises:
        ModelError: missing folder or config, damaged or pickled weights, remote code, quantised
            weights, or a model that transformers cannot build.
        ArgumentError: an unknown dtype or device.
    """
    folder = Path(given)
    local = folder.is_dir()
    architecture = read_architecture(given, trust_remote_code)
    if local:
        check_files(folder)
        if (folder / "generation_config.json").is_file():  # transformers would drop a damaged one
            read_config(folder / "generation_config.json")
    model = _from_pretrained(given, local, architecture, device_map, dtype, trust_remote_code)
    if device is not None:
        model = _moved(model, device)
    if tokenizer is None:
        tokenizer = find_tokenizer(given, local, trust_remote_code)
    return model.eval(), tokenizer, folder if local else None, home_of(given)


def read_architecture(given: str, trust_remote_code: bool) -> str | None:
    """The class that the config of a folder or id names; None where it is the model's own code.

    Raises:
        ModelError: no such folder, no config, remote code that was not asked for, or quantised
            weights.
    """
    folder = Path(given)
    local = folder.is_dir()
    if not local and (folder.exists() or given.startswith((".", "/", "~")) or given.count("/") > 1):
        raise ModelError(
            "no such model folder", where=given, next_step="give a folder that holds config.json"
        )
    if local and not (folder / "config.json").is_file():
        raise ModelError(
            "the model folder has no config.json",
            where=given,
            next_step="give the folder that save_pretrained wrote",
        )
    file = folder / "config.json" if local else _cached_config(given)
    return _architecture(file, given, trust_remote_code)


def home_of(given: str) -> Path:
    """Where the files of a folder or id lie.

    Raises:
        ModelError: there is no such model on this machine.
    """
    return Path(given) if Path(given).is_dir() else _cached_config(given).parent


def _cached_config(given: str) -> Path:
    """The config of a model id in the local cache.

    Raises:
        ModelError: there is none.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(given, "config.json")
    except HFValidationError:  # not an id
        found = None
    if not isinstance(found, str):
        raise ModelError(
            "there is no such model on this machine",
            where=given,
            why="it is no folder, and the local cache of Hugging Face models has none of this id; "
            "reattend fetches nothing from the network",
            next_step=f"give a folder, or download it first: hf download {given}",
        )
    return Path(found)


def _architecture(file: Path, given: str, trust_remote_code: bool) -> str | None:
    """The class config.json names; refuses remote code that was not asked for."""
    config = read_config(file)
    if config.get("auto_map") and not trust_remote_code:
        raise ModelError(
            "the model's code lies in its own folder and would be executed",
            where=given,
            why="config.json has an auto_map",
            next_step="read that code; if you trust it, pass trust_remote_code=True",
        )
    if config.get("quantization_config"):
        raise ModelError(
            "the model's weights are quantised",
            where=given,
            next_step="convert the unquantised model, then quantise the result",
        )
    for name, value in config.items():
        if name.startswith("num_") and isinstance(value, int) and value < 0:
            raise ModelError(
                f"{name} is {value}", where=str(file), next_step="copy or download it again"
            )
    names = config.get("architectures") or [None]
    if not isinstance(names, list) or not isinstance(names[0], str | None):
        raise ModelError(
            "config.json names no architecture",
            where=str(file),
            why=f"`architectures` is {names!r}",
            next_step='give it one class of transformers: ["LlamaForCausalLM"]',
        )
    return None if config.get("auto_map") else names[0]


def _from_pretrained(
    given: str, local: bool, architecture: str | None, device_map: Any, dtype: Any, trust: bool
) -> nn.Module:
    kwargs: dict[str, Any] = {"local_files_only": True}
    if device_map is not None:
        kwargs["device_map"] = device_map
    kwargs |= {"dtype": _dtype(dtype), "output_loading_info": True}
    try:
        if architecture and architecture.startswith("Reattend"):
            from reattend.targets.huggingface import load_model

            loaded = load_model(given, [architecture], **kwargs)
        else:
            loaded = _class(architecture, given).from_pretrained(
                given, use_safetensors=True, **kwargs,
                **({"trust_remote_code": True} if trust else {}),
            )  # fmt: skip
    except ModelError:
        raise
    except Exception as problem:  # a config can make any part of transformers fail
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else ""
        steps = "check the folder" if local else f"download it first: hf download {given}"
        if "safetensors" in first:
            steps = "only safetensors are read: save the model again with save_pretrained"
        raise ModelError(
            "the model cannot be loaded",
            where=given,
            why=f"{type(problem).__name__}: {first}",
            next_step=steps,
        ) from problem
    found, info = loaded
    return complete(found, info, given)


def _class(architecture: str | None, given: str) -> Any:
    """The class of transformers that config.json names, its class for language models if none."""
    import transformers

    chosen = getattr(transformers, architecture, None) if architecture else None
    if chosen is None:
        return transformers.AutoModelForCausalLM
    if not (isinstance(chosen, type) and issubclass(chosen, transformers.PreTrainedModel)):
        raise ModelError(
            f"{architecture} is not a model of transformers",
            where=given,
            why="config.json names it in `architectures`",
            next_step='name the model\'s class there: ["LlamaForCausalLM"]',
        )
    return chosen


def complete(model: nn.Module, loading_info: dict[str, Any], where: str) -> nn.Module:
    """The loaded model, if its checkpoint held every weight.

    transformers only warns about the others, and fills them with random numbers.

    Raises:
        ModelError: naming the first weights that are missing.
    """
    missing = sorted(loading_info.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            "the checkpoint does not hold every weight of the model",
            where=where,
            why=f"missing: {', '.join(missing[:3])}{more}",
            next_step="copy or download the whole model, and check `architectures` in config.json",
        )
    return model


def _dtype(dtype: Any) -> Any:
    """A torch dtype from what the user wrote; None keeps the checkpoint's."""
    if dtype is None or dtype == "auto":
        return "auto"
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if found not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ArgumentError(
            f"unknown dtype {str(dtype)!r}",
            why="known here: float32, float64, bfloat16, float16, auto",
            next_step="leave dtype out to keep the checkpoint's own",
        )
    return found


def _moved(model: nn.Module, device: Any) -> nn.Module:
    """The model on a device.

    Raises:
        ArgumentError: there is no such device here.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as problem:
        raise ArgumentError(
            f"the model cannot be moved to device {str(device)!r}",
            why=str(problem).strip().partition("\n")[0],
            next_step="leave device out to stay on the CPU",
        ) from problem


def find_tokenizer(given: str, local: bool, trust: bool) -> Any:
    """The model's tokenizer, None if it has none: data as tensors still works."""
    return read_tokenizer(given, local, trust)[0]


def read_tokenizer(given: str, local: bool, trust: bool) -> tuple[Any, str]:
    """The model's tokenizer and "", or None and why there is none."""
    if local and not any((Path(given) / n).exists() for n in _TOKENIZER_FILES):
        return None, "the model's folder has none"
    from transformers import AutoTokenizer

    settings = {"local_files_only": True, "trust_remote_code": trust}
    try:
        return AutoTokenizer.from_pretrained(given, **settings), ""
    except Exception as problem:  # its files can make any part of transformers and tokenizers fail
        first = (str(problem).strip().splitlines() or [""])[0]
        return None, f"the model's own cannot be read: {type(problem).__name__}: {first}"
