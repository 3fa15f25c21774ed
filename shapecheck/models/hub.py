"""Single configuration files of Hugging Face hub repositories: the local cache first, the network after it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import first_line
from shapecheck.logs import silence_logger

LARGEST_FILE = 2**20
"""Bytes; a diffusers config.json has a few thousand."""


class HubError(ShapecheckError):
    """A file is not in the cache, and the hub was not asked or did not answer, for which `reason` is the reason."""

    def __init__(self, repository: str, filename: str, reason: str, advice: str) -> None:
        self.reason = reason
        super().__init__(
            f"{repository} is not a file or folder here, its {filename} is not in the local hub cache, and {reason}; "
            f"give a local folder or config.json, a preset (`shapecheck presets`), or {advice}"
        )


def is_cached(repository: str, filename: str) -> bool:
    """Return whether the local hub cache holds the file. Never asks the hub."""
    return isinstance(_look_up(repository, filename), str)


def fetch(repository: str, filename: str, *, offline: bool) -> Path | None:
    """Return the local path of one file of a hub repository, or None if the repository has no such file.

    Raises HubError if it is not in the cache and the network is forbidden or unreachable, or refuses.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    cached = _look_up(repository, filename)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else the cache remembers that the hub has no such file
    if offline or constants.HF_HUB_OFFLINE:
        forbidden = f"{'--offline' if offline else 'HF_HUB_OFFLINE'} forbids asking the hub"
        raise HubError(repository, filename, forbidden, "allow the network")
    try:
        with silence_logger("huggingface_hub"):
            with suppress(EntryNotFoundError):  # hf_hub_download raises it again, and has the cache remember it
                # asked once, since hf_hub_download would try six times in 23 s before it says that there is no network
                metadata = get_hf_file_metadata(hf_hub_url(repository, filename), timeout=constants.HF_HUB_ETAG_TIMEOUT)
                if (metadata.size or 0) > LARGEST_FILE:
                    raise ShapecheckError(f"hub {repository} {filename} is larger than {LARGEST_FILE} bytes: not a config.json")
            return Path(hf_hub_download(repository, filename))
    except ShapecheckError:
        raise
    except GatedRepoError:
        reason, advice = "its owner gives access on request only", "accept the terms on the hub and run `hf auth login`"
    except RepositoryNotFoundError:
        reason, advice = "the hub knows no such repository, or it is private", "check the name and run `hf auth login`"
    except Exception as error:  # every HTTP client the hub library has used raises its own kinds
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason, advice = f"the hub could not be asked: {first_line(error, 200)}", "try again with a network"
    raise HubError(repository, filename, reason, advice)


def _look_up(repository: str, filename: str) -> object:
    """Return the cache's answer: a path, None, or the hub library's mark for a file known not to exist."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return try_to_load_from_cache(repository, filename)
    except HFValidationError:
        raise ShapecheckError(
            f"{repository!r} is not a file or folder here, and not a hub id of the form owner/name either; check the spelling"
        ) from None
