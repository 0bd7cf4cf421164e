# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any, Sequence

__all__ = [
    "ArgumentError",
    "BrokenFileError",
    "InputError",
    "Interrupted",
    "check_choice",
    "counted",
    "one_line",
]


class InputError(Exception):
    """
    Something the user passed (a file, a config key, a value) cannot be used. The message is one
    line that names it and says what to do; the programs print it instead of a traceback.
    """

    def __str__(self) -> str:
        """The message, without the traceback that a data loading worker puts in front of it."""
        parts = re.split(rf"^.*{InputError.__qualname__}: ", super().__str__(), flags=re.M)
        return parts[-1].strip()


class Interrupted(Exception):
    """The user has stopped the program; the message says what is left of its work."""


class BrokenFileError(InputError):
    """A file is missing, cut short, or not what its name says; another file may be usable."""


class ArgumentError(ValueError):
    """
    An argument of a component is out of range. The message names the argument; a recipe names the
    config key that it comes from instead.
    """

    def __init__(self, argument: str, value: Any, rule: str):
        """
        Args:
            argument: name of the argument.
            value: its value.
            rule: what to use instead, such as "use 1 or more".
        """
        super().__init__(f"{argument} is {value!r}: {rule}")
        self.argument, self.value, self.rule = argument, value, rule


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Raise ArgumentError if ``value`` is none of ``choices``."""
    if value not in choices:
        raise ArgumentError(argument, value, f"use one of {tuple(choices)}")


def counted(number: int, noun: str) -> str:
    """The number with the noun, such as "1 image" or "2 boxes"."""
    plural = noun + ("es" if noun.endswith(("s", "x")) else "s")
    return f"{number} {noun if number == 1 else plural}"


def one_line(error: Exception) -> str:
    """The message of ``error``, with any whitespace replaced by single spaces, or else its type."""
    # str() of a KeyError is the repr of its message.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split()) or type(error).__name__
