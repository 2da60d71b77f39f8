# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from models.datasets.sample import SampleRejected, parse_sample


def members(messages, media=(), **payload):
    text = json.dumps({"messages": messages, "media": [name for name, _ in media], **payload}).encode()
    return {"__key__": "k", "__shard__": "a.tar", "json": text, **dict(media)}


def talk(user="<image>What?", answer="red"):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


JPG = ("image0.jpg", b"bytes")


def test_media_follow_their_markers_across_kinds():
    sample = parse_sample(
        members(
            talk("<video> then <image> then <image>"),
            [("image0.jpg", b"a"), ("image1.png", b"b"), ("video0.mp4", b"c")],
        )
    )
    assert [medium.name for medium in sample.media] == ["video0.mp4", "image0.jpg", "image1.png"]


def test_frames_of_a_video_are_collected_in_order():
    raw = members(talk("<video>?"), [("video0.frames", b"")], video_fps=[3.0])
    del raw["video0.frames"]
    raw |= {"video0.frame000001.jpg": b"2", "video0.frame000000.jpg": b"1"}
    (medium,) = parse_sample(raw).media
    assert (medium.data, medium.fps, medium.is_frames) == ((b"1", b"2"), 3.0, True)


def test_reference_layout_with_from_and_value_is_read():
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "a cat"}]
    sample = parse_sample(
        {"__key__": "00453/1", "__shard__": "x.tar", "jpg": b"i", "json": json.dumps(turns).encode()}
    )
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    assert sample.media[0].data == (b"i",)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (members(talk()), "marker mismatch"),
        (members(talk("no marker"), [JPG]), "marker mismatch"),
        (members(talk("<image><image>"), [JPG]), "marker mismatch"),
        (members(talk(answer="  "), [JPG]), "empty answer"),
        (members(talk(answer="<image>"), [JPG]), "marker outside a user turn"),
        (members(list(reversed(talk())), [JPG]), "wrong role order"),
        (members(talk()[:1], [JPG]), "wrong role order"),
        (members([{"role": "tool", "content": "x"}]), "unknown role"),
        (members([]), "bad json"),
        (members(talk("<image>"), [("image0.xyz", b"")]), None),
        ({"__key__": "k", "json": b'{"messages": "\xff"}'}, "text is not utf-8"),
        ({"__key__": "k", "json": b"{"}, "bad json"),
        ({"__key__": "k", "json": b"7"}, "bad json"),
        ({"__key__": "k", "jpg": b""}, "no json"),
        (members(talk("<video>"), [("video0.mp4", b"")], video_fps=[-1]), "bad json"),
        (members(talk("<video>"), [("video0.mp4", b"")], video_fps=[1, 2]), "bad json"),
    ],
)
def test_bad_samples_are_rejected_with_a_reason(raw, reason):
    if reason is None:  # decoding finds out
        assert parse_sample(raw).media
        return
    with pytest.raises(SampleRejected) as caught:
        parse_sample(raw)
    assert caught.value.reason == reason


def test_missing_member_is_named():
    raw = members(talk(), [JPG])
    del raw["image0.jpg"]
    with pytest.raises(SampleRejected, match=r"missing media: image0\.jpg"):
        parse_sample(raw)
