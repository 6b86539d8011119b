"""A number's range, checked and told in the same words in Python and on the command line."""


def outside(value: float, least: float, most: float, *, above: bool = False) -> str | None:
    """What was expected of `value` where it isn't in the range, `above` its lower end or from it on; NaN is in none."""
    if least <= value <= most and not (above and value == least):
        return None
    return f"expected a number {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}"
