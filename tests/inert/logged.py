"""Objects that are as good as the ones they stand for, and write down everything they are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

LOG: list[tuple[str, str]] = []
"""What was asked: (name of the object, special method or attribute)."""

_NAMES: Final = """
abs add aiter and anext await bool bytes call ceil complex contains copy deepcopy delattr delitem dir divmod enter eq
exit float floor floordiv format fspath ge getitem gt hash iadd iand index int invert ior isub iter le len length_hint
lshift lt matmul mod mul ne neg next or pos pow radd rand rdivmod reduce reduce_ex repr reversed rfloordiv rmod rmul
ror round rpow rshift rsub rtruediv rxor setattr setitem sizeof str sub truediv trunc xor
"""
_SPECIAL: Final = [f"__{name}__" for name in _NAMES.split()]
_COPIES: Final = frozenset({"__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__"})


def stand_in(real: Any, name: str) -> Any:
    """An object that has and does what ``real`` has and does; copies of it are itself.

    Args:
        real: any object.
        name: its name in the log.
    """

    def method(special: str) -> Callable[..., Any]:
        def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
            LOG.append((name, special))
            return self if special in _COPIES else getattr(type(real), special)(real, *args, **kwargs)

        return asked

    def attribute(self: Any, wanted: str) -> Any:
        LOG.append((name, wanted))
        return type(real) if wanted == "__class__" else getattr(real, wanted)

    body = {special: method(special) for special in _SPECIAL if special in _COPIES or hasattr(type(real), special)}
    return type("StandIn", (), {**body, "__getattribute__": attribute})()


def derived(base: type, name: str) -> Any:
    """A class that derives from ``base``; what is asked of it and of its instances is written down."""

    def method(special: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
            LOG.append((name, special))
            return own(self, *args, **kwargs)

        return asked

    def attribute(self: Any, wanted: str) -> Any:
        LOG.append((name, wanted))
        return base.__getattribute__(self, wanted)

    found = {special: getattr(base, special, None) for special in _SPECIAL}
    body = {special: method(special, own) for special, own in found.items() if own is not None}
    kind: Any = asking(type(base), name)
    return kind(name, (base,), {**body, "__getattribute__": attribute, "__module__": __name__})


def of_logged_class(name: str) -> Any:
    """A plain object whose class writes down what it is asked itself, as an entry of a set is for its hash."""
    return asking(type, name)("Asked", (), {"__module__": __name__})()


def asking(base: type, name: str) -> Any:
    """A metaclass that derives from ``base``, whose classes write down what they are asked."""

    def hashed(kind: Any) -> int:
        LOG.append((name, "__hash__ of its class"))
        return type.__hash__(kind)

    def equal(kind: Any, other: Any) -> Any:
        LOG.append((name, "__eq__ of its class"))
        return type.__eq__(kind, other)

    def attribute(kind: Any, wanted: str) -> Any:
        LOG.append((name, f"{wanted} of its class"))
        return base.__getattribute__(kind, wanted)

    return type("Asking", (base,), {"__hash__": hashed, "__eq__": equal, "__getattribute__": attribute})
