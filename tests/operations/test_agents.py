"""Tools, agents and the code they run."""

from __future__ import annotations

import json
import shutil

import dspy
import pytest

from tests.operations.common import NATIVE, dummy
from tests.support.openai_server import Reply

only_local_interpreter = pytest.mark.skipif(not NATIVE, reason="DSPy 3.3 has no LocalInterpreter")
only_react_v2 = pytest.mark.skipif(not hasattr(dspy, "ReActV2"), reason="DSPy 3.2 has no ReActV2")
needs_deno = pytest.mark.skipif(shutil.which("deno") is None, reason="PythonInterpreter needs Deno, which is absent")


def weather(place: str) -> str:
    """Weather of a place."""
    return f"sunny in {place}"


async def slow_weather(place: str) -> str:
    """Weather of a place, after a while."""
    return f"cloudy in {place}"


def broken(place: str) -> str:
    """Never works."""
    raise LookupError(f"canary {place}")


async def test_tools(telemetry, snapshot):
    telemetry.instrument(capture_content="span_only")
    assert dspy.Tool(weather)(place="Bern") == "sunny in Bern"
    assert await dspy.Tool(slow_weather).acall(place="Bern") == "cloudy in Bern"
    with dspy.context(allow_tool_async_sync_conversion=True):
        assert await dspy.Tool(weather).acall(place="Rome") == "sunny in Rome"
    with pytest.raises(LookupError):
        dspy.Tool(broken)(place="Bern")
    snapshot(telemetry.tree())
    assert {point.attributes["gen_ai.tool.name"] for point in telemetry.metric("gen_ai.execute_tool.duration")} == {
        "weather",
        "slow_weather",
        "broken",
    }


def test_tool_without_content_tells_its_name_only(telemetry):
    telemetry.instrument()
    with pytest.raises(LookupError):
        dspy.Tool(broken)(place="Bern")
    dspy.Tool(weather)(place="Bern")
    exported = telemetry.everything()
    assert "canary" not in exported
    assert "Bern" not in exported
    assert "Weather of a place" not in exported


def test_tool_that_asks_an_lm(telemetry, server):
    """What a tool calls is inside the tool."""
    telemetry.instrument()
    lm = server.lm()
    with dspy.context(lm=lm):
        dspy.Tool(lambda question: dspy.Predict("question -> answer")(question=question), name="ask")(question="x")
    tool, workflow, chat = telemetry.spans
    assert tool.name == "execute_tool ask"
    assert workflow.parent.span_id == tool.context.span_id
    assert chat.parent.span_id == workflow.context.span_id


def react_answers(tool):
    return [
        {"next_thought": "look", "next_tool_name": tool, "next_tool_args": '{"place": "Bern"}'},
        {"next_thought": "done", "next_tool_name": "finish", "next_tool_args": "{}"},
        {"reasoning": "r", "answer": "sunny"},
    ]


async def test_react(telemetry, snapshot):
    telemetry.instrument()
    agent = dspy.ReAct("question -> answer", tools=[weather])
    with dspy.context(lm=dummy(*react_answers("weather"))):
        assert agent(question="Weather?").answer == "sunny"
    sync = telemetry.tree()
    snapshot(sync)
    telemetry.clear()
    with dspy.context(lm=dummy(*react_answers("weather"))):
        assert (await agent.acall(question="Weather?")).answer == "sunny"
    assert telemetry.tree() == sync


def test_react_with_a_failing_tool(telemetry, snapshot):
    """The tool's span has the error; the agent lives on."""
    telemetry.instrument()
    with dspy.context(lm=dummy(*react_answers("broken"))):
        dspy.ReAct("question -> answer", tools=[broken])(question="Weather?")
    snapshot(telemetry.tree(attributes=False))
    assert telemetry.only("execute_tool").attributes["error.type"] == "LookupError"
    assert "canary" not in telemetry.everything()


@only_react_v2
async def test_react_v2(telemetry, server, snapshot):
    telemetry.instrument()
    agent = dspy.ReActV2("question -> answer", tools=[weather])

    def script():
        for name, arguments in (("weather", {"place": "Bern"}), ("submit", {"answer": "sunny"})):
            calls = json.dumps({"tool_calls": [{"name": name, "args": arguments}]})
            server.replies.append(
                Reply(f"[[ ## next_thought ## ]]\nhm\n\n[[ ## tool_calls ## ]]\n{calls}\n\n[[ ## completed ## ]]")
            )

    with dspy.context(lm=server.lm()):
        script()
        assert agent(question="Weather?").answer == "sunny"
        sync = telemetry.tree()
        snapshot(sync)
        if hasattr(type(agent), "aforward"):  # DSPy 3.4
            telemetry.clear()
            script()
            assert (await agent.acall(question="Weather?")).answer == "sunny"
            assert telemetry.tree() == sync


def test_agent_inside_a_program_has_its_path(telemetry):
    class Desk(dspy.Module):
        def __init__(self):
            super().__init__()
            self.agent = dspy.ReAct("question -> answer", tools=[weather])

        def forward(self, question):
            return self.agent(question=question)

    telemetry.instrument()
    with dspy.context(lm=dummy(*react_answers("weather"))):
        Desk()(question="Weather?")
    agent = telemetry.only("invoke_agent")
    assert agent.name == "invoke_agent agent"
    assert agent.attributes["dspy.module.path"] == "agent"
    assert {span.name for span in telemetry.children(agent)} == {
        "Predict agent.react",
        "execute_tool weather",
        "ChainOfThought agent.extract",
    }


@only_local_interpreter
def test_local_interpreter(telemetry, snapshot):
    from dspy.primitives.local_interpreter import LocalInterpreter

    telemetry.instrument(capture_content="span_only")
    interpreter = LocalInterpreter(tools={"weather": dspy.Tool(weather)})
    try:
        interpreter.execute("print(weather(place='Bern'))")
        with pytest.raises(Exception, match="canary"):
            interpreter.execute("raise ValueError('canary')")
    finally:
        interpreter.shutdown()
    snapshot(telemetry.tree())


@only_local_interpreter
async def test_rlm(telemetry, server, snapshot):
    """The LM it asks from inside its code, one prompt or a batch of them on threads, is in its tree."""
    from dspy.primitives.local_interpreter import LocalInterpreter

    telemetry.instrument()
    code = "print(llm_query('one'), llm_query_batched(['two', 'three']), weather(place='Bern'))"

    def script():
        for text in (code, None, None, None, "SUBMIT(answer='fine')"):
            server.replies.append(
                Reply("spoken")
                if text is None
                else Reply(f"[[ ## reasoning ## ]]\nr\n\n[[ ## code ## ]]\n{text}\n\n[[ ## completed ## ]]")
            )

    agent = dspy.RLM("question -> answer", tools=[weather], interpreter_factory=LocalInterpreter)
    with dspy.context(lm=server.lm()):
        script()
        assert agent(question="x").answer == "fine"
        sync = telemetry.tree(sort=True, attributes=False)
        telemetry.clear()
        script()
        assert (await agent.acall(question="x")).answer == "fine"
    assert telemetry.tree(sort=True, attributes=False) == sync
    snapshot(sync)
    assert telemetry.only("invoke_agent").attributes["dspy.usage.lm_calls"] == 5
    assert len({span.context.trace_id for span in telemetry.spans}) == 1


@only_local_interpreter
def test_code_act(telemetry, snapshot):
    from dspy.primitives.local_interpreter import LocalInterpreter

    telemetry.instrument()
    agent = dspy.CodeAct("question -> answer", tools=[weather], interpreter_factory=LocalInterpreter)
    answers = [
        {"generated_code": "```python\nprint(weather('Bern'))\n```", "finished": "True"},
        {"reasoning": "r", "answer": "sunny"},
    ]
    with dspy.context(lm=dummy(*answers)):
        assert agent(question="Weather?").answer == "sunny"
    snapshot(telemetry.tree(attributes=False))


@needs_deno
def test_python_interpreter(telemetry):
    telemetry.instrument(capture_content="span_only")
    with dspy.PythonInterpreter() as interpreter:
        interpreter.execute("print(1 + 1)")
    assert telemetry.only("execute_code").attributes["dspy.interpreter.name"] == "PythonInterpreter"


@only_local_interpreter
def test_flex(telemetry, server, snapshot):
    from dspy.primitives.local_interpreter import LocalInterpreter

    telemetry.instrument()
    with dspy.context(lm=server.lm()):
        dspy.Flex("question -> answer", interpreter_factory=LocalInterpreter)(question="x")
    snapshot(telemetry.tree(attributes=False))
