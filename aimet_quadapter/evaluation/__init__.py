"""Texts, the embedded model, and numbers that say how good a model is.

Comes in: a model and a text's or a task's name. Goes out: token ids, calibration samples, a
perplexity, scores of tasks.

Modules, each importing only what stands above it:

- embedded: the model and the text inside the package
- texts: the paper's texts by name, and local files
- tokenization: a text → token ids
- windows: token ids → calibration samples
- scores: perplexity
- causal_lm: a model as a harness asks for one
- task_scores: scores of tasks, flips
- harness: a model in lm-evaluation-harness, KL divergence
- tasks: `evaluate_tasks`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
