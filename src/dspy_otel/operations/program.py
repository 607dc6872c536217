"""Programs: their state, their identity, and what is known of them between calls."""

from __future__ import annotations

import contextlib
import operator
import weakref
from itertools import islice
from typing import Any, Final, NamedTuple

from dspy_otel.content import introspection
from dspy_otel.content.digest import digest
from dspy_otel.content.id_key import IdKey
from dspy_otel.content.introspection import LEAVES, is_a
from dspy_otel.content.names import LONGEST, class_name, without_secrets
from dspy_otel.core.call_context import Program
from dspy_otel.core.internal_errors import guard
from dspy_otel.operations.identity_cache import IdentityCache
from dspy_otel.operations.module_tree import (
    attributes,
    named_modules,
    named_parameters,
    named_predictors,
    origin,
    origins,
    places_in_digest,
    survey,
)
from dspy_otel.operations.texts import Texts

_MAX_ITEMS: Final = 256
_MAX_OBJECTS: Final = 4096
_MOST_ORIGINALS: Final = 8
"""Among how many programs, those that were described last, the original of a copy is looked for."""


def _add_state(module: Any, shape: list[Any], objects: list[Any]) -> None:
    """Add what a module's state consists of: as long as shape and objects stay the same, so does the state.

    A demo changed in place (``demo["answer"] = ...``) shows, because its keys are in the shape and its values among the
    objects.
    """
    stored = attributes(module)
    signature = stored.get("signature")
    if signature is None:
        source = stored.get("_module_src")  # dspy.Flex
        if source is not None:
            objects.append(source)
        return
    # `instructions` is a property that makes a new string each time; the text lives in `__doc__`.
    objects.append(signature)
    if isinstance(signature, type):
        objects.append(vars(signature).get("__doc__"))
        for field in getattr(signature, "__pydantic_fields__", {}).values():
            extra = field.json_schema_extra
            if type(extra) is dict:
                objects += extra.get("desc"), extra.get("prefix")
    demos = stored.get("demos")
    count = introspection.length(demos)
    if count is not None:
        shape.append(count)
        for demo in introspection.items(demos) if count else ():
            values = demo if issubclass(type(demo), dict) else introspection.store_of(demo)
            if values is None:
                objects.append(demo)
                continue
            for key, value in dict.items(values):
                shape.append(key if type(key) is str else id(key))
                objects.append(value)
                if id(type(value)) not in LEAVES:
                    _add_parts(value, shape, objects, 3)
            shape.append(len(objects))
    decisions = stored.get("fields")
    if decisions:
        _add_parts(decisions, shape, objects, 3)
        shape.append(len(objects))


def _add_parts(value: Any, shape: list[Any], objects: list[Any], depth: int) -> None:
    """Add the parts of a list, dictionary or model, and the names of its entries: it may be changed in place."""
    if len(objects) >= _MAX_OBJECTS:  # Looked at on each call.
        return
    parts: Any = introspection.items(value)
    if introspection.length(value) is None:
        entries = value if is_a(value, dict) else introspection.instance_dict(value)
        shape += (key if type(key) is str else id(key) for key in islice(dict.keys(entries), _MAX_ITEMS))
        parts = dict.values(entries)
    for part in islice(parts, _MAX_ITEMS):
        objects.append(part)
        if depth and id(type(part)) not in LEAVES:
            _add_parts(part, shape, objects, depth - 1)


def program_digest(program: Any) -> str | None:
    """A stable digest of a program's state: instructions, field texts, demos and decision settings of every predictor,
    by name, and the source of every ``dspy.Flex``.

    The same before ``save()`` and after ``load()``, and for an optimizer's candidate and the program it returns.

    Args:
        program: a ``dspy.Module``.

    Returns:
        16 hex digits, or ``None`` for a program with neither.
    """
    state: dict[str, Any] = {name: _predictor_state(predictor) for name, predictor in named_predictors(program)}
    if any("_module_src" in attributes(module) for module in survey(program).modules):
        for place, module in places_in_digest(program):
            source = attributes(module).get("_module_src")
            if is_a(source, str):  # dspy.Flex: its predictors are in its source.
                state[f"{place}:source"] = source
    return digest(state) if state else None


def _predictor_state(predictor: Any) -> dict[str, Any]:
    stored = attributes(predictor)
    signature = stored["signature"]
    state = {
        "instructions": signature.instructions,
        "fields": [
            [name, (field.json_schema_extra or {}).get("prefix"), (field.json_schema_extra or {}).get("desc")]
            for name, field in signature.fields.items()
        ],
        "demos": [_demo_state(demo) for demo in introspection.items(stored.get("demos"))],
    }
    decisions = stored.get("fields")
    if decisions:  # DSPy 3.4: thresholds, cuts and weights of decision outputs, which ReAnchor fits
        state["decisions"] = decisions
    return state


def _demo_state(demo: Any) -> Any:
    values = demo if is_a(demo, dict) else introspection.store_of(demo)
    if values is None:
        return demo
    return {key: value for key, value in dict.items(values) if not (introspection.text(key) or "").startswith("dspy_")}


class Programs:
    """Knows the programs that were called: their name, id, and the paths of their modules.

    Args:
        id_key: of the ids of dataset rows; ``None`` for plain digests.
    """

    def __init__(self, id_key: IdKey | None = None) -> None:
        self._id_key = id_key
        self._programs = IdentityCache()
        self._examples = IdentityCache()
        self._signatures = IdentityCache()
        self._originals: list[weakref.ref[Any]] = []

    @guard("program")
    def find(self, root: Any) -> Program:
        """The program whose outermost module is ``root``. Cheap when nothing changed since the last call.

        Reads the program's structure and the identity of its state on each call, because both may change between
        calls; paths and digest are only worked out anew when they did.
        """
        modules, shape, places = survey(root)
        objects: list[Any] = []
        for module in modules:
            _add_state(module, shape, objects)
            shape.append(len(objects))

        def make() -> _Known:
            form = [places.get(each, each) if type(each) is int else each for each in shape]
            for module in modules:
                form += _kept_by_copies(module)
            classes = [weakref.ref(type(module)) for module in modules]
            return self._copy_of_known(form, classes, modules, objects) or self._describe(
                root, form, classes, modules, objects
            )

        known: _Known = self._programs.get(root, shape, objects, make)
        return known.program

    def _copy_of_known(
        self, form: list[Any], classes: list[weakref.ref[type]], modules: list[Any], objects: list[Any]
    ) -> _Known | None:
        """What is known of a program, if it is a copy of one that was described lately.

        Optimizers copy a program for each example. A deep copy has the very texts and signatures of its original.
        """
        for handle in self._originals:
            original = handle()
            known: _Known | None = None if original is None else self._programs.of_same(original, objects)
            # There is one weak reference without a callback to each class.
            if known is not None and known.form == form and all(map(operator.is_, known.classes, classes)):
                paths = dict(zip(map(id, modules), known.paths, strict=True))
                return known._replace(program=known.program.copy(paths))
        return None

    def _describe(
        self,
        root: Any,
        form: list[Any],
        classes: list[weakref.ref[type]],
        modules: list[Any],
        objects: list[Any],
    ) -> _Known:
        named = named_modules(root)
        paths = {id(module): path for path, module in named}
        name = without_secrets(root.name[:LONGEST]) if type(root) is Texts else class_name(type(root))
        program = Program(name, _id_of(root), paths, origins(named))
        others = [each for each in self._originals if not ((of := each()) is None or of is root)]
        known = _Known(program, None, [], [])
        if type(root) is not Texts and all(map(_is_leaf_or_class, objects)) and _is_complete(modules, paths, root):
            with contextlib.suppress(TypeError):  # It cannot be weakly referenced.
                others = [weakref.ref(root), *others][:_MOST_ORIGINALS]
                known = _Known(program, form, classes, [paths[id(module)] for module in modules])
        self._originals = others
        return known

    @guard("module paths")
    def place(self, module: Any, program: Program, caller: str | None) -> tuple[str | None, dict[int, str]]:
        """Where a module belongs that was made during a call of ``program``.

        A copy of one of the program's modules, as BestOfN and Refine run it, belongs where the original does. Of any
        other module only those inside have paths, from there.

        Args:
            module: the module, which is not in the program itself.
            program: the program.
            caller: path of the module that calls it, if it has one.

        Returns:
            Its path or ``None``, and the paths of the modules inside of it. None of these is the path of another
            module.
        """
        made = named_modules(module)
        path = origin(made, program.origins, caller)
        if path is None:
            taken = set(program.paths.values())
            return None, {id(each): inner for inner, each in made if inner not in taken}
        return path, {id(each): f"{path}.{inner}" if path and inner else path or inner for inner, each in made}

    @guard("example id")
    def example_id(self, example: Any) -> str | None:
        """A stable id of a dataset row: the same in every evaluation that uses the row, and in the next process."""
        values = introspection.store_of(example)
        if values is None:
            return None
        found: str = self._examples.get(example, [], list(dict.values(values)), lambda: self._row_id(values))
        return found

    def _row_id(self, values: dict[Any, Any]) -> str:
        plain = digest(values)
        return plain if self._id_key is None else self._id_key.of(plain)

    @guard("signature fields")
    def signature_fields(self, signature: Any) -> str:
        """``"question -> answer"``: the signature's field names, kept per signature class."""
        found: str = self._signatures.get(signature, [], [], lambda: _field_names(signature))
        return found


class _Known(NamedTuple):
    """A program, and by what its copies are known.

    Attributes:
        program: what the inner operations need of it.
        form: of its structure and state what copies share, besides the objects of the state; ``None`` where its copies
            are not to be known by it.
        classes: of its modules.
        paths: likewise.
    """

    program: Program
    form: list[Any] | None
    classes: list[weakref.ref[type]]
    paths: list[str]


def _kept_by_copies(module: Any) -> tuple[Any, Any]:
    """What a copy of a module keeps: the random text by which DSPy knows a predictor, and whether it is frozen."""
    stored = attributes(module)
    stage, frozen = stored.get("stage"), stored.get("_compiled", False)
    return stage if type(stage) is str else None, frozen if type(frozen) is bool else object()


def _is_leaf_or_class(part: Any) -> bool:
    """Whether a part of a program's state is what it is as long as it is the same object, as a text is.

    Of a signature, which may be changed in place, the texts are parts, too.
    """
    return id(type(part)) in LEAVES or issubclass(type(part), type)


def _is_complete(modules: list[Any], paths: dict[int, str], root: Any) -> bool:
    """Whether these are all modules of a program. The search for them has limits, which its digest has not."""
    if paths.keys() != set(map(id, modules)):
        return False
    try:
        return all(id(each) in paths for _, each in named_parameters(root))
    except RecursionError:  # It contains itself.
        return False


@guard("program id")
def _id_of(root: Any) -> str | None:
    try:
        return program_digest(root)
    except RecursionError:  # It contains itself: DSPy can neither name its predictors nor save it.
        return None


def _field_names(signature: Any) -> str:
    return f"{', '.join(signature.input_fields)} -> {', '.join(signature.output_fields)}"
