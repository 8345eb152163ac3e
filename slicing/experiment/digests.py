"""Sixteen hexadecimal digits that stand for contents: of JSON, of a model's weights, of a tensor."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def content_key(content: dict[str, Any]) -> str:
    """Of a JSON object, whatever the order of its names."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_key(model: "torch.nn.Module") -> str:
    """Of a model's weights: names, shapes, dtypes and every byte, some GB a second on each core."""
    from concurrent.futures import ThreadPoolExecutor

    tensors = model.state_dict()
    with ThreadPoolExecutor() as threads:  # hashlib lets other threads run
        digests = list(threads.map(_digest, tensors.values()))
    found = hashlib.sha256()
    for name, digest in zip(tensors, digests, strict=True):
        found.update(name.encode() + digest)
    return found.hexdigest()[:16]


def _digest(tensor: "torch.Tensor") -> bytes:
    import torch

    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def windows_key(ids: "torch.Tensor") -> str:
    """Of token ids (N, S)."""
    shape = f"{tuple(ids.shape)}".encode()
    return hashlib.sha256(shape + ids.cpu().numpy().tobytes()).hexdigest()[:16]
