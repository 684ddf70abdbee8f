"""The whole of reattend on one small trained model: `make demo`, or `python examples/demo.py`.

Convert the attention of a trained model to MLA, which caches half as much per token, let the
converted model learn from the original for a moment, write it as ONNX, and let all three continue
the same text. Everything lands in `demo-out/`; running it again starts from what is there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from reattend import convert, export
from reattend.events import Progress
from reattend.targets.onnx import Session

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "models" / "pycode-gqa"  # 5.6 M parameters, trained on Python code
OUT = ROOT / "demo-out"

# The preset `transmla` with a short calibration on top. More tokens recover more: this is a taste.
PLAN = {
    "extends": "transmla",
    "calibrate": {
        "tokens": 65_536,
        "stages": ["layerwise", "end-to-end"],
        "seq_len": 256,
        "statistics_tokens": 32_768,
    },
    # Beside the result: what a sliding window and a quantised cache do at about the same bytes.
    "verify": {"yardsticks": True},
}
PROMPT = '''def read_config(path):
    """Return the settings in a file."""
    with open(path) as'''
NEW_TOKENS = 40


def main() -> None:
    """Convert, export, generate, report."""
    console = Console(highlight=False)
    quieten()

    # 1. Convert. The original is never changed; statistics and training read calibration.txt,
    #    of which a few rows are held back to measure the result on.
    console.rule("Converting examples/models/pycode-gqa with plan transmla")
    with Progress() as progress:
        result = convert(
            MODEL,
            plan=PLAN,
            data=MODEL / "calibration.txt",
            out=OUT / "converted",
            overwrite=True,  # replace what another version of this demo left behind
            on_event=progress,
        )

    # 2. Export: one ONNX file for prefill and decode, checked against torch as it is written.
    console.rule("Writing ONNX")
    artifact = export(OUT / "converted", target="onnx", out=OUT / "onnx", overwrite=True)
    console.print(f"largest relative difference from torch: {artifact.max_error:.1e}")

    # 3. The same prompt, continued greedily by all three.
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    original = AutoModelForCausalLM.from_pretrained(MODEL)
    converted: Any = result.model
    continued = {
        "original": original.generate(ids, **settings),
        "converted": converted.generate(ids, **settings),
        "converted, in ONNX Runtime": Session(artifact.path).generate(
            ids, max_new_tokens=NEW_TOKENS
        ),
    }
    for name, tokens in continued.items():
        console.rule(f"Text by the model: {name}")
        prompt, new = tokens[0][: ids.shape[1]], tokens[0][ids.shape[1] :]
        console.print(Text(tokenizer.decode(prompt), "dim"), Text(tokenizer.decode(new)), sep="")

    # 4. What was done, and what it cost.
    console.rule("Report")
    console.print(result.report.summary())
    console.print(f"\nThe whole report as a page: {OUT / 'converted' / 'report.html'}")


def quieten() -> None:
    """Keep the messages of other libraries out of the picture."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
