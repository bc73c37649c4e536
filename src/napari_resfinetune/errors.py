"""What can go wrong, in words for the person at the keyboard.

Every message says what was found, where, what was expected and what to do. An error carries all problems that were
found at once, so that nobody mends them one run at a time.
"""

from __future__ import annotations

from typing import ClassVar


class ResFinetuneError(Exception):
    """Base of all errors that a user may see.

    Parameters
    ----------
    *problems
        One sentence per problem; shown one per line.

    Attributes
    ----------
    problems
        The same sentences, as a tuple.
    exit_status
        What the command ends with when this error reaches it.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__("\n".join(problems))


class ConfigError(ResFinetuneError):
    """The configuration, an option or an argument cannot be used."""

    exit_status = 2


class DataError(ResFinetuneError):
    """Images or labels cannot be used for what was asked."""

    exit_status = 2


class ResourceError(ResFinetuneError):
    """The work does not fit the memory, disk or device it may use."""

    exit_status = 3


class ModelError(ResFinetuneError):
    """A model name, checkpoint or run folder cannot be used."""

    exit_status = 4


class TrainingError(ResFinetuneError):
    """Training could not go on; what was reached is saved."""
