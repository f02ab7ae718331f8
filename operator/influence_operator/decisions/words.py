"""Words from elsewhere, made fit for a status: containers, drivers, kubelets and users wrote them."""

from __future__ import annotations

import re

MESSAGE = 1024
"""Characters of a condition's or an event's message, which Kubernetes limits to 1024 bytes in Events."""
_REASON = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")
_CUT = " … "


def sentence(said: str, limit: int = MESSAGE) -> str:
    """One line of printable text of at most `limit` characters.

    Of what is too long the beginning and the last line stay: an exception's last line says most.
    """
    lines = [_printable(line) for line in said[: 64 * limit].splitlines()]
    lines = [line for line in lines if line]
    whole = " ".join(lines)
    if len(whole) <= limit:
        return whole
    last = lines[-1][: limit // 2] if len(lines) > 1 else ""
    tail = _CUT + last if last else _CUT.rstrip()
    return whole[: limit - len(tail)] + tail


def reason_or(said: str, otherwise: str) -> str:
    """`said`, if it can be a condition's reason."""
    return said if _REASON.fullmatch(said) else otherwise


def _printable(line: str) -> str:
    # A lone surrogate, which JSON can carry, is no text that could be stored.
    valid = line.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in valid).split())
