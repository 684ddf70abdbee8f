"""Write a result as a folder and read it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from reattend.companions import write_companions
from reattend.durable import tensors_writer
from reattend.errors import ArgumentError, ModelError
from reattend.inputs import is_hf
from reattend.install.adapter import Adapter
from reattend.install.stored import FORMAT, check_format, describe, install_empty
from reattend.sharing import address
from reattend.weight_files import check_files, read_config
from reattend.workdir import Workdir

if TYPE_CHECKING:
    from reattend.api import Result

SITES_FILE = "reattend.json"


def publish_result(result: Result, work: Workdir) -> None:
    """Checkpoint, tokenizer, licence and processor, plan and report, file by file."""

    def write(folder: Path) -> None:
        write_checkpoint(result.model, folder)
        tokenizer = result.tokenizer if is_hf(result.model) else None
        write_companions(folder, result.model, tokenizer, result.original)

    work.publish_folder(write)
    plan = json.dumps(result.report.plan, sort_keys=True, indent=2) + "\n"
    work.publish_bytes("plan.json", plan.encode())
    work.publish_bytes("report.json", result.report.to_json().encode())
    work.publish_bytes("report.md", result.report.to_markdown().encode())
    work.publish_bytes("report.html", result.report.to_html().encode())


def write_checkpoint(model: nn.Module, folder: Path) -> None:
    """A Hugging Face checkpoint, or weights and `reattend.json` for other modules."""
    if is_hf(model):
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    tensors_writer(_untied(state))(folder / "model.safetensors")
    sites = {"format": FORMAT, "class": _class_name(model), "sites": describe(model)}
    (folder / SITES_FILE).write_text(json.dumps(sites, indent=2, sort_keys=True) + "\n", "utf-8")


def _untied(state: dict[str, Any]) -> dict[str, Any]:
    """safetensors refuses two names for one storage: the later names are copies."""
    seen: set[int] = set()
    out = {}
    for name, tensor in state.items():
        pointer = address(tensor)
        out[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return out


def save_result(result: Result, folder: Path, *, overwrite: bool) -> Path:
    """`Result.save`: the same files as `convert(out=...)`."""
    fingerprint = {"report": result.report.to_json()}
    with Workdir.open(folder, fingerprint, overwrite) as work:
        if work.state == "complete":
            return work.out
        publish_result(result, work)
        if result.run is not None:
            work.publish_bytes("run.json", result.run.to_json().encode())
        return work.finish()


def load_folder(
    folder: Path, model: nn.Module | None = None, inputs: Any = None, **kwargs: Any
) -> nn.Module:
    """`reattend.load`."""
    if not folder.is_dir():
        raise ModelError("no such folder", where=str(folder), next_step="give a converted folder")
    if (folder / SITES_FILE).is_file():
        return _load_module(folder, model, inputs)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(
            "not a reattend folder: it has neither config.json nor reattend.json",
            where=str(folder),
            next_step="give the folder that convert(out=...) wrote",
        )
    if model is not None or inputs is not None:
        raise ArgumentError(
            "model and inputs are for a result whose code is yours",
            where=str(folder),
            why="this one is a transformers model, which its folder holds whole",
            next_step="load(dir), with from_pretrained's own arguments",
        )
    from reattend.source_load import complete
    from reattend.targets.huggingface import checked_section, load_model

    config = read_config(config_file)
    checked_section(config, str(folder))
    if not config.get("architectures"):
        raise ModelError(
            "config.json does not name the model's class",
            where=str(folder),
            why="`architectures` is missing or empty",
            next_step="copy or download the folder again, or convert the model again",
        )
    check_files(folder)
    kwargs["output_loading_info"] = True
    try:
        loaded: Any = load_model(str(folder), config["architectures"], **kwargs)
    except (TypeError, ValueError) as problem:  # what from_pretrained says of its arguments
        raise ArgumentError(
            "the model cannot be loaded like this",
            where=", ".join(f"{k}={v!r}" for k, v in kwargs.items() if k != "output_loading_info"),
            why=f"{type(problem).__name__}: {problem}"[:300],
            next_step="check the arguments of from_pretrained that were given",
        ) from problem
    found, info = loaded
    return complete(found, info, str(folder)).eval()


def _class_name(model: nn.Module) -> str:
    """The user's class, also behind a graph."""
    return str(getattr(model, "meta", {}).get("reattend_class", type(model).__name__))


def _load_module(folder: Path, model: nn.Module | None, inputs: Any) -> nn.Module:
    from safetensors.torch import load_file

    stored = read_config(folder / SITES_FILE)
    check_format(stored, str(folder))
    if model is None:
        raise ArgumentError(
            f"this is a converted {stored['class']}, whose code is yours",
            where=str(folder),
            next_step=f"load(dir, model={stored['class']}(...))",
        )
    if any(isinstance(m, Adapter) for m in model.modules()):
        raise ArgumentError("the module given is already converted", next_step="pass a fresh one")
    if any(site["binding"] is None for site in stored["sites"]):
        model = _graph_with(model, stored["sites"], inputs, folder)
    else:
        install_empty(model, stored["sites"])
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True, assign=True)
    return model.eval() if not isinstance(model, fx.GraphModule) else model


def _graph_with(
    model: nn.Module, sites: list[dict[str, Any]], inputs: Any, folder: Path
) -> nn.Module:
    """Capture the module again and put empty mixers where the stored sites were."""
    from reattend.finder import find_attention
    from reattend.install.graph import drop_unused, replace_region
    from reattend.mixers.kinds import build_mixer

    if inputs is None:
        raise ArgumentError(
            "this folder holds a rewritten graph, which must be captured again",
            where=str(folder),
            next_step="pass the inputs given to convert: load(dir, model=module, inputs={...})",
        )
    found = find_attention(model, inputs)
    here = {site.path: site for site in found.sites}
    for stored in sites:
        site = here.get(stored["path"])
        if site is None:
            raise ModelError(
                f"the module given has no attention block {stored['path']!r}", where=str(folder)
            )
        mixer = build_mixer(stored["kind"], stored["config"])
        given = found.capture.placeholders()
        replace_region(found.capture.gm, site.path, site.region, mixer, given, site.follows_padding)
    drop_unused(found.capture.gm)
    found.capture.gm.meta["reattend_class"] = type(model).__name__
    rewritten: nn.Module = found.capture.gm
    return rewritten
