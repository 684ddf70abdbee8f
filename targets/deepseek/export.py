"""`export_deepseek`: a converted model as a checkpoint of transformers' own DeepSeek class."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reattend.companions import write_companions
from reattend.errors import ArgumentError
from reattend.mixers.latent import LatentAttention
from reattend.targets.deepseek.blocks import latent_blocks, refuse
from reattend.targets.deepseek.config import classes, stock_config
from reattend.targets.deepseek.forecast import config_obstacles, host_obstacles
from reattend.targets.deepseek.host import Host, read_host
from reattend.targets.deepseek.loaders import loaders
from reattend.targets.deepseek.manifest import MANIFEST, Cache, Manifest, read_manifest
from reattend.targets.deepseek.obstacles import block_obstacles
from reattend.targets.deepseek.proof import prove
from reattend.targets.deepseek.rope import plain_base
from reattend.targets.deepseek.shape import Shape, Version, common_shape, parse_pad
from reattend.targets.deepseek.state import state_dict
from reattend.targets.onnx.graph import evaluation_copy
from reattend.targets.onnx.manifest import weights_sha256
from reattend.workdir import Workdir, digest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A finished export.

    Attributes:
        path: the folder; `from_pretrained(path)` is all it takes, reattend need not be installed.
        manifest: what `deepseek.json` in it says.
    """

    path: Path
    manifest: Manifest

    @property
    def max_error(self) -> float:
        """Largest difference from the converted model's logits, stored dtype included."""
        return max(check.error for check in self.manifest.checks)


@dataclass(frozen=True)
class Ready:
    """Everything that was read of a model that fits."""

    blocks: dict[str, LatentAttention]
    shape: Shape
    host: Host
    wide: nn.Module


def export_deepseek(
    model: nn.Module,
    out: str | Path,
    *,
    version: Version = "v3",
    dtype: str | None = None,
    pad: str | None = None,
    tokenizer: Any = None,
    original: Path | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Write a converted decoder in DeepSeek's layout.

    The folder holds config.json, model.safetensors, the generation config, `deepseek.json` and the
    tokenizer if given. It appears under its name only after the stock class loaded it and gave the
    converted model's logits, padded, whole and token by token. `model` is not changed.

    Args:
        model: a model of `convert` or `load`; every attention layer latent, of one size.
        out: folder to create.
        version: `v3` (DeepseekV3ForCausalLM) or `v2`.
        dtype: of the files; None keeps the model's.
        pad: `max` pads layers of several sizes to the largest, `512+64` to at least that.
        tokenizer: saved beside the model.
        original: a folder whose licence and processor files are copied.
        overwrite: replace another export in `out`.

    Raises:
        ArgumentError: dtype or pad is not understood.
        RefusedError: the class cannot carry the model; every reason, before anything is written.
        GateError: the written checkpoint does not give the model's logits.
        OutputError: `out` is taken or cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(
            f"DeepSeek export does not support dtype {dtype!r}",
            next_step=f"one of {', '.join(DTYPES)}, or nothing to keep the model's",
        )
    stored = next(model.parameters()).dtype if dtype is None else DTYPES[dtype]
    ready = fitted(model, version, pad)
    asked = {
        "weights": weights_sha256(model),
        "model": digest(_config(model)),
        "target": f"deepseek {version} {stored} {pad}",
        "tokenizer": type(tokenizer).__name__,
        "versions": digest(_versions()),
    }
    with Workdir.open(out, asked, overwrite) as work:
        if work.state != "complete":
            _write(model, ready, work, version, stored, tokenizer, original, asked["weights"])
            work.finish()
    return Checkpoint(work.out, read_manifest(work.out))


def fitted(model: nn.Module, version: Version, pad: str | None) -> Ready:
    """Read everything of a model that fits the class.

    Raises:
        RefusedError: it does not fit; every reason.
    """
    padding = parse_pad(pad)
    blocks, found = latent_blocks(model)
    found += config_obstacles(model)
    configs = {path: mixer.config for path, mixer in blocks.items()}
    for path, config in configs.items():
        found += block_obstacles(path, config)
    refuse(found, version)
    theta = plain_base(model.config)
    shape, found = common_shape(configs, padding, version, theta)
    refuse(found, version)
    first = next(model.parameters()).dtype
    wide = evaluation_copy(model, first if first == torch.float64 else torch.float32)
    host, found = read_host(wide, list(blocks))
    refuse(found, version)
    assert shape is not None and host is not None
    refuse(host_obstacles(host, version), version)
    mixers = dict(wide.named_modules())
    return Ready({p: mixers[p].mixer for p in blocks}, shape, host, wide)


def _write(
    model: nn.Module,
    ready: Ready,
    work: Workdir,
    version: Version,
    stored: torch.dtype,
    tokenizer: Any,
    original: Path | None,
    sha256: str,
) -> None:
    _, model_class, _ = classes(version)
    shape, blocks = ready.shape, ready.blocks
    config, plain = stock_config(version, ready.host, shape, ready.wide.config, stored)
    compute = next(ready.wide.parameters()).dtype
    state, norm_error = state_dict(ready.host, blocks, shape, stored)
    exact: dict[str, Tensor] = {}
    if stored != compute:
        exact = {name: tensor.to(compute) for name, tensor in state.items()}
    files: dict[str, Tensor] = {name: tensor.to(stored) for name, tensor in state.items()}
    del state
    work.publish_tensors("model.safetensors", files)
    del files
    work.publish_folder(lambda folder: config.save_pretrained(folder))
    work.publish_folder(lambda folder: write_companions(folder, model, tokenizer, original))
    checks = prove(work.partial, model_class, ready.wide, exact, stored, norm_error)
    widths = [m.config.kv_lora_rank + m.config.qk_rope_head_dim for m in blocks.values()]
    manifest = Manifest(
        model_class=model_class.__name__,
        dtype=str(stored).removeprefix("torch."),
        cache=Cache(
            kv_lora_rank=shape.rank, qk_rope_head_dim=shape.rope, converted=widths,
            original=next(iter(blocks.values())).config.cache_per_token, exported=shape.cache,
        ),
        latent_norm="anchored" if shape.anchored else "own",
        norm_error=norm_error,
        attention_bias=shape.biased,
        rope_type=config.rope_parameters["rope_type"],
        padded=len({*widths, shape.cache - shape.anchored}) > 1,
        loaders=loaders(
            model_class.__name__, biased=shape.biased, plain_table=plain, rank=shape.rank,
            rope=shape.rope, version=version,
        ),
        checks=checks, source_sha256=sha256, versions=_versions(),
    )  # fmt: skip
    work.publish_json(MANIFEST, manifest.model_dump(mode="json"))


def _config(model: Any) -> dict[str, Any]:
    """The model's config without the folder it came from."""
    return {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}


def _versions() -> dict[str, str]:
    return {name: installed(name) for name in ("reattend", "torch", "transformers")}
