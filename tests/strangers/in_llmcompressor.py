"""Perplexity of a checkpoint before and after llm-compressor's oneshot.

Run by `benchmarks/strangers.py` in an environment that has llm-compressor. Linears but the head are
quantized: w8a8 is int8, weights per channel, inputs static per tensor; w4a16 is GPTQ, 4 bits,
weights per channel.
"""

from __future__ import annotations

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from measuring import Measured, arguments, load, perplexity, rows, write
from torch.utils.data import DataLoader


def modifier(scheme: str) -> GPTQModifier | QuantizationModifier:
    """What oneshot is to do."""
    weights = QuantizationArgs(num_bits=8 if scheme == "w8a8" else 4, strategy="channel")
    inputs = None
    if scheme == "w8a8":
        inputs = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=False, dynamic=False)
    kind = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    make = QuantizationModifier if scheme == "w8a8" else GPTQModifier
    return make(config_groups={"group_0": kind}, ignore=["lm_head"])


def main() -> None:
    """Measure, quantize, measure."""
    args = arguments(str(__doc__), ["w8a8", "w4a16"])
    model, tokenizer = load(args.folder)
    windows = rows(tokenizer, args.evaluation_text, args.eval_tokens // args.length, args.length)
    before = perplexity(model, windows)
    samples = rows(tokenizer, args.calibration_text, args.samples, args.length)
    batches = [{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in samples]
    with Measured() as cost:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=DataLoader(batches, batch_size=None),
            recipe=modifier(args.scheme),
            num_calibration_samples=args.samples,
            max_seq_length=args.length,
            tie_word_embeddings=False,
        )
    quantized = [m for m in model.modules() if getattr(m, "quantization_scheme", None)]
    write(
        args.result,
        ["llmcompressor", "compressed-tensors"],
        fp32=before,
        quantized=perplexity(model, windows),
        modules=len(quantized),
        recipe=modifier(args.scheme).model_dump(mode="json", include={"config_groups", "ignore"}),
        **cost.found,
    )


if __name__ == "__main__":
    main()
