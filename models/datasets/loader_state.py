# SPDX-License-Identifier: Apache-2.0
"""Energon's loader state as plain JSON, and back.

Energon's own states are Python objects meant for pickle. A resumed run must not execute what lies in a checkpoint,
so the few types that occur are written with a tag, and nothing else is read.
"""

import base64
import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

from models.contract.errors import DataError

STATE_CLASSES = {
    cls.__name__: cls
    for cls in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}


def encode_state(value: Any) -> Any:
    """Plain JSON data for an energon state.

    Raises:
        DataError: a type that is not known here; nothing is guessed.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode_state(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode_state(item) for item in value]}
    if isinstance(value, FlexState):
        return {"flex": [[key, encode_state(item)] for key, item in value.items()]}
    if isinstance(value, dict):
        return {"dict": [[encode_state(key), encode_state(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return {"array": [str(value.dtype), list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, torch.Tensor):
        return {"tensor": encode_state(value.numpy())}
    if type(value).__name__ in STATE_CLASSES:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"state": [type(value).__name__, encode_state(fields)]}
    raise DataError("a loader state holds an unknown type", got=type(value).__name__)


def decode_state(value: Any) -> Any:
    """The energon state that `encode_state` wrote.

    Raises:
        DataError: not written by `encode_state`.
    """
    if isinstance(value, list):
        return [decode_state(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise DataError("not a loader state", got=str(value)[:100])
    tag, body = next(iter(value.items()))
    if tag == "tuple":
        return tuple(decode_state(item) for item in body)
    if tag == "flex":
        return FlexState((key, decode_state(item)) for key, item in body)
    if tag == "dict":
        return {decode_state(key): decode_state(item) for key, item in body}
    if tag == "bytes":
        return base64.b64decode(body)
    if tag == "array":
        dtype, shape, data = body
        return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype)).reshape(shape).copy()
    if tag == "tensor":
        return torch.from_numpy(decode_state(body))
    if tag == "state" and body[0] in STATE_CLASSES:
        return STATE_CLASSES[body[0]](**decode_state(body[1]))
    raise DataError("not a loader state", got=str(tag))
