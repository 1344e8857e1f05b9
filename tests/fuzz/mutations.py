"""Damaged files, from whole ones."""

import random
from collections.abc import Callable

NUMBERS = [0, 1, 2, 7, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice(b'\0\1\x7f\x80\xff{}[]",:0-9e.\\$')


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 64)]


def repeat(data: bytearray, rng: random.Random) -> None:
    start, place = rng.randrange(len(data)), rng.randrange(len(data))
    data[place:place] = data[start : start + rng.randint(1, 256)]


def overwrite(data: bytearray, rng: random.Random) -> None:
    start, place, count = rng.randrange(len(data)), rng.randrange(len(data)), rng.randint(1, 64)
    data[place : place + count] = data[start : start + count]


def set_number(data: bytearray, rng: random.Random) -> None:
    """A binary number, as in a length or an offset; often the first one of the file."""
    width = rng.choice([2, 4, 8])
    place = rng.choice([0, rng.randrange(len(data))])
    data[place : place + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")


def set_digits(data: bytearray, rng: random.Random) -> None:
    """A number in text, as in a header of JSON."""
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if places:
        start = end = rng.choice(places)
        while end < len(data) and 48 <= data[end] <= 57:
            end += 1
        number = rng.choice([*NUMBERS, -1, -8, 2**64, 0.5, 1e400])
        data[start:end] = str(number).encode()


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    flip,
    set_byte,
    cut,
    remove,
    repeat,
    overwrite,
    set_number,
    set_digits,
]


def mutated(whole: bytes, seed: int) -> bytes:
    """The bytes of a file with up to four kinds of damage; the same ones for the same seed.

    Most are near the beginning or the end, where the structure of a file is.
    """
    rng = random.Random(seed)
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not data:
            break
        low, high = rng.choice([(0, len(data)), (0, min(len(data), 2048)), (max(0, len(data) - 2048), len(data))])
        part = data[low:high]
        rng.choice(MUTATIONS)(part, rng)
        data[low:high] = part
    return bytes(data)
