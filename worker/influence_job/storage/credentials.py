"""What `output.credentialsSecretRef` gives to a storage client, in driver and workers. Used by `objects`.

In a cluster the Secret is mounted as a folder, and its keys are environment variables, too. Amazon's client
needs no more than those (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN). Google's wants a file,
as `kubectl create secret generic NAME --from-file=key.json` makes one.
"""

from __future__ import annotations

import json
from pathlib import Path

from influence_job.document import CREDENTIALS_DIRECTORY
from influence_job.errors import PermanentError, Reason

KEY = "key.json"
"""Key of the Secret."""


def google_key(folder: str = CREDENTIALS_DIRECTORY) -> str | None:
    """The file with a service account's key, which gcsfs takes as `token`; None where none is mounted.

    Raises:
        PermanentError: it holds something else.
    """
    key = Path(folder) / KEY
    if not key.is_file():
        return None
    _check(key)
    return str(key)


def _check(key: Path) -> None:
    try:
        content = json.loads(key.read_bytes())
    except ValueError:
        content = None
    # The second is what `gcloud auth application-default login` writes.
    if not isinstance(content, dict) or not ({"private_key", "refresh_token"} & content.keys()):
        raise PermanentError(
            Reason.STORE_UNREACHABLE,
            f"output.credentialsSecretRef: {KEY}: expected the credentials of a service account as JSON, got "
            f"something else; put there what `gcloud iam service-accounts keys create` writes",
        )
