"""A typed client for Beamline.

    from beamline_client import Client, SearchOptions

    with Client("localhost:8001") as client:
        print(client.generate_one("Bonjour.", search=SearchOptions(beam_size=4)).text)

`AsyncClient` is the same for asyncio. Errors are drawn in `beamline_client.errors`.
"""

from beamline_client.address import AddressUnusable
from beamline_client.calls import CallOptions
from beamline_client.client import AsyncClient, Client
from beamline_client.errors import (
    BeamlineError,
    Cancelled,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
    ServerError,
    Unavailable,
)
from beamline_client.results import (
    EarlyStopping,
    FinishReason,
    Hypothesis,
    Input,
    LengthPenaltyKind,
    Limits,
    ModelInfo,
    Piece,
    Priority,
    Result,
    SearchOptions,
    ServerInfo,
    Source,
    TargetPrefix,
    Timing,
)

__all__ = [
    "AddressUnusable",
    "AsyncClient",
    "BeamlineError",
    "CallOptions",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "EarlyStopping",
    "FieldViolation",
    "FinishReason",
    "Hypothesis",
    "Input",
    "InvalidRequest",
    "LengthPenaltyKind",
    "Limits",
    "ModelInfo",
    "NotFound",
    "Overloaded",
    "Piece",
    "Priority",
    "ProtocolError",
    "Result",
    "SearchOptions",
    "ServerError",
    "ServerInfo",
    "Source",
    "TargetPrefix",
    "Timing",
    "Unavailable",
]
