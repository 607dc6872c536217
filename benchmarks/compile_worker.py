"""One configuration of compile.py: sets a tool up, then compiles what it is asked to, one JSON object per line.

Run as ``compile_worker.py TOOL STATE`` (the driver does). Requests on stdin: ``{"optimizer": name, "size": factor}``
for a measured compile, ``{"memory": calls}`` for the growth of memory in one large compile.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
from dspy.clients import base_lm
from meter import VARIABLE, Meter
from programs import by_hand
from worker import Pipeline, Skipped

OPTIMIZERS = ("MIPROv2", "GEPA", "BootstrapFewShotWithRandomSearch", "SIMBA")
# Instructions are counted in one thread: which of several runs when is another each time, and nobody waits for the LM.
COUNTS = VARIABLE in os.environ
THREADS = 1 if COUNTS else 4
SECONDS = 0.0 if COUNTS else 0.001
_FIELDS = re.compile(r"`\[\[ ## (\w+) ## \]\]`")


class HashLM(dspy.LM):
    """Answers after a given time: numbers for answers, new texts for instructions, both from a checksum of the prompt.

    The same prompt (and rollout id) gets the same answer, so that every configuration does the same work.
    """

    seconds = SECONDS

    def __init__(self) -> None:
        super().__init__("openai/hash", cache=False)
        self.calls = 0

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """Answer one call."""
        self.calls += 1  # of several threads; only for the table
        if self.seconds:
            time.sleep(self.seconds)
        given = messages or [{"role": "user", "content": prompt or ""}]
        text = "".join(
            message["content"] if isinstance(message["content"], str) else str(message["content"]) for message in given
        )
        salt = zlib.crc32(f"{text}{kwargs.get('rollout_id')}".encode())
        fields = [name for name in dict.fromkeys(_FIELDS.findall(text[-2000:])) if name != "completed"]
        if fields:
            parts = [f"[[ ## {name} ## ]]\n{self._answer(name, salt)}" for name in fields]
            answer = "\n\n".join([*parts, "[[ ## completed ## ]]"])
        else:
            answer = f"```\nVersion {salt % 10_000}\n```"
        choice = SimpleNamespace(message=SimpleNamespace(content=answer), finish_reason="stop")
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        hidden = {"response_cost": 0.0001}
        count = kwargs.get("n") or 1
        return SimpleNamespace(
            id="hash", model="hash", choices=[choice] * count, usage=usage, _hidden_params=hidden, cache_hit=False
        )

    @staticmethod
    def _answer(name: str, salt: int) -> str:
        if name in ("first", "second"):
            return str(salt % 10)
        return (
            json.dumps({"one": f"Version {salt % 10_000}"}) if name == "module_advice" else f"Version {salt % 10_000}"
        )


class Digits(dspy.Module):
    """Two predictors, whose answers depend on their instructions and demos."""

    predict: type = dspy.Predict

    def __init__(self) -> None:
        super().__init__()
        self.one = self.predict("question -> first")
        self.two = self.predict("question -> second")

    def forward(self, question: str) -> Any:
        """Two digits."""
        first, second = self.one(question=question).first, self.two(question=question).second
        return dspy.Prediction(first=first, second=second)


def high(example: Any, prediction: Any, trace: Any = None) -> float:
    """The sum of the digits, from 0 to 1."""
    score = (int(getattr(prediction, "first", 0)) + int(getattr(prediction, "second", 0))) / 18
    return score if trace is None else float(score > 0.5)


def high_with_feedback(
    example: Any, prediction: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> Any:
    """The same for GEPA."""
    score = high(example, prediction)
    return dspy.Prediction(score=score, feedback=f"The digits make {score}.")


def rows(start: int, count: int) -> list[Any]:
    return [dspy.Example(question=f"question {n}").with_inputs("question") for n in range(start, start + count)]


classes: dict[str, Any] = {"program": Digits, "lm": HashLM}
"""What is compiled, with which LM; the floor has classes of its own."""


def compile_once(optimizer: str, lm: HashLM, size: float) -> Any:
    """One whole compile; ``size`` 1 makes some hundreds of LM calls."""
    train, val = rows(0, max(int(30 * size), 6)), rows(1000, max(int(30 * size), 6))
    program: Any = classes["program"]()
    if optimizer == "MIPROv2":
        search = dspy.MIPROv2(
            metric=high,
            prompt_model=lm,
            task_model=lm,
            auto=None,
            num_candidates=4,
            max_bootstrapped_demos=2,
            max_labeled_demos=2,
            num_threads=THREADS,
            seed=1,
        )
        return search.compile(program, trainset=train, valset=val, num_trials=10, minibatch_size=max(int(15 * size), 3))
    if optimizer == "GEPA":
        gepa = dspy.GEPA(
            metric=high_with_feedback,
            reflection_lm=lm,
            max_metric_calls=int(400 * size),
            track_stats=True,
            num_threads=THREADS,
            seed=1,
        )
        return gepa.compile(program, trainset=train, valset=val)
    if optimizer == "SIMBA":
        simba = dspy.SIMBA(
            metric=high,
            bsize=max(int(16 * size), 4),
            num_candidates=4,
            max_steps=3,
            prompt_model=lm,
            num_threads=THREADS,
        )
        return simba.compile(program, trainset=train, seed=1)
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=high, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=8, num_threads=THREADS
    )
    return search.compile(program, trainset=train, valset=val)


def set_up(tool: str, state: str, pipeline: Pipeline) -> str:
    """Switch the tool on and give its version. Raises Skipped or ImportError."""
    if tool == "bare":
        return ""
    if tool == "floor":
        write_by_hand(pipeline)
        return version("opentelemetry-sdk")
    if tool == "dspy-otel":
        import dspy_otel

        content, _, traces = state.partition("/")
        if content == "no-sdk":
            dspy_otel.instrument()
            return dspy_otel.__version__
        dspy_otel.instrument(
            tracer_provider=pipeline.tracer_provider,
            meter_provider=pipeline.meter_provider,
            capture_content="span_only" if content == "on" else "no_content",
            optimization_traces=traces or "all",
        )
        return dspy_otel.__version__
    if tool == "openinference":
        from openinference.instrumentation import TraceConfig
        from openinference.instrumentation.dspy import DSPyInstrumentor as OpenInference

        config = TraceConfig() if state != "off" else TraceConfig(hide_inputs=True, hide_outputs=True)
        OpenInference().instrument(tracer_provider=pipeline.tracer_provider, config=config)
        return version("openinference-instrumentation-dspy")
    if tool == "mlflow":
        import mlflow

        folder = Path(tempfile.mkdtemp(prefix="compile-mlflow-"))
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.create_experiment("compile", artifact_location=folder.as_uri())
        mlflow.set_experiment("compile")
        mlflow.dspy.autolog(log_traces_from_compile=True, log_traces_from_eval=True, log_compiles=True, log_evals=True)
        pipeline.flush = mlflow.flush_trace_async_logging
        return mlflow.__version__
    raise Skipped(f"unknown tool {tool}")


def write_by_hand(pipeline: Pipeline) -> None:
    """The spans and measurements of each evaluated example, recorded under dspy-otel, then written by hand (floor.py).

    Less than what any instrumentation does: constants for all attributes, and nothing for optimizers, their trials,
    their own LM calls, or the metric.
    """
    from floor import Recorder, opener

    import dspy_otel

    recorder = Recorder()
    dspy_otel.instrument(tracer_provider=recorder.tracer_provider, meter_provider=recorder.meter_provider)
    HashLM.seconds = 0
    with dspy.context(lm=HashLM()):
        dspy.Evaluate(devset=rows(0, 1), metric=high, display_progress=False)(Digits())
    dspy_otel.uninstrument()
    HashLM.seconds = SECONDS
    by_name = {span["name"].split(" ")[0]: span for span in recorder.spans.values()}
    tracer, meter = pipeline.tracer_provider.get_tracer("by_hand"), pipeline.meter_provider.get_meter("by_hand")
    written = {name: opener(by_name[name], tracer, meter) for name in ("example", "invoke_workflow", "Predict", "chat")}

    def example(call: Any, *args: Any, **kwargs: Any) -> Any:
        return written["example"](lambda: written["invoke_workflow"](call, *args, **kwargs))

    program = by_hand(Digits, example)
    program.predict = by_hand(dspy.Predict, written["Predict"])  # type: ignore[attr-defined]
    classes.update(program=program, lm=by_hand(HashLM, written["chat"]))


def forget(lm: HashLM) -> None:
    """Empty DSPy's histories, so that every compile starts from the same heap."""
    base_lm.GLOBAL_HISTORY.clear()
    lm.history.clear()
    gc.collect()


def measure(work: Callable[[], Any], lm: HashLM, flush: Callable[[], Any]) -> dict[str, Any]:
    """CPU (see ``meter.py``) of the whole process, what is exported included, and wall-clock seconds of one compile."""
    forget(lm)
    calls = lm.calls
    with Meter() as meter:
        program = work()
        flush()
    state = json.dumps(program.dump_state(), sort_keys=True, default=str)
    return {"cpu": meter.cpu, "wall": meter.wall, "calls": lm.calls - calls, "program": zlib.crc32(state.encode())}


def resident() -> float:
    """Memory of this process in MB, as the system counts it (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def grow(calls: int, lm: HashLM, flush: Callable[[], Any]) -> dict[str, Any]:
    """Memory before, at most during, and after one RandomSearch of about ``calls`` LM calls, with no waiting."""
    lm.seconds = 0
    candidates, per_example = 22, 2
    devset = rows(0, calls // ((candidates + 3) * per_example))
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=high,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_candidate_programs=candidates,
        num_threads=THREADS,
    )
    flush()
    forget(lm)
    made, before, over = lm.calls, resident(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.2):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    program = search.compile(Digits(), trainset=rows(0, 30), valset=devset)
    flush()
    over.set()
    watcher.join()
    gc.collect()
    with_result = resident()
    del program
    forget(lm)
    return {
        "before": before,
        "peak": max(peak, with_result),
        "with_result": with_result,
        "after": resident(),
        "calls": lm.calls - made,
    }


def main() -> None:
    """Set up what the arguments name, then serve."""
    tool, state = sys.argv[1:3]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints to stdout must not get between the replies
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        pipeline = Pipeline(state)
        name = set_up(tool, state, pipeline)
        lm = classes["lm"]()
        dspy.configure(lm=lm)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for optimizer in OPTIMIZERS:
                compile_once(optimizer, lm, 0.2)
        pipeline.flush()
    except Exception as exc:
        return reply(skipped=f"{type(exc).__name__}: {exc}".splitlines()[0])
    reply(version=name)
    for line in sys.stdin:
        task = json.loads(line)
        spans = pipeline.exporter.spans
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if "memory" in task:
                result = grow(task["memory"], lm, pipeline.flush)
            else:

                def work(task: Any = task) -> Any:
                    return compile_once(task["optimizer"], lm, task["size"])

                result = measure(work, lm, pipeline.flush)
        reply(**result, spans=pipeline.exporter.spans - spans)
    return None


if __name__ == "__main__":
    main()
