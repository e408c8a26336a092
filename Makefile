# Start with: make help

SHELL := /bin/sh
GO ?= go
CC ?= cc

# Where a fuzz target stops, what is tested, how long that and the load may take, what is timed.
FUZZTIME ?= 60s
PACKAGES ?= ./...
TESTTIME ?= 30m
LOADTIME ?= 60s
MODEL ?= .engine/bench.gguf
BENCHFLAGS ?=

# Versions that wrote plugin/pb/*.pb.go.
PROTOC_GEN_GO := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2

# $(call need,TOOL:PACKAGE …) stops with the first tool that is missing and the Debian package that has it.
need = @for pair in $(1); do command -v "$${pair%%:*}" >/dev/null || { \
	echo "make: no $${pair%%:*} on this machine: install it (Debian: apt-get install $${pair\#\#*:})" >&2; exit 1; }; done

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build engine ollama node-host openai-client ollama-client bench-model bench-ollama test test-ollama load tools demo bench fuzz lint generate clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

build: ## the command, the enclave and the hook, into bin/
	$(call need,$(GO):golang $(CC):gcc)
	@mkdir -p bin
	$(GO) build -trimpath -o bin/ ./cmd/...
	$(MAKE) --no-print-directory -C adapters/llamacpp/preload CC='$(CC)' OUT='$(CURDIR)/bin/libkvshield.so'

engine: ## a private stock engine under .engine/
	@scripts/engine.sh

ollama: build ## Ollama with its engines inside, shielded (bin/kvshield-ollama), and stock to compare with
	@CC='$(CC)' scripts/ollama.sh

node-host: ## node-llama-cpp under .engine/node/
	@scripts/node-host.sh

openai-client: ## the OpenAI JavaScript client under .engine/openai/
	@scripts/npm-client.sh openai openai 7.57.0 examples/node/chat.mjs

ollama-client: ## Ollama's JavaScript client under .engine/ollama-js/
	@scripts/npm-client.sh ollama-js ollama 0.6.4 examples/node/ollama.mjs

bench-model: .engine/bench.gguf ## a synthetic model of about 1.1B parameters, for timing only

.engine/bench.gguf:
	@mkdir -p .engine
	$(GO) run ./internal/benchmodel -o $@.part
	@mv $@.part $@

test: test-ollama
test: tools build engine node-host openai-client ollama ollama-client ## all tests, with the real engines
	CGO_ENABLED=1 $(GO) test -race -count=1 -timeout $(TESTTIME) $(PACKAGES)

test-ollama: tools ollama ollama-client ## the tests of kvshield-ollama, a Go module of its own
	@scripts/ollama.sh go vet -trimpath ./...
	@scripts/ollama.sh go test -trimpath -count=1 -timeout $(TESTTIME) ./...

bench-ollama: ollama .engine/bench.gguf ## kvshield-ollama beside stock Ollama, in turns, on a machine that does nothing else
	@KVSHIELD_BENCH_MODEL='$(CURDIR)/.engine/bench.gguf' scripts/ollama.sh go test -trimpath -count=1 -timeout 60m -v -run TestSpeed ./e2e | grep bench_test

# What the tests need, said before anything is built.
tools:
	$(call need,$(GO):golang $(CC):gcc apt-get:apt dpkg-deb:dpkg node:nodejs npm:npm)

demo: build engine ## the shielded server beside the stock one, on the demo model
	@examples/quickstart/demo.sh

bench: build engine $(filter .engine/bench.gguf,$(MODEL)) ## shielded against stock, side by side (MODEL=, BENCHFLAGS=)
	bin/kvshield bench -m '$(MODEL)' $(BENCHFLAGS)

load: build engine ## 64 clients for LOADTIME through the proxy, and what it adds to an answer's time
	KVSHIELD_LOAD=$(LOADTIME) $(GO) test ./e2e -run TestLoad -v -count=1 -timeout 10m

fuzz: ## every fuzz target, one after another (FUZZTIME=60s each)
	@mkdir -p .cache
	@$(GO) test -list '^Fuzz' $(PACKAGES) >.cache/fuzz
	@awk '/^Fuzz/ { names[n++] = $$1 } /^ok/ { while (n > 0) print names[--n], $$2 }' .cache/fuzz | { \
		found=; while read -r name package; do \
			found=yes; echo "fuzz: $$name in $$package, $(FUZZTIME)"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$package" </dev/null || exit 1; \
		done; \
		test "$$found" || { echo 'fuzz: found no target' >&2; exit 1; }; }

lint: ## formatting, go vet, shellcheck where it is installed
	@unformatted=$$(gofmt -l .) && if [ "$$unformatted" ]; then \
		echo "lint: not gofmt'd, run gofmt -w on:" >&2; echo "$$unformatted" >&2; exit 1; fi
	$(GO) vet ./...
	@if command -v shellcheck >/dev/null; then set -x; shellcheck $(wildcard scripts/*.sh examples/*/*.sh) .ci/run; \
		else echo 'lint: no shellcheck on this machine, shell scripts not checked'; fi

models: build engine node-host ## docs/models.md: every architecture that the engine knows, in both modes (an hour)
	KVSHIELD_ARCHITECTURES=all KVSHIELD_WRITE_MODELS=1 $(GO) test ./e2e -run 'TestEveryArchitecture|TestQuantisedArchitectures|TestOlderEngine' -count=1 -timeout 120m

generate: ## plugin/pb/*.pb.go from plugin/pb/enclave.proto
	$(call need,$(GO):golang protoc:protobuf-compiler)
	@mkdir -p .cache/bin
	GOBIN='$(CURDIR)/.cache/bin' $(GO) install $(PROTOC_GEN_GO)
	GOBIN='$(CURDIR)/.cache/bin' $(GO) install $(PROTOC_GEN_GO_GRPC)
	cd plugin/pb && PATH="$(CURDIR)/.cache/bin:$$PATH" protoc \
		--go_out=. --go_opt=paths=source_relative \
		--go-grpc_out=. --go-grpc_opt=paths=source_relative *.proto

clean: ## remove what build, fuzz and generate made
	rm -rf bin .cache

distclean: clean ## remove the engines and models too
	rm -rf .engine
