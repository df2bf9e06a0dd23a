"""What an answer without success says, in whatever form a server puts it."""

from __future__ import annotations

import httpx2
import pytest

from models.http_clients import may_use_proxy, reason_of


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"error": "no such model"}', "no such model"),
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": null}', '{"error": null}'),
        (b"[1, 2]", "[1, 2]"),
        (b"<html>\n  <b>Bad\tGateway</b>", "<html> <b>Bad Gateway</b>"),
        (b"\x1b[2J\x07gone\xff", "[2J gone\ufffd"),
        (b"[" * 100_000, "[" * 300),
        (b"", "nothing more"),
        (b"x" * 5000, "x" * 300),
    ],
)
def test_a_reason_is_one_printable_line(body: bytes, says: str):
    assert reason_of(httpx2.Response(500, content=body)) == says


def test_this_machines_own_servers_are_reached_without_a_proxy():
    assert not any(map(may_use_proxy, ("http://localhost:1", "http://127.0.0.1", "https://[::1]:8000/x")))
    assert may_use_proxy("http://teacher.example:8000")
