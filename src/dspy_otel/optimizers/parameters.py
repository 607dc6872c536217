"""The parameters of an optimization: those of an optimizer's constructor and of ``compile()``, as attributes."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from itertools import islice
from types import FunctionType
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.content import introspection, redaction
from dspy_otel.content.digest import digest
from dspy_otel.content.encoder import Content
from dspy_otel.content.names import is_parameter
from dspy_otel.core.attributes import Attributes, AttributeValue
from dspy_otel.operations.evaluation import callable_name

# Text that names a choice, and is not a user's own: one short lower-case name, or such names joined by arrows. Its
# parts are words, numbers or short mixtures (`4o`): long mixtures of letters and digits are keys.
_PART: Final = r"(?:[a-z]{1,24}|[0-9]{1,8}|[a-z0-9]{1,7})"
_NAME: Final = rf"{_PART}(?:[_.-]+{_PART})*"
_CHOICE: Final = re.compile(rf"(?=.{{1,48}}$){_NAME}(?: -> {_NAME})*")
_NOT_PARAMETERS: Final = frozenset(
    {"self", "student", "trainset", "valset", "teacher", "programs", "callbacks", "args", "kwargs", "_args", "_kwargs"}
)
# Constructor parameters that optimizers of DSPy keep under another name, or on an object that they make.
_STORED_AS: Final = {
    "metric": "metric_fn",
    "num_candidate_programs": "num_candidate_sets",
    "max_bootstrapped_demos": "max_num_samples",
    "instruction_proposer": "custom_instruction_proposer",
    "code_proposer": "custom_code_proposer",
    "k": "KNN.k",
    "trainset": "KNN.trainset",
    "vectorizer": "KNN.embedding",
}
_CONTENT: Final = Content(limit=4096)
_signatures: Final = introspection.ByClass[inspect.Signature](inspect.signature)
"""By function: an optimizer that is a step of another one is made and called many times."""
_PLAIN_KINDS: Final = frozenset(map(id, (dict, list, tuple, set, frozenset)))
_MOST: Final = 100
_DEEPEST: Final = 4


def bound_arguments(
    instance: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], kind: type | None = None
) -> dict[str, Any]:
    """The arguments of ``compile()`` by name, defaults included. DSPy raises if they do not fit; this does not.

    Args:
        instance: the optimizer.
        args: positional arguments.
        kwargs: keyword arguments.
        kind: the class whose ``compile()`` this is, when it is not the instance's own.
    """
    with contextlib.suppress(TypeError, ValueError, StopIteration):
        bases = map(introspection.members_of, introspection.bases_of(kind or type(instance)))
        signature = _signatures.of(next(members["compile"] for members in bases if "compile" in members))
        bound = signature.bind(instance, *args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            elif signature.parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL:
                given[name] = value
        given.pop(next(iter(signature.parameters)), None)
        return given
    given = dict(kwargs)
    if args:
        given["student"] = args[0]
    return given


def constructor_arguments(instance: Any) -> dict[str, Any]:
    """The arguments of an optimizer's constructor, defaults included, as far as the optimizer keeps them.

    Parameters of every ``__init__`` of its class count: ``**kwargs`` usually go to the one of a base class.
    """
    stored = introspection.instance_dict(instance)
    found: dict[str, Any] = {}
    for kind in introspection.bases_of(type(instance)):
        init = introspection.members_of(kind).get("__init__")
        if init is None or kind is object:
            continue
        try:
            parameters = _signatures.of(init).parameters
        except (TypeError, ValueError):
            continue
        for name in parameters:
            if name in found or name == "self":
                continue
            for place in (name, _STORED_AS.get(name, name), f"_{name}"):
                kept = _stored(stored, place)
                if kept:
                    found[name] = kept[0]
                    break
    return found


def _stored(stored: Mapping[str, Any], place: str) -> tuple[Any, ...]:
    """The value under ``place``, as a tuple of one, or ``()``."""
    name, _, inner = place.partition(".")
    if name not in stored:
        return ()
    return (stored[name],) if not inner else _stored(introspection.instance_dict(stored[name]), inner)


def parameter_attributes(
    instance: Any, compile_arguments: Mapping[str, Any], content: bool, student: Any = None
) -> Attributes:
    """All parameters of an optimization as ``dspy.optimizer.params.*``; those given to ``compile()`` win.

    Numbers and booleans as they are; metrics, models, modules and functions by name; strings as they are with content
    on, else only where they name a choice (``light``, ``p -> w``); lists and dictionaries as JSON of such; secrets
    masked; datasets and programs left out, and whatever is ``None``.
    """
    given = {name: value for name, value in compile_arguments.items() if value is not None}
    attributes: Attributes = {}
    for name, value in {**constructor_arguments(instance), **given}.items():
        if name in _NOT_PARAMETERS or value is student or not is_parameter(name):
            continue
        shown = redaction.MASK if redaction.hides(name, value) else parameter(value, content)
        if shown is not None:
            attributes[f"{semconv.OPTIMIZER_PARAMS_PREFIX}{name}"] = shown
    return attributes


def parameter(value: Any, content: bool) -> AttributeValue | None:
    """One parameter as an attribute value, or ``None`` when there is nothing to show."""
    value = _for_every_lm(value)
    if id(type(value)) in _PLAIN_KINDS:
        return None if not value or is_dataset(value) else _CONTENT.json(_plain(value, content))
    shown: AttributeValue | None = _scalar(value, content)
    return _CONTENT.text(shown) if isinstance(shown, str) else shown


def _for_every_lm(value: Any) -> Any:
    """The setting in a dictionary that gives the same one for any LM: optimizers of weights make such dictionaries."""
    factory = value.default_factory if type(value) is defaultdict and not value else None
    if type(factory) is not FunctionType or not factory.__module__.startswith("dspy."):
        return value
    return factory()


def _scalar(value: Any, content: bool) -> bool | int | float | str | None:
    """A value that is no container: a number as it is, anything else as text."""
    kind = type(value)
    if value is None or value is True or value is False:
        return value
    whole = introspection.whole(value)
    number = whole if whole is not None else introspection.real(value)
    if number is not None:
        return number
    if issubclass(kind, str):
        return _choice(value, content)
    if issubclass(kind, Enum):
        return f"{introspection.name_of(kind)}.{introspection.field(value, '_name_')}"
    return _choice(str(value), content) if introspection.library(kind) == "pathlib" else named(value)


def _choice(value: str, content: bool) -> str:
    if content:
        return value
    return value if _CHOICE.fullmatch(value, 0, 64) else f"<{str.__len__(value)} characters>"


def _plain(value: Any, content: bool, depth: int = 0) -> Any:
    kind = type(value)
    if id(kind) not in _PLAIN_KINDS or depth >= _DEEPEST:
        return _scalar(value, content)
    if kind is dict:
        return {
            _choice(str(key), content) if type(key) is str or type(key) is int else named(key): _plain(
                item, content, depth + 1
            )
            for key, item in islice(value.items(), _MOST)
        }
    if is_dataset(value):
        return f"<{len(value)} examples>"
    return [_plain(item, content, depth + 1) for item in islice(value, _MOST)]


def named(value: Any) -> str:
    """An object by name: a model's, a function's or class's, else that of its class. Never its contents."""
    model = introspection.text(introspection.field(value, "model"), 256)
    return model or callable_name(value)  # An LM has a model.


def is_dataset(value: Any) -> bool:
    """Whether ``value`` is a list of examples."""
    first, _ = introspection.bounded(value, 1)
    return bool(first) and introspection.store_of(first[0]) is not None


def dataset_attributes(programs: Any, rows: Any, role: str) -> Attributes:
    """Size and digest of a dataset; ``role`` is ``train`` or ``val``."""
    count = introspection.length(rows)
    if count is None:
        return {}
    size, digest_name = {
        "train": (semconv.DATASET_TRAIN_SIZE, semconv.DATASET_TRAIN_DIGEST),
        "val": (semconv.DATASET_VAL_SIZE, semconv.DATASET_VAL_DIGEST),
    }[role]
    return {size: count, digest_name: digest([programs.example_id(row) for row in introspection.items(rows)])}
