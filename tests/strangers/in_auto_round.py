"""Perplexity of a checkpoint before and after auto-round.

Run by `benchmarks/strangers.py` in an environment that has auto-round. Linears but the head get
4-bit weights, per channel, symmetric, rounded by signed gradients.
"""

from __future__ import annotations

from auto_round import AutoRound
from measuring import Measured, arguments, load, perplexity, rows, write
from torch.utils.data import DataLoader

SETTINGS = {"scheme": "W4A16", "group_size": -1, "sym": True, "iters": 20, "seed": 0}


def main() -> None:
    """Measure, quantize, measure."""
    args = arguments(str(__doc__), ["w4a16"])
    model, tokenizer = load(args.folder)
    windows = rows(tokenizer, args.evaluation_text, args.eval_tokens // args.length, args.length)
    before = perplexity(model, windows)
    samples = rows(tokenizer, args.calibration_text, args.samples, args.length)
    batches = DataLoader([{"input_ids": row} for row in samples], batch_size=args.samples)
    rounder = AutoRound(
        model,
        tokenizer,
        dataset=batches,
        nsamples=args.samples,
        seqlen=args.length,
        batch_size=args.samples,
        device_map="cpu",
        enable_torch_compile=False,
        **SETTINGS,
    )
    with Measured() as cost:
        rounded, layers = rounder.quantize()
    write(
        args.result,
        ["auto-round"],
        fp32=before,
        quantized=perplexity(rounded.float(), windows),
        modules=sum(layer.get("bits") == 4 for layer in layers.values()),
        recipe=SETTINGS,
        **cost.found,
    )


if __name__ == "__main__":
    main()
