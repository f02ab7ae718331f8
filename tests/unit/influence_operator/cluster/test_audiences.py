"""What the operator's own token says of the audiences that the API server accepts."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest
from kubernetes.aio.client import Configuration

from influence_operator.cluster.audiences import audiences_of, own_audiences
from influence_operator.process import with_own_audiences
from influence_operator.settings import Defaults, Settings


def token(payload: object) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in ({}, payload)]
    return ".".join([*parts, "signature"])


@pytest.mark.parametrize(
    ("payload", "audiences"),
    [
        ({"aud": ["https://issuer.example", "k3s"], "sub": "x"}, ("https://issuer.example", "k3s")),
        ({"aud": "https://issuer.example"}, ("https://issuer.example",)),
        ({"aud": ["", 7, "a"]}, ("a",)),
        ({"aud": {"a": 1}}, ()),
        ({"aud": None}, ()),
        ({}, ()),
        ([], ()),
    ],
)
def test_the_audiences_are_those_of_the_tokens_payload(payload: object, audiences: tuple[str, ...]):
    assert audiences_of(token(payload)) == audiences


@pytest.mark.parametrize("text", ["", "opaque", "a.b", "a.!!!.c", "a.eyJ.c", "..", "a." + "/" * 9])
def test_a_token_of_another_form_has_none(text: str):
    assert audiences_of(text) == ()


def test_the_operator_reads_its_own_token():
    configuration = Configuration(host="https://nowhere")
    configuration.api_key = {"BearerToken": f"Bearer {token({'aud': ['k3s']})}"}
    assert asyncio.run(own_audiences(configuration)) == ("k3s",)
    given = Settings(Defaults("worker:1"), api_audiences=("other",))
    assert asyncio.run(with_own_audiences(given, configuration)).api_audiences == ("other", "k3s")
    assert asyncio.run(own_audiences(Configuration(host="https://nowhere"))) == ()
