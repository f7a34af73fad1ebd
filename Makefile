# What a person types. The logic is in scripts/; each target is one of them.
# FAR_CACHE (default ~/.cache/far) holds what is fetched and built, CARGO_TARGET_DIR lies in it, PROFILE is release or dev.

.DEFAULT_GOAL := help
.PHONY: help setup build guest run down test test-unit bench bench-guest bench-net bench-placement bench-controller lint clean

help: ## This text
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing on this machine (Debian 12/13, Ubuntu 24.04)
	@scripts/setup

build: ## Build the programs of this machine
	@scripts/build

guest: ## Build what runs in the microVM: kernel, initramfs, guest image
	@scripts/guest

run: ## Set up, build, start everything, run examples/embedder.yaml and show what came of it
	@scripts/run

down: ## Stop everything that make run started
	@scripts/down

test: ## Set up and run every test of the project
	@scripts/test

test-unit: ## Only the tests that need no microVM
	@scripts/test --unit

bench: ## Measure against plain QEMU (scripts/bench NAME for one of them)
	@scripts/bench

bench-guest: ## Measure PID 1 of the guest against the same over tonic, tini and dumb-init (root)
	@scripts/bench guest

bench-net: ## Measure the guests' network against ip, nft and CNI plugins (root)
	@scripts/bench net

bench-placement: ## Measure choosing a blade against a full scan of all blades
	@scripts/bench placement

bench-controller: ## Measure the controller against kube-scheduler and agent-sandbox on a real API server (ARGS=--full: the goals' sizes)
	@scripts/bench controller $(ARGS)

lint: ## Formatting, clippy and the shell scripts
	@scripts/lint

clean: ## Remove what this tree built, not what is shared in FAR_CACHE
	@rm -rf target
