"""The Hugging Face Hub: a repository is a package folder (`dd2.shipping.package`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dd2.errors import InputError

T = TypeVar("T")

WEIGHTS = ["*.json", "*.safetensors"]
"""All that is taken from a repository: no code, no pickles."""


def download(
    name: str, revision: str | None = None, token: str | None = None, *, local_files_only: bool = False, subject: str = "it"
) -> Path:
    """A repository's weights and descriptions, from the cache where they are there already.

    Args:
        name: "owner/name".
        revision: a commit, which never changes, a tag or a branch.
        token: of an account; by default the one that `hf auth login` kept.
        local_files_only: ask nobody; what is not in the cache is an error.
        subject: what the user named, for the error where the library is missing.

    Raises:
        InputError: the library, the repository, its revision or the network is not there.
    """
    hub = _library(f"{subject} is no folder here; to load it from the Hub")
    found = _asked(
        f"{name} cannot be read",
        lambda: hub.snapshot_download(
            name, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=WEIGHTS
        ),
    )
    if not (Path(found) / "config.json").is_file():
        raise InputError(f"{name} on the Hub holds no generator: it has no config.json; name a repository of dd2 push")
    return Path(found)


def located(name: str | Path, revision: str | None = None, token: str | None = None, *, local_files_only: bool = False) -> Path:
    """The folder of a name: a path, or a repository on the Hub, which is brought here.

    Raises:
        InputError: there is neither.
    """
    path = Path(name)
    if not path.exists() and str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return download(str(name), revision, token, local_files_only=local_files_only, subject=str(name))
    if revision is not None or token is not None or local_files_only:
        what = "revision" if revision is not None else "token" if token is not None else "local_files_only"
        raise InputError(f"{what} is about repositories on the Hub; {name} is a folder here")
    return path


def upload(folder: Path, name: str, *, private: bool, revision: str | None, token: str | None, message: str) -> str:
    """Put a package folder into a repository, which is made where there is none.

    Args:
        folder: what is sent, all of it.
        name: "owner/name".
        private: of a new repository, for the owner alone.
        revision: a branch, made where there is none; None: the main one.
        token: as `download`.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the library is missing, or the Hub refuses.
    """
    hub = _library("to push")

    def push() -> str:
        api = hub.HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        sent = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
        return str(sent.commit_url)

    return _asked(f"{name} cannot be written", push)


def _library(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f'{what}, pip install "dd2[hub]"') from error
    return huggingface_hub


def _asked(failed: str, call: Callable[[], T]) -> T:
    """What the library gives; whatever it raises as one line."""
    from huggingface_hub import errors

    network = getattr(errors, "HTTPError", OSError)  # of the library that carries the requests, whose name changed
    try:
        return call()
    except (OSError, ValueError, RuntimeError, network) as error:
        raise InputError(f"{failed}: {_said(error, errors)}") from error


def _said(error: BaseException, errors: Any) -> str:
    """In words: the library's own errors are pages."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split())
    kinds = {
        "GatedRepoError": "its owner lets in only whom they know; ask there, and log in by hf auth login",
        "RepositoryNotFoundError": "there is no such repository, or it is private; check the name, and log in by hf auth login",
        "RevisionNotFoundError": "it has no such revision; name a branch, a tag or a whole commit",
        "IncompleteSnapshotError": "the cache holds a part of it only; leave local_files_only out",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it",
        "LocalEntryNotFoundError": "it is not in the cache, and the Hub was not reached (no network, or local_files_only)",
        "HFValidationError": "a repository is named owner/name",
    }
    for name, said in kinds.items():
        if isinstance(error, getattr(errors, name, ())):
            return said
    if status == 401:
        return "the Hub refuses the token; log in by hf auth login, or give another"
    if status == 403:
        return "the token may not write there; make one that may"
    return text[:200] or type(error).__name__
