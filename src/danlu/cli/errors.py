"""Which exceptions are the user's to mend, and how they are told: one sentence, no traceback."""

from __future__ import annotations

_KINDS = {"SafetensorError", "OutOfMemoryError", "AnswerError", "FetchError"}


def is_user_error(error: BaseException) -> bool:
    """Whether an exception reports bad input, rather than a fault of the program."""
    if isinstance(error, BrokenPipeError):  # the reader of our output left: nothing is wrong with the input
        return False
    # safetensors and torch are not imported here: ``danlu --help`` must stay quick.
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ValueError | OSError) or bool(names & _KINDS)


def one_sentence(error: BaseException) -> str:
    """The message on one line; the exception's name when it has none."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__
