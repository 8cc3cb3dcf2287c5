"""How α is found: by formula, block by block or layer by layer (phase 1), end to end (phase 2).

Comes in: a sim, its pairs, calibration data. Goes out: an α for each pair, with its losses.

Modules, each importing only what stands above it:

- blocks: a pair's block cut out of the model, with its inputs
- layers: a model's layers, with what they are called with
- analytic: scales by formula: CLE, SmoothQuant
- block_error: how far a block's outputs are from the unquantized ones, for an α
- layer_error: the same of a layer, for the α of its pairs
- learner: Adam on the α of a block or a layer
- ranks: several processes that work together
- packing: what was found, for disk and for other processes
- sharing: which of them learns what
- choice: which α each pair gets, by the error of the whole model
- calibration: phase 1: `calibrate`
- cost: what phase 1 will take, measured
- trained: what phase 2 trains
- resume: phase 2 on disk
- finetuning: phase 2: `finetune`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
