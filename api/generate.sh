#!/bin/sh
# Generates the Go code beside each .proto file, with the pinned plugins of tools/go.mod.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
for p in google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc; do
	go build -modfile=../tools/go.mod -o "$bin/" "$p"
done
PATH=$bin:$PATH protoc -I . --go_out=. --go_opt=paths=source_relative \
	--go-grpc_out=. --go-grpc_opt=paths=source_relative \
	$(find . -name '*.proto' | sort)
