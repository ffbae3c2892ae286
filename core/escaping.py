"""Text from files, made harmless where it is shown: terminals, spreadsheets, Markdown.

A name in a record, a label in a checkpoint and an entry of a leaderboard are written by others.
HTML is `html.escape`'s.
"""

from __future__ import annotations

import logging
import re

# Control characters, and those that turn the direction of a line: a terminal obeys them.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]"
    "|[\ud800-\udfff]"
)
# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
# An opening or closing tag, a comment or an address in angle brackets; "<" before a number stays.
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def printable(text: str) -> str:
    """A text of several lines for a terminal: escape sequences are shown, not obeyed."""
    return _CONTROLS.sub(_shown, text)


def in_one_line(text: str) -> str:
    """A text for one line of a terminal or one cell of a table."""
    return printable(re.sub(r"[\r\n\t\x0b\x0c\u2028\u2029]+", " ", text))


class PrintableFormatter(logging.Formatter):
    """Lines of a log for a terminal: names of files and labels are among them."""

    def format(self, record: logging.LogRecord) -> str:
        """See `printable`."""
        return printable(super().format(record))


def log_to_terminal(level: int, form: str = logging.BASIC_FORMAT) -> None:
    """Show the log on standard error, unless somebody has set up one already.

    Args:
        level: From which on lines are shown.
        form: Of a line, see `logging.Formatter`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])


def _shown(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def in_csv(value: object) -> object:
    """A cell that no spreadsheet takes for a formula; numbers stay as they are.

    Source:
        OWASP, CSV Injection, https://owasp.org/www-community/attacks/CSV_Injection.
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA) or _is_number(value):
        return value
    return f"'{value}"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def in_markdown(text: str) -> str:
    """A cell of a table, or a sentence: no tag, no link, no further column or line."""
    text = _TAG.sub("&lt;", in_one_line(text)).replace("|", "\\|")
    return text.replace("](", "]\\(").replace("]:", "]\\:")
