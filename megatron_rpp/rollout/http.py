"""Small JSON requests to a server, with errors that name it and repeat what it said."""

from __future__ import annotations

import json

import requests

from megatron_rpp.http_failure import reply_message
from megatron_rpp.rollout.protocol import RolloutError


def post_json(url: str, endpoint: str, payload: dict[str, object] | bytes, timeout_s: float) -> dict[str, object]:
    """POST `payload`, or what `json_body` made of it, to url/endpoint.

    Raises RolloutError for anything but 200 with success.
    """
    return _call("POST", url, endpoint, payload if isinstance(payload, bytes) else json_body(payload), timeout_s)


def json_body(payload: dict[str, object]) -> bytes:
    """`payload` as a request's body; one of many megabytes is better made once for all servers."""
    return json.dumps(payload).encode()


def get_json(url: str, endpoint: str, timeout_s: float) -> dict[str, object]:
    """GET url/endpoint, like `post_json`."""
    return _call("GET", url, endpoint, None, timeout_s)


def _call(method: str, url: str, endpoint: str, body: bytes | None, timeout_s: float) -> dict[str, object]:
    where = f"{url.rstrip('/')}/{endpoint.strip('/')}"
    try:
        with requests.Session() as session:
            session.trust_env = False  # a proxy of the environment does not know the servers
            headers = {} if body is None else {"Content-Type": "application/json"}
            response = session.request(method, where, data=body, headers=headers, timeout=timeout_s)
    except requests.RequestException as error:
        raise RolloutError(f"{where}: {error}") from error
    if response.status_code != 200:
        raise RolloutError(f"{where}: HTTP {response.status_code}: {reply_message(response.text)}")
    return _parse(where, response.text)


def _parse(where: str, body: str) -> dict[str, object]:
    """The reply; a body that is no JSON object (such as flush_cache's text) is given as {"text": body}."""
    try:
        reply = json.loads(body)
    except ValueError:
        return {"text": body}
    if not isinstance(reply, dict):
        return {"text": body}
    if reply.get("success") is False:  # SGLang says so with status 200 in places
        raise RolloutError(f"{where}: {reply_message(body)}")
    return reply
