"""Open what the user gave: a live module, a folder, or a model id already on this machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reattend.errors import ArgumentError, ModelError
from reattend.inputs import is_hf
from reattend.sharing import is_shared
from reattend.weight_files import check_files, hash_files, read_config


@dataclass
class Source:
    """The original model and where it came from.

    Attributes:
        model: in eval mode; never changed by the pipeline.
        name: what the user calls it; never a path.
        folder: where its files lie, None for a live module.
        owned: we loaded it, so its tensors may be used freely.
        hashes: sha256 by weight file, or of the state dict of a live module.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    folder: Path | None
    owned: bool
    hashes: dict[str, str]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device


def open_source(
    model: Any,
    *,
    tokenizer: Any = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    trust_remote_code: bool = False,
) -> Source:
    """Load or accept a model; nothing is fetched from the network.

    Raises:
        ModelError: missing folder or config, damaged weights, remote code, quantised weights, NaN.
        ArgumentError: not a model, a folder or an id.
    """
    if isinstance(model, nn.Module):
        if device is not None or dtype is not None or device_map is not None:
            raise ArgumentError(
                "device, device_map and dtype are for models that reattend loads",
                next_step="move or cast the module before the call",
            )
        hashes = {"state_dict": _hash_state(model)}
        source = Source(model, tokenizer, type(model).__name__, None, False, hashes)
    elif isinstance(model, str | Path):
        source = _load(str(model), tokenizer, device, device_map, dtype, trust_remote_code)
    else:
        raise ArgumentError(
            f"a {type(model).__name__} is not a model",
            next_step="pass a torch.nn.Module, a model folder, or a model id",
        )
    check_weights(source.model)
    return source


def check_weights(model: nn.Module) -> None:
    """Refuse what cannot be converted: quantised, sharded or offloaded weights, and NaN.

    Raises:
        ModelError: naming the first offending tensor.
    """
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised is not None or getattr(model, "is_quantized", False):
        raise ModelError(
            "the model's weights are quantised",
            why="statistics and decompositions need the full-precision matrices",
            next_step="convert the unquantised model, then quantise the result",
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise ModelError(
                "a weight is not in memory (offloaded or never loaded)",
                where=name,
                next_step="load the model fully: device_map='cpu' or one device",
            )
        if type(tensor).__module__.startswith("torch.distributed"):
            raise ModelError(
                "a weight is sharded over processes",
                where=name,
                next_step="load the model unsharded for the conversion",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            if kind == "NaN" or not name.split(".")[-1].startswith("bias"):
                raise ModelError(
                    f"a weight holds {kind}",
                    where=name,
                    next_step="fix or re-download the checkpoint",
                )


def _load(
    given: str, tokenizer: Any, device: Any, device_map: Any, dtype: Any, trust_remote_code: bool
) -> Source:
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
    architecture = _architecture(folder, given, trust_remote_code) if local else None
    if local:
        check_files(folder)
    model = _from_pretrained(given, local, architecture, device_map, dtype, trust_remote_code)
    if device is not None:
        model = _moved(model, device)
    if tokenizer is None:
        tokenizer = find_tokenizer(given, local, trust_remote_code)
    hashes = hash_files(folder) if local else {"state_dict": _hash_state(model)}
    name = folder.name if local else given
    return Source(model.eval(), tokenizer, name, folder if local else None, True, hashes)


def _architecture(folder: Path, given: str, trust_remote_code: bool) -> str | None:
    """The class config.json names; refuses remote code that was not asked for."""
    config = read_config(folder / "config.json")
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
    names = config.get("architectures") or [None]
    return None if config.get("auto_map") else names[0]


def _from_pretrained(
    given: str, local: bool, architecture: str | None, device_map: Any, dtype: Any, trust: bool
) -> nn.Module:
    import transformers

    kwargs: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust}
    if device_map is not None:
        kwargs["device_map"] = device_map
    kwargs |= {"dtype": _dtype(dtype), "output_loading_info": True}
    loaded: Any
    try:
        if architecture and architecture.startswith("Reattend"):
            from reattend.targets.huggingface import load_model

            kwargs.pop("trust_remote_code")
            loaded = load_model(given, [architecture], **kwargs)
        else:
            chosen = getattr(transformers, architecture, None) if architecture else None
            if chosen is None:
                chosen = transformers.AutoModelForCausalLM
            elif not trust:
                kwargs.pop("trust_remote_code")
            loaded = chosen.from_pretrained(given, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else ""
        raise ModelError(
            "the model cannot be loaded",
            where=given,
            why=f"{type(problem).__name__}: {first}",
            next_step="check the folder" if local else f"download it first: hf download {given}",
        ) from problem
    found, info = loaded
    return complete(found, info, given)


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
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
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
    """The model's tokenizer, None if it has none."""
    if local and not any((Path(given) / n).exists() for n in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given, local_files_only=True, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # data as tensors still works; text data will name the missing tokenizer


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def _hash_state(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        data = tensor.detach().cpu().contiguous()
        data = data.clone() if is_shared(data) else data  # numpy's pointer would end the sharing
        total.update(str((data.dtype, tuple(data.shape))).encode())
        total.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return "sha256:" + total.hexdigest()


def is_transformers(source: Source) -> bool:
    """Whether the checkpoint can be a Hugging Face one."""
    return is_hf(source.model)
