"""The record of one request, as it travels from a generator process to the coordinator: fixed size, no objects."""

import struct

import numpy as np
import numpy.typing as npt

RECORD = np.dtype(
    [
        ("arrival", "<u4"),  # number of the request in the plan
        ("question", "<u4"),  # number of its question
        ("outcome", "u1"),  # target.Outcome
        ("code", "u1"),  # gRPC status
        ("intended_s", "<f8"),  # when it was meant to be sent, from the start of the run
        ("sent_s", "<f8"),  # when it was sent; nan if it was not
        ("done_s", "<f8"),  # when its end was known; nan if it was not sent
        ("first_piece_s", "<f4"),  # from the send; nan without one
        ("queue_s", "<f4"),  # the server's timing block; nan where it says nothing
        ("encode_s", "<f4"),
        ("decode_s", "<f4"),
        ("steps", "<u4"),
        ("tokens", "<u4"),  # of the best hypothesis
        ("characters", "<u4"),  # of its text
        ("answer", "<u8"),  # quality.answer_hash of the texts; 0 without an answer
    ]
)
"""All times in seconds on one monotonic clock, zero being the start of the run."""

PACKED = struct.Struct("<IIBBdddffffIIIQ")
"""A record from its fields, in their order."""
assert PACKED.size == RECORD.itemsize

Records = npt.NDArray[np.void]
"""Shape [n], dtype RECORD."""
