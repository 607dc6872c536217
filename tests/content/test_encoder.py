"""Content rendering: always valid JSON, always within the limit, never raising, and never touching a user's code."""

from __future__ import annotations

import base64
import collections
import dataclasses
import datetime
import decimal
import enum
import gc
import json
import re
import threading
import tracemalloc
import types
import uuid
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_otel.content import encoder as module
from dspy_otel.content import introspection, redaction, truncation
from dspy_otel.content.encoder import MAX_DEPTH, MAX_ITEMS, MAX_NODES, MIN_LIMIT, Content

LIMIT = 4096
MARK = re.compile(r"…\[cut \d+ (characters|items|bytes)\]")


def test_classes_are_not_kept() -> None:
    """A program may make one for each request. Where it says that it comes from does not matter."""
    ended: list[weakref.ref[type]] = []
    for number in range(5):
        for kind in (
            dataclasses.make_dataclass("Row", ["x"]),
            type("Plain", (), {"__init__": lambda self, x: setattr(self, "x", x)}),
            type("Own", (dspy.Example,), {"__module__": "dspy.primitives.example"}),
        ):
            assert introspection.instance_dict(kind(x=number)).get("x", number) == number
            ended.append(weakref.ref(kind))
    del kind
    gc.collect()
    assert [each() for each in ended if each() is not None] == []


def render(value: Any, limit: int = LIMIT, **options: Any) -> Any:
    text = Content(limit, **options).json(value)
    assert len(text.encode("utf-8")) <= limit
    return json.loads(text)


# --- hostile values -----------------------------------------------------------------------------------------------


class Touched(BaseException):
    """Not an Exception, so that no `except Exception` can hide that a user's code was called."""


def touch(*_: Any, **__: Any) -> Any:
    raise Touched


HOSTILE_METHODS = (
    *(
        "__repr__",
        "__str__",
        "__eq__",
        "__ne__",
        "__len__",
        "__getattr__",
        "__getattribute__",
        "__deepcopy__",
        "__copy__",
    ),
    *(
        "__hash__",
        "__iter__",
        "__getitem__",
        "__contains__",
        "__bool__",
        "__format__",
        "__call__",
        "__reduce__",
        "__dir__",
    ),
    *(
        "__reduce_ex__",
        "__int__",
        "__float__",
        "__index__",
        "__bytes__",
        "__fspath__",
        "__sizeof__",
        "__next__",
        "__lt__",
    ),
    *(
        "__enter__",
        "__await__",
        "__missing__",
        "__reversed__",
        "__set__",
        "__delete__",
        "__del__x",
        "keys",
        "items",
        "values",
    ),
    *(
        "dict",
        "model_dump",
        "_asdict",
        "startswith",
        "encode",
        "bit_length",
        "shape",
        "dtype",
        "item",
        "hex",
        "is_integer",
    ),
)


def hostile_class(*bases: type, meta: type = type) -> type:
    body: dict[str, Any] = dict.fromkeys(HOSTILE_METHODS, touch)
    body["__class__"] = property(touch)
    if not bases:
        body["__dict__"] = property(touch)
        body["_store"] = property(touch)
    body["__hash__"] = touch
    return meta("Hostile", bases, body)


class HostileMeta(type):
    __getattribute__ = __getattr__ = __eq__ = __hash__ = __repr__ = __str__ = __instancecheck__ = touch
    __subclasscheck__ = __bool__ = __len__ = __iter__ = __call__ = __dir__ = touch
    __module__ = property(touch)  # type: ignore[assignment]
    __mro__ = property(touch)  # type: ignore[assignment]
    __dict__ = property(touch)  # type: ignore[assignment]
    __name__ = property(touch)


def hostile_values() -> dict[str, Any]:
    plain = hostile_class()
    metaclassed = hostile_class(meta=HostileMeta)
    text, mapping, items = hostile_class(str), hostile_class(dict), hostile_class(list)
    sets, tuples, numbers, reals, raw = (hostile_class(kind) for kind in (set, tuple, int, float, bytes))
    values: dict[str, Any] = {
        "object": object.__new__(plain),
        "metaclass": object.__new__(metaclassed),
        "class": metaclassed,
        "str": str.__new__(text, "text"),
        "dict": dict.__new__(mapping),
        "list": list.__new__(items),
        "set": set.__new__(sets),
        "tuple": tuple.__new__(tuples, (1, 2)),
        "int": int.__new__(numbers, 7),
        "float": float.__new__(reals, 0.5),
        "bytes": bytes.__new__(raw, b"abc"),
        "exception": ValueError.__new__(hostile_class(ValueError), "boom"),
        "datetime": datetime.datetime.__new__(hostile_class(datetime.datetime), 2020, 1, 1),
        "path": object.__new__(hostile_class(type(Path()))),
    }
    dict.__setitem__(values["dict"], "key", 1)
    list.append(values["list"], 1)
    set.add(values["set"], 1)
    values["key"] = {("a", None): 1}
    return values


@pytest.mark.parametrize("name", sorted(hostile_values()))
@pytest.mark.parametrize("nested", [False, True])
def test_no_code_of_a_users_class_is_called(name: str, nested: bool) -> None:
    value = hostile_values()[name]
    expected = {
        "str": "text",
        "dict": {"key": 1},
        "list": [1],
        "set": [1],
        "tuple": [1, 2],
        "int": 7,
        "float": 0.5,
        "bytes": "<3 bytes>",
        "key": {"(a, None)": 1},
    }
    shown = render([{"field": value}] if nested else value)
    shown = shown[0]["field"] if nested else shown
    if name in expected:
        assert shown == expected[name]
    else:
        assert "Hostile" in json.dumps(shown)


def test_hostile_class_as_a_dictionary_key() -> None:
    class Key:
        __repr__ = __str__ = touch

    assert render({Key(): 1}) == {f"<{__name__}.test_hostile_class_as_a_dictionary_key.<locals>.Key>": 1}


def test_lookup_protocols_are_not_used() -> None:
    """Descriptors that pydantic, dataclasses and DSPy's store look like, on a class that is none of them."""

    class Liar:
        __pydantic_fields__ = property(touch)
        __dataclass_fields__ = {"a": object.__new__(hostile_class())}
        a = property(touch)

    assert "Liar" in json.dumps(render(Liar())) or render(Liar()) == {}


def test_hostile_time_zone_is_not_asked() -> None:
    class Zone(datetime.tzinfo):
        utcoffset = dst = tzname = touch  # type: ignore[assignment]

    shown = render(datetime.datetime(2020, 1, 2, tzinfo=Zone()))
    assert shown.startswith("2020-01-02 00:00:00 <")


def test_generators_files_and_locks_are_not_consumed(tmp_path: Path) -> None:
    pulled: list[int] = []

    def produce() -> Any:
        pulled.append(1)
        yield 1

    place = tmp_path / "file"
    place.write_text("content")
    generator = produce()
    with place.open() as handle:
        shown = render([generator, handle, threading.Lock(), iter([1]), map(str, [1]), lambda: None])
        assert handle.tell() == 0
    assert pulled == []
    assert next(generator) == 1
    assert shown[0] == "<generator>"
    assert shown[1] == "<_io.TextIOWrapper>"
    assert all(isinstance(item, str) for item in shown)


# --- what users read ----------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Plain:
    a: int
    hidden: str = dataclasses.field(default="no", repr=False)


@dataclasses.dataclass(slots=True)
class Slotted:
    a: int
    b: str


class Unknown:
    def __init__(self) -> None:
        self.inside = "secret"


READABLE: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (3, 3),
    (1.5, 1.5),
    (float("nan"), "nan"),
    (float("-inf"), "-inf"),
    (10**400, "<int of 1329 bits>"),
    ("text", "text"),
    (b"abc", "<3 bytes>"),
    (memoryview(b"abcd"), "<4 bytes>"),
    (Colour.RED, "red"),
    (Level.HIGH, 3),
    (Point(1, 2), {"x": 1, "y": 2}),
    (Plain(1), {"a": 1}),
    (Slotted(1, "b"), {"a": 1, "b": "b"}),
    (Unknown(), f"<{__name__}.Unknown>"),
    (Unknown, f"<class {__name__}.Unknown>"),
    (len, "<function len>"),
    (types.SimpleNamespace(a=1), {"a": 1}),
    ({"b", "a", "c"}, ["a", "b", "c"]),
    (collections.OrderedDict(a=1), {"a": 1}),
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (collections.deque([1, 2]), [1, 2]),
    ({"a": 1}.keys(), ["a"]),
    ({1: "int", "1": "str", None: 0, (1, "a"): 2}, {"1": "int", "1'": "str", "None": 0, "(1, a)": 2}),
    (datetime.date(2020, 1, 2), "2020-01-02"),
    (datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc), "2020-01-02 00:00:00+00:00"),
    (decimal.Decimal("1.50"), "1.50"),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (Path("a/b"), str(Path("a/b"))),
    (1 + 2j, "(1+2j)"),
    (ValueError("boom", 3), {"type": "ValueError", "args": ["boom", 3]}),
    ({"api_key": "x", "none": None, "password": None}, {"api_key": "[masked]", "none": None, "password": None}),
]


@pytest.mark.parametrize(("value", "expected"), READABLE, ids=[str(type(value).__name__) for value, _ in READABLE])
def test_values_read_as_a_user_would_write_them(value: Any, expected: Any) -> None:
    assert render(value) == expected


def test_lone_surrogates_become_replacement_characters_and_pairs_are_joined() -> None:
    assert render("a\ud800b") == "a\ufffdb"
    assert render("\ud83d\ude00") == "😀"
    assert Content(100).text("a\udfffb") == "a\ufffdb"


def test_dspy_values() -> None:
    dspy = pytest.importorskip("dspy")
    assert render(dspy.Example(a=1, b="x").with_inputs("a")) == {"a": 1, "b": "x"}
    assert render(dspy.Prediction(answer="x", score=1.0)) == {"answer": "x", "score": 1.0}
    assert render(dspy.History(messages=[{"question": "q"}])) == {"messages": [{"question": "q"}]}
    picture = dspy.Image("data:image/png;base64," + "QUJD" * 100)
    assert render(picture) == {"url": "data:image/png;base64,<300 bytes>"}
    assert render(picture, media=True)["url"].endswith("QUJD")
    sound = dspy.Audio(data="UklGRiQ1" * 100, audio_format="wav")
    assert render(sound) == {"data": "<600 bytes>", "audio_format": "wav"}
    calls = dspy.ToolCalls.from_dict_list([{"name": "add", "args": {"x": 1}}])
    call = render(calls)["tool_calls"][0]
    assert (call["name"], call["args"]) == ("add", {"x": 1})
    assert render(dspy.LM("openai/none", api_key="k")) == "<dspy.clients.lm.LM>"


def test_pydantic_models_without_running_their_code() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Model(pydantic.BaseModel):
        model_config = {"extra": "allow"}
        name: str
        hidden: str = pydantic.Field("h", repr=False)
        kept_out: str = pydantic.Field("e", exclude=True)
        password: pydantic.SecretStr = pydantic.SecretStr("hunter22")
        sealed: pydantic.SecretStr = pydantic.SecretStr("hunter22")

        @pydantic.computed_field  # type: ignore[prop-decorator]
        @property
        def computed(self) -> int:
            raise Touched

        @pydantic.model_serializer
        def serialize(self) -> Any:
            raise Touched

    shown = render(Model(name="n", more=1))
    assert shown == {"name": "n", "password": "[masked]", "sealed": "<pydantic.types.SecretStr>", "more": 1}


def test_attrs_classes() -> None:
    attrs = pytest.importorskip("attrs")
    made = attrs.make_class("Made", {"a": attrs.field(), "b": attrs.field(repr=False)}, slots=True)
    assert render(made(1, 2)) == {"a": 1}


def test_arrays_and_tables_by_shape() -> None:
    numpy = pytest.importorskip("numpy")
    assert render(numpy.zeros((3, 4))) == "<numpy.ndarray (3, 4) float64>"
    assert render([numpy.float32(0.5), numpy.int64(3), numpy.bool_(True), numpy.array(2)]) == [0.5, 3, True, 2]

    class Sub(numpy.ndarray):
        __len__ = __repr__ = __iter__ = touch  # type: ignore[assignment]

    assert "Sub" in render(numpy.zeros(3).view(Sub))


def test_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    shown = render([pandas.DataFrame({"a": [1, 2]}), pandas.Timestamp("2020-01-02")])
    assert shown[0].endswith("DataFrame (2, 1)>")
    assert shown[1] == "2020-01-02 00:00:00"


def test_proxies_and_mocks_are_not_looked_through() -> None:
    from unittest.mock import MagicMock

    import wrapt

    mock = MagicMock(spec=str)
    assert render(mock) == "<unittest.mock.MagicMock>"
    assert mock.mock_calls == []
    assert "ObjectProxy" in render(wrapt.ObjectProxy({"a": 1}))


# --- bounds -------------------------------------------------------------------------------------------------------


def test_deep_and_cyclic_values_end() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert "[deeper]" in json.dumps(render(deep), ensure_ascii=False)
    cycle: dict[str, Any] = {"a": 1}
    cycle["self"] = [cycle]
    assert render(cycle) == {"a": 1, "self": ["…[cycle]"]}
    node = Plain(1)
    node.a = node  # type: ignore[assignment]
    assert render(node) == {"a": "…[cycle]"}
    shared = [1]
    assert render([shared, shared]) == [[1], [1]]


def test_what_is_cut_says_so_and_short_parts_stay_whole() -> None:
    shown = render({"long": "x" * 100_000, "short": "y", "items": list(range(5))}, 300)
    assert shown["short"] == "y"
    assert shown["items"] == [0, 1, 2, 3, 4]
    kept, mark = shown["long"].split("…")
    assert mark == f"[cut {100_000 - len(kept)} characters]"
    assert len(kept) > 100

    shown = render(list(range(100_000)), 400)
    assert shown[-1] == f"…[cut {100_000 - (len(shown) - 1)} items]"

    shown = render({f"key{index}": "v" * 50 for index in range(3000)}, 2000)
    assert shown["…"] == f"…[cut {3000 - (len(shown) - 1)} items]"


def test_every_message_of_a_long_chat_keeps_its_share() -> None:
    chat = [{"role": "user", "parts": [{"type": "text", "content": str(index) * 20_000}]} for index in range(8)]
    chat.append({"role": "user", "parts": [{"type": "text", "content": "the question"}]})
    shown = render(chat, 16384)
    assert len(shown) == 9
    assert shown[-1] == chat[-1]
    assert all(len(message["parts"][0]["content"]) > 1000 for message in shown[:-1])


class CountingText(str):
    """Counts nothing itself: its length says how much there would be to copy."""


def test_cost_is_bounded_by_the_limit_in_memory() -> None:
    huge = "a b " * 12_500_000  # 50 MB
    values = [huge, CountingText(huge), {"k": huge}, [huge] * 100, {huge: 1}, ValueError(huge), b"x" * 50_000_000]
    Content(LIMIT).json("warm")
    for value in values:
        tracemalloc.start()
        Content(LIMIT).json(value)
        Content(LIMIT).text(value)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000, type(value)


def test_cost_is_bounded_by_the_limit_in_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[int] = []
    placed: list[int] = []
    mask, entry = module.redaction.mask, module._ContentWalker.entry
    of = module._ContentWalker.of
    monkeypatch.setattr(module.redaction, "mask", lambda text: masked.append(len(text)) or mask(text))
    monkeypatch.setattr(module._ContentWalker, "of", lambda *args: placed.append(1) or of(*args))
    monkeypatch.setattr(module._ContentWalker, "entry", lambda *args: placed.append(1) or entry(*args))
    wide: Any = ["some words " * 1000] * 1000
    for value in ([wide] * 1000, {str(n): wide for n in range(5000)}, list(range(10**6)), "word " * 10**6):
        masked.clear()
        placed.clear()
        Content(LIMIT).json(value)
        assert len(placed) <= LIMIT
        # Twice the limit, and what is looked at beyond each cut.
        assert sum(masked) <= 2 * LIMIT + (2 * LIMIT // MIN_LIMIT + 1) * (module.redaction.lookahead() + MIN_LIMIT)
    assert MAX_DEPTH <= 32
    assert MAX_ITEMS <= MAX_NODES


def test_a_value_that_another_thread_changes_all_the_time() -> None:
    shared: dict[Any, Any] = {index: index for index in range(100)}
    items: list[Any] = list(range(100))
    members = set(range(100))
    queue = collections.deque(range(100))
    stop = threading.Event()

    def change() -> None:
        number = 1000
        while not stop.is_set():
            number += 1
            for _ in range(50):
                shared[number] = number
                members.add(number)
                queue.append(number)
                items.append(number)
                number += 1
            for old in range(number - 50, number):
                shared.pop(old, None)
                members.discard(old)
                queue.pop()
                items.pop()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            render([shared, items, members, queue], 65536)
    finally:
        stop.set()
        thread.join()


# --- redaction ----------------------------------------------------------------------------------------------------


def test_redaction_sees_every_string_once_and_what_it_raises_comes_out() -> None:
    seen: list[str] = []

    def redact(text: str) -> str:
        seen.append(text)
        return text.replace("Ada", "[name]")

    content = Content(LIMIT, redact=redact)
    assert json.loads(content.json({"a": "Ada", "b": ["Ada Lovelace"]})) == {"a": "[name]", "b": ["[name] Lovelace"]}
    assert sorted(seen) == ["Ada", "Ada Lovelace", "a", "b"]

    def broken(_: str) -> str:
        raise ValueError("no")

    with pytest.raises(ValueError):
        Content(LIMIT, redact=broken).json({"a": "b"})
    with pytest.raises(TypeError):
        Content(LIMIT, redact=lambda _: None).json("b")  # type: ignore[arg-type,return-value]


def test_a_text_that_was_harmless_is_masked_as_soon_as_it_is_known_as_a_secret() -> None:
    value = {"question": "is nosuchpattern-9 harmless?", "nosuchpattern-9": 1}
    assert render(value) == value
    redaction.remember("nosuchpattern-9")
    assert render(value) == {"question": f"is {redaction.MASK} harmless?", redaction.MASK: 1}


def test_what_is_around_a_known_text_is_searched_with_it() -> None:
    known = "the answer of the model " * 300
    assert render(known, 10**6) == known
    for text in (f"<password>\n{known}\n</password>", f"<password>{known}</password>", f"password = '{known}'"):
        warm = render(text, 10**6)
        module._harmless = module._Harmless(redaction.remembered)
        assert warm == render(text, 10**6)
        assert render(known, 10**6) == known
    assert redaction.MASK in render(f"<password>\n{known}\n</password>", 10**6)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\\n"])
def test_four_lines_of_base64_are_enough(end: str) -> None:
    data = base64.b64encode(bytes(range(180))).decode()
    lines = end.join(data[start : start + 60] for start in range(0, 240, 60))
    assert render(lines) == "<180 bytes>"
    assert render(f"photo: {lines}{end}of a cat") == f"photo: <180 bytes>{end}of a cat"


def test_texts_that_are_kept_hold_no_secret_and_are_bounded() -> None:
    secret = "sk-proj-" + "aB3dE6gH9jK2mN5pQ8sT"
    for number in range(100):
        Content(10**6).json([f"{number} " + "words " * 2000, {"a": secret, f"key {number}": "text"}, f"key {secret}"])
        Content(10**6).text(f"text {number}")
    harmless = module._known_harmless()
    assert harmless._texts
    assert harmless._long
    kept = [*harmless._texts, *harmless._long.values(), *harmless._newest.values()]
    assert not [text for text in kept if secret in text]
    assert sum(map(len, {*kept})) <= module._MOST_HARMLESS
    assert len(harmless.shapes) <= module._MOST_SHAPES


@given(st.text() | st.text(alphabet=st.characters(max_codepoint=160)) | st.just("half \ud800 a character"))
def test_texts_are_quoted_as_the_standard_library_does(text: str) -> None:
    assert truncation.encode(text) == json.dumps(text, ensure_ascii=False)


# --- properties ---------------------------------------------------------------------------------------------------

HOSTILE = hostile_values()


@dataclasses.dataclass(frozen=True)
class Pick:
    """A hostile value by name: Hypothesis looks at what it draws."""

    name: str


def picked(value: Any) -> Any:
    if isinstance(value, Pick):
        return HOSTILE[value.name]
    if isinstance(value, dict):
        return {key: picked(item) for key, item in value.items()}
    if isinstance(value, (list, collections.deque)):
        return type(value)(map(picked, value))
    if type(value) is tuple:
        return tuple(map(picked, value))
    return Plain(picked(value.a)) if isinstance(value, Plain) else value


KEYS = st.one_of(
    st.text(), st.integers(), st.booleans(), st.none(), st.floats(), st.tuples(st.integers(), st.text()), st.binary()
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**120, max_value=2**140),
    st.floats(),
    st.text(),
    st.text(alphabet=st.characters(categories=["Cs", "Cc", "So", "Lo"])),
    st.text(alphabet='\\"\n\x00é漢', min_size=50, max_size=400),
    st.binary(),
    st.datetimes(),
    st.decimals(),
    st.uuids(),
    st.sampled_from(
        [Colour.RED, Level.HIGH, Point(1, 2), Plain(1), Slotted(1, "b"), Unknown(), Unknown, len, ValueError("v")]
    ),
    st.builds(Pick, st.sampled_from(sorted(HOSTILE))),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=30),
        st.dictionaries(KEYS, inner, max_size=30),
        st.tuples(inner, inner),
        st.builds(collections.deque, st.lists(inner, max_size=5)),
        st.builds(Plain, inner),
    ),
    max_leaves=60,
)


@settings(max_examples=400, deadline=None)
@given(value=VALUES, limit=st.integers(MIN_LIMIT, 2000), media=st.booleans())
def test_any_value_gives_valid_json_within_the_limit_and_the_same_again(value: Any, limit: int, media: bool) -> None:
    value = picked(value)
    content = Content(limit, media=media)
    text = content.json(value)
    assert len(text.encode("utf-8")) <= limit
    json.loads(text)
    assert content.json(value) == text
    full = Content(10**6, media=media).json(value)
    if len(full.encode("utf-8")) <= limit and "[cut" not in full:
        if "[cut" not in text:
            assert text == full
    elif "[cut" not in full:
        assert MARK.search(text), text


@settings(max_examples=200, deadline=None)
@given(text=st.text(), limit=st.integers(MIN_LIMIT, 300))
def test_any_text_stays_within_the_limit(text: str, limit: int) -> None:
    shown = Content(limit).text(text)
    data = shown.encode("utf-8")
    assert len(data) <= limit
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(clean.encode("utf-8")) <= limit:
        assert shown == clean or "[masked]" in shown
    else:
        assert MARK.search(shown)


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**60), 2**60),
            # A name of a secret makes one of what stands beside it: `("password", 7)`.
            st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=14).filter(
                lambda text: not redaction.name_kind(text)
            ),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=5), st.dictionaries(st.text("abc", max_size=3), inner, max_size=5)
        ),
        max_leaves=20,
    )
)
def test_json_values_come_back_as_they_were(value: Any) -> None:
    assert render(value, 10**6) == value


SECRET = "sk-proj-" + "aB3dE5gH7jK9mN1pQ3sT5vX7"
NAMED = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(), st.sampled_from(["text", "password", "Authorization", SECRET])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["a", "name", "value", "content", "type", "password", "token"]), inner),
        st.builds(lambda store: dspy.Prediction(**store), st.dictionaries(st.sampled_from(["answer", "token"]), inner)),
    ),
    max_leaves=20,
)


@given(value=st.one_of(VALUES, NAMED), limit=st.integers(MIN_LIMIT, 2000), media=st.booleans())
def test_ordinary_values_come_out_as_they_would_the_long_way(value: Any, limit: int, media: bool) -> None:
    content = Content(limit, media)
    short_way = content.json(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ordinary", lambda *_: module._UNUSUAL)
        assert content.json(value) == short_way
        patch.setattr(module._Harmless, "are", lambda *_: False)
        assert content.json(value) == short_way


@pytest.mark.parametrize(
    "value",
    [
        {"question": "What is it?", "n": 3, "p": 0.5, "ok": True, "none": None, "list": ["a", ("b", 1)], "": ""},
        dspy.Prediction(answer="blue", score=1),
        dspy.Example(question="x", nested={"deep": [1, 2, {"x": "y"}]}).with_inputs("question"),
        [{"role": "user", "parts": [{"type": "text", "content": "[[ ## question ## ]]\nWhat? é 漢 \ud83d"}]}],
    ],
)
def test_these_take_the_short_way(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their strings are looked at together."""
    monkeypatch.setattr(module.redaction, "mask", None)
    Content(1000).json(value)


SECRET = "aB3dE6gH9jK2mN5pQ8sT"


@pytest.mark.parametrize(
    "value",
    [
        ["run", "--api-key", SECRET, "fast"],
        ("--api-key", SECRET),
        ["run", "--password", SECRET, "--token", SECRET],
        {b"password": SECRET},
        {"id": "api_key", "value": SECRET},
        {"type": "password", "value": SECRET},
        {"k": "api_key", "v": SECRET},
        {"passwordHash": SECRET, "mnemonic": SECRET, "seed_phrase": SECRET, "csrf": SECRET},
    ],
)
def test_secrets_that_other_items_name_are_masked(value: Any) -> None:
    assert SECRET not in json.dumps(render({"call": value}))


@pytest.mark.parametrize(
    "value",
    [["run", "--name", SECRET], ["--api-key"], ["--token", "the", "run"], ["api_key", "x", SECRET], {"id": SECRET}],
)
def test_items_that_name_no_secret_stay(value: Any) -> None:
    assert render(value) == value
