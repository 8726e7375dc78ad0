"""The one exception for mistakes a user can mend, and text that is safe to show."""

import unicodedata


class InputError(ValueError):
    """A mistake in what the user gave.

    Its message is one line that says what is wrong, where, and what to do. Recipes and the command line
    print it without a traceback and exit with status 2; everything else that is raised is a defect of ours.
    """


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
