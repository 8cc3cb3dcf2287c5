"""Quadapter for AIMET: one learned scale per channel, folded away before export.

Every public name is imported when it is first used: `import aimet_quadapter` alone loads neither
torch nor aimet_torch, which take many seconds.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analytic import analytic_alphas as analytic_alphas
    from .attach import attach as attach
    from .attach import detach as detach
    from .bits import assign_bits as assign_bits
    from .bits import set_residual_bits as set_residual_bits
    from .calibrate import calibrate as calibrate
    from .clipping import choose_ranges as choose_ranges
    from .compare_generation import compare_generation as compare_generation
    from .config import CalibrationConfig as CalibrationConfig
    from .config import FinetuneConfig as FinetuneConfig
    from .coverage import coverage as coverage
    from .coverage import keep_module_sites as keep_module_sites
    from .default import default_code as default_code
    from .default import default_text as default_text
    from .default import load_default as load_default
    from .deploy import CpuSession as CpuSession
    from .deploy import HtpSession as HtpSession
    from .deploy import compile_for_htp as compile_for_htp
    from .deploy import perplexity_on_cpu as perplexity_on_cpu
    from .deploy import perplexity_on_htp as perplexity_on_htp
    from .deploy import run_on_cpu as run_on_cpu
    from .deploy import run_on_htp as run_on_htp
    from .discovery import find_pairs as find_pairs
    from .errors import (
        CompileError as CompileError,
    )
    from .errors import (
        CoverageError as CoverageError,
    )
    from .errors import (
        DataError as DataError,
    )
    from .errors import (
        IntegrityError as IntegrityError,
    )
    from .errors import (
        MissingRuntimeError as MissingRuntimeError,
    )
    from .errors import (
        PairError as PairError,
    )
    from .errors import (
        QuadapterError as QuadapterError,
    )
    from .errors import (
        SimError as SimError,
    )
    from .errors import (
        UnfoldedError as UnfoldedError,
    )
    from .errors import (
        UnsupportedModelError as UnsupportedModelError,
    )
    from .evaluate import perplexity as perplexity
    from .export import export as export
    from .export_generation import export_generation as export_generation
    from .finetune import finetune as finetune
    from .fold import fold as fold
    from .fold import weights_restored as weights_restored
    from .generate import Generator as Generator
    from .generate import generate_on_cpu as generate_on_cpu
    from .generate import generate_on_htp as generate_on_htp
    from .pipeline import apply_quadapter as apply_quadapter
    from .pipeline import set_ranges as set_ranges
    from .prepare import prepare as prepare
    from .report import report as report
    from .softmax import compensate_softmax as compensate_softmax
    from .texts import calibration_samples as calibration_samples
    from .texts import check_disjoint as check_disjoint
    from .texts import check_text as check_text
    from .texts import check_vocabulary as check_vocabulary
    from .texts import load_text as load_text
    from .texts import tokens as tokens
    from .verify import verify as verify

__version__ = "0.1.0"

_MODULE_OF = {
    "CalibrationConfig": "config",
    "CompileError": "errors",
    "CoverageError": "errors",
    "CpuSession": "deploy",
    "DataError": "errors",
    "FinetuneConfig": "config",
    "Generator": "generate",
    "HtpSession": "deploy",
    "IntegrityError": "errors",
    "MissingRuntimeError": "errors",
    "PairError": "errors",
    "QuadapterError": "errors",
    "SimError": "errors",
    "UnfoldedError": "errors",
    "UnsupportedModelError": "errors",
    "analytic_alphas": "analytic",
    "apply_quadapter": "pipeline",
    "assign_bits": "bits",
    "attach": "attach",
    "calibrate": "calibrate",
    "calibration_samples": "texts",
    "check_disjoint": "texts",
    "check_text": "texts",
    "check_vocabulary": "texts",
    "choose_ranges": "clipping",
    "compare_generation": "compare_generation",
    "compensate_softmax": "softmax",
    "compile_for_htp": "deploy",
    "coverage": "coverage",
    "detach": "attach",
    "default_code": "default",
    "default_text": "default",
    "export": "export",
    "export_generation": "export_generation",
    "find_pairs": "discovery",
    "finetune": "finetune",
    "fold": "fold",
    "generate_on_cpu": "generate",
    "generate_on_htp": "generate",
    "keep_module_sites": "coverage",
    "load_default": "default",
    "load_text": "texts",
    "perplexity": "evaluate",
    "perplexity_on_cpu": "deploy",
    "perplexity_on_htp": "deploy",
    "prepare": "prepare",
    "report": "report",
    "run_on_cpu": "deploy",
    "run_on_htp": "deploy",
    "set_ranges": "pipeline",
    "set_residual_bits": "bits",
    "tokens": "texts",
    "verify": "verify",
    "weights_restored": "fold",
}
"""Public name → the module that defines it."""

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    value = getattr(module, name)
    globals()[name] = value  # from now on without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


class _Package(ModuleType):
    """The package as seen from outside: a public name is never hidden by its own module.

    Python binds a submodule to its package once it is loaded. `prepare`, `calibrate` and others
    are names of a module and of the function in it, so `aimet_quadapter.prepare` would be the one
    or the other depending on what was imported before. Here it is always the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _MODULE_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
