"""Single configuration files from the Hugging Face hub: the local cache first, the network after it."""

from __future__ import annotations

from pathlib import Path

from shapecheck.contract import ShapecheckError

_TIMEOUT_S = 10.0


def fetch(repository: str, filename: str, *, offline: bool) -> Path | None:
    """The local path of one file of a hub repository; None where the repository has no such file.

    Raises ShapecheckError where it is not in the cache and the network is forbidden, unreachable or refuses.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    cached = try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached)
    if offline:
        if cached is not None or _is_cached(repository):
            return None
        raise ShapecheckError(f"{repository} is not in the local hub cache, and --offline forbids asking the hub")
    try:
        return Path(hf_hub_download(repository, filename, etag_timeout=_TIMEOUT_S))
    except GatedRepoError:
        raise ShapecheckError(f"{repository} is gated: accept its terms on the hub and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ShapecheckError(f"the hub knows no repository {repository} (or it is private: `hf auth login`)") from None
    except EntryNotFoundError as error:
        if _is_missing_on_hub(error):
            return None
        raise _unreachable(repository, error) from None
    except Exception as error:  # every HTTP client the hub library has used raises its own kinds
        raise _unreachable(repository, error) from None


def _is_cached(repository: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots").is_dir()


def _is_missing_on_hub(error: Exception) -> bool:
    """Whether the hub answered that there is no such file, rather than not answering at all."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return not isinstance(error, LocalEntryNotFoundError)


def _unreachable(repository: str, error: Exception) -> ShapecheckError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ShapecheckError(
        f"{repository} is no local path, is not in the hub cache, and the hub could not be asked ({reason}); "
        "give a local folder or config.json, a preset (`shapecheck presets`), or try again with a network"
    )
