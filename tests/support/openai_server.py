"""A localhost server that speaks as much of OpenAI's HTTP API as DSPy's engines need, with scripted answers.

It answers what a prompt asks for: the output fields that DSPy's adapters name in their prompts, with values from
`answers` (default `the <field>`). Usage is fixed, unless the prompt says `tokens=<n>`: then `n` in and `n + 1` out.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_CHAT_FIELDS = re.compile(r"\[\[ ## (\w+) ## \]\]")
_JSON_FIELDS = re.compile(r"`(\w+)`")
_DETAILS = {
    "prompt_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 8},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
_TOKENS = re.compile(r"tokens=(\d+)")


@dataclass
class Reply:
    """One scripted answer.

    Attributes:
        text: the assistant's text.
        reasoning: what it thought before.
        tool_calls: `(name, arguments)` of each call it makes.
        status: other than 200, an error with `text` as its message.
        headers: further response headers.
    """

    text: str | None = None
    reasoning: str | None = None
    tool_calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class OpenAIServer:
    """What a running server is asked, and what it shall say.

    Attributes:
        replies: answers used up first, in order.
        answers: value of each output field by name, or by name and a text that the prompt must hold.
        requests: (path, body, headers) of every request.
        delay: seconds before each piece of a streamed answer.
        usage: whether answers report usage.
        details: whether that has more than the tokens of prompt and answer.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.port = port
        self.replies: deque[Reply] = deque()
        self.answers: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.delay = 0.0
        self.usage = True
        self.details = True
        self.counter = 0
        self.lock = threading.Lock()

    def lm(self, model: str = "openai/gpt-4o-mini", **options: Any) -> Any:
        """A `dspy.LM` that talks to this server."""
        import dspy

        return dspy.LM(
            model, **{"api_base": self.url, "api_key": "sk-test-0123456789abcdef", "cache": False, **options}
        )

    # --- answers -------------------------------------------------------------------------------------------------
    def reply(self, body: dict[str, Any]) -> Reply:
        """The next scripted answer, or one with the fields that the prompt asks for."""
        with self.lock:
            if self.replies:
                return self.replies.popleft()
        prompt = _prompt(body)
        tail = prompt[prompt.rfind("Respond with") :] if "Respond with" in prompt else ""
        if "[[ ## completed ## ]]" in tail:
            fields = [name for name in _CHAT_FIELDS.findall(tail) if name != "completed"]
            parts = [f"[[ ## {name} ## ]]\n{self.answer(name, prompt)}" for name in dict.fromkeys(fields)]
            return Reply("\n\n".join((*parts, "[[ ## completed ## ]]")))
        if "JSON object" in tail:
            return Reply(json.dumps({name: self.answer(name, prompt) for name in _JSON_FIELDS.findall(tail)}))
        if "<" in tail and "</" in prompt:
            fields = re.findall(r"<(\w+)>", tail)
            return Reply("\n".join(f"<{name}>\n{self.answer(name, prompt)}\n</{name}>" for name in fields))
        return Reply("Hello from the server.")

    def answer(self, name: str, prompt: str) -> str:
        """The value of one output field."""
        return self.answers.get(name, f"the {name}")

    def identifier(self, prefix: str) -> str:
        """`chatcmpl-1`, `chatcmpl-2`, ... over all requests."""
        with self.lock:
            self.counter += 1
            return f"{prefix}-{self.counter}"


def _prompt(body: dict[str, Any]) -> str:
    texts = []
    messages = body.get("messages") or body.get("input") or body.get("prompt") or ""
    for message in [messages] if isinstance(messages, str) else messages:
        content = message if isinstance(message, str) else message.get("content")
        for part in [content] if isinstance(content, str) else content or ():
            texts.append(part if isinstance(part, str) else part.get("text", ""))
    return "\n".join(texts)


def _usage(body: dict[str, Any]) -> tuple[int, int]:
    found = _TOKENS.search(_prompt(body))
    return (int(found.group(1)), int(found.group(1)) + 1) if found else (100, 20)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: OpenAIServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        self._colbert({"query": query["query"][0], "k": int(query["k"][0])})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        path = urlsplit(self.path).path
        with self.state.lock:
            self.state.requests.append((path, body, dict(self.headers)))
        if path.endswith("/embeddings"):
            self._embeddings(body)
        elif path.endswith("/colbert"):
            self._colbert(body)
        elif path.endswith("/chat/completions"):
            self._chat(body)
        elif path.endswith("/responses"):
            self._responses(body)
        elif path.endswith("/completions"):
            self._text(body)
        else:
            self._send(404, {"error": {"message": f"no {path}"}})

    def _send(self, status: int, payload: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _failed(self, reply: Reply) -> bool:
        if reply.status == 200:
            return False
        error = {"message": reply.text or "scripted failure", "type": "server_error", "code": "scripted"}
        self._send(reply.status, {"error": error}, reply.headers)
        return True

    def _embeddings(self, body: dict[str, Any]) -> None:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        data = [
            {"object": "embedding", "index": index, "embedding": [float(len(text)), 1.0, 0.5]}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        self._send(200, {"object": "list", "data": data, "model": body.get("model"), "usage": usage})

    def _colbert(self, body: dict[str, Any]) -> None:
        passages = [{"pid": n, "rank": n + 1, "score": 9.5 - n, "text": f"passage {n}"} for n in range(body["k"])]
        self._send(200, {"topk": passages})

    # --- chat ----------------------------------------------------------------------------------------------------
    def _chat_usage(self, body: dict[str, Any]) -> dict[str, Any]:
        inputs, outputs = _usage(body)
        return {
            "prompt_tokens": inputs,
            "completion_tokens": outputs,
            "total_tokens": inputs + outputs,
            **(_DETAILS if self.state.details else {}),
        }

    def _chat(self, body: dict[str, Any]) -> None:
        reply = self.state.reply(body)
        if self._failed(reply):
            return
        calls = [
            {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for index, (name, arguments) in enumerate(reply.tool_calls)
        ]
        head = {"id": self.state.identifier("chatcmpl"), "created": 1, "model": f"{body['model']}-2024-07-18"}
        reason = "tool_calls" if calls else "stop"
        if body.get("stream"):
            self._stream(self._chat_chunks(head, reply, calls, reason, body))
            return
        message = {"role": "assistant", "content": reply.text, **({"tool_calls": calls} if calls else {})}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        choices = [{"index": index, "message": message, "finish_reason": reason} for index in range(body.get("n") or 1)]
        payload = {**head, "object": "chat.completion", "choices": choices}
        if self.state.usage:
            payload["usage"] = self._chat_usage(body)
        self._send(200, payload, reply.headers)

    def _chat_chunks(
        self, head: dict[str, Any], reply: Reply, calls: list[Any], reason: str, body: dict[str, Any]
    ) -> Iterator[Any]:
        head = {**head, "object": "chat.completion.chunk"}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

        yield chunk({"role": "assistant", "content": ""})
        for piece in re.findall(r"\S+\s*", reply.text or ""):
            yield chunk({"content": piece})
        if calls:
            yield chunk({"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]})
        yield chunk({}, reason)
        if self.state.usage and (body.get("stream_options") or {}).get("include_usage"):
            yield {**head, "choices": [], "usage": self._chat_usage(body)}

    def _stream(self, chunks: Iterator[Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for chunk in chunks:
                if self.state.delay:
                    time.sleep(self.state.delay)
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # The consumer stopped early.

    # --- the other two APIs --------------------------------------------------------------------------------------
    def _text(self, body: dict[str, Any]) -> None:
        reply = self.state.reply(body)
        if self._failed(reply):
            return
        inputs, outputs = _usage(body)
        choices = [
            {"index": index, "text": reply.text, "finish_reason": "stop", "logprobs": None}
            for index in range(body.get("n") or 1)
        ]
        usage = {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}
        head = {"id": self.state.identifier("cmpl"), "object": "text_completion", "created": 1, "model": body["model"]}
        self._send(200, {**head, "choices": choices, "usage": usage}, reply.headers)

    def _responses(self, body: dict[str, Any]) -> None:
        reply = self.state.reply(body)
        if self._failed(reply):
            return
        inputs, outputs = _usage(body)
        output: list[dict[str, Any]] = [
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": reply.text or "", "annotations": []}],
            }
        ]
        output += [
            {
                "type": "function_call",
                "id": f"fc_{index}",
                "call_id": f"call_{index}",
                "name": name,
                "arguments": json.dumps(arguments),
                "status": "completed",
            }
            for index, (name, arguments) in enumerate(reply.tool_calls)
        ]
        payload = {
            "id": self.state.identifier("resp"),
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": f"{body['model']}-2024-07-18",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": {
                "input_tokens": inputs,
                "input_tokens_details": {"cached_tokens": 40},
                "output_tokens": outputs,
                "output_tokens_details": {"reasoning_tokens": 5},
                "total_tokens": inputs + outputs,
            },
        }
        self._send(200, payload, reply.headers)


@contextmanager
def openai_server() -> Iterator[OpenAIServer]:
    """Run a server on a free loopback port; it stops at the end of the block."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Handler.state = OpenAIServer(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
