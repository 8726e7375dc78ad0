"""What a user is told: the one exception for mistakes that can be mended, notices, and text that is safe to show."""

import os
import sys
import unicodedata
from functools import cache


class InputError(ValueError):
    """A mistake in what the user gave.

    Its message is one line that says what is wrong, where, and what to do. Recipes and the command line
    print it without a traceback and exit with status 2; everything else that is raised is a defect of ours.
    """


@cache
def notice(text: str) -> None:
    """Write a line to stderr: each once a process, and by the main process of several only."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{printable(text)}\n")


_JOINERS = "\u200c\u200d"
"""Format characters that change nothing but the letters beside them; Persian, Hindi and emoji need them."""


def printable(text: str) -> str:
    r"""Make control and format characters visible, such as ESC as \x1b.

    Names and paths come from others, and must not colour, move or reorder what a terminal shows. What no encoding can
    write, such as the bytes of a file name that is no UTF-8, becomes visible too.
    """
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    """Give a letter itself, or its escape if it is a control, a format character, a line break or a surrogate."""
    is_safe = letter in _JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return letter if is_safe else letter.encode("unicode_escape").decode("ascii")
