"""A folded sim → the folder of an export; refuses one that is not folded.

Comes in: a sim. Goes out: ONNX, encodings, QDQ ONNX, a manifest; for generation, two graphs.

Modules, each importing only what stands above it:

- exportable: what must hold of a sim and the settings
- fused_relu: a ReLU that AIMET fuses with what stands before it
- widths: conversions between activations of 8 and 16 bits
- vocabulary: files whose large tables are written a part of their rows at a time
- onnx_files: AIMET's exports as clean files
- reference: inputs and their logits, kept so that the folder alone can be checked
- whole_model: `export`
- cached_model: a prompt graph and a one-token graph around a sim's model
- generation: `export_generation`
- model_card: what a HuggingFace checkpoint says of itself
- checkpoint_folder: `save_huggingface`
- adapter_folder: the folder of a LoRA adapter
- adapter_proof: an adapter before and after, both run in `peft`
- adapter: `fold_adapter`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
