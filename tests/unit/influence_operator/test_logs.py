"""What the operator logs: a record is one line, whatever the words that it quotes."""

import json
import logging

import pytest

from influence_operator.logs import JsonFormatter, PlainFormatter

HOSTILE = "no\n2026-01-01 INFO leading\r\x1b[2J\u2028\u0085 \ud800 \x9b31m \xfc"


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("operator", logging.WARNING, "file", 1, "pass failed: %s", (message,), None)


@pytest.mark.parametrize("formatter", [JsonFormatter(), PlainFormatter("%(levelname)s %(message)s")])
def test_quoted_words_neither_begin_a_line_nor_steer_a_terminal(formatter: logging.Formatter):
    line = formatter.format(record(HOSTILE))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    line.encode()


def test_a_json_line_keeps_every_character():
    assert json.loads(JsonFormatter().format(record(HOSTILE)))["message"] == f"pass failed: {HOSTILE}"


def test_a_plain_line_keeps_what_can_be_read():
    assert PlainFormatter("%(message)s").format(record("gr\xf6\xdfer \n")) == "pass failed: gr\xf6\xdfer \\n"
