"""Every MLA preset at equal cache, without training: one conversion whose report has the table.

    python examples/mla_table.py --model examples/models/pycode-gqa \\
        --out examples/results/mla_table.json
    python examples/mla_table.py --model examples/models/pycode-qwen2 \\
        --text examples/models/pycode-gqa --out examples/results/mla_table_qwen2.json --rows 24

Converts the model with the plan `transmla` and asks for the other presets beside it
(`verify: {peers, peer_keep, peer_pairs}`), at four shares of the cache and three of the rotary
pairs. Statistics come from `calibration.txt`, all is measured on `heldout.txt`. The checkpoint and
its report go to `--report`; an interrupted run continues there. `--table` prints the Markdown table
of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import campaign

PRESETS = ("transmla", "transmla-paper", "mha2mla", "x-ecomla", "care")
KEEPS = (0.5, 0.25, 0.125, 0.0625)
PAIRS = (0.5, 0.25, 0.125)
RECALL_TOKENS = 512


def plan(rows: int, text: Path) -> dict[str, Any]:
    """The conversion."""
    verify = {"peers": PRESETS, "peer_keep": KEEPS, "peer_pairs": PAIRS, "rows": rows,
              "data": str(text / "heldout.txt"), "recall_tokens": RECALL_TOKENS}  # fmt: skip
    return {"extends": "transmla", "verify": verify}


def table(results: dict[str, Any]) -> str:
    """The report's table, and what it was made with."""
    from reattend.report.evidence import Quality
    from reattend.report.markdown import grid
    from reattend.report.peer_table import peers_table

    made = peers_table(Quality.model_validate(results["quality"]))
    assert made is not None
    lines = [
        *grid(made),
        "",
        f"{results['model']}, {results['date']}, {results['device']}. {made.caption} Statistics: "
        f"{results['statistics']:,} tokens of calibration.txt, on float32 weights; a table made "
        f"from other statistics has other numbers for the same preset. Command: "
        f"`{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/mla_table.json")
    parser.add_argument("--text", type=Path, help="folder of the texts")
    parser.add_argument("--report", type=Path, help="folder of the converted model and its report")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Convert, and store what the report says of the presets."""
    from reattend import convert
    from reattend.events import Event

    def tell(event: Event) -> None:
        if event.message:
            print(f"{event.stage}: {event.message}", file=sys.stderr, flush=True)

    text = args.text or args.model
    out = args.report or args.out.with_suffix(".work")
    result = convert(
        args.model, plan(args.rows, text), data=text / "calibration.txt", out=out, dtype="float32",
        device=args.device, seed=args.seed, overwrite=args.fresh, on_event=tell,
    )  # fmt: skip
    report = result.report
    assert report.quality is not None and report.calibration is not None
    more = ("--text", campaign.shown(args.text)) if args.text else ()
    inputs = {**report.provenance.weights, "data": report.provenance.data, "seed": args.seed}
    args.fresh = True  # the folder of the conversion has told the inputs apart
    described = campaign.begun("mla_table.py", args, inputs, *more)
    assert described is not None
    del described["rows"]
    results = {
        **described,
        "date": datetime.date.today().isoformat(),
        "statistics": report.calibration.stages[0].tokens,
        "quality": report.quality.model_dump(mode="json"),
    }
    campaign.write(args.out, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
