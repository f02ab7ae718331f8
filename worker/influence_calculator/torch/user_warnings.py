"""Warnings at the line of whoever called the library, which Python shows once per line and text."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

BETWEEN = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(torch.__file__).parent) + os.sep,
    contextlib.__file__,
)
"""Where calls lie between the user's line and ours: the library, and decorators of torch and Python."""


def warn_user(message: str, category: type[Warning]) -> None:
    """A warning that names the innermost line outside of the library, however deep inside it is told."""
    frame, depth = sys._getframe(1), 2
    while frame.f_code.co_filename.startswith(BETWEEN) and frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=depth)
