#!/usr/bin/env bash
# Gets a program that the pipelines run or send to, and prints where it is.
#
#   collector/install.sh collector      the Collector of builder-config.yaml, built from its Go modules
#   collector/install.sh jaeger         Jaeger, built from its Go module (its web pages are not part of that)
#   collector/install.sh phoenix        Arize Phoenix, in a Python environment of its own
#   collector/install.sh rotel          rotel, a small collector (Python 3.11 only: a tool of the tests)
#   collector/install.sh kafka          Kafka's jars, by Maven (a tool of the tests; Java 17)
#   collector/install.sh --path NAME    prints the path, gets nothing; exit status 1 if it is not there
#
# All goes to ${XDG_CACHE_HOME:-~/.cache}/dspy-otel, in folders named by what decides their content, so that every checkout
# on a machine uses the same ones.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/dspy-otel

# Jaeger's tags v2.* cannot be named as a Go module (its path has no /v2); v1.76.0 is the same commit as v2.13.0.
JAEGER=v1.76.0 PHOENIX=20.26.1 ROTEL=0.0.1a15 KAFKA=4.1.1

collector=$(sed -n 's/^  version: //p' "$here/builder-config.yaml")
what=${2:-${1:-}}
case $what in
  collector) folder=collector-$collector-$(sha256sum <"$here/builder-config.yaml" | cut -c1-12) file=otelcol-dspy ;;
  jaeger) folder=jaeger-$JAEGER file=jaeger ;;
  phoenix) folder=phoenix-$PHOENIX file=bin/phoenix ;;
  rotel) folder=rotel-$ROTEL file=lib/python3.11/site-packages/rotel/rotel-agent ;;
  kafka) folder=kafka-$KAFKA file=lib ;;
  *) sed -n 's/^# \?//; 2,/^$/p' "$0" >&2 && exit 2 ;;
esac
path=$cache/$folder/$file
if [ -e "$path" ]; then
  echo "$path"
  exit
fi
[ "$1" != --path ] || exit 1

needs() { command -v "$1" >/dev/null || { echo "$what needs $2" >&2 && exit 1; }; }
environment() { # PACKAGE: a Python environment with it, here in $work
  if command -v uv >/dev/null; then
    uv venv -q --relocatable --python "${PYTHON:-python3}" "$work/$folder"
    uv pip install -q --compile-bytecode --python "$work/$folder/bin/python" "$1"
  else
    echo "$what needs uv" >&2 && exit 1
  fi
}

echo "getting $what (some minutes, once)" >&2
mkdir -p "$cache"
work=$(mktemp -d "$cache/$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/$folder"
cd "$work"
case $what in
  collector)
    needs go "Go (https://go.dev/dl/)"
    cp "$here/builder-config.yaml" .
    # -e: the builder's `go mod tidy` asks for the modules of the components' own tests as well, and shall go on where
    # a proxy lacks one of those. A module that is really needed and missing fails the compilation.
    GOFLAGS="-mod=mod -e=true" CGO_ENABLED=0 \
      go run "go.opentelemetry.io/collector/cmd/builder@v$collector" --config builder-config.yaml >&2
    mv "build/$file" "$folder"
    ;;
  jaeger)
    needs go "Go (https://go.dev/dl/)"
    # `go install` refuses a module with a replace directive; a module of its own may build any package.
    go mod init jaeger-build >&2
    go get "github.com/jaegertracing/jaeger/cmd/jaeger@$JAEGER" >&2
    CGO_ENABLED=0 go build -trimpath -o "$folder" \
      -ldflags "-s -w -X github.com/jaegertracing/jaeger/internal/version.latestVersion=$JAEGER" \
      github.com/jaegertracing/jaeger/cmd/jaeger >&2
    ;;
  phoenix) environment "arize-phoenix==$PHOENIX" >&2 ;;
  rotel) PYTHON=3.11 environment "rotel==$ROTEL" >&2 ;;
  kafka)
    needs mvn "Maven"
    cat >pom.xml <<END
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion><groupId>local</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$KAFKA</version>
  </dependency></dependencies>
</project>
END
    mvn -q -B dependency:copy-dependencies -DoutputDirectory="$work/$folder/lib" >&2
    ;;
esac
[ -e "$folder/$file" ]
rm -rf "${cache:?}/$folder"
mv "$folder" "$cache" # a rename: whoever looks finds all of it or nothing
echo "$path"
