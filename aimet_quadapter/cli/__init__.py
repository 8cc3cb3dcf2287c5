"""The same from a shell: `quadapter run`, `fold`, `report`, `compile`, `verify` and others.

Comes in: arguments. Goes out: an exit code, printed tables, files. A command is one module, with an
`add_command` that says its arguments; what it works with is imported when it runs.

Modules, each importing only what stands above it:

- terminal: what is printed where not every character can be
- settings: the settings of `run`, from a file and from flags
- arguments: arguments that several commands take, and a flag for each setting
- loading: the model and the tokens that `run` works on
- launch: `run` on several ranks
- adapters: LoRA adapters for a run's checkpoint
- observation: what a run's page shows
- machine: memory and disk, free and used
- estimate: what a run will take, and whether the machine has that
- pieces: pieces of a run, each timed once
- preflight: the estimate, from these
- summary: what a run says about itself
- run: `quadapter run`
- fold: `quadapter fold`
- report: `quadapter report`
- compile: `quadapter compile`
- verify: `quadapter verify`
- generate: `quadapter generate`
- evaluate: `quadapter eval`
- crash: the report of an error that is ours
- program: `main`, which joins the commands
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
