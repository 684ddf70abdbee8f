"""Linear attention in tiny image and diffusion models: error of the output, by images trained on.

    python examples/linear_images.py --out examples/results/linear_images.json

A ViT, a diffusers UNet and a diffusers DiT with random weights, presets of `to: linear` with sizes
for their 16 tokens (64 in the UNet), trained block by block on normal noise as a plan does it. The
error is |y - t| / |t| over 16 inputs of other noise, t the original's output. Every row converts
anew. `--table` prints the Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import campaign

TRAINED, HELD, BATCH, BATCHES = (0, 256, 2048), 16, 8, 32
#: model, preset, sizes that make it choose among few tokens
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ViT", "linfusion", {"mlp_width": 8}),
    ("UNet", "linfusion", {"mlp_width": 8}),
    ("DiT", "linfusion", {"mlp_width": 8}),
    ("DiT", "sla", {"sparse_top": 0.3, "sparse_block": 4}),
)


def models() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each with inputs for one row."""
    import torch
    from tiny_models import liven
    from transformers import ViTConfig, ViTForImageClassification

    diffusers: Any = import_module("diffusers")  # says nothing of its types
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4,
        )
    )  # fmt: skip
    liven(vit, 1.0)  # as it is drawn its attention is nearly even
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=12, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    step = torch.tensor([5])
    latents = torch.zeros(1, 4, 8, 8)
    return {
        "ViT": (vit.eval(), {"pixel_values": torch.zeros(1, 3, 16, 16)}),
        "UNet": (unet.eval(), {
            "sample": latents, "timestep": step, "encoder_hidden_states": torch.zeros(1, 7, 12),
        }),
        "DiT": (dit.eval(), {"hidden_states": latents, "timestep": step, "class_labels": step}),
    }  # fmt: skip


def drawn(inputs: dict[str, Any], rows: int, seed: int) -> dict[str, Any]:
    """Noise in the place of numbers, steps and labels below 10 in the place of whole ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, *x.shape[1:], generator=generator)
        if x.is_floating_point()
        else torch.randint(0, 10, (rows, *x.shape[1:]), generator=generator)
        for name, x in inputs.items()
    }


def row(model: Any, inputs: dict[str, Any], preset: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Errors by images trained on."""
    import torch

    from reattend import convert
    from reattend.plan import Plan

    rule = Plan.load(preset).to_dict()["rules"][0] | sizes
    data = [drawn(inputs, BATCH, seed) for seed in range(1, BATCHES + 1)]
    held, more = drawn(inputs, HELD, 0), {"return_dict": False}

    def output(which: Any) -> Any:
        with torch.no_grad():
            return which(**held, **more)[0]

    errors, converted = {}, 0
    for images in TRAINED:
        plan: dict[str, Any] = {"rules": [rule], "on_refusal": "keep"}
        if images:
            plan["calibrate"] = {"tokens": images, "stages": ["layerwise"], "batch_size": BATCH}
        made = convert(model, plan=plan, inputs={**data[0], **more}, data=data)
        gap, want = output(made.model) - output(model), output(model)
        errors[str(images)] = float(gap.norm() / want.norm())
        converted = sum(site.action == "converted" for site in made.report.sites)
    return {"blocks": converted, "error": errors}


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{results['device']}, {results['date']}, `{results['command']}`: relative error of the "
        f"output on {HELD} inputs that were not trained on, random weights. Columns: images "
        f"trained on, of {BATCHES * BATCH} different ones, repeated.",
        "",
        "| model | preset | blocks | " + " | ".join(f"{n:,} images" for n in TRAINED) + " |",
        "|---|---|---:|" + "---:|" * len(TRAINED),
    ]
    for found in results["rows"]:
        errors = " | ".join(f"{found['error'][str(n)]:.3f}" for n in TRAINED)
        lines.append(f"| {found['model']} | {found['preset']} | {found['blocks']} | {errors} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> int:
    """Write the file."""
    made = models()
    rows = [
        {"model": name, "preset": preset, **row(*made[name], preset, sizes)}
        for name, preset, sizes in ROWS
    ]
    results = {
        "command": f"python examples/linear_images.py --out {campaign.shown(args.out)}",
        "date": datetime.date.today().isoformat(),
        "device": campaign.device_name("cpu"),
        "versions": campaign.versions(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    out = Path("examples/results/linear_images.json")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", action="store_true", help="print the table of the file")
    return campaign.run(parser.parse_args(), table, measure)


if __name__ == "__main__":
    sys.exit(main())
