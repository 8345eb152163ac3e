"""What the hub and Transformers say when they refuse a model, in one line; what only the hub can tell of one."""

from slicing.checkpoint import NO_SAFETENSORS
from slicing.families import InputError


def why(what: str, error: BaseException) -> str:
    """One line that says why the hub or Transformers refused, and what to do."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    status = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}
    if among(errors.GatedRepoError):
        return f"{what}: it is gated on the hub; accept its terms on its page there, then log in with `hf auth login`"
    if among(errors.RevisionNotFoundError):
        return f"{what}: it has no such revision on the hub"
    if among(errors.RepositoryNotFoundError) or status & {401, 403}:
        return (
            f"{what}: it is neither a local folder nor public on the hub; if it is private, log in with `hf auth login`"
        )
    if among(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        return (
            f"{what}: it is neither a local folder nor in the hub's cache, and the hub can't be reached "
            "(check the name, the network and HF_HUB_OFFLINE)"
        )
    text = " ".join(str(error).split())
    if "model.safetensors" in text and "does not appear to have" in text:
        return f"{what}: {NO_SAFETENSORS}"
    if "trust_remote_code" in text:
        return f"{what}: it needs code of its own; read that code, then allow it with --trust-remote-code"
    kind = "" if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__} "
    return f"{what}: {kind}{text[:300]}".rstrip()


def check_no_adapter(name: str, revision: str | None) -> None:
    """Refuse a hub model with an adapter beside its weights: Transformers would load it, and another model below."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except Exception:  # what is wrong with the hub's model, its config has said or its weights will
        return
    if found is not None:
        raise InputError(f"{name!r} is or holds an adapter (adapter_config.json): merge it into a model of its own")
