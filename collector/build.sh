#!/usr/bin/env bash
# Builds the Collector of builder-config.yaml, or Jaeger, from their Go modules, and prints where the program is.
#
#   collector/build.sh collector        build it unless that has been done
#   collector/build.sh jaeger
#   collector/build.sh --path NAME      print its path, build nothing; exit 1 if it is not there
#
# Needs Go. Programs go to ${XDG_CACHE_HOME:-~/.cache}/dspy-otel, into a folder named by a digest of all that decides
# what is built, so that every checkout on a machine uses the same ones.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/dspy-otel

# Jaeger's tags v2.* cannot be named as a Go module (its path has no /v2); v1.76.0 is the same commit as v2.13.0.
JAEGER=v1.76.0

version=$(sed -n 's/^  version: //p' "$here/builder-config.yaml")
digest() { sha256sum | cut -c1-12; }
case ${2:-$1} in
  collector) name=otelcol-dspy folder=collector-$version-$(digest <"$here/builder-config.yaml") ;;
  jaeger) name=jaeger folder=jaeger-$JAEGER ;;
  *) echo "usage: $0 [--path] collector|jaeger" >&2 && exit 2 ;;
esac
program=$cache/$folder/$name
if [ -x "$program" ]; then
  echo "$program"
  exit
fi
[ "$1" != --path ] || exit 1
command -v go >/dev/null || { echo "building $name needs Go (https://go.dev/dl/)" >&2 && exit 1; }

echo "building $name (some minutes, once)" >&2
mkdir -p "$cache"
work=$(mktemp -d "$cache/$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT
case $name in
  otelcol-dspy)
    # CGO off: the program then runs in any image, whatever its C library.
    cp "$here/builder-config.yaml" "$work"
    # -e: the builder's `go mod tidy` asks for the modules of the components' own tests as well, and shall go on where
    # a proxy lacks one of those. A module that is really needed and missing fails the compilation.
    (cd "$work" && GOFLAGS="-mod=mod -e=true" CGO_ENABLED=0 \
      go run "go.opentelemetry.io/collector/cmd/builder@v$version" --config builder-config.yaml >&2)
    mv "$work/build/$name" "$work/$name"
    ;;
  jaeger)
    # `go install` refuses a module with a replace directive; a module of its own may build any package.
    (cd "$work" && go mod init jaeger-build >&2 && go get "github.com/jaegertracing/jaeger/cmd/jaeger@$JAEGER" >&2 &&
      CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X github.com/jaegertracing/jaeger/internal/version.latestVersion=$JAEGER" \
        -o "$work/$name" github.com/jaegertracing/jaeger/cmd/jaeger >&2)
    ;;
esac
mkdir -p "$cache/$folder"
mv "$work/$name" "$program" # a rename: whoever looks finds all of it or nothing
echo "$program"
