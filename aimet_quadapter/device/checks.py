"""The checks that `verify` makes on the folder of an export."""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..artifacts.exported import check_export
from ..artifacts.manifest import CONTEXT, MODEL, QDQ, changed_files, read_manifest, trusted
from ..artifacts.reference import read_reference
from ..errors import CompileError, DataError, IntegrityError
from ..evaluation.scores import perplexity
from .differences import Difference, Paired, output_step
from .htp import Target
from .sessions import CpuSession, HtpSession, Runner

FP_TOLERANCE = 1e-4
"""Largest difference of the float logits, as a share of their range."""

LEVELS = 255
"""The mean difference from the sim may be the logits' range by this: one step of 8 bits."""

SAME_TOKEN, PERPLEXITY = "same token on HTP", "perplexity"


@dataclass(frozen=True)
class Check:
    """One line of the report; `ok` is None when it was not made, `detail` then says why."""

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FINDING", None: "skipped"}[self.ok]
        return f"{mark:<8} {self.name:<22} {self.detail}"


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        folder: the export.
        checks: in the order they were made.
        numbers: what was measured, by name.
    """

    folder: Path
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.findings

    @property
    def findings(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.ok is False]

    def to_json(self) -> str:
        """The report as JSON."""
        whole = {"folder": str(self.folder), "ok": self.ok}
        return json.dumps(
            {**whole, "checks": [asdict(c) for c in self.checks], "numbers": self.numbers}, indent=2
        )

    def __str__(self) -> str:
        count = len(self.findings)
        end = f"{count} finding{'s' * (count > 1)}" if count else "no findings"
        return "\n".join([*map(str, self.checks), end])


class Checks:
    """The checks of one folder, each of them a method that adds to the report.

    `files` comes first: when it returns False, nothing else may be opened.
    """

    def __init__(self, folder: Path, sim: Any) -> None:
        self.folder = folder
        self.sim = sim
        self.manifest = read_manifest(folder)
        self.report = VerifyReport(folder)
        self.htp: HtpSession | None = None

    def _add(self, name: str, ok: bool | None, detail: str) -> None:
        self.report.checks.append(Check(name, ok, detail))

    def files(self) -> bool:
        """Whether hashes are the manifest's and the ONNX files point to nothing outside."""
        changed = changed_files(self.folder, self.manifest)
        problem = f"changed since the export: {', '.join(changed)}" if changed else ""
        names = [n for n in (MODEL, QDQ, CONTEXT) if n in self.manifest["files"] and not changed]
        try:
            for name in names:
                trusted(self.folder / name)
        except IntegrityError as e:
            problem = str(e)
        good = f"{len(self.manifest['files'])} files have the hashes in the manifest"
        self._add("files", not problem, problem or good)
        if problem:
            self._add("everything else", None, "a file is not what was exported: nothing is opened")
        return not problem

    def encodings(self) -> None:
        """Every device operation has its encoding, every encoding its tensor."""
        found = check_export(self.folder)
        lacking = f"{len(found.missing)} lack theirs: {', '.join(found.missing[:5])}"
        good = f"all {found.operations[MODEL]} device operations have theirs, in both ONNX files"
        self._add("encodings", not found.missing, lacking if found.missing else good)
        unknown = f"not in {MODEL}: {', '.join(found.unknown[:5])}"
        good = f"each is a tensor of {MODEL}"
        self._add("names of encodings", not found.unknown, unknown if found.unknown else good)

    def float_logits(self) -> None:
        """`model.onnx` against torch, both without activation quantizers."""
        self.reference = read_reference(self.folder)
        got = CpuSession(self.folder / MODEL).run(self.reference.inputs)
        fp = self.reference.fp
        error = (self.reference.rows(torch.from_numpy(got)) - fp).abs().max()
        share = float(error / (fp.max() - fp.min()))
        self.report.numbers["float_error"] = share
        detail = f"largest difference {share:.1e} of the logits' range; at most {FP_TOLERANCE:.0e}"
        self._add("ONNX = torch, float", share <= FP_TOLERANCE, detail)

    def quantized_logits(self) -> None:
        """`model_qdq.onnx` on the CPU against the sim as it was exported."""
        spread = float(self.reference.sim.max() - self.reference.sim.min())
        self.step = output_step(self.folder / QDQ) or spread / LEVELS
        self.limit = spread / LEVELS / self.step
        self.report.numbers["output_step"] = self.step
        self.cpu = CpuSession(self.folder)
        self._against_reference("QDQ on CPU = sim", self.cpu.run(self.reference.inputs))

    def _against_reference(self, name: str, logits: np.ndarray) -> Difference:
        difference = Difference(self.step)
        difference.add(self.reference.rows(torch.from_numpy(logits)), self.reference.sim)
        self.report.numbers[name] = asdict(difference)
        detail = f"{difference}; mean at most {self.limit:.1f}"
        self._add(name, difference.mean <= self.limit, detail)
        return difference

    def the_sim(self) -> None:
        """The sim given against the sim as it was exported."""
        from aimet_torch.utils import in_eval_mode  # loaded by whoever has a sim

        model = self.sim.model
        device = next(model.parameters()).device
        inputs = {name: x.to(device) for name, x in self.reference.inputs.items()}
        with torch.no_grad(), in_eval_mode(model):
            logits = model(**inputs)
        self._against_reference("sim = exported sim", logits.cpu().numpy())

    def lowered(self, target: Target) -> None:
        """Every operation compiles for the HTP."""
        try:
            self.htp = HtpSession(self.folder, htp_arch=target.htp_arch, soc_model=target.soc_model)
        except CompileError as e:
            self._add("operations on HTP", False, str(e).replace("\n", "\n" + 32 * " "))
            return
        count, seconds = self.htp.operations, self.htp.seconds
        self.report.numbers["htp"] = {"operations": count, "seconds": seconds}
        detail = f"{count} of {count} on {target}, compiled in {seconds:.1f} s"
        self._add("operations on HTP", True, detail)

    def tokens(self, tokens: Tensor | None, least: float, change: float, progress: bool) -> None:
        """Most likely tokens on the HTP, and perplexity everywhere, against the sim."""
        try:
            cpu = Runner(self.cpu)
        except DataError as e:
            self._add(PERPLEXITY, None, str(e))
            if self.htp is not None:
                got = self.htp.run(self.reference.inputs)
                self._same_token(self._against_reference("HTP = sim", got), least)
            return
        ids = next(iter(self.reference.inputs.values())) if tokens is None else tokens
        ids = ids.reshape(1, -1) if tokens is None else ids
        settings: dict[str, Any] = {"batch_size": cpu.batch, "progress": progress}

        def score(model: nn.Module) -> float:
            return perplexity(model, ids, cpu.length, **settings)

        expected = cpu if self.sim is None else self.sim.model
        scores = {} if self.sim is None else {"sim": score(expected)}
        scores["CPU"] = score(cpu)
        if self.htp is not None:
            difference = Difference(self.step)
            scores["HTP"] = score(Paired(Runner(self.htp), expected, difference))
            self.report.numbers["HTP = sim"] = asdict(difference)
            self._same_token(difference, least)
        self._perplexities(scores, change)
        wrong = {check.name for check in self.report.findings} & {SAME_TOKEN, PERPLEXITY}
        if wrong and self.sim is not None:
            self._own_rounding(score, scores["sim"])

    def _own_rounding(self, score: Callable[[nn.Module], float], simulated: float) -> None:
        """How far rounding alone moves the sim: no file can be expected to be nearer."""
        difference = Difference(self.step)
        exact = copy.deepcopy(self.sim.model).double()
        found = score(Paired(exact, self.sim.model, difference))
        self.report.numbers["sim in float64"] = {**asdict(difference), "perplexity": found}
        detail = (
            f"differs from itself in float32 by {difference}; same token at "
            f"{difference.agreement_or_tie:.1%}; perplexity {found / simulated - 1:+.2%}"
        )
        self._add("the sim in float64", True, detail)

    def _same_token(self, found: Difference, least: float) -> None:
        # Of few positions, as many may differ as chance allows, two standard deviations.
        lowest = least - 2 * (least * (1 - least) / found.positions) ** 0.5
        detail = (
            f"{found.agreement_or_tie:.1%} of {found.positions} positions (first of tied tokens: "
            f"{found.agreement:.1%}); at least {lowest:.1%}, {least:.0%} less chance. {found}"
        )
        self._add(SAME_TOKEN, found.agreement_or_tie >= lowest, detail)

    def _perplexities(self, scores: dict[str, float], change: float) -> None:
        self.report.numbers["perplexity"] = scores
        (base, reference), *others = scores.items()
        parts = [f"{base} {reference:.3f}"]
        parts += [f"{name} {x:.3f} ({x / reference - 1:+.2%})" for name, x in others]
        if not others:
            self._add(PERPLEXITY, None, f"{parts[0]}: nothing to compare it with")
            return
        worst = max(abs(x / reference - 1) for _, x in others)
        self._add(PERPLEXITY, worst <= change, f"{', '.join(parts)}; within {change:.0%}")

    def in_aimet_onnx(self, python: str | Path | None) -> None:
        """AIMET's ONNX package with the same files, in its own environment."""
        name = "aimet-onnx = sim"
        if python is None:
            how = "AIMET_ONNX_PYTHON=… or aimet_onnx=… names the Python that has it"
            self._add(name, None, how)
            return
        script = Path(__file__).with_name("in_aimet_onnx.py")
        with tempfile.TemporaryDirectory() as scratch:
            inputs, output = Path(scratch, "inputs.json"), Path(scratch, "logits")
            given = {
                k: (str(x.dtype).removeprefix("torch."), x.tolist())
                for k, x in self.reference.inputs.items()
            }
            inputs.write_text(json.dumps(given), encoding="utf-8")
            # -I: this folder and PYTHONPATH stay out of what that Python imports.
            command = [str(python), "-I", str(script), str(self.folder), str(inputs), str(output)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as e:
                raise DataError(f"{python} does not run: {e}. Pass a Python interpreter.") from e
            if done.returncode:
                self._add(name, False, (done.stderr.strip().splitlines() or ["no message"])[-1])
                return
            logits = np.fromfile(output, np.float32).reshape(1, -1, self.reference.sim.shape[-1])
            about = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
        self.report.numbers["aimet-onnx"] = about
        self._against_reference(name, logits)

    def sizes(self) -> None:
        """Sizes of the files."""
        sizes = {name: entry["bytes"] for name, entry in self.manifest["files"].items()}
        self.report.numbers["bytes"] = sizes
        large = {
            n: b for n, b in sizes.items() if n.endswith((".onnx", ".bin", ".data")) and b > 1e5
        }
        listed = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in large.items())
        self._add("sizes", True, listed)
