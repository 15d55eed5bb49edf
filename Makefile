# Everything a newcomer needs: `make demo`, `make test`. Each installs what it needs into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet

.PHONY: venv venv-sprint venv-space test test-quick test-portable test-full lint docs demo demo-says demo-full benchmark clean

# The development environment: exact versions from constraints/dev.txt. torch comes first and by exact
# version, because an open range would fetch whatever build is newest.
venv: $(VENV)/.done
$(VENV)/.done: pyproject.toml constraints/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip==26.3 # which knows dependency groups
	$(PIP) torch==2.13.0
	$(PIP) -c constraints/dev.txt -e '.[heic,hub,verify]' --group dev
	# for CLIP's vocabulary, which it carries; its own dependencies (torchvision, ...) are not needed
	$(PIP) --no-deps open_clip_torch==3.3.0
	# transformers 4, to check that its loader takes our files too; beside, not instead of, transformers 5
	$(PIP) --no-deps --target $(VENV)/transformers4 'transformers==4.57.6' 'huggingface-hub==0.36.0' 'tokenizers==0.22.1'
	touch $@

# keras-cv 0.4.2 on TensorFlow 2.12, the stack of the 2023 DreamBooth sprint (Python 3.8 to 3.11).
venv-sprint: .venv-sprint/.done
.venv-sprint/.done: constraints/sprint.txt
	$(PYTHON) -m venv .venv-sprint
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-sprint/bin/pip install --quiet -r constraints/sprint.txt
	touch $@

# Gradio and Playwright, to drive the demo of a Space; the rest of what it needs comes from .venv.
venv-space: .venv-space/.done
.venv-space/.done: constraints/space.txt $(VENV)/.done
	$(PYTHON) -m venv .venv-space
	cd $(VENV)/lib/python3*/site-packages && pwd > $$(echo $(CURDIR)/.venv-space/lib/python3*/site-packages)/zz-venv.pth
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-space/bin/pip install --quiet -r constraints/space.txt
	touch $@

# Two groups of files at a time, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Everything but models of the full size.
test: venv venv-sprint venv-space
	$(PYTEST) -m 'not full_size'

# What a change breaks first: without what trains, draws or makes KerasCV checkpoints of a UNet.
test-quick: venv venv-sprint venv-space
	$(PYTEST) -m 'not full_size and not slow'

# The tests of conversions once more, without what Windows does not have (tests/support/portable).
PORTABLE := sources/test_fuzz sources/test_not_weights sources/test_tensor_bundle sources/test_bad_hdf5 \
	sources/test_bad_archives sources/test_bad_bundles sources/test_bad_tensors targets/test_stream \
	conversion/test_exactness conversion/test_round_trip conversion/test_bad_target system/test_portable \
	conversion/test_single_file conversion/test_hostile_single_file cli/test_stopped
test-portable: venv venv-sprint
	PYTHONPATH=$(CURDIR)/tests/support/portable $(PYTEST) -m 'not full_size' \
		-k 'not (unet or vae or SavedModel or TensorFlow)' $(PORTABLE:%=tests/%.py)

# Full-size models too. They are in one file, one at a time, and take up to 10 GB.
test-full: venv venv-sprint venv-space
	$(PYTEST)

# .pre-commit-config.yaml runs the same. mkdocs with --quiet would not count warnings, and --strict find nothing.
export NO_MKDOCS_2_WARNING := 1
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/docs.py --check
	$(BIN)/mkdocs build --strict --site-dir .cache/site

# The documentation as a site, in site/. tools/docs.py generates parts of it first.
docs: venv
	$(BIN)/python tools/docs.py
	$(BIN)/mkdocs build --strict --site-dir site

# The tiny base in Keras and, converted, in diffusers: one picture with both rows, and the report of verify.
# It runs in the development environment if that is there, or else in a smaller one without TensorFlow and JAX.
DEMO := $(if $(wildcard $(VENV)/.done),$(VENV),.venv-demo)
demo: demo-says $(if $(wildcard $(DEMO)/.done),,$(DEMO)/.done)
	$(DEMO)/bin/python tools/demo.py demo

demo-says:
ifeq ($(wildcard $(DEMO)/.done),)
	@echo "1. Install PyTorch, Keras, diffusers and what they need into $(DEMO): a few minutes."
else
	@echo "1. Use what is installed in $(DEMO)."
endif
	@echo "2. Teach the tiny base a subject, draw it in Keras and in diffusers, verify the result: a few minutes on two cores."
	@echo "3. Leave demo/demo.png to look at, and demo/report/report.html."

.venv-demo/.done: pyproject.toml constraints/dev.txt
	$(PYTHON) -m venv .venv-demo
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-demo/bin/pip install --quiet torch==2.13.0
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-demo/bin/pip install --quiet -c constraints/dev.txt -e '.[verify]'
	touch $@

# A genuine full-size KerasCV SD1 checkpoint, converted, loaded in diffusers, both sides compared.
demo-full: venv
	$(BIN)/python tools/demo_full.py demo

benchmark: venv venv-sprint
	$(BIN)/python benchmarks/convert.py --space

clean:
	rm -rf $(VENV) .venv-sprint .venv-space .venv-demo .cache demo site
