"""Run by test_modeling.py in a process that can't import this repository: load saved folders as any user would.

    python -I fresh_process.py JOBS.json RESULTS.json

A job has a folder, token ids (B, S), and `options` for `from_pretrained`; `again`, if given, is a folder to save the
loaded model to again, and `generate` asks for tokens by the saved generation config. Results, job by job: the error's
type and text, or what the model gives (logits in the file `logits.safetensors` beside the results).
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, logging


def run(job: dict) -> tuple[dict, torch.Tensor | None]:
    options = {key: getattr(torch, value) if key == "dtype" else value for key, value in job["options"].items()}
    before = set(sys.modules)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(job["folder"], output_loading_info=True, **options)
    except Exception as error:
        remote = [name for name in set(sys.modules) - before if name.startswith("transformers_modules.")]
        return {"error": type(error).__name__, "text": str(error), "remote": remote}, None
    ids = torch.tensor(job["ids"])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    result = {
        "training": model.training,
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "attention": [model.base_model.config._attn_implementation, model.config._attn_implementation],
        "unfit": [len(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "one_table": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "module": type(model).__module__,
    }
    if job.get("generate"):
        result["tokens"] = model.generate(ids).tolist()
    if "again" in job:
        model.save_pretrained(job["again"])
    return result, logits


def main(jobs: str, results: str) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    found, tensors = [], {}
    for index, job in enumerate(json.loads(Path(jobs).read_text())):
        result, logits = run(job)
        found.append(result)
        if logits is not None:
            tensors[str(index)] = logits
    assert importlib.util.find_spec("slicing") is None
    save_file(tensors, Path(results).with_name("logits.safetensors"))
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
