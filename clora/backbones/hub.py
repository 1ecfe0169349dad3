"""A base on the Hugging Face hub -> its folder on this machine. Only this module asks the hub for anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
from huggingface_hub import errors, snapshot_download

from clora.errors import InputError

# Configurations, tokenizers and the scheduler: a few megabytes. Weights come on top, for the components asked for.
SMALL_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.jinja")


def hub_folder(hub_id: str, revision: str | None = None, components: Sequence[str] = ()) -> Path:
    """The folder of OWNER/NAME in the hub's cache, downloaded first where it is not there or not the newest.

    Without a network the cached files serve. Raises `InputError` in one sentence where neither is to be had; nothing
    is tried twice before that.
    """
    wanted = [*SMALL_FILES, *(f"{name}/*.safetensors" for name in components)]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        why = "the hub has no such model, or not for this account"
        raise InputError(f"base {hub_id}: {why}; check the name, or log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"base.revision: {hub_id} has no {revision!r}; name a commit, branch or tag of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if _is_offline(error) else f"the hub cannot serve it ({_reason(error)})"
        raise InputError(
            f"base {hub_id}: is not (all) on this machine and {why}; run `hf download {hub_id}` where there is a"
            " network, or name a folder"
        ) from error


def _is_offline(error: BaseException) -> bool:
    return isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
