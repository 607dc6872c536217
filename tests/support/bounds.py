"""The lower bounds of pyproject.toml, and whether they are what is installed here: `python bounds.py EXTRAS [--check]`.

Prints each as `package==version`, for pip's or uv's `-c`. With `--check`, fails when something has moved one of them
up: then the lower bound was not what the tests ran on.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires, version


def bounds(extras: set[str]) -> dict[str, str]:
    """The packages that dspy-otel names for these extras, with their lower bounds."""
    found: dict[str, str] = {}
    for line in requires("dspy-otel") or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if extra is not None and extra.group(1) not in extras:
            continue
        parts = re.fullmatch(r"([\w.-]+)(?:\[([\w,.-]+)\])?(.*)", requirement)
        assert parts is not None, line
        name, inner, range_ = parts.groups()
        bound = re.search(r">=\s*([\w.]+)", range_)
        if name == "dspy-otel" and inner:
            found.update(bounds({*inner.split(",")}))
        elif bound is not None:
            found[name] = bound.group(1)
    return found


def same(one: str, other: str) -> bool:
    """Whether two versions are equal, however many zeros they end in."""
    return re.sub(r"(\.0)+$", "", one) == re.sub(r"(\.0)+$", "", other)


def main(extras: str, *options: str) -> int:
    """Print the bounds, or check them."""
    # DSPy is in the pair's name: it may be above its bound.
    found = {name: bound for name, bound in bounds(set(extras.split(","))).items() if name != "dspy"}
    if "--check" not in options:
        print("\n".join(f"{name}=={version(name)}" for name in found))
        return 0
    moved = [f"{name} {version(name)}, not {bound}" for name, bound in found.items() if not same(version(name), bound)]
    if moved:
        print(f"not at their lower bound: {'; '.join(moved)}", file=sys.stderr)
    return bool(moved)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
