# SPDX-License-Identifier: Apache-2.0
"""``dqrelo deltas``: ask a running server about its deltas."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from dqrelo_tools.text_table import text_table
from vllm_dqrelo.format.errors import DqreloError

COLUMNS = {
    "id": "NAME",
    "tier": "WHERE",
    "size": "SIZE",
    "ratio": "RATIO",
    "pinned": "PINNED",
    "running": "RUNNING",
    "digest": "DIGEST",
}


class Server:
    """A server that was started with ``dqrelo serve --delta-endpoints``.

    Args:
        url: such as http://localhost:8000.
        api_key: what the server was given as ``--api-key``, if it was.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = f"{url.rstrip('/')}/v1/dqrelo/deltas"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def list(self) -> list[dict[str, Any]]:
        """Every delta that a request can name."""
        return self._ask("GET", "")["data"]

    def do(self, action: str, name: str, **options: bool) -> dict[str, Any]:
        """Load, unload or pin the delta called ``name``; what became of it.

        Args:
            action: load, unload or pin.
            name: of the delta.
            options: the body of the request.
        """
        path = f"/{urllib.parse.quote(name, safe='')}/{action}"
        return self._ask("POST", path, options)

    def _ask(self, method: str, path: str, body: dict[str, bool] | None = None) -> Any:
        headers, data = self._headers, None
        if body:
            headers = {**headers, "Content-Type": "application/json"}
            data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise DqreloError(explanation(error, self._url)) from error
        except urllib.error.URLError as error:
            raise DqreloError(f"{self._url}: {error.reason}") from error


def explanation(error: urllib.error.HTTPError, url: str) -> str:
    """What the server said, or what its status means."""
    if error.code == 401:
        return f"{url}: not authorised; give --api-key, or set VLLM_API_KEY"
    try:
        said = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = error.reason
    if said == "Not Found":
        return f"{url} does not exist: start the server with --delta-endpoints"
    return str(said)


def to_text(entries: Sequence[dict[str, Any]]) -> str:
    """A table for people: one line a delta."""
    rows = [list(COLUMNS.values())]
    rows += [[cell(key, entry[key]) for key in COLUMNS] for entry in entries]
    return text_table(rows, "<")


def cell(key: str, value: Any) -> str:
    """One value of the table."""
    if key == "size":
        return f"{value / 1e6:.1f} MB"
    if key == "digest":
        return value.removeprefix("sha256:")[:12]
    if key == "pinned":
        return "yes" if value else "no"
    return f"{value:g}" if key == "ratio" else str(value)
