"""Tasks for lm-evaluation-harness that need no network: items in JSON lines, and what asks them."""

from __future__ import annotations

import json
from pathlib import Path

ITEMS = [
    ("The cat sat on the", [" mat", " moon", " green"], 0),
    ("Two and two are", [" four", " five apples", " a long way from here"], 0),
    ("It rained all day, so they stayed", [" up", " inside"], 1),
    ("She opened the door and", [" saw", " the", " seven"], 0),
    ("In the morning he went to the market to buy", [" bread and milk", " clouds"], 0),
    ("A", [" b", " c"], 1),
]
"""Question, choices, place of the right one; of one token and of several."""

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""

WRITE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["zzzz"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""

TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[answer]}}"
metric_list:
  - metric: word_perplexity
"""

GROUP = """
group: both
task: [choice, again]
aggregate_metric_list:
  - metric: acc
"""


def write_tasks(folder: Path) -> Path:
    """The tasks `choice`, `again`, `write` and `text`, and the group `both`; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    items = folder / "items.jsonl"
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in ITEMS]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, body in (("choice", CHOICE), ("again", CHOICE), ("write", WRITE), ("text", TEXT)):
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{items}'}}}}\n"
        head = f"task: {name}\n{data}test_split: test"
        (folder / f"{name}.yaml").write_text(head + body, encoding="utf-8")
    (folder / "both.yaml").write_text(GROUP, encoding="utf-8")
    return folder
