"""Typed mutations of protobuf messages: fields with extreme, odd, empty, huge or no values."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ladderstitch_loadtest.faults.fuzzing.odd_values import draw_float, draw_integer, draw_text

SURROGATE_MARK = "\x01\x02\x03"
"""A text that the encoded message has in place of an encoded lone surrogate."""
LONE_SURROGATE = b"\xed\xa0\x80"
KEYS = (
    "latency_budget_us",
    "hard_deadline",
    "timeout",
    "variant_id",
    "priority",
    "min_quality",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "sequence_id",
    "triton_enable_empty_final_response",
    "binary_data_output",
)
"""Keys of maps: parameters of the Open Inference Protocol."""
HUGE_LIST, LONG_LIST = 100_000, 300
SHARE_OF_HUGE_LISTS = 0.03
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
"""The range of each integer type."""


def mutate_fields(rng: random.Random, message: Message) -> bytes:
    """Return the encoding of a copy of the message in which one to three fields are changed.

    A text field may hold a lone surrogate, which parsers of protobuf reject.
    """
    changed = type(message)()
    changed.CopyFrom(message)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        owner: Any = rng.choice(_messages_in(changed))
        fields = owner.DESCRIPTOR.fields
        if fields:
            _change(rng, owner, rng.choice(fields))
    encoded = changed.SerializeToString(deterministic=True)
    return encoded.replace(SURROGATE_MARK.encode(), LONE_SURROGATE)


def _messages_in(message: Message) -> list[Message]:
    """Return the message and all messages in its fields, those in maps too."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if _is_map(field):
            inner = [v for v in value.values() if isinstance(v, Message)]
        else:
            inner = list(value) if field.is_repeated else [value]
        for part in inner[:8]:
            found += _messages_in(part)
    return found


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _change(rng: random.Random, owner: Any, field: FieldDescriptor) -> None:
    if rng.random() < 0.1:
        owner.ClearField(field.name)
    elif _is_map(field):
        _change_map(rng, getattr(owner, field.name), field)
    elif field.is_repeated and field.message_type is not None:
        _change_messages(rng, getattr(owner, field.name))
    elif field.is_repeated:
        _change_list(rng, getattr(owner, field.name), field)
    elif field.message_type is not None:
        getattr(owner, field.name).SetInParent()
        _change(rng, getattr(owner, field.name), rng.choice(field.message_type.fields))
    else:
        setattr(owner, field.name, draw_scalar(rng, field))


def draw_scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    """Return an odd value of the field's type."""
    kind = field.cpp_type
    if kind in INTEGERS:
        return draw_integer(rng, *INTEGERS[kind])
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return draw_float(rng)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 4, 100, 784, 785, 3136)))
    if rng.random() < 0.1:
        return "a" + SURROGATE_MARK
    return draw_text(rng)


def _change_map(rng: random.Random, entries: Any, field: FieldDescriptor) -> None:
    key = rng.choice(KEYS) if rng.random() < 0.8 else draw_text(rng)
    assert field.message_type is not None, "entries of maps are messages"
    value = field.message_type.fields_by_name["value"]
    if value.message_type is None:
        entries[key] = draw_scalar(rng, value)
        return
    entry = entries[key]
    chosen = rng.choice(value.message_type.fields)
    setattr(entry, chosen.name, draw_scalar(rng, chosen))


def _change_messages(rng: random.Random, items: Any) -> None:
    choice = rng.randrange(4)
    if choice == 0 or not items:
        items.add()
    elif choice == 1:
        items.add().CopyFrom(rng.choice(items))
    elif choice == 2:
        del items[rng.randrange(len(items))]
    else:
        for _ in range(rng.choice((3, 40))):
            items.add().CopyFrom(items[0])


def _change_list(rng: random.Random, items: Any, field: FieldDescriptor) -> None:
    choice = rng.randrange(5)
    if choice == 0:
        del items[:]
    elif choice == 1 and items:
        items[rng.randrange(len(items))] = draw_scalar(rng, field)
    elif choice == 2 and items:
        del items[rng.randrange(len(items))]
    elif choice == 3:
        is_huge = rng.random() < SHARE_OF_HUGE_LISTS
        is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
        size = HUGE_LIST if is_huge and not is_text else rng.randint(1, LONG_LIST)
        items.extend([_short_scalar(rng, field)] * size)
    else:
        items.append(draw_scalar(rng, field))


def _short_scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return b"ab" if field.type == FieldDescriptor.TYPE_BYTES else "ab"
    return draw_scalar(rng, field)
