"""Retrievers and embedders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import dspy
import numpy as np
import pytest

CORPUS = ["about cats", "about dogs and more", "about the sea"]


def embed(texts):
    """A function for `dspy.Embedder`: letters a, e and o."""
    return np.array([[text.count(letter) + 0.1 for letter in "aeo"] for text in texts], dtype=np.float32)


def rm(query, k, **_):
    return [dspy.Example(long_text=f"{query} {number}") for number in range(k)]


@pytest.mark.parametrize("content", ["no_content", "span_only"])
def test_retrieve(telemetry, snapshot, content):
    telemetry.instrument(capture_content=content)
    with dspy.context(rm=rm):
        assert dspy.Retrieve(k=2)("sea").passages == ["sea 0", "sea 1"]
    snapshot(telemetry.tree(), f"retrieve_{content}")


def test_retrieve_inside_a_program(telemetry, snapshot):
    class Rag(dspy.Module):
        def __init__(self):
            super().__init__()
            self.retrieve = dspy.Retrieve(k=1)

        def forward(self, question):
            return self.retrieve(question, k=3)

    telemetry.instrument()
    with dspy.context(rm=rm):
        Rag()(question="sea")
    assert [span.name for span in telemetry.spans] == ["invoke_workflow Rag", "retrieval Retrieve"]
    assert telemetry.only("retrieval").attributes["gen_ai.retrieval.top_k"] == 3


def test_retrieve_error(telemetry):
    telemetry.instrument()
    with pytest.raises(AssertionError):
        dspy.Retrieve()("sea")
    assert telemetry.only("retrieval").attributes["error.type"] == "AssertionError"


def test_embeddings(telemetry, snapshot):
    """The embedder is asked by a thread of DSPy's own, and is still inside the retrieval."""
    telemetry.instrument(capture_content="span_only")
    search = dspy.Embeddings(CORPUS, dspy.Embedder(embed), k=2)
    telemetry.clear()
    with telemetry.tracer.start_as_current_span("application"):
        got = search("the sea, the sea")
    assert len(got.passages) == 2
    snapshot(telemetry.tree())


def test_embeddings_from_many_threads(telemetry):
    """One call of the embedder serves several retrievals: it is inside one of them and linked to the others."""
    telemetry.instrument()
    search = dspy.Embeddings(CORPUS, dspy.Embedder(embed), k=2)
    telemetry.clear()

    def ask(number):
        with telemetry.tracer.start_as_current_span(f"request {number}"):
            return search(f"question {number}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(12)))
    retrievals = {span.context.span_id for span in telemetry.named("retrieval")}
    assert len(retrievals) == 12
    served = set()
    for span in telemetry.named("embeddings"):
        assert span.parent.span_id in retrievals
        served |= {span.parent.span_id, *(link.context.span_id for link in span.links)}
    assert served == retrievals


def test_embeddings_with_a_plain_function(telemetry):
    telemetry.instrument()
    dspy.Embeddings(CORPUS, embed, k=1)("sea")
    assert [span.name for span in telemetry.spans] == ["retrieval Embeddings"]


def test_colbert(telemetry, server, snapshot):
    telemetry.instrument(capture_content="span_only")
    colbert = dspy.ColBERTv2(url=f"http://127.0.0.1:{server.port}/colbert")
    assert colbert("sea", k=2)[0].long_text == "passage 0"
    snapshot(telemetry.tree())


def test_knn(telemetry, snapshot):
    telemetry.instrument()
    rows = [dspy.Example(question=text, answer="a").with_inputs("question") for text in CORPUS]
    knn = dspy.KNN(k=1, trainset=rows, vectorizer=dspy.Embedder(embed))
    telemetry.clear()
    knn(question="cats, cats")
    snapshot(telemetry.tree())


async def test_embedder(telemetry, snapshot):
    telemetry.instrument(capture_content="span_only")
    embedder = dspy.Embedder(embed)
    assert embedder(["sea"]).shape == (1, 3)
    assert (await embedder.acall(["sea"])).shape == (1, 3)
    snapshot(telemetry.tree())


def test_hosted_embedder(telemetry, server, snapshot):
    telemetry.instrument()
    embedder = dspy.Embedder(
        "openai/text-embedding-3-small", api_base=server.url, api_key="sk-test-0123456789abcdef", caching=False
    )
    assert embedder(["sea", "land"]).shape == (2, 3)
    snapshot(telemetry.tree())
    assert "sk-test" not in telemetry.everything()
