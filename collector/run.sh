#!/usr/bin/env bash
# The Collector, Jaeger, Prometheus, MLflow and Phoenix on this machine, without Docker, with the same files as compose.yaml.
#
#   make collector jaeger phoenix       gets these (the first two are built, and need Go)
#   collector/run.sh                    runs what is there, says what is not, until Ctrl-C
#   collector/run.sh jaeger prometheus  the Collector and just these
#
# Prometheus is Debian's package `prometheus`, or any `prometheus` on the PATH. MLflow is looked for in ./.venv and on the PATH.
#
# SAMPLING=1 takes sampling.yaml in place of keep-all.yaml. DATA is where all data and logs go (default ./otel-data). Ports
# are the variables below. Everything listens on the loopback interface only.
set -euo pipefail
set -m # each service is a process group of its own: MLflow's workers end with it
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${DATA:=otel-data}"
DATA=$(cd "$DATA" && pwd)
logs=$DATA/logs
mkdir -p "$logs"

export COLLECTOR_GRPC_PORT=${COLLECTOR_GRPC_PORT:-4317} COLLECTOR_HTTP_PORT=${COLLECTOR_HTTP_PORT:-4318}
export COLLECTOR_PROMETHEUS_PORT=${COLLECTOR_PROMETHEUS_PORT:-8889} COLLECTOR_TELEMETRY_PORT=${COLLECTOR_TELEMETRY_PORT:-8888}
export COLLECTOR_HEALTH_PORT=${COLLECTOR_HEALTH_PORT:-13133}
export JAEGER_OTLP_PORT=${JAEGER_OTLP_PORT:-14317} JAEGER_UI_PORT=${JAEGER_UI_PORT:-16686}
export JAEGER_QUERY_GRPC_PORT=${JAEGER_QUERY_GRPC_PORT:-16685}
export PROMETHEUS_PORT=${PROMETHEUS_PORT:-9090} MLFLOW_PORT=${MLFLOW_PORT:-5000}
export PHOENIX_PORT=${PHOENIX_PORT:-6006} PHOENIX_GRPC_PORT=${PHOENIX_GRPC_PORT:-6007}

collector=$("$here/install.sh" --path collector) || { echo "no Collector: run \`make collector\` first (needs Go)" >&2 && exit 1; }

find_program() { # NAME: what install.sh got, ./.venv, the PATH
  "$here/install.sh" --path "$1" 2>/dev/null && return
  if [ -x ".venv/bin/$1" ]; then echo ".venv/bin/$1"; else command -v "$1"; fi
}
wanted() { [ "${#only[@]}" = 0 ] || [[ " ${only[*]} " == *" $1 "* ]]; }
start() { # NAME COMMAND...: in the background, its own log
  local name=$1
  shift
  "$@" >"$logs/$name.log" 2>&1 &
  pids[$name]=$!
}
answers() { # NAME URL: wait until it does, or has ended
  while kill -0 "${pids[$1]}" 2>/dev/null; do
    if curl -fsS -o /dev/null "$2" 2>/dev/null; then printf '  %-11s %s\n' "$1" "$3" && return; fi
    sleep 0.3
  done
  echo "$1 did not start; see $logs/$1.log" >&2
  tail -5 "$logs/$1.log" >&2
  exit 1
}

declare -A pids=()
only=("$@")
stop() {
  trap - EXIT INT TERM
  [ "${#pids[@]}" = 0 ] || kill -- "${pids[@]/#/-}" 2>/dev/null || true
  wait
}
trap stop EXIT
trap 'exit 0' INT TERM # by way of EXIT

configs=(base content metrics file)
if [ -n "${SAMPLING:-}" ]; then configs+=(sampling); else configs+=(keep-all); fi

if wanted jaeger; then
  if jaeger=$(find_program jaeger); then
    PROMETHEUS_URL=http://localhost:$PROMETHEUS_PORT start jaeger "$jaeger" --config "$here/jaeger/jaeger.yaml"
    configs+=(jaeger)
  else
    echo "no Jaeger: \`make jaeger\` builds it (needs Go)"
  fi
fi
if wanted prometheus; then
  if prometheus=$(find_program prometheus); then
    settings=$DATA/prometheus
    mkdir -p "$settings/targets"
    sed "s/15s/${PROMETHEUS_INTERVAL:-15s}/" "$here/prometheus/prometheus.yaml" >"$settings/prometheus.yaml"
    cp "$here/prometheus/rules.yaml" "$settings"
    sed "s/8889/$COLLECTOR_PROMETHEUS_PORT/" "$here/prometheus/targets/dspy.yaml" >"$settings/targets/dspy.yaml"
    sed "s/8888/$COLLECTOR_TELEMETRY_PORT/" "$here/prometheus/targets/collector.yaml" >"$settings/targets/collector.yaml"
    start prometheus "$prometheus" --config.file "$settings/prometheus.yaml" --storage.tsdb.path "$settings/data" \
      --web.listen-address "127.0.0.1:$PROMETHEUS_PORT" --enable-feature=exemplar-storage
  else
    echo "no Prometheus: Debian's package \`prometheus\` has it"
  fi
fi
if wanted mlflow; then
  if mlflow=$(find_program mlflow); then
    mkdir -p "$DATA/mlflow"
    # With LiteLLM installed and no network, a start would wait for LiteLLM's list of prices.
    LITELLM_LOCAL_MODEL_COST_MAP=True start mlflow "$mlflow" server --host 127.0.0.1 --port "$MLFLOW_PORT" --workers 1 \
      --backend-store-uri "sqlite:///$DATA/mlflow/mlflow.db" --artifacts-destination "$DATA/mlflow/artifacts"
    export MLFLOW_ENDPOINT=http://localhost:$MLFLOW_PORT
    configs+=(mlflow)
  else
    echo "no MLflow: pip install mlflow"
  fi
fi
if wanted phoenix; then
  if phoenix=$(find_program phoenix); then
    mkdir -p "$DATA/phoenix"
    PHOENIX_HOST=127.0.0.1 PHOENIX_WORKING_DIR=$DATA/phoenix PHOENIX_TELEMETRY_ENABLED=false start phoenix "$phoenix" serve
    export PHOENIX_ENDPOINT=http://localhost:$PHOENIX_PORT
    configs+=(phoenix)
  else
    echo "no Phoenix: \`make phoenix\` gets it"
  fi
fi

export COLLECTOR_STORAGE=$DATA/queues COLLECTOR_FILES=$DATA/files JAEGER_OTLP=localhost:$JAEGER_OTLP_PORT
mkdir -p "$COLLECTOR_FILES"
start collector "$collector" $(printf -- "--config $here/config/%s.yaml " "${configs[@]}")

answers collector "http://localhost:$COLLECTOR_HEALTH_PORT" \
  "OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:$COLLECTOR_GRPC_PORT (gRPC), :$COLLECTOR_HTTP_PORT (HTTP)"
[ -z "${pids[jaeger]:-}" ] || answers jaeger "http://localhost:$JAEGER_UI_PORT/api/services" "http://localhost:$JAEGER_UI_PORT"
[ -z "${pids[prometheus]:-}" ] || answers prometheus "http://localhost:$PROMETHEUS_PORT/-/ready" "http://localhost:$PROMETHEUS_PORT"
[ -z "${pids[mlflow]:-}" ] || answers mlflow "http://localhost:$MLFLOW_PORT/health" "http://localhost:$MLFLOW_PORT"
[ -z "${pids[phoenix]:-}" ] || answers phoenix "http://localhost:$PHOENIX_PORT/healthz" "http://localhost:$PHOENIX_PORT"
echo "ready; logs and data in $DATA; Ctrl-C ends all"
wait -n # the first that ends, ends all
