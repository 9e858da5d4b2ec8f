"""Tests of the mutations of the fuzzer: they repeat by seed, and reach deep into each format."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from PIL import Image

from ladderstitch.v1 import generation_pb2, inference_pb2
from ladderstitch_loadtest.faults.fuzzing import http_bytes, image_files, json_text, wire
from ladderstitch_loadtest.faults.fuzzing.cases import draw_case
from ladderstitch_loadtest.faults.fuzzing.entrances import all_entrances
from ladderstitch_loadtest.faults.fuzzing.fields import LONE_SURROGATE, mutate_fields

REQUEST = generation_pb2.GenerateRequest(text="a b", max_tokens=3, temperature=0.5, stop=["x"])
BODY = {"model": "tiny", "prompt": "a b", "max_tokens": 3, "stop": ["x", "y"]}


def parses(data: bytes) -> bool:
    try:
        generation_pb2.GenerateRequest.FromString(data)
    except DecodeError:
        return False
    return True


def test_cases_repeat_by_seed_and_index() -> None:
    entrances = all_entrances()
    first = [draw_case(entrances, 7, index) for index in range(300)]
    again = [draw_case(entrances, 7, index) for index in reversed(range(300))][::-1]
    assert [(c.messages, c.headers, c.deadline_s) for c in first] == [
        (c.messages, c.headers, c.deadline_s) for c in again
    ]
    other = [draw_case(entrances, 8, index) for index in range(300)]
    assert [case.messages for case in first] != [case.messages for case in other]


def test_cases_reach_every_entrance_with_every_kind() -> None:
    entrances = all_entrances()
    cases = [draw_case(entrances, 1, index) for index in range(4000)]
    assert {case.entrance.name for case in cases} == {one.name for one in entrances}
    kinds = {"wire", "fields", "metadata", "deadline", "image", "cancelled"}
    assert {case.kind for case in cases} == kinds | {"structure", "text", "headers", "bytes"}
    assert max(sum(map(len, case.messages)) for case in cases) < 8 << 20


def test_records_of_a_message_cover_all_its_bytes() -> None:
    data = REQUEST.SerializeToString()
    found = wire.records(data)
    assert [record.number for record in found] == [4, 6, 7, 11]
    assert b"".join(data[record.start : record.end] for record in found) == data
    assert wire.records(data[:-1])[:-1] == found[:-2]


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**64 - 1])
def test_varints_are_read_as_they_are_written(number: int) -> None:
    data = wire.write_varint(number)
    assert wire.read_varint(b"x" + data + b"y", 1) == (number, 1 + len(data))


@pytest.mark.parametrize("mutation", wire.MESSAGE, ids=lambda one: one.__name__)
def test_a_mutation_of_bytes_changes_them_and_takes_any(mutation: wire.ByteMutation) -> None:
    data = REQUEST.SerializeToString()
    changed = [mutation(random.Random(seed), data) for seed in range(50)]
    assert any(one != data for one in changed)
    for odd in (b"", b"\xff", b"\x0a\xff\xff", bytes(3)):
        assert isinstance(mutation(random.Random(1), odd), bytes)


def test_wire_mutations_make_parsable_and_other_messages() -> None:
    data = REQUEST.SerializeToString()
    accepted = [parses(wire.mutate(random.Random(seed), data, wire.MESSAGE)) for seed in range(300)]
    assert 50 < sum(accepted) < 280


def test_field_mutations_set_extreme_values_and_lone_surrogates() -> None:
    found = [mutate_fields(random.Random(seed), REQUEST) for seed in range(3000)]
    parsed = [generation_pb2.GenerateRequest.FromString(data) for data in found if parses(data)]
    assert any(one.max_tokens == 2**31 - 1 for one in parsed)
    assert any(one.temperature != one.temperature for one in parsed)
    assert any(len(one.stop) > 16 for one in parsed)
    surrogates = [data for data in found if LONE_SURROGATE in data]
    assert surrogates
    assert not any(map(parses, surrogates))


def test_field_mutations_reach_nested_messages() -> None:
    tensor = inference_pb2.Tensor(shape=(1, 1, 2, 2), data=bytes(4))
    request = inference_pb2.InferRequest(tensor=tensor)
    found = [
        inference_pb2.InferRequest.FromString(mutate_fields(random.Random(seed), request))
        for seed in range(200)
        if LONE_SURROGATE not in mutate_fields(random.Random(seed), request)
    ]
    assert any(min(one.tensor.shape, default=0) < 0 for one in found)
    assert any(max(one.tensor.shape, default=0) > 2**40 for one in found)


def test_json_structures_have_odd_types_duplicates_and_depth() -> None:
    texts = [json_text.mutate_structure(random.Random(seed), BODY) for seed in range(800)]
    assert all(json_text.mutate_structure(random.Random(3), BODY) == texts[3] for _ in range(2))
    pairs = [read_pairs(text) for text in texts]
    read = [dict(one) for one in pairs if one]
    assert any(isinstance(one.get("max_tokens"), str) for one in read)
    assert any("prompt" not in one for one in read)
    assert any(len({key for key, _ in one}) < len(one) for one in pairs)
    assert any(b"[" * 500 in text for text in texts)


def read_pairs(text: bytes) -> list[tuple[str, object]]:
    try:
        found = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return []
    is_object = isinstance(found, list) and all(isinstance(one, tuple) for one in found)
    return found if is_object else []


def test_json_texts_are_truncated_recoded_and_not_utf8() -> None:
    texts = [json_text.mutate_text(random.Random(seed), BODY) for seed in range(400)]
    assert b"" in texts
    assert any(text.startswith(b"\xff\xfe") for text in texts)
    assert any(b"\xed\xa0\x80" in text for text in texts)


def test_image_parts_are_joined_as_they_were_split() -> None:
    for file in image_files.seed_files():
        if file.startswith(image_files.PNG_SIGNATURE):
            assert image_files.png_file(image_files.png_chunks(file)) == file
        if file.startswith(image_files.JPEG_START):
            parts = image_files.jpeg_segments(file)
            assert image_files.JPEG_START + b"".join(parts) == file
            assert len(parts) > 4


def test_image_mutations_keep_some_files_readable() -> None:
    read = [is_readable(image_files.mutate_image(random.Random(seed))) for seed in range(200)]
    assert 5 < sum(read) < 195


def is_readable(file: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(file)) as picture:
            if picture.width * picture.height > 10**5:
                return False
            picture.load()
    except Exception:  # decoders raise errors of many types
        return False
    return True


@pytest.mark.parametrize("mutation", http_bytes.MUTATIONS)
def test_a_mutation_of_a_request_changes_its_bytes(
    mutation: Callable[[random.Random, bytes], bytes],
) -> None:
    request = http_bytes.encode_request("/v1/completions", b'{"a": 1}', (("x-a", "1"),))
    assert request.endswith(b'x-a: 1\r\n\r\n{"a": 1}')
    changed = [mutation(random.Random(seed), request) for seed in range(20)]
    assert any(one != request for one in changed)
