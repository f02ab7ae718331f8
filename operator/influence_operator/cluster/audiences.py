"""For whom the operator's own token is: whatever carries one of these audiences, the API server accepts.

Kubernetes gives a pod's token every audience of the API server, which nobody could ask for otherwise.
"""

from __future__ import annotations

import base64
import json

from kubernetes.aio.client import Configuration


async def own_audiences(configuration: Configuration) -> tuple[str, ...]:
    """The audiences of the token that the operator speaks with; none where it uses a certificate."""
    _, _, token = (await configuration.get_api_key_with_prefix("BearerToken") or "").rpartition(" ")
    return audiences_of(token)


def audiences_of(token: str) -> tuple[str, ...]:
    """`aud` of a JSON Web Token; empty for what is none, or has none. Nothing is verified: it is our own."""
    parts = token.split(".")
    try:
        payload = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        named = payload.get("aud") or ()
    except (IndexError, ValueError, AttributeError):
        return ()
    listed = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return tuple(audience for audience in listed if isinstance(audience, str) and audience)
