"""Before a conversion: would what a plan makes of a model fit a DeepSeek class?

Reads the plan's choices, the blocks' descriptions and one short run of the original; no statistics
are collected and nothing is written.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from reattend.mixers.latent_config import LatentConfig
from reattend.targets.deepseek.blocks import CONVERT, missing_layers, refuse
from reattend.targets.deepseek.host import Host, read_host
from reattend.targets.deepseek.obstacles import KEEP_FORMAT, UNIFORM, Obstacle, block_obstacles
from reattend.targets.deepseek.rope import length_dependent
from reattend.targets.deepseek.shape import Version, common_shape


def foresee(model: nn.Module, choices: list[Any], version: Version) -> None:
    """Stop where the result of a plan could not be exported.

    Args:
        model: the original.
        choices: from `reattend.preflight`.
        version: which class the plan's target names.

    Raises:
        RefusedError: every reason, with what to change in the plan.
    """
    found, outcomes = config_obstacles(model), {}
    paths = [c.site.path for c in choices]
    for choice in choices:
        path = choice.site.path
        if choice.conversion is None:
            found.append(Obstacle(path, f"it is {choice.action}, not converted", CONVERT))
            continue
        name = choice.conversion.name
        outcome = choice.conversion.outcome(choice.config, choice.options)
        if name == "mixed":
            found.append(Obstacle(path, "its head groups are converted apart", CONVERT))
        elif outcome is None:
            why = "its sizes or rotated frequencies are chosen layer by layer, from statistics"
            found.append(Obstacle(path, why, f"{UNIFORM} (the plan `deepseek` does that)"))
            found += block_obstacles(path, choice.config)
        elif isinstance(outcome, LatentConfig):
            outcomes[path] = outcome
            found += block_obstacles(path, outcome)
        else:
            found.append(Obstacle(path, f"it becomes {name}", CONVERT))
        if choice.site.surrounding is not None:
            why = "the module does more than its attention"
            found.append(Obstacle(path, why, KEEP_FORMAT))
    found += missing_layers(model, len(paths))
    refuse(found, version)
    found += common_shape(outcomes, None, version)[1]
    host, around = read_host(model, paths)
    found += around
    if host is not None:
        found += host_obstacles(host, version)
    refuse(found, version)


def config_obstacles(model: Any) -> list[Obstacle]:
    """What the model as a whole is, as far as its config says."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return [Obstacle(type(model).__name__, "it is no model of transformers", KEEP_FORMAT)]
    if config.is_encoder_decoder or model.get_output_embeddings() is None:
        why = "it is no decoder-only language model with a head"
        return [Obstacle(type(model).__name__, why, "load it with AutoModelForCausalLM")]
    kind = length_dependent(config)
    if kind:
        why = f"its rotary table changes with the length of the text: {kind}"
        return [Obstacle(type(model).__name__, why, KEEP_FORMAT)]
    return []


def host_obstacles(host: Host, version: Version) -> list[Obstacle]:
    """What the parts around attention have that the class has not, or has once for all layers."""
    layers = host.layers.values()
    found = []
    norms = {n.eps for layer in layers for n in (layer.before, layer.between)} | {host.norm.eps}
    if len(norms) > 1:
        found.append(Obstacle("norms", f"their eps differ: {sorted(norms)}", KEEP_FORMAT))
    if len({(x.mlp.gate.shape, x.mlp.act, x.mlp.biases is None) for x in layers}) > 1:
        found.append(Obstacle("MLPs", "they differ from layer to layer", KEEP_FORMAT))
    if version == "v3" and any(x.mlp.biases is not None for x in layers):
        found.append(
            Obstacle("MLPs", "they have biases, DeepseekV3 has none", "target: deepseek-v2")
        )
    return found
