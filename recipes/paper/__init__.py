"""The paper's experiments, and any other: data that is checked, a sim, methods, one result a run.

`experiments/*.json` says what is run; `recipes/run.py` runs it.

Modules, each importing only what stands above it:

- record: peak memory, versions
- settings: which settings there are and what each may be
- experiment: an experiment's file → its runs
- model: a model with its tokenizer, the tokens of texts
- data: what a run learns from and is measured on
- sims: a model and settings → a sim
- rounding: AIMET's AdaRound, each rounded module kept
- methods: one method, one function
- fingerprint: hashes of what a result depends on
- observations: errors of blocks, ranges of channels
- measure: one run measured
- results: one JSON file a run, with its stamp
"""
