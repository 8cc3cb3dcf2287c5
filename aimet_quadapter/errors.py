"""What goes wrong, by kind. Every message names the value, the reason and the fix."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager


class QuadapterError(Exception):
    """Base of every error this package raises on purpose."""


class UnsupportedModelError(QuadapterError):
    """The model has something that `prepare` does not know; the message lists what."""


class SimError(QuadapterError):
    """The sim is not what the call needs: wrong type, quantizers off or without encodings."""


class DataError(QuadapterError):
    """Samples are missing, of the wrong shape, type or device, or hold NaN or inf."""


class PairError(QuadapterError):
    """No pair was found, or a pair did not prove exact."""


class CoverageError(QuadapterError):
    """An operation that runs on the device carries no encoding."""


class UnfoldedError(QuadapterError):
    """The sim still carries an α that has not been folded into the weights."""


class IntegrityError(QuadapterError):
    """A file of an export is not what its manifest says, or points outside its folder."""


class CompileError(QuadapterError):
    """The HTP compiler refused operations, failed or crashed; the message lists which ones."""


class MissingRuntimeError(QuadapterError, ImportError):
    """A package of an extra is not installed: what runs exported models, or tasks."""


@contextmanager
def of_extra(extra: str, packages: Collection[str], what: str) -> Iterator[None]:
    """Name the extra where an import in the context does not find one of its packages.

    Args:
        extra: its name in setup.py.
        packages: those that it brings; what else is missing stays the error that it is.
        what: what they do, behind "which".

    Raises:
        MissingRuntimeError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in packages:
            raise
        raise MissingRuntimeError(
            f"{error.name} is not installed, which {what}. Install it: "
            f"pip install 'aimet_quadapter[{extra}]'."
        ) from error
