"""Answers that can be verified: the last number of a reply."""

import re
from decimal import Decimal


# A minus between two operands ("10-3") is no sign
_NUMBER = re.compile(r"(?:(?<![\d)])-)?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?")


def extract_answer(reply: str) -> str | None:
    """Return the last number of a reply in plain form (`"1,204.0"` is `"1204"`), or `None`."""
    numbers = _NUMBER.findall(reply.replace("\u2212", "-"))
    if not numbers:
        return None
    number = Decimal(numbers[-1].replace(",", ""))
    if number == 0:  # nor "-0"
        return "0"
    # Not by way of `int`, which refuses numbers of thousands of digits
    return f"{number.to_integral_value():f}" if number == number.to_integral_value() else str(number)
