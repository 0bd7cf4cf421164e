# SPDX-License-Identifier: Apache-2.0
import re

__all__ = ["BrokenFileError", "InputError", "one_line"]


class InputError(Exception):
    """
    Something the user passed (a file, a config key, a value) cannot be used. The message is one
    line that names it and says what to do; ``train_net.py`` prints it instead of a traceback.
    """

    def __str__(self) -> str:
        """The message, also where a data loading worker's traceback was put in front of it."""
        return re.split(rf"^.*{InputError.__qualname__}: ", super().__str__(), flags=re.M)[
            -1
        ].strip()


class BrokenFileError(InputError):
    """A file is missing, cut short, or not what its name says; another one might do."""


def one_line(error: Exception) -> str:
    """The message of ``error``."""
    # str() of a KeyError is the repr of its message.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())
