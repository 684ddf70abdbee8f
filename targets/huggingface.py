"""The Hugging Face checkpoint: `model_type: reattend`, round trip by transformers' own path.

A converted model's class is a dynamic subclass of its base class with the mixers put in place
by `__init__`; its config's class a dynamic subclass of the base config. So bf16, generate, tied
weights, device_map and every Auto class the base has work as they do for the base, and a folder
opened without reattend fails to load instead of running random attention.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from reattend.errors import ArgumentError, ModelError
from reattend.install.stored import FORMAT, check_format, describe, install_empty, local_path

MODEL_TYPE = "reattend"


class ReattendConfig(PreTrainedConfig):
    """What `AutoConfig` finds for `model_type: reattend`; becomes the base's dynamic subclass."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the base architecture with the `reattend` section kept."""
        section = checked_section(config_dict)
        made = config_class(CONFIG_MAPPING[section["base_model_type"]])
        register_auto_classes(made)
        return made.from_dict(config_dict, **kwargs)


def checked_section(config_dict: dict[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The `reattend` section of a config.json.

    Raises:
        ModelError: it is missing, or written by a newer reattend.
    """
    section = config_dict.get("reattend")
    kind = config_dict.get("model_type")
    if section is None and kind != MODEL_TYPE:
        raise ModelError(
            "this is an ordinary checkpoint, which reattend has not converted",
            where=where,
            why=f"its config.json says model_type {kind!r} and has no `reattend` section",
            next_step=f"reattend convert {where} --plan identity --out NEW keeps its attention as "
            "it is; then use NEW",
        )
    if not isinstance(section, dict) or "sites" not in section:
        raise ModelError(
            "config.json has no `reattend` section",
            where=where,
            why="nothing says which blocks were converted",
            next_step="copy or download the folder again, or convert the model again",
        )
    check_format(section, where)
    base = section.get("base_model_type")
    if base not in CONFIG_MAPPING:
        raise ModelError(
            f"transformers {transformers.__version__} has no model type {base!r}",
            where=where,
            why="it is the `base_model_type` of what was converted",
            next_step="install a transformers version that has it",
        )
    return section


@cache
def config_class(base: Any) -> Any:
    """`Reattend<Base>Config`, one per base class."""
    name = f"Reattend{base.__name__}"
    return type(name, (base,), {"model_type": MODEL_TYPE, "__module__": __name__})


@cache
def model_class(base: Any) -> Any:
    """`Reattend<Base>`: the base with the mixers of `config.reattend` in place."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, config, *args, **kwargs)
        larger = [s["path"] for s in config.reattend["sites"] if s["binding"].get("around")]
        keep_recording(self, larger)
        install_empty(self, config.reattend["sites"])

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_attention_weights(self.config, kwargs)
        return base.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(
        f"Reattend{base.__name__}",
        (base,),
        {
            "__init__": __init__,
            "forward": forward,
            "config_class": config_class(base.config_class),
            "__module__": __name__,
        },
    )


def refuse_attention_weights(config: Any, kwargs: dict[str, Any]) -> None:
    """Converted layers do not form attention weights; say so instead of returning none.

    Raises:
        ArgumentError: the call or the config asks for them.
    """
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and getattr(config, "output_attentions", False)):
        raise ArgumentError(
            "a converted model does not form attention weights",
            next_step="call it without output_attentions=True",
        )


def keep_recording(model: nn.Module, paths: list[str]) -> None:
    """Let transformers hook the blocks whose outputs it records, before they are replaced.

    It knows them by class (`output_hidden_states` records every decoder layer), and hooks lazily;
    an adapter in a layer's place keeps the hooks but not the class.
    """
    for path in paths:
        local = local_path(model, path, getattr(model, "base_model_prefix", ""))
        above = "" if local is None else local
        while above:
            above = above.rpartition(".")[0]
            holder = model.get_submodule(above) if above else model
            if isinstance(holder, PreTrainedModel):
                maybe_install_capturing_hooks(holder)
                break


def register_auto_classes(made: Any) -> None:
    """Let every Auto class that knows the base config know its reattend subclass."""
    base = made.__mro__[1]
    for name in dir(modeling_auto):
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or base not in mapping:
            continue
        found = mapping[base]
        found = found[0] if isinstance(found, tuple) else found
        if getattr(found, "config_class", None) is not base:
            continue  # a composite that merely contains this architecture
        auto.register(made, model_class(found), exist_ok=True)


def adopt(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a model whose blocks were swapped in memory into its reattend class, in place."""
    base: Any = type(model)
    if base.__name__.startswith("Reattend"):
        base = base.__mro__[1]
    config = model.config
    section = getattr(config, "reattend", None) or {"base_model_type": config.model_type}
    kind: Any = type(config)
    made = config_class(kind) if config.model_type != MODEL_TYPE else kind
    config.__class__ = made
    config.reattend = {
        "format": FORMAT,
        "base_model_type": section["base_model_type"],
        "sites": describe(model),
    }
    model.__class__ = model_class(base)
    register_auto_classes(made)
    return model


def load_model(folder: str, architectures: list[str], **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained` with the class the checkpoint was saved from; reads safetensors only."""
    register()
    name = architectures[0].removeprefix("Reattend")
    base = getattr(transformers, name, None)
    if base is None:
        raise ModelError(
            f"transformers {transformers.__version__} has no class {name}",
            where=folder,
            next_step="install a transformers version that has it",
        )
    loaded: PreTrainedModel = model_class(base).from_pretrained(
        folder, **{**kwargs, "use_safetensors": True}
    )
    return loaded


def register() -> None:
    """Teach AutoConfig the model type (idempotent)."""
    AutoConfig.register(MODEL_TYPE, ReattendConfig, exist_ok=True)


register()
