"""Secrets in the shapes they have in prompts, settings, headers, files and errors, and ordinary texts that hold none.

Everything is put together here from parts and a generator with a fixed seed: no scanner of repositories takes a line of
this file for a real key, and every run has the same texts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import sysconfig
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

UPPER, LOWER, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789"
ALNUM, HEX = UPPER + LOWER + DIGITS, DIGITS + "abcdef"
_random = random.Random(20260101)


def body(length: int, alphabet: str = ALNUM) -> str:
    """Random characters, a digit among them where it may be."""
    text = "".join(_random.choices(alphabet, k=length))
    return text[:3] + "7" + text[4:] if alphabet is ALNUM and not any(map(str.isdigit, text)) else text


class Secret(NamedTuple):
    """One shape: the text or value, and what of it must not leave."""

    shape: str
    content: Any
    secret: str


def _uuid() -> str:
    return str(uuid.UUID(int=_random.getrandbits(128), version=4))


def _jwt() -> str:
    parts = ({"alg": "HS256", "typ": "JWT"}, {"sub": body(10), "exp": 1893456000})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join((*encoded, body(43, ALNUM + "-_")))


def _pem(kind: str) -> str:
    lines = "\n".join(body(64, ALNUM + "+/") for _ in range(6))
    return f"-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----"


# --- keys with a look of their own, as providers document them ---------------------------------------------------
_KEYS: dict[str, str] = {
    "openai": "sk-" + body(48),
    "openai project": "sk-proj-" + body(74, ALNUM + "-_") + "T3Blbk" + "FJ" + body(74, ALNUM + "-_"),
    "openai service account": "sk-svcacct-" + body(60, ALNUM + "-_"),
    "openai admin": "sk-admin-" + body(60, ALNUM + "-_"),
    "anthropic": "sk-ant-" + "api03-" + body(93, ALNUM + "-_") + "AA",
    "anthropic admin": "sk-ant-" + "admin01-" + body(93, ALNUM + "-_") + "AA",
    "openrouter": "sk-or-v1-" + body(64, HEX),
    "deepseek": "sk-" + body(32, HEX),
    "langfuse secret": "sk-lf-" + _uuid(),
    "langfuse public": "pk-lf-" + _uuid(),
    "cerebras": "csk-" + body(48),
    "elevenlabs": "sk_" + body(48, HEX),
    "hugging face": "hf_" + body(34, UPPER + LOWER),
    "hugging face organization": "api_org_" + body(34, UPPER + LOWER),
    "groq": "gsk_" + body(52),
    "xai": "xai-" + body(80),
    "nvidia": "nvapi-" + body(64, ALNUM + "-_"),
    "perplexity": "pplx-" + body(48),
    "replicate": "r8_" + body(37),
    "fireworks": "fw_" + body(24),
    "jina": "jina_" + body(60),
    "tavily": "tvly-" + body(32),
    "langsmith": "lsv2_pt_" + body(32, HEX) + "_" + body(10, HEX),
    "runpod": "rpa_" + body(40, UPPER + DIGITS) + body(6),
    "voyage": "pa-" + body(43, ALNUM + "-_"),
    "aws access key": "AKIA" + body(16, UPPER + "234567"),
    "aws temporary key": "ASIA" + body(16, UPPER + "234567"),
    "aws other key": "ABIA" + body(16, UPPER + "234567"),
    "aws older key": "A3TX" + body(16, UPPER + DIGITS),
    "aws bedrock": "ABSK" + body(120, ALNUM + "+/") + "=",
    "alibaba": "LTAI" + body(20),
    "google": "AIza" + body(35, ALNUM + "-_"),
    "google oauth": "ya29." + body(120, ALNUM + "-_"),
    "google client secret": "GOCSPX-" + body(28, ALNUM + "-_"),
    "azure client secret": body(3) + "8Q~" + body(34, ALNUM + "_~."),
    "github classic": "ghp_" + body(36),
    "github oauth": "gho_" + body(36),
    "github user": "ghu_" + body(36),
    "github server": "ghs_" + body(36),
    "github refresh": "ghr_" + body(36),
    "github fine-grained": "github_pat_" + body(22) + "_" + body(59),
    "gitlab": "glpat-" + body(20, ALNUM + "-_"),
    "gitlab routable": "glpat-" + body(27, ALNUM + "-_") + ".01." + body(9, LOWER + DIGITS),
    "gitlab deploy": "gldt-" + body(20),
    "gitlab runner": "glrt-" + body(20),
    "gitlab job": "glcbt-" + body(2) + "_" + body(20),
    "gitlab trigger": "glptt-" + body(40, HEX),
    "gitlab feed": "glft-" + body(20),
    "gitlab scim": "glsoat-" + body(20),
    "gitlab oauth application": "gloas-" + body(64, HEX),
    "gitlab registration": "GR1348941" + body(20),
    "slack bot": "xoxb-" + body(12, DIGITS) + "-" + body(12, DIGITS) + "-" + body(24),
    "slack user": "xoxp-" + body(12, DIGITS) + "-" + body(12, DIGITS) + "-" + body(32, HEX),
    "slack app": "xapp-1-A" + body(10, UPPER + DIGITS) + "-" + body(13, DIGITS) + "-" + body(64, HEX),
    "slack configuration": "xoxe.xoxp-1-" + body(163, UPPER + DIGITS),
    "stripe live": "sk_live_" + body(24),
    "stripe test": "sk_test_" + body(99),
    "stripe restricted": "rk_live_" + body(24),
    "webhook signing": "whsec_" + body(32),
    "square": "sq0atp-" + body(22, ALNUM + "-_"),
    "square oauth": "sq0csp-" + body(43, ALNUM + "-_"),
    "square other": "EAAA" + body(60, ALNUM + "-_"),
    "facebook": "EAAC" + body(120),
    "facebook app": body(16, DIGITS) + "|" + body(27, ALNUM + "-_"),
    "shopify": "shpat_" + body(32, HEX),
    "shopify secret": "shpss_" + body(32, HEX),
    "sendgrid": "SG." + body(22, ALNUM + "-_") + "." + body(43, ALNUM + "-_"),
    "mailchimp": body(32, HEX) + "-us" + "14",
    "mailgun": "key-" + body(32, HEX),
    "brevo": "xkeysib-" + body(64, HEX) + "-" + body(16),
    "twilio key": "SK" + body(32, HEX),
    "twilio account": "AC" + body(32, HEX),
    "telegram": body(10, DIGITS) + ":AA" + body(33, ALNUM + "-_"),
    "discord": "M" + body(23) + "." + body(6) + "." + body(27, ALNUM + "-_"),
    "npm": "npm_" + body(36),
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + body(80, ALNUM + "-_"),
    "rubygems": "rubygems_" + body(48, HEX),
    "nuget": "oy2" + body(43, LOWER + DIGITS),
    "clojars": "CLOJARS_" + body(60, LOWER + DIGITS),
    "docker hub": "dckr_pat_" + body(27, ALNUM + "-_"),
    "databricks": "dapi" + body(32, HEX),
    "digitalocean": "dop_v1_" + body(64, HEX),
    "heroku": "HRKU-AA" + body(58, ALNUM + "-_"),
    "fly": "fo1_" + body(43, ALNUM + "-_"),
    "fly macaroon": "fm2_" + body(120, ALNUM + "+/"),
    "netlify": "nfp_" + body(40),
    "supabase": "sbp_" + body(40, HEX),
    "vercel": "vcp_" + body(56),
    "figma": "figd_" + body(40, ALNUM + "-_"),
    "tailscale": "tskey-auth-" + body(17) + "-" + body(32),
    "vault": "hvs." + body(95, ALNUM + "-_"),
    "vault batch": "hvb." + body(140, ALNUM + "-_"),
    "vault older": "s." + body(24),
    "terraform cloud": body(14) + ".atlasv1." + body(64, ALNUM + "-_"),
    "pulumi": "pul-" + body(40, HEX),
    "doppler": "dp.pt." + body(43),
    "1password": "A3-" + "-".join(body(n, UPPER + DIGITS) for n in (6, 6, 5, 5, 5, 5)),
    "1password service": "ops_" + "eyJ" + body(250, ALNUM + "+/") + "=",
    "age": "AGE-SECRET-KEY-1" + body(58, UPPER + DIGITS),
    "grafana service account": "glsa_" + body(32) + "_" + body(8, HEX),
    "grafana cloud": "glc_" + body(60, ALNUM + "+/") + "=",
    "grafana older": "eyJ" + "rIjoi" + body(80),
    "new relic": "NRAK-" + body(27, UPPER + DIGITS),
    "new relic insert": "NRII-" + body(32, ALNUM + "-"),
    "sentry user": "sntryu_" + body(64, HEX),
    "sentry organization": "sntrys_" + "eyJpYXQiO" + body(90) + "_" + body(43),
    "dynatrace": "dt0c01." + body(24, UPPER + DIGITS) + "." + body(64, UPPER + DIGITS),
    "sonar": "squ_" + body(40, HEX),
    "sourcegraph": "sgp_" + body(16, HEX) + "_" + body(40, HEX),
    "linear": "lin_api_" + body(40),
    "notion": "ntn_" + body(11, DIGITS) + body(35),
    "notion older": "secret_" + body(43),
    "airtable": "pat" + body(14) + "." + body(64, HEX),
    "asana": "2/" + body(16, DIGITS) + "/" + body(16, DIGITS) + ":" + body(32, HEX),
    "postman": "PMAK-" + body(24, HEX) + "-" + body(34, HEX),
    "typeform": "tfp_" + body(59, ALNUM + "-_"),
    "readme": "rdme_" + body(70, LOWER + DIGITS),
    "planetscale": "pscale_tkn_" + body(43, ALNUM + "-_."),
    "planetscale password": "pscale_pw_" + body(43, ALNUM + "-_."),
    "prefect": "pnu_" + body(36),
    "shippo": "shippo_live_" + body(40, HEX),
    "easypost": "EZAK" + body(54),
    "duffel": "duffel_live_" + body(43, ALNUM + "-_"),
    "frame.io": "fio-u-" + body(64, ALNUM + "-_"),
    "flutterwave": "FLWSECK_TEST-" + body(32, HEX) + "-X",
    "plaid": "access-production-" + _uuid(),
    "artifactory": "AKCp" + body(69),
    "artifactory reference": "cmVmd" + body(59),
    "atlassian": "ATATT3" + body(186, ALNUM + "-_=")[:-9] + "=" + body(8, "0123456789ABCDEF"),
    "bitbucket": "ATBB" + body(32),
    "adobe": "p8e-" + body(32),
    "clickhouse": "4b1d" + body(38),
    "cloudflare origin": "v1.0-" + body(24, HEX) + "-" + body(146, HEX),
    "defined networking": "dnkey-" + body(26) + "-" + body(52),
    "dropbox": "sl." + body(135, ALNUM + "-_"),
    "harness": "pat." + body(22, ALNUM + "-_") + "." + body(24) + "." + body(20),
    "infracost": "ico-" + body(32),
    "mapbox": "sk." + "eyJ" + body(60) + "." + body(22),
    "maxmind": body(6) + "_" + body(29) + "_mmk",
    "octopus": "API-" + body(26, UPPER + DIGITS),
    "openshift": "sha256~" + body(43, ALNUM + "-_"),
    "scalingo": "tk-us-" + body(48, ALNUM + "-_"),
    "settlemint": "sm_pat_" + body(16),
    "yandex": "t1." + body(60, ALNUM + "-_") + "." + body(86, ALNUM + "-_"),
    "yandex key": "AQVN" + body(36, ALNUM + "-_"),
    "twitter bearer": "A" * 22 + body(90),
    "pinecone": "pcsk_" + body(6) + "_" + body(63),
    "e2b": "e2b_" + body(40, HEX),
    "firecrawl": "fc-" + body(32, HEX),
    "anyscale": "esecret_" + body(28),
    "firebase messaging": "APA91b" + body(134, ALNUM + "-_"),
    "jwt": _jwt(),
    "jwt, cut in its second part": _jwt()[:60],
    "jwt, unsigned": _jwt().rpartition(".")[0] + ".",
    "jwt in base64": base64.b64encode(_jwt().encode()).decode(),
}
_PLACES = (
    "{}",
    "My key is {}, please use it.",
    '{{"config": ["{}"]}}',
    "GET https://host.example/v1?k={}&page=2 returned 401",
    "Incorrect API key provided: {}. You can find yours online.",
    "export X='{}'",
    "line one\n{}\nline three",
    "é ({}) 漢字",
)

# --- what stands under a name in a text --------------------------------------------------------------------------
P, K, H, B64 = "Tr0ub4dor&3x!", body(40), body(32, HEX), body(43, ALNUM + "+/") + "="
AWS = body(18, ALNUM) + "/" + body(10, ALNUM) + "/" + body(10, ALNUM)
AZURE = body(86, ALNUM + "+/") + "=="
_PLAIN = "hunter2"
_BASIC = base64.b64encode(b"ada:correct-horse").decode()


def _assigned() -> Iterator[tuple[str, str, str]]:
    yield from (
        ("env, capitals", "PASSWORD=" + _PLAIN, _PLAIN),
        ("env, capitals, letters only", "DB_PASSWORD=letmeinplease\nPORT=5432", "letmeinplease"),
        ("env, export", f"export AWS_SECRET_ACCESS_KEY={AWS}", AWS),
        ("env, quoted", f'OPENAI_API_KEY="{K}"', K),
        ("env, single quotes", f"SECRET_KEY='{P}'", P),
        ("env, spaces", f"API_TOKEN = {K}", K),
        ("env, django", f"SECRET_KEY = 'django-insecure-{K}'", K),
        ("env, hf", f"HF_TOKEN={K}", K),
        ("env, windows", f"set GITHUB_TOKEN={K}", K),
        ("env, powershell", f'$env:API_KEY = "{K}"', K),
        ("env, docker -e", f"docker run -e MYSQL_ROOT_PASSWORD={_PLAIN} mysql", _PLAIN),
        ("yaml", "password: hunter2", _PLAIN),
        ("yaml, letters only", "user: ada\npassword: letmeinplease\nport: 1", "letmeinplease"),
        ("yaml, quoted", 'db:\n  password: "correct horse battery"', "correct horse battery"),
        ("yaml, single quotes", f"api_key: '{K}'", K),
        ("yaml, hyphen", f"api-key: {K}", K),
        ("yaml, list", f"- secret: {P}", P),
        ("yaml, kubernetes", f"kind: Secret\ndata:\n  db-password: {B64}", B64),
        ("yaml, kubernetes env", f"env:\n- name: API_KEY\n  value: {P}", P),
        ("yaml, kubernetes env quoted", f'- name: DB_PASSWORD\n  value: "{P}"', P),
        ("ini", "[client]\nuser = root\npasswd = s3cr3tpass", "s3cr3tpass"),
        ("ini, aws", f"[default]\naws_access_key_id = x\naws_secret_access_key = {AWS}", AWS),
        ("ini, pypirc", f"username: __token__\npassword: {P}", P),
        ("properties", "spring.datasource.password=letmein99", "letmein99"),
        ("properties, camel case", f"clientSecret={K}", K),
        ("toml", f'api_key = "{K}"', K),
        ("toml, private token", f"private-token = '{K}'", K),
        ("json", json.dumps({"password": _PLAIN}), _PLAIN),
        ("json, spaces in it", json.dumps({"passphrase": "my cat is called Tom"}), "my cat is called Tom"),
        ("json, camel case", json.dumps({"apiKey": K}), K),
        ("json, in capitals", json.dumps({"API_KEY": H}), H),
        ("json, compact", json.dumps({"secret": P}, separators=(",", ":")), P),
        ("json, pretty", json.dumps({"a": 1, "client_secret": K}, indent=4), K),
        ("json in json", json.dumps(json.dumps({"api_key": H})), H),
        ("json in json in json", json.dumps(json.dumps(json.dumps({"password": _PLAIN}))), _PLAIN),
        ("json, name and value", json.dumps({"name": "api_key", "value": K}), K),
        ("json, value and name", json.dumps({"value": P, "name": "api_key"}), P),
        ("json, value and name, more beside", json.dumps({"id": 1, "value": K, "name": "DB_PASSWORD", "on": True}), K),
        ("json, value and name, in json", json.dumps(json.dumps({"value": K, "key": "x-api-key"})), K),
        ("python dict, value and name", repr({"value": P, "field": "clientSecret"}), P),
        ("json, label and value", json.dumps({"label": "password", "value": P}), P),
        ("json, title and value", json.dumps({"title": "api_key", "value": K}), K),
        ("session, java", f"JSESSIONID={H}", H),
        ("session, php", f"curl -b PHPSESSID={body(26, LOWER + DIGITS)} https://host.example", ""),
        ("session, django", f"sessionid={K}; path=/", K),
        ("json, key and value", json.dumps([{"key": "Authorization", "value": "Token " + H}]), H),
        ("json, pair", json.dumps(["X-Api-Key", H]), H),
        ("json, pair in json", json.dumps(json.dumps(["X-Api-Key", H])), H),
        ("json, docker", json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": _BASIC}}}), _BASIC),
        ("json, docker identity", json.dumps({"auths": {"registry": {"identitytoken": K}}}), K),
        ("json, oauth answer", json.dumps({"access_token": K, "token_type": "bearer", "expires_in": 3600}), K),
        ("json, refresh token", json.dumps({"refresh_token": "1//0g" + K}), K),
        ("json, azure settings", json.dumps({"AzureOpenAI:ApiKey": H}), H),
        ("json, gcp key id", json.dumps({"type": "service_account", "private_key_id": body(40, HEX)}), ""),
        ("json, connection", json.dumps({"host": "db", "pwd": P}), P),
        ("python dict", repr({"password": _PLAIN}), _PLAIN),
        ("python pair", repr([("Authorization", "Bearer " + K)]), K),
        ("python pair, plain", repr([("api_key", P)]), P),
        ("python pair of bytes", repr([(b"x-api-key", H.encode())]), H),
        ("python argument", f"client = Client(api_key='{K}', timeout=3)", K),
        ("python argument, password", 'connect(user="ada", password="hunter2")', _PLAIN),
        ("python index", f'headers["Authorization"] = "Bearer {K}"', K),
        ("python environ", f"os.environ['OPENAI_API_KEY'] = '{K}'", K),
        ("python annotated", f'api_key: str = "{K}"', K),
        ("python f-string", f'password = f"{P}"', P),
        ("python setter", f'openai.api_key = "{K}"', K),
        ("python repr", f"Settings(api_key='{K}', model='m')", K),
        ("pydantic error", f"input_value={{'password': '{P}'}}, input_type=dict", P),
        ("javascript", f"const apiKey = `{K}`;", K),
        ("go", f'password := "{P}"', P),
        ("ruby", f":password => '{P}',", P),
        ("php", f"'db_password' => '{P}',", P),
        ("terraform", f'  administrator_login_password = "{P}"', P),
        ("c", 'char password[] = "hunter2";', _PLAIN),
        ("comparison", 'if password == "hunter2":', _PLAIN),
        ("sql", "ALTER USER ada WITH PASSWORD 'hunter2';", _PLAIN),
        ("sql, identified", "CREATE USER ada IDENTIFIED BY 'hunter2';", _PLAIN),
        ("xml", "<password>hunter2</password>", _PLAIN),
        ("xml, maven", f"<server><id>x</id><password>{P}</password></server>", P),
        ("xml, attribute", '<user name="ada" password="hunter2"/>', _PLAIN),
        ("xml, nuget", '<add key="ClearTextPassword" value="hunter2" />', _PLAIN),
        ("dspy, heading", "[[ ## api_key ## ]]\nletmeinplease\n\n[[ ## answer ## ]]\nyes", "letmeinplease"),
        ("dspy, heading, last", "[[ ## question ## ]]\nwho?\n\n[[ ## password ## ]]\nmy cat is Tom", "my cat is Tom"),
        ("dspy, heading, a header", f"[[ ## authorization ## ]]\n{H}\n\nRespond with", H),
        ("dspy, heading in json", json.dumps("[[ ## client_secret ## ]]\n" + P + "\n\n[[ ## answer ## ]]"), P),
        ("dspy, element", "<user_password>\nletmeinplease\n</user_password>\n\n<answer>", "letmeinplease"),
        ("dspy, element in json", json.dumps(f"<api_key>\n{K}\n</api_key>\n"), K),
        ("npmrc", f"//registry.npmjs.org/:_authToken={_uuid()}", ""),
        ("npmrc, auth", f"_auth={_BASIC}", _BASIC),
        ("npmrc, password", f'//host.example/:_password="{B64}"', B64),
        ("flag", f"tool --api-key {K} --verbose", K),
        ("flag, first", f"--api-key {K} --verbose", K),
        ("flag, next line", f"tool \\\n--api-key {K} --verbose", K),
        ("escaped line break", f"raise ValueError('a\\npassword: {H}\\nb')", H),
        ("flag, equals", "mysql --password=hunter2 -u root", _PLAIN),
        ("flag, blank", "psql --password hunter2", _PLAIN),
        ("flag, token", f"gh auth login --token {K}", K),
        ("flag, list", repr(["tool", "--password", _PLAIN]), _PLAIN),
        ("curl user", "curl -u ada:hunter2 https://host.example", _PLAIN),
        ("curl user, quoted", 'curl --user "ada:hunter2" https://host.example', _PLAIN),
        ("curl header", f"curl -H 'X-Api-Key: {H}' https://host.example", H),
        ("prose", "my password: hunter2, thanks", _PLAIN),
        ("prose, is", "The password is Tr0ub4dor&3x!", P),
        ("prose, api key", f"my api key: {K}", K),
        ("prose, secret key", f"Secret key = {K}", K),
        ("prose, access token", f"use the access token {K}", K),
        ("prose, capital", f"Password: {P}", P),
        ("passphrase", "passphrase=correct-horse-battery-7", "correct-horse-battery-7"),
        ("pwd", "Server=db;Uid=sa;Pwd=hunter2;", _PLAIN),
        ("ado.net", "Data Source=db;User ID=sa;Password=Pa55w0rd!;Encrypt=yes", "Pa55w0rd!"),
        ("jdbc", "jdbc:postgresql://db/app?user=ada&password=hunter2", _PLAIN),
        ("libpq", "host=db user=ada password=letmein dbname=app", "letmein"),
        ("odbc", "DRIVER={x};SERVER=db;UID=ada;PWD=hunter2", _PLAIN),
        ("azure storage", f"DefaultEndpointsProtocol=https;AccountName=x;AccountKey={AZURE};EndpointSuffix=x", AZURE),
        ("azure service bus", f"Endpoint=sb://x/;SharedAccessKeyName=Root;SharedAccessKey={B64}", B64),
        ("azure cosmos", f"AccountEndpoint=https://x/;AccountKey={AZURE};", AZURE),
        (
            "azure sas",
            f"https://x.blob.core.windows.net/c?sv=2024-01-01&sig={B64.replace('/', '%2F').replace('+', '%2B')}",
            "",
        ),
        ("azure sas header", f"SharedAccessSignature sr=x&sig={B64}&se=1700000000", B64),
        ("azure functions", f"https://x.azurewebsites.net/api/f?code=1&x-functions-key={K}", K),
        ("azure openai", f"AZURE_OPENAI_API_KEY={H}", H),
        ("aws near its id", f"AKIA{body(16, UPPER)}:{AWS}", AWS),
        ("aws session", f"AWS_SESSION_TOKEN={body(200, ALNUM + '+/')}", ""),
        ("aws presigned", f"https://b.s3.amazonaws.com/k?X-Amz-Signature={body(64, HEX)}", ""),
        ("gcp oauth", f"client_secret: {K}", K),
        ("query, token", f"https://host.example/x?token={K}", K),
        ("query, api key", f"https://host.example/x?a=1&api_key={H}#frag", H),
        ("query, key", f"https://maps.example/api?key={K}", K),
        ("query, access token", f"wss://host.example/?access_token={K}", K),
        ("query, password", "https://host.example/login?user=ada&passwd=hunter2", _PLAIN),
        ("form", "grant_type=password&username=ada&password=hunter2&scope=x", _PLAIN),
        ("form, client secret", f"client_id=x&client_secret={P}", P),
        ("datadog", f"DD_API_KEY: {H}", H),
        ("cohere", f"CO_API_KEY={body(40)}", ""),
        ("mistral", f"MISTRAL_API_KEY={body(32)}", ""),
        ("together", f"TOGETHER_API_KEY={body(64, HEX)}", ""),
        ("wandb", f"WANDB_API_KEY={body(40, HEX)}", ""),
        ("pinecone", f"pinecone_api_key = {_uuid()}", ""),
        ("kraken", f"kraken_secret = {body(86, ALNUM + '+/')}==", ""),
        ("ibm", f"iam_apikey = {body(44, ALNUM + '-_')}", ""),
        ("ibm cos", f"cos_hmac_secret_access_key: {body(48, HEX)}", ""),
        ("softlayer", f"softlayer_api_key: {body(64, HEX)}", ""),
        ("cloudant", f"cloudant_password: {body(64, HEX)}", ""),
        ("okta", f"okta_api_token: 00{body(40)}", ""),
        ("snyk", f"SNYK_TOKEN={_uuid()}", ""),
        ("heroku, older", f"HEROKU_API_KEY={_uuid()}", ""),
        ("looker", f"looker_client_secret: {body(24)}", ""),
        ("mattermost", f"mattermost_token: {body(26, LOWER + DIGITS)}", ""),
        ("sidekiq", f"BUNDLE_ENTERPRISE_TOKEN: {body(40, HEX)}", ""),
        ("github old", f"github_token: {body(40, HEX)}", ""),
        ("contrasena", "contrasena=hunter2", _PLAIN),
    )


_COMMANDS = (
    ("sshpass", "sshpass -p hunter2 ssh ada@host", _PLAIN),
    ("sshpass, joined", "sshpass -phunter2 ssh ada@host", _PLAIN),
    ("docker login", "docker login -u ada -p hunter2 registry.example", _PLAIN),
    ("mysql", "mysql -u root -phunter2 shop", _PLAIN),
    ("mysqldump, quoted", "mysqldump -h db -u root -p'hunter2' shop", _PLAIN),
    ("dockerfile", "FROM python\nENV API_KEY hunter2\nRUN x", _PLAIN),
    ("netrc", "machine host.example login ada password hunter2", _PLAIN),
    ("netrc, in lines", "machine host.example\n  login ada\n  password hunter2\n", _PLAIN),
    ("sql, mysql", "CREATE USER 'ada'@'%' IDENTIFIED BY 'hunter2';", _PLAIN),
    ("sql, mysql plugin", "CREATE USER ada IDENTIFIED WITH caching_sha2_password BY 'hunter2';", _PLAIN),
    ("sql, postgres", "ALTER USER ada WITH PASSWORD 'hunter2';", _PLAIN),
    ("sentence", "The password is hunter2, please.", _PLAIN),
    ("sentence, colon", "my password is: hunter2", _PLAIN),
    ("sentence, quoted", "Its password is `0penSesame`.", "0penSesame"),
    ("form, type first", '<input type="password" name="pw" value="hunter2">', _PLAIN),
    ("form, value first", '<input value="hunter2" name="db_password">', _PLAIN),
    ("form, value first, type last", "<input value='hunter2' id=x type='password'/>", _PLAIN),
    ("yaml, block", "auth:\n  password: |\n    hunter2\n  port: 1", _PLAIN),
    ("yaml, folded", "client_secret: >-\n  hunter2\nport: 1", _PLAIN),
    ("annotated, python", 'api_key: str = "hunter2"', _PLAIN),
    ("annotated, python, optional", 'password: str | None = "letmein please"', "letmein please"),
    ("annotated, rust", 'let db_password: &\'static str = "letmeinplease";', "letmeinplease"),
    ("setter", 'config.setPassword("hunter2");', _PLAIN),
    ("builder", "client.api_key('hunter2').build()", _PLAIN),
    ("url-encoded", "next=%2Flogin%3Fpassword%3Dhunter2%26x%3D1", _PLAIN),
    ("url-encoded, small", "q=password%3dhunter2", _PLAIN),
    ("url-encoded JSON", "state=%7B%22password%22%3A%22hunter2%22%7D", _PLAIN),
    ("url-encoded JSON, blank", "state=%7B%22apiKey%22%3A%20%22hunter2%22%7D", _PLAIN),
    ("JSON in HTML", '<div data-x="{&quot;apiKey&quot;:&quot;hunter2&quot;}">', _PLAIN),
    ("JSON in HTML, numbers", "{&#34;password&#34;: &#34;hunter2&#34;}", _PLAIN),
    ("assignment in HTML", "password&#61;hunter2", _PLAIN),
)

_HEADERS = (
    ("authorization, bearer", f"Authorization: Bearer {K}", K),
    ("authorization, two blanks", f"Authorization: Bearer  {K}", K),
    ("authorization, small letters", f"authorization: bearer {K}", K),
    ("authorization, capitals", f"AUTHORIZATION: BEARER {K}", K),
    ("authorization, basic", f"Authorization: Basic {_BASIC}", _BASIC),
    ("authorization, token", f"Authorization: Token {H}", H),
    ("authorization, bare", f"Authorization: {K}", K),
    ("authorization, api key", f"Authorization: ApiKey {P}", P),
    ("authorization, short", "Authorization: Bearer hunter2", _PLAIN),
    ("authorization, letters only", "Authorization: Bearer abcdefghijklmnop", "abcdefghijklmnop"),
    ("authorization, aws", f"Authorization: AWS4-HMAC-SHA256 Credential=x/s3, Signature={body(64, HEX)}", ""),
    ("authorization, json", json.dumps({"Authorization": f"Bearer {K}"}), K),
    ("authorization, python", repr({"Authorization": f"Bearer {K}"}), K),
    ("proxy authorization", f"Proxy-Authorization: Basic {_BASIC}", _BASIC),
    ("bearer alone", f"sent 'Bearer {K}' to the server", K),
    ("bearer in a url", f"https://host.example/?auth=Bearer%20{K}", K),
    ("bearer with dots", "bearer ab1.cd-ef~gh+ij/kl==", "ab1.cd-ef~gh+ij/kl=="),
    ("basic alone", f"header Basic {_BASIC}", _BASIC),
    ("x-api-key", f"x-api-key: {H}", H),
    ("x-auth-token", f"X-Auth-Token: {H}", H),
    ("x-goog-api-key", f"x-goog-api-key: {K}", K),
    ("api-key", f"api-key: {H}", H),
    ("subscription key", f"Ocp-Apim-Subscription-Key: {H}", H),
    ("private token", f"PRIVATE-TOKEN: {K}", K),
    ("vault token", f"X-Vault-Token: {K}", K),
    ("security token", f"X-Amz-Security-Token: {K}", K),
    ("csrf token", f"X-CSRF-Token: {K}", K),
    ("cookie", "Cookie: sessionid=hunter2abc; csrftoken=x1y2z3", "hunter2abc"),
    ("cookie, second", "Cookie: theme=dark; sid=hunter2abc", "hunter2abc"),
    ("set-cookie", f"Set-Cookie: id={H}; Path=/; HttpOnly", H),
    ("cookie, json", json.dumps({"cookie": f"a=1; session={H}"}), H),
    ("cookie, python", repr({"Cookie": f"session={H}"}), H),
    ("curl -b", f"curl --cookie 'session={H}' https://host.example", H),
)

_URLS = (
    ("url", "postgresql://ada:hunter2@db.example:5432/app", _PLAIN),
    ("url, slash", "postgres://ada:pa/ss5word@db.example/app", "pa/ss5word"),
    ("url, at", "postgres://ada:p@ss5word@db.example/app", "p@ss5word"),
    ("url, slash and at", "mysql://ada:p@s/s5word@db.example/app", "p@s/s5word"),
    ("url, colon", "amqp://ada:pa:ss5word@mq.example/vhost", "pa:ss5word"),
    ("url, hash", "mongodb+srv://ada:pa#ss5word@c.example/db", "pa#ss5word"),
    ("url, question mark", "redis://ada:pa?ss5word@cache.example/0", "pa?ss5word"),
    ("url, no user", "redis://:hunter2@cache.example:6379/0", _PLAIN),
    ("url, percent", "https://ada:p%40ssw0rd@host.example/x", "p%40ssw0rd"),
    ("url, digits", "https://ada:12345678@host.example/x", "12345678"),
    ("url, plus driver", "postgresql+psycopg2://ada:hunter2@localhost/app", _PLAIN),
    ("url, in json", json.dumps({"url": "https://ada:hunter2@host.example"}), _PLAIN),
    ("url, in brackets", "see <https://ada:hunter2@host.example>", _PLAIN),
    ("url, token as user", f"https://{K}@github.com/o/r.git", K),
    ("url, token as user with colon", f"https://{K}:@api.example/v1", K),
    ("url, token as user, x-oauth", f"https://{K}:x-oauth-basic@github.com/o/r.git", K),
    ("url, x-access-token", f"https://x-access-token:{K}@github.com/o/r.git", K),
    ("url, sentry", f"https://{body(32, HEX)}@o1.ingest.sentry.io/1", ""),
    ("url, ftp", "ftp://ada:hunter2@files.example/", _PLAIN),
    ("url, proxy", "HTTPS_PROXY=http://ada:hunter2@proxy.example:3128", _PLAIN),
    ("url, smtp", "smtps://ada%40x.example:hunter2@mail.example:465", _PLAIN),
    ("slack webhook", f"https://hooks.slack.com/services/T{body(8, UPPER)}/B{body(8, UPPER)}/" + body(24), ""),
    ("discord webhook", f"https://discord.com/api/webhooks/{body(18, DIGITS)}/" + body(68, ALNUM + "-_"), ""),
    ("teams webhook", f"https://x.webhook.office.com/webhookb2/{_uuid()}@{_uuid()}/IncomingWebhook/{H}/{_uuid()}", H),
    ("telegram url", f"https://api.telegram.org/bot{body(10, DIGITS)}:AA{body(33)}/sendMessage", ""),
)

_PRIVATE_KEYS = tuple(
    _pem(kind)
    for kind in (
        "PRIVATE KEY",
        "RSA PRIVATE KEY",
        "EC PRIVATE KEY",
        "DSA PRIVATE KEY",
        "OPENSSH PRIVATE KEY",
        "ENCRYPTED PRIVATE KEY",
        "PGP PRIVATE KEY BLOCK",
        "SSH2 ENCRYPTED PRIVATE KEY",
    )
)


def texts() -> list[Secret]:
    """Every text with a secret in it."""
    found = [
        Secret(name, _PLACES[number % len(_PLACES)].format(key), key)
        for number, (name, key) in enumerate(_KEYS.items())
    ]
    escapes = ("\\n", "\\t", "\\u0022", "\\x1b", "%20", "\x1b[31m", "\\\\n")
    found += [
        Secret(
            f"{name} behind {escapes[number % len(escapes)]!r}", f"it said{escapes[number % len(escapes)]}{key}", key
        )
        for number, (name, key) in enumerate(_KEYS.items())
    ]
    for name, text, secret in (*_assigned(), *_COMMANDS, *_HEADERS, *_URLS):
        # Where the table above has no room for its name: the longest run of the text.
        if not secret:
            runs = text.replace("=", " ").replace("&", " ").replace("/", " ").replace('"', " ").replace(":", " ")
            secret = max(runs.replace("@", " ").split(), key=len)
        assert secret in text, name
        found.append(Secret(name, text, secret))
    for pem in _PRIVATE_KEYS:
        name = pem.splitlines()[0].strip("-")
        found.append(Secret(name, pem, pem.splitlines()[2]))
        found.append(Secret(f"{name}, in JSON", json.dumps({"private_key": pem}), pem.splitlines()[2]))
        found.append(Secret(f"{name}, cut", f"key:\n{pem[:300]}", pem.splitlines()[2]))
    putty = f"PuTTY-User-Key-File-2: ssh-rsa\nEncryption: none\nPrivate-Lines: 8\n{K}\nPrivate-MAC: {body(40, HEX)}"
    found.append(Secret("PuTTY's key", putty, K))
    return found


def values() -> list[Secret]:
    """Every value with a secret under a name: dictionaries, pairs, names beside values."""
    found = [
        Secret(f"name {name}", {name: secret}, secret)
        for name, secret in (
            *((name, P) for name in ("password", "Password", "PASSWORD", "passwd", "db_passwd", "passphrase", "pwd")),
            *((name, P) for name in ("userPassword", "user-password", "user.password", "password1", "password_2")),
            *((name, P) for name in ("secret", "clientSecret", "client-secret", "client secret", "CLIENT_SECRET")),
            *(
                (name, P)
                for name in ("api_key", "apikey", "apiKey", "API-KEY", "X-Api-Key", "x_goog_api_key", "api.key")
            ),
            *(
                (name, P)
                for name in ("OPENAI_API_KEY", "azure_openai_api_key", "Ocp-Apim-Subscription-Key", "api_keys")
            ),
            *(
                (name, P)
                for name in ("aws_secret_access_key", "AWSSecretAccessKey", "secretAccessKey", "awsAccessKeyId")
            ),
            *(
                (name, P)
                for name in ("AccountKey", "account_key", "SharedAccessKey", "shared_access_signature", "sas_url")
            ),
            *(
                (name, P)
                for name in ("hf_token", "HF_TOKEN", "github_token", "gitlabToken", "access_token", "accessToken")
            ),
            *(
                (name, P)
                for name in ("refresh_token", "id_token", "session_token", "X-Auth-Token", "api_token", "bot_token")
            ),
            *(
                (name, P)
                for name in ("authorization", "Authorization", "Proxy-Authorization", "auth", "cookie", "Set-Cookie")
            ),
            *(
                (name, P)
                for name in ("credentials", "vertex_credentials", "private_key", "privateKey", "private_key_id")
            ),
            *(
                (name, P)
                for name in ("signing_key", "encryption_key", "master_key", "ssh_key", "db_pass", "bearer", "jwt")
            ),
            *((name, P) for name in ("webhook_secret", "secret_value", "password_b64", "license_key", "X-Vault-Token")),
            *((name, K) for name in ("token", "key", "signature", "session", "x_custom_token", "partner-key")),
        )
    ]
    bearer = f"Bearer {K}"
    found += [
        Secret("nested", {"a": {"b": [{"password": P}]}}, P),
        Secret("nested in tuples", ({"headers": {"x-api-key": P}},), P),
        Secret("a list under a name", {"api_keys": [P, P]}, P),
        Secret("a dictionary under a name", {"credentials": {"user": "ada", "word": P}}, P),
        Secret("a number under a name", {"password": 8_675_309_123}, "8675309123"),
        Secret("pair", [("Authorization", P)], P),
        Secret("pair, bearer", [("authorization", bearer)], K),
        Secret("pair in a list", [["X-Api-Key", P]], P),
        Secret("pair with bytes", [(b"authorization", P)], P),
        Secret("pair alone", ("password", P), P),
        Secret("pair with a number", [("password", 8_675_309_123)], "8675309123"),
        Secret("pair among others", {"headers": [("accept", "*/*"), ("api-key", P)]}, P),
        Secret("pair, doubtful", [("token", K)], K),
        Secret("name and value", {"name": "api_key", "value": P}, P),
        Secret("name and value, in a list", [{"name": "DB_PASSWORD", "value": P}], P),
        Secret("key and value", {"key": "Authorization", "value": P}, P),
        Secret("header and value", {"header": "X-Api-Key", "value": P}, P),
        Secret("Name and Value", {"Name": "ClientSecret", "Value": P}, P),
        Secret("field and value", {"field": "password", "value": P}, P),
        Secret("name and content", {"name": "secret", "content": P}, P),
        Secret("name and value, more beside", {"id": 3, "value": P, "name": "access_token", "enabled": True}, P),
        Secret("label and value", {"label": "password", "value": P}, P),
        Secret("title and value", {"title": "API key", "value": P}, P),
        Secret("title and text", {"title": "api_key", "text": P}, P),
        Secret("session of a cookie", {"sessionid": K}, K),
        Secret("session, java", {"JSESSIONID": P}, P),
        Secret("session, php", {"PHPSESSID": P}, P),
        Secret("token against forgery", {"xsrf": K}, K),
        Secret("signature of a URL", {"sig": K}, K),
        Secret("recovery code", {"recovery_codes": [P]}, P),
        Secret("security code", {"security_code": P}, P),
        Secret("number of a card", {"cvv": 8_675_309}, "8675309"),
        Secret("text of its own", {"note": f"password={_PLAIN}"}, _PLAIN),
        Secret("text in a list", [f"Authorization: {bearer}"], K),
    ]
    return found


# --- ordinary texts ----------------------------------------------------------------------------------------------
_PROSE = (
    "the model answers a question about tokens and keys the author of this passage keeps a secret garden "
    "password policy requires that a session has a cookie recipe and the bearer of news signs with a "
    "signature basic arithmetic authorization to travel was given in context credentials matter less than "
    "reasoning retrieval augmented generation"
)
_WORDS = _PROSE.split()
_NUMBER = 10_000


_SHOW_SECRETS = {"masking.py", "redaction.py", "secret_rules.py"}
"""Files of ours that hold shapes of secrets on purpose."""


def _sources() -> Iterator[str]:
    """Windows of this project's own files and of the standard library's, in an order that is always the same."""
    root = Path(__file__).parents[2]
    own = [path for folder in ("src", "docs", "examples", "benchmarks") for path in root.glob(f"{folder}/**/*.*")]
    library = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    for path in (*sorted(own), *sorted(library), *sorted(root.glob("*.md"))):
        if path.suffix in {".py", ".md", ".yaml", ".toml"} and path.name not in _SHOW_SECRETS:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            for start in range(0, len(lines), 24):
                yield "\n".join(lines[start : start + 24])


def _generated(number: int, rnd: random.Random) -> str:
    """One text of the kind that ``number`` stands for."""
    words = " ".join(rnd.choices(_WORDS, k=rnd.randint(5, 60)))
    raw = rnd.randbytes(rnd.randint(20, 400))
    digest = hashlib.sha256(raw)
    kinds = (
        lambda: words.capitalize() + ".",
        lambda: f"[[ ## question ## ]]\n{words}?\n\n[[ ## answer ## ]]\n{words}\n\n[[ ## completed ## ]]",
        lambda: f"[[ ## password ## ]]\n{{password}}\n\nBy `[[ ## password ## ]]`\n\n[[ ## key ## ]]\n{words}",
        lambda: f"<password>\n{{password}}\n</password>\n\n<answer>\n{words}\n</answer>",
        lambda: base64.b64encode(b"\x89PNG\r\n\x1a\n" + raw).decode(),
        lambda: f'<img src="data:image/png;base64,{base64.b64encode(raw).decode()}">',
        lambda: f"commit {hashlib.sha1(raw).hexdigest()}\nAuthor: Ada <ada@example.com>\n\n    {words}",
        lambda: f"sha256:{digest.hexdigest()}  {rnd.choice(_WORDS)}-{rnd.randint(0, 9)}.tar.gz",
        lambda: str(uuid.UUID(bytes=digest.digest()[:16])),
        lambda: json.dumps({"id": str(uuid.UUID(bytes=digest.digest()[:16])), "tokens": number, "text": words}),
        lambda: json.dumps(
            {"prompt_tokens": number, "max_tokens": 100, "next_token": "the", "key": "primary"}, indent=2
        ),
        lambda: f"https://example.com/{'/'.join(rnd.choices(_WORDS, k=3))}?p={number}&q={digest.hexdigest()[:8]}#a",
        lambda: f"http://localhost:{8000 + number % 1000}/users/ada@example.com/settings",
        lambda: f"$\\sum_{{i=1}}^{{{number}}} x_i^2 = {rnd.random():.12f}$, $a_{{ij}} := b_{{ji}} * 2$",
        lambda: f"/usr/lib/python3.11/{'/'.join(rnd.choices(_WORDS, k=4))}/_{number}.cpython-311-x86_64-linux-gnu.so",
        lambda: f"2026-11-28T07:{number % 60:02}:00Z INFO worker[{number}] session={number} key=user:{number} {words}",
        lambda: f"SELECT id, name FROM users WHERE session_id = {number} AND key = '{rnd.choice(_WORDS)}' LIMIT 10;",
        lambda: f"00-{digest.hexdigest()[:32]}-{digest.hexdigest()[:16]}-01 chatcmpl-{digest.hexdigest()[:29]}",
        lambda: ", ".join(f"{rnd.random():.6f}" for _ in range(40)),
        lambda: f"| {' | '.join(rnd.choices(_WORDS, k=5))} |\n|---|---|---|---|---|\n| "
        + " | ".join(map(str, raw[:5]))
        + " |",
        lambda: f"def f(key: str, token: int, password=None):\n    return cache.get(key, token) or x[{number}]",
        lambda: _traceback(words, number),
        lambda: f"The key is {rnd.choice(_WORDS)}. Token: {rnd.choice(_WORDS)}. Password: required. Auth: basic.",
        lambda: "".join(rnd.choices("ACGT", k=200)) + " ".join(rnd.choices(["日本語", "漢字", "é", "ß"], k=30)),
    )
    return kinds[number % len(kinds)]()


def _traceback(words: str, number: int) -> str:
    try:
        {}[words[:20]] + number
    except KeyError:
        return traceback.format_exc()
    return ""


def ordinary() -> Iterator[str]:
    """Ten thousand texts without a secret in them: half source code and prose of files, half generated."""
    half = _NUMBER // 2
    windows = [text for text in _sources() if text.strip()]
    step = max(len(windows) // half, 1)
    chosen = windows[::step][:half]
    yield from chosen
    rnd = random.Random(7)
    for number in range(_NUMBER - len(chosen)):
        yield _generated(number, rnd)
