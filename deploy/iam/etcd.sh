#!/bin/sh
# A role that reads and writes the records under one prefix, and nothing else.
set -eu
etcdctl role add keyagent
etcdctl role grant-permission keyagent readwrite --prefix=true PREFIX/
etcdctl user add keyagent --no-password
etcdctl user grant-role keyagent keyagent
