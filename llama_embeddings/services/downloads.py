"""Results as files to take away: JSON in the orientation asked for, alone or in a zip."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from embeddings_data_models import StoredDocument, StoredTokenLevelBundle
from llama_embeddings.documents.export import content_disposition, render_records, zip_single_file

JSON_TYPE = "application/json"
ZIP_TYPE = "application/zip"


@dataclass(frozen=True, slots=True)
class Download:
    """Bytes with their media type and the headers that go with them."""

    content: bytes
    media_type: str
    headers: dict[str, str]


def render_document(document: StoredDocument, *, json_format: str, as_zip: bool) -> Download:
    """Sentences with their embeddings. Raises InvalidInput for an unknown orientation."""
    rows = [(sentence.text, vector) for sentence, vector in zip(document.sentences, document.vectors, strict=True)]
    content = render_records(rows, label="text", json_format=json_format)
    return _pack(content, f"{document.filename}.embeddings", as_zip)


def render_token_level_bundle(text: str, bundle: StoredTokenLevelBundle, *, json_format: str, as_zip: bool) -> Download:
    """Tokens with their embeddings and the combined feature vector. Raises InvalidInput for an unknown orientation."""
    rows = list(zip(bundle.tokens, bundle.matrix, strict=True))
    content = orjson.dumps(
        {
            "input_text": text,
            "token_level_embedding_bundle": orjson.Fragment(
                render_records(rows, label="token", json_format=json_format)
            ),
            "combined_feature_vector": bundle.feature_vector,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    return _pack(content, f"token_level_embeddings_{bundle.text_hash[:16]}", as_zip)


def _pack(content: bytes, name: str, as_zip: bool) -> Download:
    if not as_zip:
        return Download(content, JSON_TYPE, {})
    packed = zip_single_file(f"{name}.json", content)
    return Download(packed, ZIP_TYPE, {"Content-Disposition": content_disposition(f"{name}.zip")})
