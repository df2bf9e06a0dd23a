"""Two-digit addition with its carries written out: a procedural task that a tiny model learns in seconds.

    47+38=   →   7+8=15,4+3+1=08;85

Units, then tens with the carry, each sum two digits wide so that every step stands at a fixed place;
the answer is what follows the last `;`.
"""

from __future__ import annotations

from typing import Literal

from envs.datasets import Row, split_held_out

ALPHABET = "0123456789+=,;"
"""Every character of a question or a completion."""

MAX_COMPLETION_CHARS = len("9+9=18,9+9+1=19;198")


def rows(split: Literal["train", "test"], seed: int = 0, test_size: int = 500) -> list[Row]:
    """One side of all 100 × 100 problems. `a+b` and `b+a` are always on the same side."""
    problems = [_row(a, b) for a in range(100) for b in range(100)]
    train, test = split_held_out(problems, test_size, seed, key=_operands)
    return {"train": train, "test": test}[split]


def completion(a: int, b: int) -> str:
    """The worked answer to `a+b`, for 0 ≤ a, b ≤ 99."""
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}={units:02d},{a // 10}+{b // 10}+{carry}={tens:02d};{a + b}"


def answer(text: str) -> str | None:
    """The digits after the last `;`, or None if there is no `;` or something else follows it."""
    _, separator, last = text.rpartition(";")
    last = last.strip()
    return last if separator and last.isascii() and last.isdigit() else None


def _row(a: int, b: int) -> Row:
    question = f"{a:02d}+{b:02d}="
    return Row(
        row_id=f"arithmetic:{question[:-1]}",
        messages=({"role": "user", "content": question},),
        expected_answer=str(a + b),
        completion=completion(a, b),
    )


def _operands(row: Row) -> tuple[str, ...]:
    return tuple(sorted(row.messages[0]["content"].rstrip("=").split("+")))
