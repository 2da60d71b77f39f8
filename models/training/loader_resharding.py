# SPDX-License-Identifier: Apache-2.0
"""Loader states of one number of data-parallel ranks, for another.

A loader's streams are numbered over all ranks, and their number follows from the global batch alone (see
:mod:`models.datasets.loader`). Between steps every rank has asked each of its streams equally often, so the streams
may change hands: the next global batch holds the same samples as it would have without the change. Where that is not
so, the resume is refused: worker processes and packing tie streams to ranks, and a rank that skipped a sample is at
another stream than the others. Rows of a stated shape have no streams: they are numbered over all ranks.
"""

from typing import Any

from models.contract.errors import ConfigError

RANK_KEYS = ("data_parallel_rank", "data_parallel_size", "micro_batch_size")
"""What a loader state says about the layout it was saved in."""


def loader_state_for(
    states: list[dict[str, Any]], dp_rank: int, dp_size: int, *, micro_batch_size: int, where: str
) -> dict[str, Any]:
    """The state from which one rank of `dp_size` goes on.

    Args:
        states: Of all data-parallel ranks that were, in rank order.
        dp_rank: This rank.
        dp_size: Ranks that are.
        micro_batch_size: Of the resumed run.
        where: The checkpoint, for messages.

    Raises:
        ConfigError: the streams cannot change hands.
    """
    layout = states[dp_rank % len(states)]["layout"]
    if layout["packing"] and layout["micro_batch_size"] != micro_batch_size:
        return states[dp_rank]  # the loader names the difference
    if len(states) == dp_size:
        return states[dp_rank] | {"layout": layout | {"micro_batch_size": micro_batch_size}}
    if "rows" in states[0]["source"]:
        return _resharded(states, dp_rank, dp_size, micro_batch_size, states[0]["source"])
    streams = [stream for state in states for stream in state["source"]["loaders"]]
    reasons = {
        "data.num_workers > 0: its worker processes tie streams to ranks": layout["num_workers"] > 0,
        "data.packing: packs are filled by rank": layout["packing"],
        "a rank skipped a sample": any(state["source"]["turn"] for state in states),
        f"{len(streams)} streams do not divide over {dp_size} ranks": len(streams) % dp_size != 0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConfigError(
            "another number of data-parallel ranks would change the order of the samples", where=where,
            expected=f"{len(states)} data-parallel ranks", got=f"{dp_size}: {'; '.join(found)}",
            fix="keep the data-parallel size when resuming",
        )  # fmt: skip
    mine = len(streams) // dp_size
    source = {"turn": 0, "loaders": streams[dp_rank * mine : (dp_rank + 1) * mine]}
    return _resharded(states, dp_rank, dp_size, micro_batch_size, source)


def _resharded(
    states: list[dict[str, Any]], dp_rank: int, dp_size: int, micro_batch_size: int, source: dict[str, Any]
) -> dict[str, Any]:
    """The state of one rank of `dp_size` that goes on from `source`."""
    layout = states[dp_rank % len(states)]["layout"]
    counts = _all_skips(states) if dp_rank == 0 else _no_skips()
    return {
        "version": states[0]["version"],
        "layout": layout | dict(zip(RANK_KEYS, (dp_rank, dp_size, micro_batch_size), strict=True)),
        "source": source,
        **counts,
    }


def _all_skips(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks together read and skipped; the first rank goes on with it."""
    reasons: dict[str, int] = {}
    for state in states:
        for reason, count in state["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "num_read": sum(state["num_read"] for state in states),
        "num_skipped": sum(state["num_skipped"] for state in states),
        "skipped": [sample for state in states for sample in state["skipped"]],
        "reasons": reasons,
    }


def _no_skips() -> dict[str, Any]:
    return {"num_read": 0, "num_skipped": 0, "skipped": [], "reasons": {}}
