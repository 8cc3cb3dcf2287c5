"""Result files, and what one run found → tables, figures, an HTML page.

Comes in: a folder of result files, or plain data of a run. Goes out: a page that needs nothing
else.

Modules, each importing only what stands above it:

- files: result files, checked, and the rows they are
- plots: numbers as small SVG
- figures: the figures of an experiment
- templates: data files, and pages made of them
- page: `report`
- run_facts: what a run did and found
- run_figures: its figures
- channel_chart: the ranges of a pair that the reader picks
- run_page: `report.html` of a run
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
