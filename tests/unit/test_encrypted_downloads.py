"""No byte of a model comes over a connection that others can write into."""

from __future__ import annotations

import httpx2
import pytest

from llama_embeddings.catalogue.downloads import check_encrypted
from llama_embeddings.errors import DownloadFailed


def open_session(locations: dict[str, str]) -> httpx2.Client:
    """A client of a network in which these addresses send on to those; all others answer with `content`."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        location = locations.get(str(request.url))
        if location is not None:
            return httpx2.Response(302, headers={"location": location})
        return httpx2.Response(200, content=b"content")

    return httpx2.Client(
        transport=httpx2.MockTransport(answer), follow_redirects=True, event_hooks={"request": [check_encrypted]}
    )


def test_redirects_are_followed_from_https_to_https() -> None:
    """As hubs do to where their large files lie; this machine's own addresses may go without."""
    with open_session({"https://hub.example/a": "https://files.example/a"}) as session:
        assert session.get("https://hub.example/a").content == b"content"
        assert session.get("http://127.0.0.1:8080/a").content == b"content"
        assert session.get("http://localhost/a").content == b"content"


@pytest.mark.parametrize("location", ["http://files.example/a", "http://10.0.0.1/a", "http://127.0.0.1.example/a"])
def test_redirect_to_an_address_without_https_is_not_followed(location: str) -> None:
    """Whoever sits in between could put another file there."""
    with (
        open_session({"https://hub.example/a": location}) as session,
        pytest.raises(DownloadFailed, match="without https"),
    ):
        session.get("https://hub.example/a")
