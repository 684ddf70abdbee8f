"""The latent blocks of a converted model, and why there may be too few of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from reattend.errors import NothingFoundError, RefusedError
from reattend.install.adapter import Adapter
from reattend.mixers.latent import LatentAttention
from reattend.targets.deepseek.loaders import TAKES
from reattend.targets.deepseek.obstacles import Obstacle

CONVERT = 'convert every layer to MLA, for example with the plan "deepseek"'


def latent_blocks(model: nn.Module) -> tuple[dict[str, LatentAttention], list[Obstacle]]:
    """Latent mixers by the path of their module, in order, and what is in the way.

    Raises:
        NothingFoundError: nothing of the model is converted.
    """
    blocks: dict[str, LatentAttention] = {}
    found: list[Obstacle] = []
    for path, module in model.named_modules():
        if not isinstance(module, Adapter):
            continue
        mixer = module.mixer
        if module.around is not None:
            why = "the original's module does more than its attention"
            found.append(Obstacle(path, why, CONVERT))
        elif isinstance(mixer, LatentAttention):
            blocks[path] = mixer
        else:
            found.append(Obstacle(path, f"its mixer is {mixer.kind}, not latent", CONVERT))
    if not blocks and not found:
        raise NothingFoundError(
            "the model has no converted attention layer, so there is nothing to lower",
            next_step=CONVERT,
        )
    return blocks, found + missing_layers(model, len(blocks) + len(found))


def missing_layers(model: Any, count: int) -> list[Obstacle]:
    """Attention layers that stay as they were, where the config says how many there are."""
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    layers = getattr(text, "num_hidden_layers", count)
    if layers == count:
        return []
    why = f"{count} of {layers} layers become latent; a DeepSeek model has no other attention"
    return [Obstacle("all layers", why, CONVERT)]


def refuse(found: list[Obstacle], version: str) -> None:
    """Stop with every obstacle and the table of what loads where.

    Raises:
        RefusedError: there is an obstacle.
    """
    if not found:
        return
    lines: dict[tuple[str, str], list[str]] = {}
    for item in found:
        lines.setdefault((item.why, item.next_step), []).append(item.where)
    name = "DeepseekV3ForCausalLM" if version == "v3" else "DeepseekV2ForCausalLM"
    told = "\n".join(f"    {_some(where)}: {why}" for (why, _), where in lines.items())
    steps = "; ".join(dict.fromkeys(step for _, step in lines))
    raise RefusedError(
        f"transformers' {name} cannot carry this model; nothing was written",
        where=f"\n{told}", why=TAKES, next_step=steps,
    )  # fmt: skip


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
