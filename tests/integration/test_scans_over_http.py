"""Scans through a real server with a real tesseract: sentences to be found, and a refusal that says what to do."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import httpx

from tests.scans import draw_page, save_images
from tests.serving import start_server

DOCUMENT = "/get_all_embedding_vectors_for_document/?send_back_json_or_zip_file=json"
FIRST, SECOND = "The boats came home early.", "Nobody was surprised by the storm."


def send(client: httpx.Client, name: str, data: bytes) -> httpx.Response:
    return client.post(DOCUMENT, files={"file": (name, data)})


def test_scans_are_embedded_and_found(tmp_path: Path) -> None:
    """A PDF of two images and a photograph of a page; the same file again comes from the store."""
    scan = save_images(draw_page(FIRST), "PDF", draw_page(SECOND))
    with start_server(tmp_path, {"USE_OCR": "True"}) as server, server.client() as client:
        answer = send(client, "scan.pdf", scan)
        assert answer.status_code == 200, answer.text
        assert [(row["text"], row["page"]) for row in answer.json()] == [(FIRST, 1), (SECOND, 2)]
        picture = send(client, "page.png", save_images(draw_page(FIRST), "PNG"))
        assert [row["text"] for row in picture.json()] == [FIRST]
        assert picture.json()[0]["embedding"] == answer.json()[0]["embedding"]
        assert send(client, "again.pdf", scan).json() == answer.json()
        found = client.post(
            "/search_stored_embeddings_with_query_string_for_semantic_similarity/",
            json={"query_text": "The storm surprised no one.", "number_of_most_similar_strings_to_return": 1},
        )
        assert found.json()["results"][0]["search_result_text"] == SECOND


def test_without_ocr_a_scan_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    """The refusal names the setting."""
    with start_server(tmp_path) as server, server.client() as client:
        for name, kind in (("scan.pdf", "PDF"), ("page.png", "PNG")):
            refused = send(client, name, save_images(draw_page(FIRST), kind))
            assert refused.status_code in {415, 422}
            assert "USE_OCR=True" in refused.json()["detail"]
        with closing(sqlite3.connect(server.database)) as connection:
            assert connection.execute("SELECT count(*) FROM documents").fetchone() == (0,)
