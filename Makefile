PYTHON ?= python3
VENV := .venv
# Small models on a CPU spend their time waiting for threads and for fresh memory. Waiting threads spin briefly and then
# sleep, and freed memory is kept for the next step: together a fifth off a step of the demo.
export GOMP_SPINCOUNT = 20000
export MALLOC_MMAP_THRESHOLD_ = 33554432
export MALLOC_TRIM_THRESHOLD_ = 17179869184
export MALLOC_TOP_PAD_ = 268435456

.PHONY: setup demo test test-slow fuzz lint docs cards clean

setup: $(VENV)/.ready

# optimum-executorch pins a release candidate of transformers that nothing else here can use, so it goes in without its
# dependencies; what it needs from them is in the `export` extra. The test of MATH-500 takes antlr4 4.11 from beside the
# environment, in which executorch's dependencies want 4.9.
$(VENV)/.ready: pyproject.toml
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "python3 cannot make a virtual environment. On Debian: apt install python3-venv"; exit 1; }
	$(VENV)/bin/pip install --quiet --editable ".[all]"
	$(VENV)/bin/pip install --quiet --no-deps optimum==2.0.0 optimum-executorch==1.1.0
	$(VENV)/bin/pip install --quiet --no-deps --target $(VENV)/antlr4-4.11 antlr4-python3-runtime==4.11.0
	touch $@

# End to end at toy scale, 4 to 11 minutes on 2 cores: out/demo/
demo: setup
	$(VENV)/bin/python examples/demo.py

# In two processes: most tests wait for imports and small models on one core.
test: lint
	$(VENV)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup
	$(VENV)/bin/python -m pytest -m slow

# Damaged inputs of every kind, today's: about ten minutes on two cores.
fuzz: setup
	$(VENV)/bin/python -m tests.fuzz --cases 2000

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check

# The site: out/docs/index.html. Its sources are copied with their paths, so that links between documents hold.
docs: $(VENV)/.docs
	rm -rf build/docs
	mkdir -p build/docs
	git ls-files '*.md' docs 'examples/*.ipynb' ':!.github' ':!*template.md' | xargs cp --parents -t build/docs
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.ready
	$(VENV)/bin/pip install --quiet --editable ".[docs]"
	touch $@

# Results that begin with a size belong to its card, those that begin with "all" to all three.
cards: setup
	for size in s m l; do \
		results=$$(ls model_cards/results/all-*.json model_cards/results/$$size-*.json 2>/dev/null); \
		$(VENV)/bin/mobilemoe card --model $$(echo $$size | tr a-z A-Z) $${results:+--results $$results} \
			--output model_cards/mobilemoe-$$size.md --overwrite || exit 1; \
	done

clean:
	rm -rf $(VENV) out build *.egg-info
