"""What a mounted Secret gives to Google's storage client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from influence_job.errors import PermanentError, Reason
from influence_job.storage import credentials
from influence_job.storage.store import Store

URL = "gs://bucket/x.zarr"


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the Secret is mounted; empty."""
    monkeypatch.setattr(credentials.google_key, "__defaults__", (str(tmp_path),))
    return tmp_path


@pytest.fixture
def key(secret: Path) -> Path:
    """The key of a service account that nobody has, in the Secret."""
    private = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    content = {
        "type": "service_account",
        "client_email": "writer@project.iam.gserviceaccount.com",
        "token_uri": "https://oauth2.googleapis.com/token",
        "private_key": private.decode(),
    }
    path = secret / "key.json"
    path.write_text(json.dumps(content))
    return path


def client(store: Store) -> object:
    return store._backend._filesystem  # type: ignore[attr-defined]


def test_without_a_secret_the_client_finds_credentials_itself(secret: Path) -> None:
    assert credentials.google_key() is None


def test_the_storage_client_speaks_for_the_mounted_service_account(key: Path) -> None:
    with Store.open(URL) as store:
        speaks_for = client(store).credentials.credentials  # type: ignore[attr-defined]
    assert speaks_for.service_account_email == "writer@project.iam.gserviceaccount.com"


def test_the_jobs_own_option_comes_first(key: Path) -> None:
    with Store.open(URL, {"token": "anon"}) as store:
        assert client(store).credentials.credentials is None  # type: ignore[attr-defined]


def test_a_store_that_travels_to_another_process_carries_no_credentials(key: Path) -> None:
    """Each process takes those that are mounted into its own pod."""
    with Store.open(URL) as store:
        assert store.__reduce__()[1] == (URL, {})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\xff"])
def test_a_key_that_is_none_is_refused_with_its_name(content: str, secret: Path) -> None:
    (secret / "key.json").write_text(content, encoding="latin-1")
    with pytest.raises(PermanentError, match=r"credentialsSecretRef: key\.json: expected") as refused:
        Store.open(URL)
    assert refused.value.reason is Reason.STORE_UNREACHABLE


def test_files_and_amazons_storage_need_no_key(secret: Path, tmp_path: Path) -> None:
    (secret / "key.json").write_text("for another program")
    with Store.open(str(tmp_path / "x.zarr")) as store:
        store.probe()
