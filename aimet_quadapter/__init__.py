"""Quadapter for AIMET: one learned scale per channel, folded away before export.

Public names are those of `__init__.pyi`. Each is imported when it is first used:
`import aimet_quadapter` alone loads neither torch nor aimet_torch, which take many seconds.

Files and packages, each importing only what stands above it (docs/architecture.md):

- errors: what goes wrong, by kind
- progress: how far a long loop is
- config: settings of each stage
- checkpoint: finished pieces of long work on disk
- models: what is known about an architecture
- sim: an AIMET sim seen from outside
- pairs: what a pair is, which there are, α in and out of the weights
- learning: how α is found
- encodings: which operation carries which encoding
- precision: bits, clipping, the softmax
- evaluation: texts, the embedded model, perplexity, tasks
- transforms: a prefix, a rotation
- artifacts: the folder of an export
- exporting: a sim → that folder
- device: that folder → Qualcomm's HTP
- results: result files → one page
- pipeline: `apply_quadapter`, which joins the stages
- cli: the same from a shell
- integrations: a pass of Microsoft Olive
- __main__: `python -m aimet_quadapter`
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
