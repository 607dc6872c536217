"""A user's program: plain DSPy, not one line about telemetry. Its LM is a class of its own and needs no network."""

import sys
from types import SimpleNamespace

import dspy


class EchoLM(dspy.BaseLM):
    """Answers in DSPy's chat format, the same each time."""

    def forward(self, prompt=None, messages=None, **kwargs):
        text = "[[ ## answer ## ]]\nblue\n\n[[ ## completed ## ]]"
        message = SimpleNamespace(content=text, tool_calls=None)
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")],
            usage={"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
            model="echo-1",
        )

    async def aforward(self, prompt=None, messages=None, **kwargs):
        return self.forward(prompt, messages, **kwargs)


class App(dspy.Module):
    def __init__(self):
        super().__init__()
        self.reply = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.reply(question=question)


def exact(example, prediction, trace=None):
    return float(example.answer == prediction.answer)


def main():
    dspy.configure(lm=EchoLM(model="test/echo"))
    app = App()
    print("answer:", app(question="Which colour is the sky?").answer)
    if "evaluate" in sys.argv:
        devset = [dspy.Example(question=f"q{i}", answer="blue").with_inputs("question") for i in range(2)]
        evaluate = dspy.Evaluate(devset=devset, metric=exact, num_threads=2, display_progress=False)
        print("score:", evaluate(app).score)


if __name__ == "__main__":
    main()
