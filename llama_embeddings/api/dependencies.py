"""What handlers ask for in their signatures.

Few and `async`: resolving dependencies is a third of what FastAPI takes for a small request, and one that is no
coroutine takes a turn through a thread pool besides.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends, Query, Request

from embeddings_data_models import CollectionName, RequestStamp
from llama_embeddings.api.clients import FROM_TRUSTED_PROXY
from llama_embeddings.services.container import Services

LARGEST_INTEGER = 2**63 - 1  # the database's


async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def stamp_connection(request: Request) -> RequestStamp:
    """Who asks, as the connection says."""
    return RequestStamp(ip_address=request.client.host if request.client is not None else None)


async def _stamp(
    request: Request,
    client_ip: Annotated[
        str | None,
        Query(max_length=64, description="Address to note as the caller's; only believed from TRUSTED_PROXIES."),
    ] = None,
) -> RequestStamp:
    if client_ip and FROM_TRUSTED_PROXY in request.scope:
        return RequestStamp(ip_address=client_ip)
    return stamp_connection(request)


CurrentServices = Annotated[Services, Depends(get_services)]
Stamp = Annotated[RequestStamp, Depends(_stamp)]
ModelName = Annotated[str | None, Query(description="Only of this model; of all models if absent.")]
InCollection = Annotated[
    CollectionName | None, Query(description="Only of this collection; of all collections if absent.")
]
IntoCollection = Annotated[
    CollectionName | None, Query(description="Collection to put the document into; `default` if absent.")
]
Limit = Annotated[int | None, Query(ge=1, le=LARGEST_INTEGER, description="How many at most; all if absent.")]
PageLimit = Annotated[int, Query(ge=1, le=10_000, description="How many at most; `next_cursor` says where more are.")]
DEFAULT_PAGE_LIMIT = 1_000
Cursor = Annotated[
    int | None,
    Query(
        ge=0, le=LARGEST_INTEGER, description="The `next_cursor` of an earlier reply, to go on from there; 0 to begin."
    ),
]
Offset = Annotated[int, Query(ge=0, le=LARGEST_INTEGER, description="How many to leave out first.")]
JsonFormat = Annotated[
    Literal["records", "split", "index", "columns", "values", "table"],
    Query(description="Orientation of the rows, as in pandas' `to_json`."),
]
ReplyAs = Annotated[Literal["json", "zip"], Query(description="JSON in the reply's body, or a zip file that holds it.")]
DocumentReplyAs = Annotated[
    Literal["json", "zip", "npz", "parquet"],
    Query(description="JSON in the reply's body, a zip file that holds it, arrays for NumPy, or a Parquet file."),
]
