"""A program that has the workers of a Dask cluster of its own ask an LM, and says what is counted here."""

import dspy
from distributed import Client, LocalCluster, WorkerPlugin

import dspy_otel
from tests.switching.app import App, EchoLM


def ask(question):
    with dspy.context(lm=EchoLM(model="test/echo", cache=False)):
        return App()(question=question).answer


def ask_and_fail(question):
    raise ValueError(ask(question))


class SwitchOn(WorkerPlugin):
    """On every worker, also on those that come later."""

    def setup(self, worker):
        dspy_otel.instrument()


def main():
    dspy_otel.instrument()
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1")
    with cluster, Client(cluster) as client, dspy_otel.budget(tokens=10**6) as budget:

        def show(name):
            spent = budget.spent
            print(name, spent.lm_calls, spent.tokens, spent.unanswered_tasks)

        client.register_plugin(SwitchOn())
        # The same question, and yet two tasks: what asks an LM is no pure function.
        sent = [client.submit(dspy_otel.delegate(ask), "q") for _ in range(2)]
        assert client.gather(sent) == client.gather(sent) == ["blue"] * 2
        show("submit")
        assert client.gather(client.map(dspy_otel.delegate(ask), ["a", "b", "c"])) == ["blue"] * 3
        show("map")
        try:
            client.submit(dspy_otel.delegate(ask_and_fail), "q").result()
        except ValueError:
            show("failed")


if __name__ == "__main__":
    main()
