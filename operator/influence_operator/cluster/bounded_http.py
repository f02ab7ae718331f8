"""HTTP to processes of a job, which run their user's code: nothing they answer is trusted.

Redirects are not followed, the answer is cut off at a size and a time, it is never decompressed, and
connections are not kept: an IP address may belong to another pod the next time. Used by `driver` and
`scheduler`, which parse what comes with pydantic.
"""

from __future__ import annotations

import asyncio

import aiohttp

from influence_operator.cluster.errors import BadAnswerError, UnreachableError


class BoundedHttp:
    """A client with limits; at most `at_once` requests run side by side."""

    def __init__(self, at_once: int) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._session: aiohttp.ClientSession | None = None

    async def fetch(
        self, method: str, url: str, *, seconds: float, most_bytes: int, body: object = None
    ) -> bytes:
        """The body of a 200 answer.

        Raises:
            UnreachableError: nothing listens there, or not all of the answer came in time.
            BadAnswerError: another status than 200 (redirects too), or more than `most_bytes`.
        """
        async with self._turns:
            try:
                async with asyncio.timeout(seconds):
                    return await self._fetch(method, url, most_bytes, body)
            except TimeoutError as error:
                raise UnreachableError(f"{url}: no whole answer within {seconds:g} s") from error
            except (aiohttp.ClientError, OSError, ValueError) as error:
                words = " ".join(str(error).split())[:200]  # may quote the answer
                raise UnreachableError(f"{url}: {type(error).__name__}: {words}") from error

    async def close(self) -> None:
        """Ends what is left."""
        if self._session:
            await self._session.close()

    async def _fetch(self, method: str, url: str, most_bytes: int, body: object) -> bytes:
        async with self._client().request(method, url, json=body, allow_redirects=False) as response:
            if response.status != 200:
                raise BadAnswerError(f"{url}: expected status 200, got {response.status}")
            parts, size = [], 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > most_bytes:
                    raise BadAnswerError(f"{url}: expected at most {most_bytes} bytes, got more")
                parts.append(part)
            return b"".join(parts)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False,
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                connector=aiohttp.TCPConnector(force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session


def host(address: str) -> str:
    """An IP address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address
