"""Every span, attribute, event and metric name this package emits, in one room.

Three vocabularies meet here:

* ``gen_ai.*`` - OpenTelemetry's GenAI semantic conventions (status: development). They have never been
  tagged and are renamed often, so they are spelled out here instead of imported.
* ``dspy.*`` - what no convention covers: programs, modules, evaluations, optimizers.
* OpenInference - the few keys that Phoenix, MLflow and Langfuse need to type a span that is not an LM call.

``docs/semantic-conventions.md`` documents each name with its type, unit, presence and an example; a test keeps the
two in step.
"""

from __future__ import annotations

from typing import Final

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.41.0"
"""Newest schema of the core conventions that still carries the ``gen_ai.*`` names used below."""

SCOPE_NAME: Final = "dspy_otel"
"""Instrumentation scope of every tracer, meter and logger."""

# --- OpenTelemetry, general -------------------------------------------------------------------------------------
ERROR_TYPE: Final = "error.type"
ERROR_SCORE_NOT_FINITE: Final = "score_not_finite"
"""An example whose metric returned NaN or infinity."""
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
EXCEPTION_STACKTRACE: Final = "exception.stacktrace"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
SESSION_ID: Final = "session.id"
USER_ID: Final = "user.id"

# --- GenAI: operations ------------------------------------------------------------------------------------------
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
OPERATION_CHAT: Final = "chat"
OPERATION_TEXT_COMPLETION: Final = "text_completion"
OPERATION_EMBEDDINGS: Final = "embeddings"
OPERATION_RETRIEVAL: Final = "retrieval"
OPERATION_EXECUTE_TOOL: Final = "execute_tool"
OPERATION_INVOKE_AGENT: Final = "invoke_agent"
OPERATION_INVOKE_WORKFLOW: Final = "invoke_workflow"

# --- GenAI: inference -------------------------------------------------------------------------------------------
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_REQUEST_TOP_K: Final = "gen_ai.request.top_k"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
GEN_AI_REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
GEN_AI_REQUEST_STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
GEN_AI_REQUEST_SEED: Final = "gen_ai.request.seed"
GEN_AI_REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_REQUEST_REASONING_LEVEL: Final = "gen_ai.request.reasoning.level"
GEN_AI_OUTPUT_TYPE: Final = "gen_ai.output.type"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_USAGE_CACHE_WRITE_INPUT_TOKENS: Final = "gen_ai.usage.cache_write.input_tokens"
GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"
GEN_AI_INPUT_MESSAGES: Final = "gen_ai.input.messages"
GEN_AI_OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
GEN_AI_SYSTEM_INSTRUCTIONS: Final = "gen_ai.system_instructions"
GEN_AI_TOOL_DEFINITIONS: Final = "gen_ai.tool.definitions"
GEN_AI_TOKEN_TYPE: Final = "gen_ai.token.type"
TOKEN_TYPE_INPUT: Final = "input"
TOKEN_TYPE_OUTPUT: Final = "output"

# --- GenAI: tools, agents, workflows, retrieval, embeddings, evaluation -----------------------------------------
GEN_AI_TOOL_NAME: Final = "gen_ai.tool.name"
GEN_AI_TOOL_TYPE: Final = "gen_ai.tool.type"
GEN_AI_TOOL_DESCRIPTION: Final = "gen_ai.tool.description"
GEN_AI_TOOL_CALL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
GEN_AI_TOOL_CALL_RESULT: Final = "gen_ai.tool.call.result"
GEN_AI_AGENT_NAME: Final = "gen_ai.agent.name"
GEN_AI_WORKFLOW_NAME: Final = "gen_ai.workflow.name"
GEN_AI_DATA_SOURCE_ID: Final = "gen_ai.data_source.id"
GEN_AI_RETRIEVAL_QUERY_TEXT: Final = "gen_ai.retrieval.query.text"
GEN_AI_RETRIEVAL_DOCUMENTS: Final = "gen_ai.retrieval.documents"
GEN_AI_RETRIEVAL_TOP_K: Final = "gen_ai.retrieval.top_k"
GEN_AI_EMBEDDINGS_DIMENSION_COUNT: Final = "gen_ai.embeddings.dimension.count"
GEN_AI_EVALUATION_NAME: Final = "gen_ai.evaluation.name"
GEN_AI_EVALUATION_SCORE_VALUE: Final = "gen_ai.evaluation.score.value"
GEN_AI_EVALUATION_EXPLANATION: Final = "gen_ai.evaluation.explanation"

# --- DSPy: programs and modules ---------------------------------------------------------------------------------
PROGRAM_NAME: Final = "dspy.program.name"
PROGRAM_ID: Final = "dspy.program.id"
MODULE_CLASS: Final = "dspy.module.class"
MODULE_PATH: Final = "dspy.module.path"
SIGNATURE_NAME: Final = "dspy.signature.name"
SIGNATURE_FIELDS: Final = "dspy.signature.fields"
SIGNATURE_INSTRUCTIONS: Final = "dspy.signature.instructions"
DEMOS_COUNT: Final = "dspy.demos.count"
ADAPTER_NAME: Final = "dspy.adapter.name"
MODULE_INPUTS: Final = "dspy.module.inputs"
MODULE_OUTPUTS: Final = "dspy.module.outputs"

# --- DSPy: LM calls ---------------------------------------------------------------------------------------------
LM_CACHE_HIT: Final = "dspy.lm.cache_hit"
LM_ROLE: Final = "dspy.lm.role"
LM_RETRIES: Final = "dspy.lm.retries"
LM_ROLLOUT_ID: Final = "dspy.lm.rollout_id"
LM_ENGINE: Final = "dspy.lm.engine"
LM_COST: Final = "dspy.lm.cost"
LM_COST_SAVED: Final = "dspy.lm.cost.saved"
LM_COST_LOOPBACK: Final = "dspy.lm.cost.loopback"
LM_CHUNKS: Final = "dspy.lm.chunks"
HTTP_STATUS_CODE: Final = "http.response.status_code"
LM_REQUEST_ID: Final = "dspy.lm.request.id"
LM_RETRY_DELAY: Final = "dspy.lm.retry.delay"
LM_RETRY_ATTEMPT: Final = "dspy.lm.retry.attempt"

ROLE_TASK: Final = "task"
ROLE_JUDGE: Final = "judge"
ROLE_PROPOSER: Final = "proposer"
ROLE_REFLECTION: Final = "reflection"
ROLE_TEACHER: Final = "teacher"

# --- DSPy: totals on parents. Never gen_ai.usage.*: backends add those up over the tree ---------------------------
USAGE_INPUT_TOKENS: Final = "dspy.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "dspy.usage.output_tokens"
USAGE_COST: Final = "dspy.usage.cost"
USAGE_LM_CALLS: Final = "dspy.usage.lm_calls"
USAGE_CACHE_HITS: Final = "dspy.usage.cache_hits"
USAGE_UNPRICED_CALLS: Final = "dspy.usage.unpriced_calls"
USAGE_PREFIX: Final = "dspy.usage."
"""Totals by role put the role behind it: ``dspy.usage.task.input_tokens``."""

# --- DSPy: budgets ----------------------------------------------------------------------------------------------
BUDGET_LIMIT: Final = "dspy.budget.limit"
BUDGET_PERCENT: Final = "dspy.budget.percent"
BUDGET_SPENT: Final = "dspy.budget.spent"
BUDGET_ALLOWED: Final = "dspy.budget.allowed"

# --- DSPy: evaluation -------------------------------------------------------------------------------------------
EVALUATION_ID: Final = "dspy.evaluation.id"
EVALUATION_SCORE: Final = "dspy.evaluation.score"
EVALUATION_SIZE: Final = "dspy.evaluation.size"
EVALUATION_FAILURES: Final = "dspy.evaluation.failures"
EVALUATION_METRIC_NAME: Final = "dspy.evaluation.metric.name"
EVALUATION_NUM_THREADS: Final = "dspy.evaluation.num_threads"
EXAMPLE_INDEX: Final = "dspy.example.index"
EXAMPLE_ID: Final = "dspy.example.id"
EXAMPLE_SCORE: Final = "dspy.example.score"
EXAMPLE_FEEDBACK: Final = "dspy.example.feedback"
EXAMPLE_EXPECTED: Final = "dspy.example.expected"
EXAMPLE_RESUBMITTED: Final = "dspy.example.resubmitted"
PARALLEL_SIZE: Final = "dspy.parallel.size"
PARALLEL_FAILURES: Final = "dspy.parallel.failures"
PARALLEL_NUM_THREADS: Final = "dspy.parallel.num_threads"

# --- DSPy: code interpreter -------------------------------------------------------------------------------------
INTERPRETER_NAME: Final = "dspy.interpreter.name"
INTERPRETER_CODE: Final = "dspy.interpreter.code"
INTERPRETER_OUTPUT: Final = "dspy.interpreter.output"

# --- DSPy: optimizers -------------------------------------------------------------------------------------------
OPTIMIZER_NAME: Final = "dspy.optimizer.name"
OPTIMIZER_RUN_ID: Final = "dspy.optimizer.run.id"
OPTIMIZER_PARENT_RUN_ID: Final = "dspy.optimizer.parent_run.id"
OPTIMIZER_PARENT_TRIAL: Final = "dspy.optimizer.parent_trial.number"
OPTIMIZER_PARENT_PHASE: Final = "dspy.optimizer.parent_phase"
OPTIMIZER_ROOT_RUN_ID: Final = "dspy.optimizer.root_run.id"
OPTIMIZER_PHASE: Final = "dspy.optimizer.phase"
OPTIMIZER_PARAMS_PREFIX: Final = "dspy.optimizer.params."
OPTIMIZER_OUTCOME: Final = "dspy.optimizer.outcome"
OPTIMIZER_SCORE_SCALE: Final = "dspy.optimizer.score.scale"
OPTIMIZER_BASELINE_SCORE: Final = "dspy.optimizer.baseline_score"
OPTIMIZER_BEST_SCORE: Final = "dspy.optimizer.best_score"
OPTIMIZER_GAIN: Final = "dspy.optimizer.gain"
OPTIMIZER_TRIALS_DONE: Final = "dspy.optimizer.trials.done"
OPTIMIZER_TRIALS_PLANNED: Final = "dspy.optimizer.trials.planned"
OPTIMIZER_TRIALS_ACCEPTED: Final = "dspy.optimizer.trials.accepted"
OPTIMIZER_TRIALS_REJECTED: Final = "dspy.optimizer.trials.rejected"
OPTIMIZER_EXAMPLES_EVALUATED: Final = "dspy.optimizer.examples.evaluated"
OPTIMIZER_WINNER_TRIAL: Final = "dspy.optimizer.winner.trial"
OPTIMIZER_INFERENCE_TIME: Final = "dspy.optimizer.inference_time"
OPTIMIZER_ATTEMPT: Final = "dspy.optimizer.attempt"
OPTIMIZER_RESUMED: Final = "dspy.optimizer.resumed"
OPTIMIZER_PREVIOUS_OUTCOME: Final = "dspy.optimizer.previous_outcome"
OPTIMIZER_ALL_ATTEMPTS_PREFIX: Final = "dspy.optimizer.all_attempts."
"""Usage of all attempts of a resumed run: ``dspy.optimizer.all_attempts.usage.task.lm_calls``."""

DATASET_TRAIN_SIZE: Final = "dspy.dataset.train.size"
DATASET_VAL_SIZE: Final = "dspy.dataset.val.size"
DATASET_TRAIN_DIGEST: Final = "dspy.dataset.train.digest"
DATASET_VAL_DIGEST: Final = "dspy.dataset.val.digest"
DATASET_TRAIN_ROWS: Final = "dspy.dataset.train.rows"
DATASET_VAL_ROWS: Final = "dspy.dataset.val.rows"
INITIAL_PROGRAM_ID: Final = "dspy.optimizer.initial_program.id"
INITIAL_PROGRAM_STATE: Final = "dspy.optimizer.initial_program.state"
PROGRAM_STATE: Final = "dspy.program.state"
STATE_COMPLETE: Final = ".complete"
"""Put behind the name of a state: False when the state was cut, masked or redacted."""

PHASE_BOOTSTRAP: Final = "bootstrap"
PHASE_PROPOSE: Final = "propose"
PHASE_SEARCH: Final = "search"
PHASE_SAMPLE: Final = "sample"
PHASE_REFLECT: Final = "reflect"
PHASE_MERGE: Final = "merge"
PHASE_FINETUNE: Final = "finetune"
PHASE_FINAL_EVALUATION: Final = "final_evaluation"

BOOTSTRAP_ATTEMPTS: Final = "dspy.bootstrap.attempts"
BOOTSTRAP_ACCEPTED: Final = "dspy.bootstrap.accepted"
BOOTSTRAP_ROUND: Final = "dspy.bootstrap.round"
FINETUNE_JOBS: Final = "dspy.finetune.jobs"
FINETUNE_MODELS: Final = "dspy.finetune.models"

TRIAL_NUMBER: Final = "dspy.trial.number"
TRIAL_KIND: Final = "dspy.trial.kind"
TRIAL_SCORE: Final = "dspy.trial.score"
TRIAL_SCORE_REPORTED: Final = "dspy.trial.score.reported"
TRIAL_SIZE: Final = "dspy.trial.size"
TRIAL_BEST_SCORE: Final = "dspy.trial.best_score"
TRIAL_IS_BEST: Final = "dspy.trial.is_best"
TRIAL_PARAMS_PREFIX: Final = "dspy.trial.params."
TRIAL_ACCEPTED: Final = "dspy.trial.accepted"
TRIAL_REASON: Final = "dspy.trial.reason"
TRIAL_SCORE_BEFORE: Final = "dspy.trial.score_before"
TRIAL_SCORE_AFTER: Final = "dspy.trial.score_after"
TRIAL_ON_PARETO_FRONT: Final = "dspy.trial.on_pareto_front"
CANDIDATE_ID: Final = "dspy.candidate.id"
CANDIDATE_PARENT_IDS: Final = "dspy.candidate.parent_ids"
CANDIDATE_DIFF: Final = "dspy.candidate.diff"

TRIAL_BASELINE: Final = "baseline"
TRIAL_MINIBATCH: Final = "minibatch"
TRIAL_FULL: Final = "full"
TRIAL_SAMPLE: Final = "sample"
TRIAL_VALIDATION: Final = "validation"

# --- OpenInference ----------------------------------------------------------------------------------------------
OPENINFERENCE_SPAN_KIND: Final = "openinference.span.kind"
KIND_CHAIN: Final = "CHAIN"
KIND_LLM: Final = "LLM"
KIND_TOOL: Final = "TOOL"
KIND_AGENT: Final = "AGENT"
KIND_RETRIEVER: Final = "RETRIEVER"
KIND_EMBEDDING: Final = "EMBEDDING"
KIND_EVALUATOR: Final = "EVALUATOR"
INPUT_VALUE: Final = "input.value"
INPUT_MIME_TYPE: Final = "input.mime_type"
OUTPUT_VALUE: Final = "output.value"
OUTPUT_MIME_TYPE: Final = "output.mime_type"
MIME_JSON: Final = "application/json"

# --- Span names. Low-cardinality: a number or an id is an attribute, never part of a name ------------------------
SPAN_EVALUATE: Final = "evaluate"
SPAN_EXAMPLE: Final = "example"
SPAN_EXECUTE_CODE: Final = "execute_code"
SPAN_PARALLEL: Final = "parallel"
SPAN_COMPILE: Final = "compile"
SPAN_TRIAL: Final = "trial"
SPAN_BOOTSTRAP_ATTEMPT: Final = "attempt"

# --- Span events ------------------------------------------------------------------------------------------------
EVENT_EXCEPTION: Final = "exception"
EVENT_LM_RETRY: Final = "dspy.lm.retry"
EVENT_ADAPTER_PARSE_ERROR: Final = "dspy.adapter.parse_error"
EVENT_ADAPTER_FALLBACK: Final = "dspy.adapter.fallback"
EVENT_BUDGET_ALERT: Final = "dspy.budget.alert"
EVENT_PARETO_FRONT: Final = "dspy.optimizer.pareto_front"
PARETO_FRONT: Final = "dspy.optimizer.pareto_front.candidates"
PARETO_DISPLACED: Final = "dspy.optimizer.pareto_front.displaced"
ADAPTER_FALLBACK_FROM: Final = "dspy.adapter.fallback.from"
ADAPTER_COMPLETION: Final = "dspy.adapter.completion"

# --- Log events (logs signal) -----------------------------------------------------------------------------------
LOG_INFERENCE_DETAILS: Final = "gen_ai.client.inference.operation.details"
LOG_EVALUATION_RESULT: Final = "gen_ai.evaluation.result"

# --- Metrics ----------------------------------------------------------------------------------------------------
METRIC_OPERATION_DURATION: Final = "gen_ai.client.operation.duration"
METRIC_TOKEN_USAGE: Final = "gen_ai.client.token.usage"
METRIC_TIME_TO_FIRST_CHUNK: Final = "gen_ai.client.operation.time_to_first_chunk"
METRIC_TOOL_DURATION: Final = "gen_ai.execute_tool.duration"
METRIC_MODULE_DURATION: Final = "dspy.module.duration"
METRIC_LM_COST: Final = "dspy.lm.cost"
METRIC_LM_CACHE_HITS: Final = "dspy.lm.cache.hits"
METRIC_LM_RETRIES: Final = "dspy.lm.retries"
METRIC_EVALUATION_EXAMPLES: Final = "dspy.evaluation.examples"
METRIC_EVALUATION_SCORE: Final = "dspy.evaluation.score"
METRIC_OPTIMIZER_TRIALS: Final = "dspy.optimizer.trials"
METRIC_OPTIMIZER_TRIALS_PLANNED: Final = "dspy.optimizer.trials.planned"
METRIC_OPTIMIZER_TRIAL_SCORE: Final = "dspy.optimizer.trial.score"
METRIC_OPTIMIZER_BEST_SCORE: Final = "dspy.optimizer.best_score"
METRIC_OPTIMIZER_EXAMPLES: Final = "dspy.optimizer.examples"
METRIC_OPTIMIZER_LM_CALLS: Final = "dspy.optimizer.lm_calls"
METRIC_OPTIMIZER_COST: Final = "dspy.optimizer.cost"
METRIC_OPTIMIZER_DURATION: Final = "dspy.optimizer.duration"
METRIC_BUDGET_ALERTS: Final = "dspy.budget.alerts"

METRIC_SPANS_EXPORTED: Final = "otel.sdk.exporter.span.exported"
"""OpenTelemetry's own name for what becomes of the spans of an exporter."""
OTEL_COMPONENT_TYPE: Final = "otel.component.type"
OTEL_COMPONENT_NAME: Final = "otel.component.name"

TRIAL_OUTCOME: Final = "dspy.trial.outcome"

EXAMPLE_OUTCOME: Final = "dspy.example.outcome"
OUTCOME_SCORED: Final = "scored"
OUTCOME_FAILED: Final = "failed"

# Advised bucket boundaries of the GenAI metric conventions; seconds and tokens.
DURATION_BUCKETS: Final = tuple(0.01 * 2**k for k in range(14))
TOKEN_BUCKETS: Final = tuple(float(4**k) for k in range(14))
SECONDS_OF_A_RUN: Final = tuple(float(2**k) for k in range(17))
