"""Secrets are masked by name, by look and by value, also when they are cut in two; ordinary text is left alone."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_otel.content import encoder, redaction, secret_rules
from dspy_otel.content.encoder import Content
from tests.content import secrets_corpus

BODY = "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5bC7d"
HEX = "0123456789abcdef0123456789abcdef"
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "\n".join(["MIIEpAIBAAKCAQEA7bq0" + BODY] * 20)
    + "\n-----END RSA PRIVATE KEY-----"
)

# Put together here, so that scanners of repositories do not take them for real ones.
KEYS = {
    "openai": "sk-" + BODY,
    "openai-project": "sk-proj-" + BODY + "-_" + BODY,
    "anthropic": "sk-ant-" + "api03-" + BODY,
    "openrouter": "sk-or-v1-" + HEX * 2,
    "langfuse": "sk-lf-" + "01234567-89ab-cdef-0123-456789abcdef",
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "google": "AIza" + BODY[:35],
    "google-oauth": "ya29." + BODY,
    "github": "ghp_" + BODY[:36],
    "github-fine": "github_pat_" + BODY,
    "gitlab": "glpat-" + BODY[:20],
    "huggingface": "hf_" + BODY[:34],
    "groq": "gsk_" + BODY,
    "xai": "xai-" + BODY,
    "nvidia": "nvapi-" + BODY,
    "perplexity": "pplx-" + BODY,
    "replicate": "r8_" + BODY[:37],
    "tavily": "tvly-" + BODY[:20],
    "langsmith": "lsv2_pt_" + HEX + "_0123456789",
    "databricks": "dapi" + HEX,
    "slack": "xoxb-" + "123456789012-" + BODY[:24],
    "stripe": "sk_live_" + BODY[:24],
    "sendgrid": "SG." + BODY[:22] + "." + BODY,
    "npm": "npm_" + BODY[:36],
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + BODY,
}


# What DSPy makes of a module's long input is a prompt around it. It is searched once, where it is harmless by itself.
PROSE = "".join(f"Sentence {number} says nothing that anybody hides, and one more follows. " for number in range(90))


def test_what_is_masked_at_the_edge_of_a_long_text_that_was_harmless_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    content = Content(100_000)
    different = []
    split = 0
    image = base64.b64encode(bytes(range(256)) * 2).decode()[:400]
    for secret in (*secrets_corpus.texts(), secrets_corpus.Secret("base64", image, image)):
        for cut in {1, len(secret.content) // 3, len(secret.content) // 2, len(secret.content) - 1}:
            before, after = secret.content[:cut], secret.content[cut:]
            for inner, whole in ((after + PROSE, before + after + PROSE), (PROSE + before, PROSE + before + after)):
                if content.text(inner) != inner:
                    continue  # half a secret is masked by itself
                split += 1
                shown = content.text(whole)
                monkeypatch.setattr(encoder, "_harmless", encoder._Harmless(redaction.remembered))
                if shown != content.text(whole):
                    different.append((secret.shape, cut))
    assert split > 1000
    assert not different


@pytest.mark.parametrize("name", sorted(KEYS))
@pytest.mark.parametrize(
    "around", ["{}", "key: {}.", '{{"k": "{}"}}', "https://host/path?k={}&x=1", "a\n{}\nb", "é {} é", "({})"]
)
def test_keys_of_providers_wherever_they_stand(name: str, around: str) -> None:
    text = around.format(KEYS[name])
    shown = redaction.mask(text)
    assert KEYS[name][-12:] not in shown
    assert KEYS[name][:12] not in shown
    assert redaction.MASK in shown
    assert shown.startswith(around.split("{}", maxsplit=1)[0].replace("{{", "{")[:4])


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"Authorization: Bearer {BODY}", BODY),
        ("authorization: bearer ab.cd-ef~gh+ij/kl==", "ab.cd-ef~gh+ij/kl=="),
        ("Authorization: Basic " + base64.b64encode(b"user:hunter22-pass").decode(), "aHVudGVyMjI"),
        (f"x-api-key: {HEX}", HEX),
        (f'{{"api_key": "{HEX}"}}', HEX),
        (f'{{\\"api_key\\": \\"{HEX}\\"}}', HEX),
        (f"https://host/v1?api-key={HEX}&model=x", HEX),
        (f"AZURE_OPENAI_API_KEY={HEX}", HEX),
        (f"client_secret={BODY}", BODY),
        ("postgresql://admin:hunter22@db.host:5432/app", "hunter22"),
        ("redis://:hunter22@cache:6379/0", "hunter22"),
        ("Server=db;User=sa;Password=hunter22;", "hunter22"),
        ('{"password": "hunter22"}', "hunter22"),
        ("{'password': 'hunter22'}", "hunter22"),
        (PEM, "MIIEpAIBAAKCAQEA7bq0"),
        (PEM[:400], "MIIEpAIBAAKCAQEA7bq0"),
        (json.dumps(PEM), "MIIEpAIBAAKCAQEA7bq0"),
    ],
)
def test_secrets_in_headers_urls_and_settings(text: str, secret: str) -> None:
    assert secret in text.replace("aHVudGVyMjI", secret) or secret == "aHVudGVyMjI"
    shown = redaction.mask(text)
    assert secret not in shown
    assert redaction.MASK in shown


SECRET_NAMES = [
    *("api_key", "apikey", "apiKey", "API_KEY", "X-Api-Key", "x-goog-api-key", "OPENAI_API_KEY", "openai.api.key"),
    *("authorization", "Authorization", "Proxy-Authorization", "auth", "access_token", "accessToken", "refresh_token"),
    *("client_secret", "clientSecret", "secret", "secrets", "aws_secret_access_key", "AWSSecretAccessKey", "secretKey"),
    *("aws_access_key_id", "password", "PGPASSWORD_password", "db_passwd", "passphrase", "private_key", "privateKey"),
    *("credentials", "cookie", "Set-Cookie", "HF_TOKEN", "github_token", "session_token", "id_token", "bearer_token"),
    *("Ocp-Apim-Subscription-Key", "azure_ad_token_api_key", "webhook_secret", "api_keys", "jwt"),
]
ORDINARY_NAMES = [
    *("tokens", "author", "authors", "keywords", "keyword", "max_tokens", "token_count", "secretary", "num_tokens"),
    *("token_usage", "prompt_tokens", "completion_tokens", "time_to_first_token", "next_token", "eos_token", "token"),
    *("authority", "authored_by", "keys", "key", "key_points", "key_facts", "monkey", "turkey", "passage", "passages"),
    *("compass", "pass", "bypass", "password_policy_question", "question", "answer", "reasoning", "context", "history"),
    *("credential_type", "session_id", "cookie_recipe", "secret_santa", "is_secret_kept", "tokenizer", "api_base"),
    *("authorized", "authentication_method", "description", "public_key_question", "primary_key", "api_key_count"),
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_that_hold_secrets(name: str) -> None:
    assert redaction.is_secret_name(name)
    assert redaction.hides(name, "anything")
    assert json.loads(Content(1000).json({name: {"nested": "value"}})) == {name: redaction.MASK}


@pytest.mark.parametrize("name", ORDINARY_NAMES)
def test_ordinary_names_are_left_alone(name: str) -> None:
    assert not redaction.is_secret_name(name)
    assert json.loads(Content(1000).json({name: "an ordinary value"})) == {name: "an ordinary value"}


def test_under_a_doubtful_name_only_what_looks_like_a_credential_is_masked() -> None:
    shown = json.loads(Content(1000).json({"token": BODY, "next_token": "the", "key": HEX, "primary_key": 17}))
    assert shown == {"token": redaction.MASK, "next_token": "the", "key": redaction.MASK, "primary_key": 17}


def test_no_key_is_told_as_no_key() -> None:
    assert json.loads(Content(1000).json({"api_key": None, "password": ""})) == {"api_key": None, "password": ""}


ORDINARY_TEXTS = [
    "The task-based approach to risk-adjusted learning with scikit-learn and sk-learn-contrib-extensions works.",
    "Retrieval-augmented-generation and chain-of-thought-prompting are state-of-the-art-techniques.",
    "[[ ## completed ## ]] [[ ## reasoning ## ]] Respond with the corresponding output fields.",
    "See https://example.com/a/very/long/path/with-many-segments/and_some_underscores?page=2#fragment",
    "max_completion_tokens_per_request = 4096; the_quick_brown_fox_jumps_over_the_lazy_dog()",
    "My password policy: use a passphrase. The secret of the token economy is trust.",
    "Mail me at ada@example.com about http://example.com/",
    "Basic understanding of basic arithmetic; a bearer of news bears the burden.",
    "550e8400-e29b-41d4-a716-446655440000 and e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "hf_hub_download(repo_id) calls huggingface_hub; gh_actions; xai-models; npm_config",
    "-" * 300 + "=" * 300 + "_" * 300,
    "x" * 1000,
]


@pytest.mark.parametrize("text", ORDINARY_TEXTS)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redaction.mask(text) == text


def test_remembered_values_are_masked_in_any_text() -> None:
    redaction.remember("Tr0ub4dor&3")
    assert redaction.mask("say Tr0ub4dor&3!") == f"say {redaction.MASK}!"
    assert json.loads(Content(1000).json({"Tr0ub4dor&3": ["Tr0ub4dor&3"]})) == {redaction.MASK: [redaction.MASK]}
    for harmless in ("short", "anonymous", "postgres", None, 12345678, "x" * 5000):
        redaction.remember(harmless)
    assert redaction.mask("anonymous postgres short") == "anonymous postgres short"


def test_the_last_remembered_values_count() -> None:
    for number in range(1000):
        redaction.remember(f"rotating-key-{number}")
    assert redaction.mask("rotating-key-999") == redaction.MASK
    assert len(redaction._known) <= 256
    for number in range(200):
        redaction.remember(f"another-key-{number}")
    assert redaction.mask("rotating-key-999") == redaction.MASK


def test_the_working_directory_is_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/ada/my-project")
    redaction.remember_environment()
    assert redaction.mask("sqlite:////home/ada/my-project/mlflow.db") == "sqlite:////home/ada/my-project/mlflow.db"
    assert redaction.mask("PWD=hunter2;x") == "PWD=[masked];x"


def test_environment_secrets_are_masked_and_ordinary_settings_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "plain-0-value")
    monkeypatch.setenv("SOME_TOKEN", "f00-" + BODY)
    monkeypatch.setenv("MAX_TOKENS", "123456789")
    monkeypatch.setenv("AUTH", "disabled")
    redaction.remember_environment()
    text = f"plain-0-value f00-{BODY} 123456789 disabled"
    assert redaction.mask(text) == f"{redaction.MASK} {redaction.MASK} 123456789 disabled"


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted({**KEYS, "pem": PEM, "known": "", "url": "", "bearer": ""})),
    limit=st.integers(64, 400),
    before=st.integers(0, 420),
    after=st.integers(0, 3000),
    filler=st.sampled_from(["a b ", "é ü ", "漢 字 "]),
    early=st.booleans(),
)
def test_no_secret_survives_by_being_cut_in_two(
    name: str, limit: int, before: int, after: int, filler: str, early: bool
) -> None:
    redaction._known.clear()
    known = "known value " * 150 + "end"
    secret = {"pem": PEM, "known": known, "url": f"https://user:{HEX}@host/", "bearer": f"Bearer {BODY}"}.get(
        name
    ) or KEYS[name]
    inside = {"pem": PEM[40:-40], "url": HEX, "bearer": BODY, "known": known[:-20]}.get(name, secret)
    if name == "known":
        redaction.remember(known)
    lead = (filler * 200)[:before]
    text = (PEM + "\n" if early else "") + lead + " " + secret + " " + (filler * 1000)[:after]
    content = Content(limit)
    for shown in (content.text(text), content.json({"a": text}), content.json([text, text])):
        assert len(shown.encode()) <= limit
        pieces = [inside[index : index + 10] for index in range(0, max(len(inside) - 10, 1), 7)]
        assert not [piece for piece in pieces if piece.strip() and piece in shown], shown
    redaction._known.clear()


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab1 -_.:/@=\"'Be\\", max_size=300) | st.text(max_size=100))
def test_masking_never_fails_and_masked_text_stays_as_it_is(text: str) -> None:
    once = redaction.mask(text)
    assert redaction.mask(once) == once


SLOW = [
    *(
        "a" * 20 + " ",
        "eyJ" + "a" * 12 + ".",
        "eyJ-",
        "eyJ" + "a" * 8,
        "://a:",
        "://a:b",
        "password=",
        "password: ",
        "sk-",
    ),
    *(
        "sk-" + "-" * 15,
        "sk-" + "a" * 15,
        "Bearer ",
        "bearer a",
        "-",
        "--",
        " --key ",
        "_",
        "key=",
        "key: a1",
        '"key", "',
    ),
    *(
        "'secret', ",
        '\\"',
        '\\\\"',
        "name: key, value: ",
        "<key>",
        "</",
        "-----BEGIN PRIVATE KEY-----",
        "basic ",
        " -u a",
    ),
    *(
        "AKIA" + "A" * 16,
        "cookie: a=",
        "authorization: ",
        "api key ",
        "value=",
        "value: ",
        "A" * 40 + "/",
        ": ",
        "=",
        "'",
        "é",
    ),
    *(
        "s-s4t2ud-",
        "PuTTY-User-Key-File-",
        "pat." + "a" * 22,
        "1" * 15 + "|",
        "M" + "a" * 23 + ".",
        "@",
        "://" + "a1" * 8,
    ),
]


@pytest.mark.parametrize("text", SLOW)
def test_the_cost_of_masking_grows_with_the_text_only(text: str) -> None:
    """Texts made to be slow for expressions: sixteen times the text is 16 times the work, and would be 256 if it grew
    with the square."""

    def cost(length: int) -> float:
        many, times = text * (length // len(text)), []
        for _ in range(3):
            start = time.process_time()
            redaction.mask(many)
            times.append(time.process_time() - start)
        return min(times)

    cost(1000)  # compiles
    assert cost(128_000) < 80 * max(cost(8000), 0.0002)


def test_secrets_in_text_are_masked() -> None:
    corpus = secrets_corpus.texts()
    missed = [secret.shape for secret in corpus if secret.secret in redaction.mask(secret.content)]
    assert len(corpus) > 300
    assert len(missed) <= len(corpus) // 50, missed


def by_name(value: Any) -> Any:
    """``value`` as callers mask it that know names and pairs."""
    if isinstance(value, dict):
        own = redaction.named(value)
        return {
            key: redaction.MASK if key == own or redaction.hides(key, item) else by_name(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and redaction.hides_pair(*value):
            return [by_name(value[0]), redaction.MASK]
        return [by_name(item) for item in value]
    return redaction.mask(value) if isinstance(value, str) else value


def test_secrets_under_names_are_masked() -> None:
    corpus = secrets_corpus.values()
    missed = [secret.shape for secret in corpus if secret.secret in repr(by_name(secret.content))]
    assert len(corpus) >= 100
    assert not missed


def test_ordinary_values_stand_under_names_and_beside_them() -> None:
    for value in (
        [
            ("password", "username"),
            ["token", "the"],
            ["secret", "santa"],
            ("key", 17),
            (["password"], 2),
            ("a", "b"),
        ],
        {"name": "city", "value": "Paris"},
        {"name": "api_key", "value": None},
        {"key": 3, "value": "password"},
        {"name": "token", "value": "the"},
        {"title": "Password", "text": "A password is a secret word."},
        {"label": "Secret", "value": 3},
        {"title": "Cookies", "content": ""},
        {"sig": "question, context -> answer"},
    ):
        assert json.dumps(by_name(value)) == json.dumps(value)


def test_ordinary_texts_are_left_alone() -> None:
    texts = list(secrets_corpus.ordinary())
    assert len(texts) == 10_000
    masked = [text for text in texts if redaction.mask(text) != text]
    assert len(masked) <= 10, masked[:3]


def test_nothing_is_compiled_or_imported_before_it_is_needed() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, dspy_otel.content.redaction; print('dspy_otel.content.secret_rules' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_every_row_of_the_table_can_be_found() -> None:
    """What :class:`Key` and :class:`Shape` promise: no long needles, none that hides behind another row's."""
    needles = [needle for key in secret_rules.KEYS for needle in key.needles]
    assert len(needles) == len(set(needles))
    for needle in needles:
        run = re.search(r"[\w\-]*\Z", needle).group()
        assert len(needle) - len(run) <= redaction._LONGEST_NEEDLE, needle
    shapes = (*secret_rules.SHAPES, *secret_rules.URLS)
    for pattern in (*(key.pattern for key in secret_rules.KEYS), *(shape.pattern for shape in shapes)):
        assert not re.search(r"\(\?(?:[=!]|<[=!])", pattern), "RE2 has no lookaround"
        assert re.compile(pattern).groups <= 2


def test_secret_settings_are_known_from_then_on_wherever_they_hide() -> None:
    redaction.remember_settings(
        {
            "aws_secret_access_key": "nosuchpattern/AAA/one",
            "azure_ad_token": "nosuchpattern-two",
            "temperature": 0.5,
            "api_base": "https://host.example/v1",
            "extra_headers": {"Authorization": "Custom nosuchpattern-three", "X-Team-Key": "no-such-pattern-4"},
            "vertex_credentials": '{"type": "service_account", "private_key": "nosuchpattern-five"}',
            "tools": [{"api_key": "left alone here"}],
        }
    )
    hidden = "nosuchpattern/AAA/one nosuchpattern-two nosuchpattern-three no-such-pattern-4 nosuchpattern-five"
    assert redaction.mask(hidden) == " ".join([redaction.MASK] * 5)
    assert redaction.mask("https://host.example/v1 service_account") == "https://host.example/v1 service_account"


FRAGMENTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [*KEYS.values(), f"Bearer {BODY}", "https://user:pass1@host", f"api_key={BODY}", PEM, "eyJ" + BODY]
    ),
    st.text(alphabet="ab1 -_.:/@=\"'Be\\\n", max_size=30),
)


@given(st.lists(FRAGMENTS, max_size=4).map("".join).flatmap(lambda text: st.tuples(st.just(text), FRAGMENTS)))
def test_nothing_is_masked_in_what_is_not_suspect(texts: tuple[str, str]) -> None:
    if not redaction.scan("\n".join(texts)).suspect:
        assert tuple(map(redaction.mask, texts)) == texts


@pytest.mark.parametrize("name", sorted(KEYS))
@pytest.mark.parametrize("around", ["{}", "key {}", "before\n{}", "{} after"])
def test_a_key_is_suspect_wherever_it_stands(name: str, around: str) -> None:
    assert redaction.scan(f"one\n{around.format(KEYS[name])}\ntwo").suspect


def test_what_load_dotenv_sets_later_is_masked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    redaction.remember_environment()
    monkeypatch.setenv("LATE_API_KEY", "set-by-dotenv-1")
    redaction.refresh_environment()
    assert redaction.mask("set-by-dotenv-1") == redaction.MASK
    monkeypatch.setenv("LATE_API_KEY", "another-one-22")  # as many variables as before: known after a second
    monkeypatch.setattr(redaction.time, "monotonic", lambda: redaction._environment_seen[0] + 1.1)
    redaction.refresh_environment()
    assert redaction.mask("another-one-22") == redaction.MASK


def test_the_password_in_an_lms_address_is_masked_without_its_scheme() -> None:
    redaction.remember_settings({"api_base": "https://team:hunter22-pass@host.example/v1"})
    assert redaction.mask("cannot connect to team:hunter22-pass@host.example") == (
        f"cannot connect to team:{redaction.MASK}@host.example"
    )


@pytest.mark.parametrize("before", ["\\n", "\\t", "\\u0022", "\\x1b", "%20", "\x1b[31m", "\x1b[0;31m"])
def test_a_key_right_behind_an_escape_is_found(before: str) -> None:
    key = "ghp_" + "aB3dE6gH9jK2mN5pQ8sT" * 2
    assert redaction.mask(f"it said{before}{key[:40]}, twice") == f"it said{before}{redaction.MASK}, twice"
