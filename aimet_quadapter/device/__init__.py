"""The folder of an export → Qualcomm's HTP, without AIMET: compile, run, generate, verify.

Comes in: a folder. Goes out: a context binary, logits, text, and whether they are the sim's.

Modules, each importing only what stands above it:

- htp: ONNX Runtime, the HTP and its compiler in a process of its own
- weight_formats: encodings of weights that the HTP refuses or computes wrongly
- lowering: which operations do not lower, and why
- logit_differences: how far logits are apart, in steps of their quantizer
- compilation: `compile_for_htp`, and which context fits
- sessions: an export on the CPU and on the HTP
- verify_report: what `verify` says, line by line
- file_checks: hashes, encodings and sizes
- in_aimet_onnx: a program for the environment that has aimet-onnx
- logit_checks: the same inputs computed in other ways
- text_checks: tokens and perplexity of a text
- verification: `verify`, the checks in order
- cached_graphs: the two graphs of generation as a model with a cache
- generator: text, token by token
- token_differences: a generated text beside what the sim says
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
