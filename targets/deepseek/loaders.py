"""Who loads a checkpoint in DeepSeek's layout, and why the others do not.

transformers is run on every export. Servers are not: what is said of them was read in their
sources (2026), where their DeepSeek layers are built with `bias=False`, with an RMS norm on the
latent, and with every scaled rotary table taken for one of DeepSeek's own. vLLM picks its MLA
layers by how much they cache, and its older versions stop at a model without experts.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

#: (latent rank, rotary width) that dense MLA decode kernels are built for
FLASH_MLA = ((512, 64),)
FLASHINFER = ((512, 64), (256, 64))
#: r + R that vLLM's MLA layers accept; 576 alone in its older versions
VLLM = (576, 320)


class Loader(BaseModel):
    """One row of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    loads: bool
    proven: bool
    why: str


def loaders(
    class_name: str, *, biased: bool, plain_table: bool, rank: int, rope: int, version: str
) -> list[Loader]:
    """Every loader known here and its verdict on a checkpoint of these properties."""
    other = "DeepseekV2ForCausalLM" if version == "v3" else "DeepseekV3ForCausalLM"
    against = []
    if biased:
        against.append("no biases (attention_bias: true here)")
    if not plain_table:
        against.append("only the plain rotary table")
    served = not against
    why = "their DeepSeek layers take " + " and ".join(against) if against else (
        "no bias, the norm on the latent is the model's own, plain rotary table"
    )  # fmt: skip
    shape = f"r + R = {rank} + {rope}"
    sized = f"{shape} = {rank + rope}; its MLA layers take 576, newer versions 320 too"
    return [
        Loader(
            name=f"transformers {class_name}", loads=True, proven=True,
            why="loaded at export, logits and cached decoding compared",
        ),
        Loader(
            name=f"transformers {other}", loads=False, proven=False,
            why=f"another model_type; export with target "
            f"{'deepseek-v2' if version == 'v3' else 'deepseek'}",
        ),
        Loader(
            name="vLLM (stock DeepSeek classes)", loads=served and rank + rope in VLLM,
            proven=False, why=sized if served else why,
        ),
        Loader(name="SGLang (stock DeepSeek classes)", loads=served, proven=False, why=why),
        Loader(
            name="FlashMLA dense decode", loads=served and (rank, rope) in FLASH_MLA, proven=False,
            why=f"{shape}; its kernels take 512 + 64",
        ),
        Loader(
            name="FlashInfer MLA", loads=served and (rank, rope) in FLASHINFER, proven=False,
            why=f"{shape}; its kernels take 512 + 64 and 256 + 64",
        ),
    ]  # fmt: skip


def as_text(rows: list[Loader]) -> str:
    """The table as lines of text."""

    def verdict(row: Loader) -> str:
        if not row.loads:
            return "no"
        return "yes, proven" if row.proven else "yes, by its source"

    wide = max(len(row.name) for row in rows)
    return "\n".join(f"{row.name:<{wide}}  {verdict(row):<18}  {row.why}" for row in rows)


#: Before a conversion: which class takes what, for the text of a refusal.
TAKES = """who loads a DeepSeek checkpoint, and what of a model it can carry:
    transformers DeepseekV3ForCausalLM: one r and one rotary table (any: as longrope), biases,
        no window, no softcap, no sinks, no norm of queries or keys; gated MLP without bias
    transformers DeepseekV2ForCausalLM: the same, MLP biases too
    vLLM, SGLang stock classes: as V3, but no bias at all, the plain rotary table only, and the
        RMS norm on the latent for real (latent_norm: rms, center: false); vLLM with r + R = 576
        or 320 only
    FlashMLA: of these, r + R = 512 + 64; FlashInfer: 512 + 64 or 256 + 64"""
