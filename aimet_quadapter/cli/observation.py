"""What the page of a run shows: what is looked at for it alone, and what the run knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline import QuadapterResult
    from ..results.run_facts import CoverageFacts, PairFacts, SiteFacts, StreamFacts

TOKENS = 128
"""Tokens of the first calibration sample that the stream and the sites are looked at on."""

RANGE_SAMPLES = 4
"""Calibration samples that ranges of channels are taken from, at most."""


class Observation:
    """What is seen while a run goes on, for the page behind it.

    Args:
        subject: what the run works on.
        wanted: False looks at nothing.
    """

    def __init__(self, subject: Subject, wanted: bool) -> None:
        self.subject, self.wanted = subject, wanted
        self.streams: list[StreamFacts] = []
        self.stages: dict[str, str] = {}
        self.result: QuadapterResult
        self.end: dict[str, Any] = {}
        self.finetuning: Any = None

    def see_stream(self) -> None:
        """Look at the residual stream, unless it was seen as it is now."""
        title = _title(self.subject)
        if self.wanted and title not in [one.title for one in self.streams]:
            self.streams.append(stream(self.subject, title))

    def see_stage(self, stage: str, found: Any) -> None:
        """Keep what a stage behind phase 1 returned."""
        self.stages[stage] = str(found)
        if stage == "phase 2":
            self.finetuning = found

    def see_end(self, sim: Any, alphas: Mapping[str, Tensor]) -> None:
        """Look at the sim as it is in the end.

        Args:
            sim: the sim, α folded.
            alphas: pair name → α in the weights, of all phases.
        """
        from ..artifacts.manifest import bit_widths

        self.end = {
            "bits": bit_widths(sim),
            "pairs": pair_facts(self.subject, sim, self.result.calibration.results, alphas),
            "sites": site_facts(self.subject, sim),
            "coverage": coverage_facts(sim),
        }

    def write(self, file: Path, measured: Mapping[str, Any]) -> None:
        """Write the page.

        Args:
            file: the page.
            measured: what the run knows, by the names of `RunFacts`.
        """
        from ..results.run_facts import RunFacts
        from ..results.run_page import write_run_page

        calibration, tuned = self.result.calibration, self.finetuning
        choice, samples = calibration.choice, min(RANGE_SAMPLES, len(self.subject.samples))
        facts = RunFacts(
            **measured,
            **self.end,
            choice=choice.losses if choice else None,
            chosen=(choice.kept, choice.loss) if choice else None,
            finetuning=tuned.curve if tuned else (),
            finetuning_loss=tuned.config.loss if tuned else "",
            streams=self.streams,
            stages=self.stages,
            objective=calibration.config.objective,
            measured_on={
                "channels": f"{samples} calibration samples of {self.subject.length} tokens",
                "sites": f"the first {min(TOKENS, self.subject.length)} tokens of calibration",
            },
        )
        write_run_page(facts, file)


def _title(subject: Subject) -> str:
    """What was done to the stream."""
    prefix, kind = subject.model.prefix, subject.rotated
    tokens = f"behind a prefix of {len(prefix)} token{'s' * (len(prefix) > 1)}"
    turned = "" if kind == "none" else f"rotated ({kind})"
    title = ", ".join(filter(None, (tokens if prefix else "", turned))) or "as the model is"
    return title[0].upper() + title[1:]


def stream(subject: Subject, title: str) -> StreamFacts:
    """The residual stream of the model as it is now."""
    from ..results.run_facts import StreamFacts
    from ..sim.stream import largest_by_token

    sample = subject.samples[0][:, :TOKENS]
    places, largest = largest_by_token(subject.model, subject.model.residual_sums, sample)
    tokens = [subject.tokenizer.decode([i]) for i in sample[0].tolist()]
    return StreamFacts(title, places, tokens, largest.numpy())


def pair_facts(
    subject: Subject, sim: Any, results: Sequence[Any], alphas: Mapping[str, Tensor]
) -> list[PairFacts]:
    """Every pair of phase 1 with its channels.

    Args:
        subject: its model is the unquantized one, without α.
        sim: α is folded in.
        results: of phase 1.
        alphas: pair name → α in the sim's weights.
    """
    from ..pairs.channels import channel_ends
    from ..results.run_facts import PairFacts

    pairs, samples = [r.pair for r in results], subject.samples[:RANGE_SAMPLES]
    before = channel_ends(subject.model, pairs, samples)
    after = channel_ends(sim.model, pairs, samples)
    return [
        PairFacts(
            name=r.pair.name,
            kind=r.pair.kind,
            kept=r.kept,
            losses=r.losses,
            curve=r.curve,
            crossed=r.crossed,
            alpha=alphas[r.pair.name].detach().cpu().float().numpy(),
            before=before[r.pair.name].numpy() if r.pair.name in before else None,
            after=after[r.pair.name].numpy() if r.pair.name in after else None,
        )
        for r in results
    ]


def site_facts(subject: Subject, sim: Any) -> list[SiteFacts]:
    """What each activation quantizer costs."""
    from ..results.run_facts import SiteFacts
    from ..sim.sensitivity import site_costs

    found = site_costs(sim, [subject.samples[0][:, :TOKENS]])
    return [SiteFacts(one.site, one.bits, one.error, one.cost) for one in found]


def coverage_facts(sim: Any) -> CoverageFacts:
    """Operations by kind, and those without an encoding."""
    from ..encodings.coverage_table import coverage
    from ..results.run_facts import CoverageFacts

    kinds: dict[str, tuple[int, int]] = {}
    table = coverage(sim)
    for row in table.rows:
        count, missing = kinds.get(row.operation, (0, 0))
        kinds[row.operation] = count + 1, missing + row.missing
    return CoverageFacts(kinds, [(r.name, r.operation, r.note) for r in table.missing])
