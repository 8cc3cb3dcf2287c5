"""A small GPT-2 with outlier channels, trained from text on a CPU.

Modules, each importing only what stands above it:

- recipe: every number that the result depends on
- prose: the text that every Python carries, in splits; excerpts
- tokenizer: a byte-level BPE tokenizer and the tokens of texts
- outliers: outlier channels put in, kept while training, settled after it
- fit: the model, its training, its perplexity
- card: the model card of the default model
"""
