"""Perplexity on token windows.

The decoder body runs once per batch and the head on chunks of tokens, so that no (B, S, V) tensor exists. Where that
does not give what the whole model's forward gives, this one runs.
"""

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from slicing.batches import (
    body_of,
    broken_weight,
    check_token_ids,
    check_weights,
    evaluation_mode,
    in_batches,
    input_device,
    is_gpu,
)
from slicing.causality import SEEDS, check_causal, trial_logits, trial_tokens
from slicing.families import InputError
from slicing.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_BYTES = 2**28  # of fp32 logits at a time: large enough for full speed, small beside the model
_WHOLE_BYTES = 2**31  # of fp32 logits where all of a batch's exist at once

_apart: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()  # what head_runs_apart found


def perplexity(
    model: "PreTrainedModel", windows: torch.Tensor, *, batch_size: int | None = None, progress: Progress = True
) -> float:
    """exp of the mean negative log likelihood of the S - 1 predicted tokens of all windows (N, S)."""
    return window_nll(model, windows, batch_size=batch_size, progress=progress).mean().exp().item()


def window_nll(
    model: "PreTrainedModel", windows: torch.Tensor, *, batch_size: int | None = None, progress: Progress = True
) -> torch.Tensor:
    """Mean negative log likelihood, in nats, of the S - 1 predicted tokens of each window.

    model: any causal language model of Transformers, on one device or spread by accelerate. It is run in evaluation
        mode and left as it was.
    windows: (N, S) integer token ids, without padding.
    batch_size: windows a batch; None starts with about 32,000 tokens (8,000 on a CPU) and halves when memory runs out.

    Returns (N,) fp64 on the CPU. Raises InputError for token ids outside the vocabulary, weights that are not
    finite, windows shorter than two tokens, a model that is not causal, a batch that does not fit and a result that is
    not finite.
    """
    table = model.get_input_embeddings()
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(
            f"windows have shape {tuple(windows.shape)}: at least one window of at least 2 tokens is needed"
        )
    check_token_ids(windows, table.weight.shape[0])
    device = input_device(table)
    automatic = max(1, (32_768 if is_gpu(device) else 8_192) // windows.shape[1])
    with evaluation_mode(model), torch.no_grad():  # quantisers' tensors know no inference mode
        check_causal(model)
        run = token_nll if head_runs_apart(model) else whole_nll
        if run is whole_nll:
            automatic = min(automatic, max(1, _WHOLE_BYTES // (4 * windows.shape[1] * table.weight.shape[0])))
        batches = in_batches(
            partial(run, model),
            windows.to(device=device, dtype=torch.long),
            batch_size=batch_size,
            automatic=automatic,
            name="perplexity",
            progress=progress,
        )
    nll = torch.cat(batches).cpu().double().mean(dim=1)  # (N, S - 1) -> (N,)
    bad = (~nll.isfinite()).nonzero().flatten().tolist()
    if bad:
        name = broken_weight(model)
        weights = "check the model's weights" if name is None else f"another copy of the model: its {name} are not"
        raise InputError(
            f"window {bad[0]} has a negative log likelihood of {nll[bad[0]].item()} ({len(bad)} of {len(nll)} windows "
            f"are not finite) with {model.dtype}: use float32 or bfloat16, and {weights}"
        )
    check_weights(model)  # that the numbers are finite does not tell
    return nll


def head_runs_apart(model: "PreTrainedModel") -> bool:
    """Whether body and head one after the other give what the whole model's forward gives, tried on a few tokens once a
    model: some families' bodies have other arguments, or add something behind them."""
    if model not in _apart:
        ids = trial_tokens(model, SEEDS[0])
        logits = trial_logits(model, ids)
        allowed = max(1e-4, 8 * torch.finfo(model.dtype).eps) * max(1.0, logits.abs().max().item())
        wanted = F.cross_entropy(logits[:-1], ids[0, 1:].to(logits.device), reduction="none")
        try:
            found = token_nll(model, ids, rows=5)[0].double()
            # NaN is told elsewhere
            _apart[model] = not bool((found - wanted).abs().max() > allowed)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # code of any family
            _apart[model] = False
    return _apart[model]


def whole_nll(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    """What `token_nll` gives, by the whole model's forward."""
    logits = model(input_ids=ids, use_cache=False, return_dict=True).logits[:, :-1].flatten(0, 1)  # (B (S - 1), V)
    targets = ids[:, 1:].flatten().to(logits.device)
    rows = max(1, HEAD_BYTES // (4 * logits.shape[-1]))
    return torch.cat(list(map(_nll, torch.split(logits, rows), torch.split(targets, rows)))).view(len(ids), -1)


def token_nll(model: "PreTrainedModel", ids: torch.Tensor, *, rows: int | None = None) -> torch.Tensor:
    """Negative log likelihood (B, S - 1) of every token of ids (B, S) but the first of each row, fp32 or fp64.

    rows: tokens whose logits exist at once; None goes by HEAD_BYTES.
    """
    body = body_of(model)
    # No attention mask: the causal path of the attention kernel, without a mask in memory.
    output = body(input_ids=ids, use_cache=False, return_dict=True)
    hidden = output.last_hidden_state.flatten(0, 1)  # (B * S, D)
    # The last position of a row predicts nothing: a stand-in is its target, and it is dropped below. So `hidden` need
    # not be copied.
    targets = ids.roll(-1, dims=1).flatten().to(hidden.device)  # (B * S,)
    rows = rows or max(1, HEAD_BYTES // (4 * model.get_input_embeddings().weight.shape[0]))
    nll = []
    with _body_output(body) as hand_over:
        for chunk, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            hand_over(type(output)(last_hidden_state=chunk[None]))
            # The ids only say how many tokens there are, and on which device accelerate shall leave the logits.
            logits = model(input_ids=target[None], use_cache=False, return_dict=True).logits[0]  # (rows, V)
            nll.append(_nll(logits, target))
    return torch.cat(nll).view(ids.shape)[:, :-1]


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood (T,) of targets (T,) under logits (T, V), fp32 or fp64."""
    logs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return F.nll_loss(logs, targets, reduction="none")


@contextlib.contextmanager
def _body_output(body: torch.nn.Module) -> Iterator[Any]:
    """While this lasts, `body` returns what was last handed over, whatever it is called with.

    The model's own forward then is its head alone, with its own scaling, capping and biases, for every family.
    """
    held: list[Any] = []
    before = vars(body).get("forward")  # accelerate's hooks replace `forward` on the instance too
    body.forward = lambda *args, **kwargs: held[-1]

    def hand_over(output: Any) -> None:
        held[:] = [output]

    try:
        yield hand_over
    finally:
        del body.forward
        if before is not None:
            body.forward = before
