"""Load an export in AIMET's ONNX package and compute its logits; a script, run by `verify`.

    python in_aimet_onnx.py FOLDER INPUTS.json OUTPUT

AIMET's two packages do not live in one environment, so this runs in the other one and imports
nothing of ours. INPUTS.json holds name → [type, values]. OUTPUT receives the logits as raw
float32, OUTPUT.json how many encodings were loaded.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx


def main(folder: str, inputs: str, output: str) -> None:
    """Write the logits that AIMET's ONNX sim gives."""
    quantsim = import_module("aimet_onnx.quantsim")  # absent where this package is checked
    model = onnx.load(Path(folder, "model.onnx"))
    place = [y.name for y in model.graph.output].index("logits")
    sim = quantsim.QuantizationSimModel(model, providers=["CPUExecutionProvider"])
    quantsim.load_encodings_to_sim(sim, str(Path(folder, "model.encodings")), strict=False)
    given = json.loads(Path(inputs).read_text(encoding="utf-8"))
    feeds = {name: np.array(values, dtype) for name, (dtype, values) in given.items()}
    logits = sim.session.run(None, feeds)[place]
    np.asarray(logits, np.float32).tofile(output)
    about = {
        "version": version("aimet-onnx"),
        "quantizers": sum(q.enabled for q in sim.qc_quantize_op_dict.values()),
    }
    Path(f"{output}.json").write_text(json.dumps(about), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
