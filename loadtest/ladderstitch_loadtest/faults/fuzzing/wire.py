"""Mutations of bytes: of any bytes, and of protobuf messages by their wire format.

Each function takes a random generator and the bytes, and returns other bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

ByteMutation = Callable[[random.Random, bytes], bytes]

VARINT, FIXED64, LENGTH, GROUP_START, GROUP_END, FIXED32 = range(6)
NESTED_GROUPS = 10_000
MAX_INSERTED = 64


class Record(NamedTuple):
    """One field of an encoded message: `data[start:end]`, whose value starts at `value`."""

    start: int
    value: int
    end: int
    number: int
    wire_type: int


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint that starts at `at`, and the position after it.

    Raises `ValueError` if the bytes end before it does, or if it has more than ten bytes.
    """
    value = 0
    for count, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, at + count + 1
    raise ValueError(f"varint at {at}: expected at most ten bytes and an end, got neither")


def write_varint(value: int) -> bytes:
    """Return the varint of a number from 0 to 2**64 - 1."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def records(data: bytes) -> list[Record]:
    """Return the fields of an encoded message, up to the first one that is malformed."""
    found: list[Record] = []
    at = 0
    while at < len(data):
        try:
            tag, value = read_varint(data, at)
            end = _end_of_value(data, value, tag & 7)
        except ValueError:
            break
        found.append(Record(at, value, end, tag >> 3, tag & 7))
        at = end
    return found


def _end_of_value(data: bytes, at: int, wire_type: int) -> int:
    if wire_type == VARINT:
        return read_varint(data, at)[1]
    if wire_type == LENGTH:
        length, at = read_varint(data, at)
        end = at + length
    else:
        sizes = {FIXED64: 8, FIXED32: 4, GROUP_START: 0, GROUP_END: 0}
        end = at + sizes.get(wire_type, len(data) + 1)
    if end > len(data):
        raise ValueError(f"value at {at}: expected {end} bytes or more, got {len(data)}")
    return end


def flip_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with one to eight of them changed."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Return a proper prefix of the bytes."""
    return data[: rng.randrange(len(data))] if data else data


def insert_random(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with up to 64 random ones inserted at one place."""
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.randint(1, MAX_INSERTED)) + data[at:]


def repeat_slice(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with a part of them repeated."""
    start = rng.randint(0, len(data))
    end = rng.randint(start, len(data))
    return data[:end] + data[start:end] + data[end:]


def remove_slice(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes without a part of them."""
    start = rng.randint(0, len(data))
    return data[:start] + data[rng.randint(start, len(data)) :]


def change_tag(rng: random.Random, data: bytes) -> bytes:
    """Return the message with another field number or wire type before one of its values."""
    record = _draw_record(rng, data)
    if record is None:
        return insert_random(rng, data)
    number, wire_type = record.number, record.wire_type
    if rng.random() < 0.5:
        number = rng.choice((0, 1, number + 1, rng.randint(1, 20), 2**29 - 1))
    else:
        wire_type = rng.randint(0, 7)
    tag = write_varint(number << 3 | wire_type)
    return data[: record.start] + tag + data[record.value :]


def change_length(rng: random.Random, data: bytes) -> bytes:
    """Return the message with a wrong length, or a wrong number, in one of its fields."""
    record = _draw_record(rng, data)
    if record is None or record.wire_type not in (VARINT, LENGTH):
        return flip_bytes(rng, data)
    value, end = read_varint(data, record.value)
    wrong = rng.choice((0, max(0, value - 1), value + 1, 2 * value, 2**31 - 1, 2**32, 2**64 - 1))
    return data[: record.value] + write_varint(wrong) + data[end:]


def repeat_record(rng: random.Random, data: bytes) -> bytes:
    """Return the message with one of its fields twice, the second one at the end."""
    record = _draw_record(rng, data)
    return data + (data[record.start : record.end] if record else data)


def shuffle_records(rng: random.Random, data: bytes) -> bytes:
    """Return the message with its fields in another order."""
    parts = [data[record.start : record.end] for record in records(data)]
    rng.shuffle(parts)
    return b"".join(parts)


def nest_groups(rng: random.Random, data: bytes) -> bytes:
    """Return the message with thousands of nested groups, which may never end."""
    depth = rng.choice((50, 200, NESTED_GROUPS))
    number = rng.choice((15, 99))
    starts = write_varint(number << 3 | GROUP_START) * depth
    ends = write_varint(number << 3 | GROUP_END) * rng.choice((depth, depth - 1, 0))
    return data + starts + ends


def mutate_nested(rng: random.Random, data: bytes) -> bytes:
    """Return the message with a mutated message or text in one of its fields, of right length."""
    lengths = [record for record in records(data) if record.wire_type == LENGTH]
    if not lengths:
        return flip_bytes(rng, data)
    record = rng.choice(lengths)
    start = read_varint(data, record.value)[1]
    inner = mutate(rng, data[start : record.end], NESTED)
    head = data[: record.value] + write_varint(len(inner))
    return head + inner + data[record.end :]


def _draw_record(rng: random.Random, data: bytes) -> Record | None:
    found = records(data)
    return rng.choice(found) if found else None


def mutate(rng: random.Random, data: bytes, mutations: Sequence[ByteMutation]) -> bytes:
    """Return the bytes after one to three of the mutations."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(mutations)(rng, data)
    return data


ANY_BYTES: tuple[ByteMutation, ...] = (
    flip_bytes,
    truncate,
    insert_random,
    repeat_slice,
    remove_slice,
)
"""Mutations of bytes of any format."""
NESTED: tuple[ByteMutation, ...] = (
    *ANY_BYTES,
    change_tag,
    change_length,
    repeat_record,
    shuffle_records,
)
"""Mutations of a part of a message."""
MESSAGE: tuple[ByteMutation, ...] = (*NESTED, nest_groups, mutate_nested, mutate_nested)
"""Mutations of a whole message."""
