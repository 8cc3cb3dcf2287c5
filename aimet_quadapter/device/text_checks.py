"""The checks of `verify` on a text: tokens and perplexity on the CPU, on the HTP, in the sim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from ..errors import CompileError, DataError
from ..evaluation.scores import perplexity
from .htp import Target
from .logit_checks import LogitChecks
from .logit_differences import Difference, Logits, Paired
from .sessions import CpuSession, HtpSession, Runner
from .verify_report import VerifyReport

SAME_TOKEN, PERPLEXITY = "same token on HTP", "perplexity"


def check_lowering(report: VerifyReport, target: Target) -> HtpSession | None:
    """Every operation compiles for the HTP; the session, None when one does not."""
    try:
        # Its tokens are compared below.
        settings: dict[str, Any] = {"soc_model": target.soc_model, "check": False}
        session = HtpSession(report.folder, htp_arch=target.htp_arch, **settings)
    except CompileError as e:
        report.add("operations on HTP", False, str(e).replace("\n", "\n" + 32 * " "))
        return None
    count, seconds = session.operations, session.seconds
    report.numbers["htp"] = {"operations": count, "seconds": seconds}
    detail = f"{count} of {count} on {target}, compiled in {seconds:.1f} s"
    report.add("operations on HTP", True, detail)
    return session


class TextChecks:
    """Most likely tokens on the HTP, and perplexity everywhere, against the sim.

    Args:
        logits: the checks of the folder's reference inputs.
        cpu: the QDQ file on the CPU; it stands for the sim where none is given.
        htp: the QDQ file on the HTP, if it is there.
        sim: the sim that was exported, if it is given.
        least: least share of positions with the sim's most likely token.
        change: largest relative change of the perplexity.
    """

    def __init__(
        self,
        logits: LogitChecks,
        cpu: CpuSession,
        htp: HtpSession | None,
        sim: Any,
        least: float,
        change: float,
    ) -> None:
        self.report = logits.report
        self.logits = logits
        self.cpu = cpu
        self.htp = htp
        self.sim = sim
        self.least = least
        self.change = change

    def on(self, tokens: Tensor | None, progress: bool) -> None:
        """Check a text: token ids (N,) or (1, N); the reference inputs when None."""
        try:
            cpu = Runner(self.cpu)
        except DataError as e:
            self.report.add(PERPLEXITY, None, str(e))
            if self.htp is not None:
                got = self.htp.run(self.logits.inputs)
                self._same_token(self.logits.beside_the_sim("HTP = sim", got))
            return
        if tokens is None:
            tokens = next(iter(self.logits.inputs.values())).reshape(1, -1)
        settings: dict[str, Any] = {"batch_size": cpu.batch, "progress": progress}

        def score(model: nn.Module) -> float:
            return perplexity(model, tokens, cpu.length, **settings)

        expected = cpu if self.sim is None else Logits(self.sim.model)
        scores = {} if self.sim is None else {"sim": score(expected)}
        scores["CPU"] = score(cpu)
        if self.htp is not None:
            difference = Difference(self.logits.step)
            scores["HTP"] = score(Paired(Runner(self.htp), expected, difference))
            self.report.numbers["HTP = sim"] = asdict(difference)
            self._same_token(difference)
        self._perplexities(scores)
        wrong = {check.name for check in self.report.findings} & {SAME_TOKEN, PERPLEXITY}
        if wrong and self.sim is not None:
            self._own_rounding(score, scores["sim"])

    def _same_token(self, found: Difference) -> None:
        least = self.least
        # Of few positions, as many may differ as chance allows, two standard deviations.
        lowest = least - 2 * (least * (1 - least) / found.positions) ** 0.5
        detail = (
            f"{found.agreement_or_tie:.1%} of {found.positions} positions (first of tied tokens: "
            f"{found.agreement:.1%}); at least {lowest:.1%}, {least:.0%} less chance. {found}"
        )
        self.report.add(SAME_TOKEN, found.agreement_or_tie >= lowest, detail)

    def _perplexities(self, scores: dict[str, float]) -> None:
        self.report.numbers["perplexity"] = scores
        (base, reference), *others = scores.items()
        parts = [f"{base} {reference:.3f}"]
        parts += [f"{name} {x:.3f} ({x / reference - 1:+.2%})" for name, x in others]
        if not others:
            self.report.add(PERPLEXITY, None, f"{parts[0]}: nothing to compare it with")
            return
        worst = max(abs(x / reference - 1) for _, x in others)
        detail = f"{', '.join(parts)}; within {self.change:.0%}"
        self.report.add(PERPLEXITY, worst <= self.change, detail)

    def _own_rounding(self, score: Callable[[nn.Module], float], simulated: float) -> None:
        """How far rounding alone moves the sim: no file can be expected to be nearer."""
        difference = Difference(self.logits.step)
        exact = copy.deepcopy(self.sim.model).double()
        found = score(Paired(exact, self.sim.model, difference))
        self.report.numbers["sim in float64"] = {**asdict(difference), "perplexity": found}
        detail = (
            f"differs from itself in float32 by {difference}; same token at "
            f"{difference.agreement_or_tie:.1%}; perplexity {found / simulated - 1:+.2%}"
        )
        self.report.add("the sim in float64", True, detail)
