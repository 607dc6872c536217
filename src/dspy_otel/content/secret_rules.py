"""What a secret looks like: the one table that the redaction here and the Collector's content guard are made from.

Every expression is written in the part of the syntax that Python and RE2 (Go, the Collector) share: no lookaround, no
back reference, no possessive quantifier. Whatever needs a tail is bounded, so that the cost is linear in Python, too.
The table is imported when the first text is masked, not before.

There are four kinds of rows:

* :class:`Key` is recognised by its own look: it begins with letters that its provider chose.
* :class:`Shape` is recognised by its own look too, but has no beginning of its own.
* :class:`Name` says that what stands under it is a secret: in a dictionary, a header, a query string, an assignment.
* :class:`Value` is what may stand under a name in a text, one for each :class:`Kind` of name.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple


class Where(enum.Enum):
    """Where a row applies."""

    TEXT = "text"
    NAME = "name"
    BOTH = "both"


class Key(NamedTuple):
    """A secret that begins with letters its provider chose.

    Attributes:
        what: what it opens.
        needles: the literal beginnings. They stand after something that is neither a letter nor a digit.
        pattern: what follows. It holds at least 15 letters, digits, ``_`` or ``-`` in a row, the first of them at most
            twelve characters behind the beginning of the needle.
        before: what must stand before the needle; stays visible. Empty: anything but a letter or a digit.
    """

    what: str
    needles: tuple[str, ...]
    pattern: str
    before: str = ""


class Shape(NamedTuple):
    """A secret without a beginning of its own.

    Attributes:
        what: what it opens.
        needle: a text that every match contains: without it, the pattern is not tried. Empty: the match begins with a
            run of 15 letters, digits, ``_`` and ``-``, or ``back`` characters before one.
        pattern: the whole, with up to two groups around the secret that stay visible.
        back: see ``needle``.
    """

    what: str
    needle: str
    pattern: str
    back: int = 0


class Kind(enum.IntEnum):
    """How sure a name is that it holds a secret, and how its value is written in text."""

    DOUBTFUL = 1
    SECRET = 2
    HEADER = 3
    COOKIE = 4


class Name(NamedTuple):
    """Names of one kind, in snake case; a prefix of whole words may stand before each (``my_api_key``).

    Attributes:
        kind: how sure they are.
        where: in text, as a name of a value, or both.
        words: the names. An underscore stands for any separator, or none.
    """

    kind: Kind
    where: Where
    words: tuple[str, ...]


class Value(NamedTuple):
    """What stands under a name in a text, from the sign between them on.

    Attributes:
        kind: the kind of name it stands under.
        patterns: the alternatives, each with a group before the secret that stays visible, and maybe one after it.
    """

    kind: Kind
    patterns: tuple[str, ...]


def _with_digit(least: int, letters: str = r"A-Za-z_\-", word: str = r"\w\-") -> str:
    """At least ``least`` characters with a digit among them."""
    first = "|".join(f"[{letters}]{{{n}}}[0-9][{word}]{{{least - 1 - n},}}" for n in range(least))
    return f"(?:{first}|[{letters}]{{{least},80}}[0-9][{word}]*)"


_UUID: Final = r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"

KEYS: Final = (
    Key(
        "OpenAI, Anthropic, OpenRouter, DeepSeek, Langfuse and others",
        ("sk-", "rk-", "pk-", "csk-"),
        f"(?:{_with_digit(12)}|[A-Za-z]{{20,}})",
    ),
    Key("Stripe, Clerk", ("sk_live_", "sk_test_", "sk_prod_", "rk_live_", "rk_test_", "rk_prod_"), r"\w{10,}"),
    Key("ElevenLabs", ("sk_",), r"[0-9a-f]{40,}"),
    Key(
        "AWS: id of an access key, and the key itself where it stands beside its id",
        ("AKIA", "ASIA", "ABIA", "ACCA", "AGPA", "AROA", "AIDA"),
        r"[0-9A-Z]{16}\b(?:[\s:,|/\"'=;]{1,4}[A-Za-z0-9+/]{40}\b)?",
    ),
    Key("AWS: id of an access key, older", ("A3T",), r"[0-9A-Z]{17}\b"),
    Key("AWS Bedrock", ("ABSK", "bedrock-api-key-"), r"[A-Za-z0-9+/]{20,}={0,2}"),
    Key("Alibaba Cloud", ("LTAI",), r"[A-Za-z0-9]{16,}"),
    Key("Google: API key", ("AIza", "AQ."), r"[\w\-]{30,}"),
    Key("Google: OAuth", ("ya29.", "GOCSPX-"), r"[\w\-.]{12,}"),
    Key("GitHub", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"), r"\w{16,}"),
    Key(
        "GitLab",
        ("glpat-", "glptt-", "glrt-", "gldt-", "glcbt-", "glft-", "glsoat-", "glimt-", "glagent-", "gloas-", "glffct-"),
        r"[\w\-]{12,}(?:\.[0-9a-z]{2}[0-9a-z]{7}\b)?",
    ),
    Key("GitLab: runner's registration", ("GR1348941",), r"[\w\-]{16,}"),
    Key("Hugging Face", ("hf_", "api_org_"), r"[A-Za-z0-9]{12,}"),
    Key("Groq", ("gsk_",), r"[A-Za-z0-9]{12,}"),
    Key("xAI", ("xai-",), r"\w{12,}"),
    Key("NVIDIA", ("nvapi-",), r"[\w\-]{12,}"),
    Key("Perplexity", ("pplx-",), r"\w{12,}"),
    Key("Replicate", ("r8_",), r"\w{12,}"),
    Key("Fireworks, Jina", ("fw_", "jina_"), r"\w{16,}"),
    Key("Tavily", ("tvly-",), r"[\w\-]{10,}"),
    Key("LangSmith", ("lsv2_", "ls__"), r"\w{12,}"),
    Key("RunPod", ("rpa_",), r"[A-Z0-9]{30,}\w*"),
    Key("Voyage", ("pa-",), r"[A-Za-z0-9_\-]{43}\b"),
    Key("Databricks", ("dapi", "dose", "dkea"), r"[0-9a-f]{32}"),
    Key("npm", ("npm_",), r"[A-Za-z0-9]{30,}"),
    Key("PyPI", ("pypi-",), r"[\w\-]{16,}"),
    Key("RubyGems", ("rubygems_",), r"[0-9a-f]{32,}"),
    Key("NuGet", ("oy2",), r"[a-z0-9]{43}\b"),
    Key("Clojars", ("CLOJARS_", "clojars_"), r"[A-Za-z0-9]{30,}"),
    Key("Slack", ("xoxa-", "xoxb-", "xoxe-", "xoxo-", "xoxp-", "xoxr-", "xoxs-", "xoxe.", "xapp-"), r"[\w\-]{10,}"),
    Key("Svix, Stripe: webhooks", ("whsec_",), r"\w{12,}"),
    Key("Shopify", ("shpat_", "shpca_", "shppa_", "shpss_"), r"\w{12,}"),
    Key("DigitalOcean", ("dop_v1_", "doo_v1_", "dor_v1_"), r"\w{12,}"),
    Key("age", ("AGE-SECRET-KEY-",), r"\w{12,}"),
    Key("SendGrid", ("SG.",), r"[\w\-]{16,}\.[\w\-]{16,}"),
    Key("Brevo", ("xkeysib-", "xsmtpsib-"), r"[0-9a-f]{32,}[\w\-]*"),
    Key("Mailgun", ("key-",), r"[0-9a-f]{32}\b"),
    Key("1Password: secret key", ("A3-",), r"[A-Z0-9]{6}-[A-Z0-9]{6}[A-Z0-9\-]{16,}"),
    Key("1Password: service account", ("ops_eyJ",), r"[A-Za-z0-9+/]{40,}={0,3}"),
    Key("Adobe", ("p8e-",), r"[A-Za-z0-9]{32}\b"),
    Key("Airtable", ("pat",), r"[A-Za-z0-9]{14}\.[0-9a-f]{64}"),
    Key("Harness", ("pat.", "sat."), r"[\w\-]{22}\.[A-Za-z0-9]{24}\.[A-Za-z0-9]{20}"),
    Key("Artifactory", ("AKCp", "AKC"), r"[A-Za-z0-9]{50,}"),
    Key("Artifactory: reference token", ("cmVmd",), r"[A-Za-z0-9]{59}\b"),
    Key("Atlassian, Bitbucket", ("ATATT3", "ATCTT3", "ATBB"), r"[\w\-]{20,}(?:=[0-9A-F]{8})?"),
    Key("ClickHouse Cloud", ("4b1d",), r"[A-Za-z0-9]{38}\b"),
    Key("Cloudflare: origin CA", ("v1.0-",), r"[0-9a-f]{24}-[0-9a-f]{100,}"),
    Key("Defined Networking", ("dnkey-",), r"[\w\-=]{26}-[\w\-=]{52}"),
    Key("Doppler", ("dp.pt.", "dp.st.", "dp.ct.", "dp.sa.", "dp.scim.", "dp.audit."), r"[A-Za-z0-9_.]{30,}"),
    Key("Duffel", ("duffel_test_", "duffel_live_"), r"[\w\-=]{30,}"),
    Key("Dynatrace", ("dt0c01.", "dt0s01.", "dt0s16."), r"[A-Za-z0-9]{24}\.[A-Za-z0-9]{64}"),
    Key("EasyPost", ("EZAK", "EZTK"), r"[A-Za-z0-9]{50,}"),
    Key("Facebook, Square", ("EAAM", "EAAC", "EAAA", "EAAB", "EAAD", "EAAG"), r"[\w\-]{22,}"),
    Key("Square", ("sq0atp-", "sq0csp-", "sq0idp-"), r"[\w\-]{20,}"),
    Key("Flutterwave", ("FLWSECK_TEST-", "FLWSECK-", "FLWPUBK_TEST-"), r"[A-Za-z0-9]{12,}[\w\-]*"),
    Key("Fly.io", ("fo1_", "fm1a_", "fm1r_", "fm2_"), r"[\w\-+/]{40,}={0,3}"),
    Key("Frame.io", ("fio-u-",), r"[\w\-=]{40,}"),
    Key("Grafana", ("glc_", "glsa_"), r"[A-Za-z0-9+/_]{24,}={0,3}"),
    Key("Heroku", ("HRKU-",), r"[\w\-]{36,}"),
    Key("Infracost", ("ico-",), r"[A-Za-z0-9]{32}\b"),
    Key("42", ("s-s4t2ud-", "s-s4t2af-"), r"[0-9a-f]{40,}"),
    Key("Linear", ("lin_api_", "lin_oauth_"), r"[A-Za-z0-9]{30,}"),
    Key("Dropbox", ("sl.",), r"(?:u\.)?[\w\-]{100,}"),
    Key("Mapbox", ("sk.eyJ", "pk.eyJ", "tk.eyJ"), r"[\w\-]{20,}\.[\w\-]{16,}"),
    Key("New Relic", ("NRAK-", "NRII-", "NRJS-", "NRSP-", "NRIQ-", "NRAA-"), r"[A-Za-z0-9\-]{15,}"),
    Key("Notion", ("ntn_", "secret_"), r"[A-Za-z0-9]{40,}"),
    Key("Octopus Deploy", ("API-",), r"[A-Z0-9]{25,}"),
    Key("OpenShift", ("sha256~",), r"[\w\-]{43}"),
    Key("PlanetScale", ("pscale_tkn_", "pscale_oauth_", "pscale_pw_"), r"[\w=.\-]{30,}"),
    Key("Postman", ("PMAK-",), r"[0-9a-f]{24}-[0-9a-f]{30,}"),
    Key("Prefect", ("pnu_", "pnb_"), r"[A-Za-z0-9]{30,}"),
    Key("Pulumi", ("pul-",), r"[0-9a-f]{40}"),
    Key("ReadMe", ("rdme_",), r"[a-z0-9]{60,}"),
    Key("Scalingo", ("tk-us-",), r"[\w\-]{40,}"),
    Key("Sentry", ("sntrys_", "sntryu_"), r"[A-Za-z0-9_+/]{30,}={0,2}[\w+/]*"),
    Key("SettleMint", ("sm_aat_", "sm_pat_", "sm_sat_"), r"[A-Za-z0-9]{16,}"),
    Key("Shippo", ("shippo_live_", "shippo_test_"), r"[0-9a-fA-F]{40}"),
    Key("SonarQube", ("squ_", "sqp_", "sqa_"), r"[0-9a-f]{40}"),
    Key("Sourcegraph", ("sgp_",), r"(?:[0-9a-fA-F]{16}_|local_)?[0-9a-fA-F]{40}"),
    Key("Twilio", ("SK", "AC"), r"[0-9a-f]{32}\b"),
    Key("Typeform", ("tfp_",), r"[\w\-.=]{40,}"),
    Key("Vault", ("hvs.", "hvb.", "hvr."), r"[\w\-]{20,}"),
    Key("Vault, older", ("s.",), r"[A-Za-z]{0,20}[0-9][A-Za-z0-9]{3,23}\b"),
    Key("Terraform Cloud", ("atlasv1.",), r"[\w\-=]{50,}"),
    Key("Yandex", ("t1.",), r"[\w\-]{10,}={0,2}\.[\w\-]{80,}={0,2}"),
    Key("Yandex: API key", ("AQVN",), r"[\w\-]{35,}"),
    Key("Plaid", ("access-production-", "access-sandbox-", "access-development-"), _UUID),
    Key("Supabase", ("sbp_", "sb_secret_"), r"[\w\-]{20,}"),
    Key("Vercel, Figma, PostHog", ("vcp_", "vck_", "figd_", "phx_"), r"[\w\-]{24,}"),
    Key("Docker Hub", ("dckr_pat_", "dckr_oat_"), r"[\w\-]{20,}"),
    Key("Tailscale", ("tskey-",), r"[\w\-]{16,}"),
    Key("Netlify, Buildkite, CircleCI", ("nfp_", "bkua_", "CCIPAT_"), r"\w{30,}"),
    Key("Amazon MWS", ("amzn.mws.",), _UUID),
    Key("Twitter", ("AAAAAAAAAAAAAAAAAAAAA",), r"A[A-Za-z0-9%]{60,}"),
    Key("Telegram", ("AA",), r"[\w\-]{32,34}\b", before=r"[0-9]{6,14}(?::|%3A)"),
    Key("Pinecone", ("pcsk_",), r"\w{30,}"),
    Key("E2B", ("e2b_",), r"[0-9a-f]{40}\b"),
    Key("Firecrawl", ("fc-",), r"[0-9a-f]{32}\b"),
    Key("Anyscale", ("esecret_",), r"[A-Za-z0-9]{20,}"),
    Key("Firebase Cloud Messaging", ("APA91b",), r"[\w\-]{100,}"),
    Key("PuTTY", ("PuTTY-User-Key-File-",), r"[23]:[\s\S]*"),
    Key(
        "JSON web token, also one that is cut; Grafana's older key",
        ("eyJhbGci", "eyJ0eXAi", "eyJraWQi", "eyJlbmMi", "eyJqa3Ui", "eyJjdHki", "eyJ4NXQi", "eyJ6aXAi", "eyJrIjoi"),
        r"[\w\-+/]{7,}={0,2}(?:\.[\w\-]*){0,4}",
    ),
    Key("JSON web token of another kind", ("eyJ",), r"[\w\-]{8,900}\.(?:eyJ)?[\w\-]{8,}(?:\.[\w\-]*){0,3}"),
    Key("JSON web token, in base64 once more", ("ZXlKaGJHY2lPaU", "ZXlKMGVYQWlPaU"), r"[\w\-+/]{20,}={0,2}"),
)

SHAPES: Final = (
    Shape("Mailchimp", "", r"[0-9a-f]{32}-us[0-9]{1,2}\b"),
    Shape("Discord", "", r"[MNO][\w\-]{23,27}\.[\w\-]{6}\.[\w\-]{27,40}"),
    Shape("Facebook: app", "", r"[0-9]{15,16}(?:\||%7[cC])[\w\-]{27,40}\b"),
    Shape("MaxMind", "", r"[A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk\b"),
    Shape("Asana", "", r"[12]/[0-9]{16}/[0-9]{16}:[0-9a-f]{32}", back=2),
    Shape("Azure: client secret", "", r"[\w~.]{3}[0-9]Q~[\w~.\-]{30,34}", back=6),
    Shape(
        "private key",
        "-----",
        r"PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----|$)",
    ),
    Shape(
        "credential of an HTTP header",
        "earer",
        r"(earer(?:\s{1,4}|%20|: ?))" + _with_digit(8, r"\w\-.~+/", r"\w\-.~+/="),
    ),
    Shape("credential of an HTTP header", "earer", r"(earer(?:\s{1,4}|%20|: ?))[\w\-.]{0,80}[~+/_=][\w\-.~+/=]{7,}"),
    Shape(
        "user and password of an HTTP header",
        "",
        r"(asic |asic  |sic%20)(?:"
        + _with_digit(12, "A-Za-z+/", "A-Za-z0-9+/=")
        + r"|[A-Za-z0-9+/]{7,200}[a-z][A-Z][A-Za-z0-9+/]{3,}={0,2}|[A-Za-z0-9+/]{10,}={1,2})",
        back=5,
    ),
    Shape("password in a command", " -p", r"(sshpass -p ?[\"']?)[^\s\"'][^\s\"']{3,}"),
    Shape("password in a command", " -p", r"( login [^\r\n|;&]{0,120}-p[ =]?[\"']?)[^\s\"'\-][^\s\"']{3,}"),
    Shape("password in a command", " -p", r"(mysql[^\r\n|;&]{0,120} -p[\"']?)[^\s\"'][^\s\"']{3,}"),
    Shape("variable of a Dockerfile", "ENV ", r"(ENV \w{0,64}(?:KEY|TOKEN|SECRET|PASSWO?R?D) )[^\s=]\S{3,}"),
    Shape("SQL", "IDENTIFIED", r"(IDENTIFIED (?:WITH \S{1,40} )?BY ')[^'\"\\\r\n]{3,128}(')"),
    Shape("SQL", "PASSWORD '", r"(PASSWORD ')[^'\"\\\r\n]{3,128}(')"),
    Shape("netrc", "assword", r"(login \S{1,128}\s{1,8}password )\S{3,}"),
    Shape(
        "password in a sentence",
        "assword",
        r"(assword is:? [\"'`]?)(?:[A-Za-z_]{1,64}[0-9!@#$%^*+~?]|[0-9]{1,20}[A-Za-z]{2})[^\s\"'`]{3,}",
    ),
    Shape("field of a form", "assword", r"(type=[\"']?password\b[^<>]{0,120}\bvalue=[\"']?)[^\s\"'<>]{3,}"),
    Shape(
        "field of a form",
        "assword",
        r"(value=[\"']?)[^\s\"'<>]{3,128}([\"' ][^<>]{0,120}\b(?:type|name)=[\"']?[\w\-]{0,32}password\b)",
    ),
    Shape(
        "value before its name",
        "alue",
        r"(alue\\{0,3}[\"']\s{0,4}[:=]\s{0,4}\\{0,3}[\"'])[^\"'\\\r\n]{3,900}"
        r"(\\{0,3}[\"']\s{0,4},\s{0,40}\\{0,3}[\"'](?:name|key|header|field|label|title|id)\\{0,3}[\"']\s{0,4}[:=]\s{0,4}"
        r"\\{0,3}[\"'][\w.\-]{0,64}(?i:password|passwd|passphrase|pwd|secret|credentials?|authorization|cookie|"
        r"(?:api|access|secret|private|account|auth)[_\-]?key|(?:access|auth|refresh|api|bearer|hf|github)[_\-]?token)"
        r"\\{0,3}[\"'])",
    ),
    Shape("curl's user and password", "-u", r"(-u(?:ser)?[ =]{1,2}[\"']?[^\s:\"']{1,64}:)[^\s\"']{3,}"),
)

URLS: Final = (
    Shape(
        "token as the user of a URL",
        "://",
        r"(://)" + _with_digit(16, r"A-Za-z_\-.~%", r"\w\-.~%") + r"((?::|:x-oauth-basic)?@)",
    ),
    # A port is no password, and what a template leaves open is none.
    Shape(
        "password in a URL",
        "://",
        r"(://[^\s/:@\"'<>{}]{0,128}:)(?:[0-9]{0,12}[^\s0-9/?#@\"'<>{:][^\s\"'<>]{0,256}|[0-9]{1,64})(@)",
    ),
    Shape(
        "webhook",
        "://",
        r"(://hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/)[\w/+\-]{20,}",
    ),
    Shape(
        "webhook", "://", r"(://(?:\w{1,20}\.)?discord(?:app)?\.com/api/(?:v[0-9]+/)?webhooks/[0-9]{6,24}/)[\w\-]{20,}"
    ),
    Shape("webhook", "://", r"(://[\w\-]{1,64}\.webhook\.office\.com/webhookb2/)[\w@\-/]{30,}"),
    Shape("SoftLayer", "://", r"(://api\.softlayer\.com/soap/v3(?:\.1)?/)[0-9a-z]{40,}"),
)

NAMES: Final = (
    Name(
        Kind.SECRET,
        Where.BOTH,
        (
            *("password", "passwords", "passwd", "passphrase", "passcode", "pass_word", "pwd", "pgpassword"),
            *("password_hash", "password_confirmation", "seed_phrase", "recovery_phrase", "totp_seed"),
            *("contrasena", "passwort", "kennwort", "mot_de_passe", "wachtwoord", "senha"),
            *("db_pass", "database_pass", "key_pass", "user_pass", "smtp_pass", "ftp_pass", "mysql_pass", "root_pass"),
            *("api_key", "api_keys", "auth_key", "service_key", "account_key", "db_key", "database_key", "private_key"),
            *("private_key_id", "priv_key", "client_key", "access_key", "access_key_id", "secret_key"),
            *(
                "subscription_key",
                "signing_key",
                "encryption_key",
                "storage_key",
                "master_key",
                "license_key",
                "ssh_key",
            ),
            *("shared_key", "functions_key", "function_key", "rapidapi_key", "consumer_key", "app_key"),
            *("shared_access_key", "shared_access_signature", "session_key", "deploy_key", "integration_key"),
            *("secret", "secrets", "client_secret", "secret_access_key", "secret_token", "secret_id", "secret_value"),
            *("access_token", "auth_token", "authentication_token", "refresh_token", "session_token", "security_token"),
            *("bearer_token", "hf_token", "hub_token", "github_token", "gh_token", "gitlab_token", "slack_token"),
            *("api_token", "id_token", "ad_token", "csrf_token", "xsrf_token", "oauth_token", "personal_access_token"),
            *("bot_token", "jwt_token", "sas_token", "npm_token", "pypi_token", "vault_token", "private_token"),
            *("job_token", "deploy_token", "app_token", "service_token", "webhook_token", "huggingface_token"),
            *("credential", "credentials", "sas_url", "amz_signature", "jsessionid", "phpsessid"),
        ),
    ),
    # As names of fields only: in text these are words, and what stands behind them is anything.
    Name(
        Kind.SECRET,
        Where.NAME,
        (
            *("auth", "x_auth", "basic_auth", "http_auth", "proxy_auth", "bearer", "jwt", "pw", "passkey", "otp"),
            *("service_account_key", "service_account_json", "authorization", "cookie", "cookies", "set_cookie", "pem"),
            *("tls_key", "ssl_key", "secret_string", "pat", "secret_key_base", "mnemonic"),
            *("recovery_code", "recovery_codes", "security_code", "cvv"),
        ),
    ),
    Name(Kind.HEADER, Where.TEXT, ("authorization", "authorisation", "auth")),
    Name(Kind.COOKIE, Where.TEXT, ("cookie", "cookies")),
    Name(
        Kind.DOUBTFUL,
        Where.BOTH,
        ("token", "key", "session", "signature", "dsn"),
    ),
    Name(Kind.DOUBTFUL, Where.NAME, ("pass", "connection_string", "sid", "sessionid", "sig", "csrf", "xsrf")),
    Name(
        Kind.DOUBTFUL,
        Where.TEXT,
        ("sig", "sessionid", "jwt", "pass", "passkey", "identitytoken", "registrytoken", "code_verifier"),
    ),
)

_SIGN: Final = r"(?::=|=>|={1,3}|:)[ \t]{0,4}"
_OPEN: Final = r"[@bfru]?\\{0,3}"
_BARE: Final = r"[^\s\"'`&;,<>(){}\[\]|\\]"
_MARK: Final = r"[0-9!@#$%^*+~?]"
_PAIR: Final = r"\\{0,3}[\"'][ \t]{0,2},\s{0,8}"
_END: Final = r"([\s&;,\"'`\\]|$)"
_ENCODED: Final = r"(?:%22%3[aA](?:%20|\+)?%22|%3[dD](?:%22)?|&quot;:\s?&quot;|&#34;:\s?&#34;|&#61;)"
"""A sign in a URL or in HTML, with the quotes around it."""
_QUOTED: Final = (
    # What begins with a comma or a bracket stands behind a text that ends in a name.
    rf'({_SIGN}{_OPEN}")(?:[^"\\\r\n,)]|\\[^"\\\r\n])(?:[^"\\\r\n]|\\[^"\\\r\n]){{2,}}',
    rf"({_SIGN}{_OPEN}')(?:[^'\\\r\n,)]|\\[^'\\\r\n])(?:[^'\\\r\n]|\\[^'\\\r\n]){{2,}}",
    rf"({_SIGN}`)[^`\r\n]{{3,}}",
    # The second of a pair, in quotes as the name is. Plain words are a list of names.
    rf'({_PAIR}{_OPEN}")[A-Za-z_]{{0,64}}[^A-Za-z_"\\\r\n](?:[^"\\\r\n]|\\[^"\\\r\n]){{2,}}',
    rf'({_PAIR}{_OPEN}")[A-Za-z_]{{2,64}}[^A-Za-z_"\\\r\n](?:[^"\\\r\n]|\\[^"\\\r\n]){{0,1}}',
    rf"({_PAIR}{_OPEN}')[A-Za-z_]{{0,64}}[^A-Za-z_'\\\r\n](?:[^'\\\r\n]|\\[^'\\\r\n]){{2,}}",
    rf"({_PAIR}{_OPEN}')[A-Za-z_]{{2,64}}[^A-Za-z_'\\\r\n](?:[^'\\\r\n]|\\[^'\\\r\n]){{0,1}}",
)
_FIELDS: Final = (
    # Under the heading of a field, as DSPy writes prompts and LMs answer. A brace begins a template, or JSON.
    r"( ## \]\][ \t]{0,4}\r?\n[ \t]{0,16})[^\s{][^\r\n]{2,}",
    r"( ## \]\]\\{1,4}n[ \t]{0,16})[^\s{\\\"][^\r\n\\\"]{2,}",  # in JSON
)
_CREDENTIAL: Final = r"[A-Za-z_\-+/]{0,64}[0-9]{1,40}[A-Za-z_\-+/%=]{1,64}[0-9][\w\-+/%=.]{8,}"
_SCHEMES: Final = (
    r"(?:basic|bearer|token|digest|negotiate|ntlm|api-?key|key|aws4-hmac-sha256|aws|hmac|sso-key|oauth|hawk|geniekey|"
    r"sharedkey|sharedaccesssignature|bot|splunk|dpop|snowflake|secret|zoho-oauthtoken|pve[a-z]{0,12}|deepl-auth-key)"
)

VALUES: Final = (
    Value(
        Kind.SECRET,
        (
            *_QUOTED,
            *_FIELDS,
            rf"(:[ \t]{{0,4}}[\w&'\[\]|. ]{{1,32}}=[ \t]{{0,4}}{_OPEN}[\"'])[^\"'\\\r\n]{{3,}}",  # behind its type
            rf"(\([\"'])[A-Za-z_.\-/]{{0,64}}{_MARK}[^\"'\\\r\n]{{3,}}",  # the argument of a function of that name
            r"(:[ \t]{1,4}[|>][+\-]?[ \t]{0,4}\r?\n[ \t]{1,16})[^\r\n]{3,}",  # a block of YAML
            rf"({_ENCODED})[^\s\"'<>&;%]{{3,900}}",
            rf"([:=]){_BARE}{{4,900}}([\s&;]|$)",
            rf"([:=]){_BARE}{{900,}}",
            rf"({_SIGN}\\{{0,3}}[\"'`]?)(?:[A-Za-z_.\-/]{{0,64}}{_MARK}{_BARE}{{3,900}}|[A-Za-z_.\-/]{{3,64}}{_MARK}{_BARE}{{0,2}}){_END}",
            r"(:[ \t]{1,4})[A-Za-z]{6,64}([ \t]{0,4}(?:[\r\n]|$))",
        ),
    ),
    Value(
        Kind.HEADER,
        (
            rf"((?:{_SIGN}|{_PAIR}){_OPEN}[\"'`]?{_SCHEMES}[ \t]{{1,4}})[^\r\n\"'`<>\\]{{4,}}",
            *_QUOTED,
            *_FIELDS,
            rf"({_SIGN})[A-Za-z_.\-/]{{0,64}}{_MARK}{_BARE}{{5,900}}{_END}",
        ),
    ),
    Value(
        Kind.COOKIE,
        (
            rf"({_SIGN}\\{{0,3}}[\"'`]?)[^\s=;,\"'`]{{1,64}}=[^\r\n\"'`\\]{{3,}}",
            rf"({_PAIR}{_OPEN}[\"'])[^\s=;,\"'`]{{1,64}}=[^\r\n\"'`\\]{{3,}}",
            *_FIELDS,
        ),
    ),
    Value(
        Kind.DOUBTFUL,
        (
            rf"({_SIGN}{_OPEN}[\"'`]?){_CREDENTIAL}",
            rf"({_PAIR}{_OPEN}[\"']){_CREDENTIAL}",
            rf"( ## \]\][ \t]{{0,4}}(?:\r?\n|\\{{1,4}}n)[ \t]{{0,16}}){_CREDENTIAL}",
            rf"({_SIGN}\\{{0,3}}[\"'])[A-Za-z0-9+/]{{10,}}={{1,2}}",
        ),
    ),
)

ESCAPE: Final = r"\\(?:[abfnrtv0]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})|%[0-9A-Fa-f]{2}|\x1b\[[0-9;]{0,16}m"
"""An escape of JSON, Python, URLs or terminals: a key may begin right behind its last letter."""

FLAG: Final = (
    r"((?:\A|\s|\\n)--([\w\-]{2,64})[ \t]{1,2}[\"']?)"
    r"(?:[\w.\-/]{0,64}[0-9!@#$%^*+~?][^\s\"']{3,}|[\w.\-/]{3,64}[0-9!@#$%^*+~?])"
)
"""A flag of a command line, whose name is the second group."""

ELEMENTS: Final = (
    r"(<([\w:.\-]{2,64})>)[^<>\s]{3,}(</)",
    # On a line of its own, as DSPy writes prompts; also in JSON.
    r"(<([\w:.\-]{2,64})>(?:\r?\n|\\{1,4}n)[ \t]{0,16})[^\s<>{][^\r\n<>]{2,}((?:\r?\n|\\{1,4}n)[ \t]{0,16}</)",
)
"""An element of XML, whose name is the second group. The third is what follows the secret."""
