"""Shared set-up: no hub, one thread for the tiny models, and random models of every family."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before Transformers or datasets is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
