# Two commands on a fresh Debian 12 with Go: make demo, make test.

GO      ?= go
# Erase what computations with keys leave on stacks and heap, see internal/secret.
export GOEXPERIMENT := runtimesecret
# golang.org/x/net/trace, which gRPC links otherwise, brings html/template and with it
# reflection that keeps the linker from leaving out what is never called.
export GOFLAGS := -tags=grpcnotrace
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X main.version=$(VERSION)
TOOL    := $(GO) tool -modfile=tools/go.mod

.PHONY: all deps build node deb demo test test-full test-cloud lint bench fuzz generate clean

all: build

deps: ## Debian packages that building and testing need
	@./test/deps/install

build: deps
	$(GO) build -trimpath -ldflags "$(LDFLAGS)" -o bin/keyagent ./cmd/keyagent

# Without the key service, and all that a node does not need, see docs/BENCHMARKS.md.
NODE_TAGS := grpcnotrace,keyagent_node
# A key service without the clients of clouds and of etcd.
CLOUDLESS := grpcnotrace,keyagent_noaws,keyagent_noazure,keyagent_nogcp,keyagent_noetcd

node: deps ## the program for confidential VMs, half as large
	$(GO) build -trimpath -tags $(NODE_TAGS) -ldflags "$(LDFLAGS)" -o bin/keyagent-node ./cmd/keyagent

deb: build ## the Debian package, in dist/
	./deploy/debian/build bin/keyagent $(VERSION) dist

demo: build ## the whole main job on this machine
	./bin/keyagent demo --out demo-out

lint:
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt would change: $$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags grpcnotrace,umlguest ./luks ./test/suite/hardware ./test/suite/disks ./test/suite/csi ./test/suite/e2e/crash
	$(GO) vet -tags grpcnotrace,cloud ./kms/... ./storage/...
	$(GO) vet -tags grpcnotrace,versions ./test/suite/disks
	$(GO) vet -tags $(CLOUDLESS) ./cmd/... ./kms/setup ./internal/keyservice
	$(GO) build -tags $(NODE_TAGS) -o /dev/null ./cmd/keyagent
	$(TOOL) staticcheck ./...
	cd test/suite/kubernetes && $(GO) vet ./...

# What fills the machine by itself, and would make others' deadlines pass beside it.
ALONE := $(addprefix ./test/suite/,apiserver disks e2e hardware luks replicas) ./test/sim/uml
# What takes longest to build and to run, in test-full alone.
FULL := ./test/suite/csi

test: deps lint ## everything, with real kernels in guests; needs root
	cd test/suite/kubernetes && $(GO) tool -modfile=../../../tools/go.mod gotestsum --format pkgname -- ./...
	$(TOOL) gotestsum --format pkgname -- -race -timeout 60m -p 1 $(ALONE)
	$(TOOL) gotestsum --format pkgname --format-hide-empty-pkg -- -race -timeout 30m -p 2 $$($(GO) list ./... | grep -v $(patsubst ./%,-e /%$$,$(ALONE) $(FULL)))

test-full: test ## test, and the matrices that it samples as a whole
	KEYAGENT_TEST_ROUNDS=50 $(TOOL) gotestsum --format pkgname -- -timeout 330m -count 1 ./test/suite/disks
	./test/suite/disks/old-program bin/keyagent-old
	KEYAGENT_TEST_OLD_PROGRAM=$(CURDIR)/bin/keyagent-old $(TOOL) gotestsum --format pkgname -- -tags grpcnotrace,versions -timeout 20m -count 1 -run TestTwoVersions ./test/suite/disks
	KEYAGENT_BOOTS_FULL=1 $(TOOL) gotestsum --format pkgname -- -timeout 120m -count 1 -run "TestWhatABootMeasuresWasPredicted|TestARootFileSystemIsOpenedInTheInitrd|TestCrypttabOpensItsDisks|TestAKeySocketOpensALineOfCrypttab" ./test/suite/e2e
	KEYAGENT_TEST_NODES=500 $(TOOL) gotestsum --format pkgname -- -timeout 60m -count 1 ./test/suite/replicas
	KEYAGENT_CSI_FULL=1 $(TOOL) gotestsum --format pkgname -- -timeout 60m -count 1 $(FULL)
	KEYAGENT_MODEL_FULL=1 $(TOOL) gotestsum --format pkgname -- -timeout 60m -count 1 ./test/suite/model ./internal/volume

test-cloud: ## the suites of backends on real clouds, see docs/clouds.md
	@./test/suite/cloud/run $(TOOL) gotestsum --format pkgname --

bench: deps ## figures and ratios, see docs/BENCHMARKS.md
	$(GO) test -run '^$$' -bench . -benchtime 2s ./test/bench ./attestation/... ./kms/... ./storage/... ./internal/secret ./internal/kubekms
	$(GO) test -run '^$$' -bench 'Open|Integrity' -benchtime 1x ./test/suite/luks
	KEYAGENT_BENCH_OUT=$(CURDIR)/bench-out $(GO) test -run '^$$' -bench Boot -benchtime 3x -timeout 40m ./test/suite/e2e

FUZZTIME ?= 30s
fuzz: deps ## each fuzz target for FUZZTIME
	@for pkg in $$($(GO) list ./...); do \
		for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "$$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x $$pkg || exit 1; \
		done; \
	done

generate: ## Go code of the protocols
	./api/generate.sh

clean:
	rm -rf bin demo-out bench-out dist
