"""Publishing a pipeline folder as a repository on the Hub: check, model card, upload in one commit.

huggingface_hub uploads only what the Hub does not have. An interrupted push therefore resumes, and a push of
an unchanged folder uploads nothing. Files that exist only in the repository are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcv2diffusers.errors import Error
from kcv2diffusers.hub.client import NOT_LOGGED_IN, asking, connect, require_hub, token_of
from kcv2diffusers.pipeline_files import CARD, CONVERSION_FILE
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.publish.card import STATED, model_card
from kcv2diffusers.publish.card_facts import Facts, gather
from kcv2diffusers.publish.check import check
from kcv2diffusers.publish.names import check_names

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    `changed` are the files that are new or changed in the commit. `left_out` are files that do not belong to
    a pipeline. `card` is "written", "kept" or, in a dry run, the text of the card.
    """

    repository: str
    url: str
    commit: str | None
    changed: list[str]
    left_out: list[str]
    card: str
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return a few human-readable lines."""
        if self.commit is None:
            return f"{self.card}\nChecked: {len(self.changed)} files; nothing was published (--dry-run)."
        lines = [f"Not published, not of a pipeline: {', '.join(self.left_out)}"] if self.left_out else []
        if self.card == "kept":
            lines.append("README.md was kept; --overwrite-card replaces it.")
        what = f"{len(self.changed)} files" if self.changed else "Nothing had changed"
        where = self.pull_request or self.url
        lines.append(f"{what}: {where}" if self.changed else f"{what} at {where}")
        return "\n".join(lines)


def push(
    pipeline: str | PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    trained_with: Sequence[str] = (),
    overwrite_card: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Publish a pipeline folder as `repository` ("user/name", or a name in your own account).

    The repository is created if it does not exist, as a private one if `private` is set. `revision` is a
    branch, which is created if it does not exist; `create_pr` opens a pull request instead. `token` defaults
    to HF_TOKEN, then to the token of `hf auth login`. `license` and `base_model` take precedence over those
    of the sources on the Hub. `tags` are added to those of the card. `trained_with` are facts about the
    training that the weights do not determine (`STATED` in card.py). An existing card is kept unless
    `overwrite_card` is set. A `dry_run` sends no request to the Hub. `progress` is called with the bytes
    checked and in total. Raises Error with a message for the user; only complete and finite pipelines with a
    license are published.
    """
    if create_pr and revision:
        raise Error("A pull request goes to the default branch.\nOmit --revision or --create-pr.")
    if wrong := [fact for fact in trained_with if fact not in STATED]:
        raise Error(f"--trained-with {wrong[0]}: choose of {', '.join(STATED)}.")
    require_hub()
    check_names(repository, license)
    checked = check(Path(pipeline), progress)
    facts = gather(
        checked,
        license=license,
        base_model=base_model,
        tags=tags,
        trained_with=frozenset(trained_with),
        progress=progress,
    )
    if dry_run:
        return Pushed(repository, "", None, checked.files, checked.left_out, model_card(facts, repository))
    api, repository = log_in(repository, token)
    with asking(repository, token_of(api)):
        if not create_pr:
            api.create_repo(repository, private=private or None, exist_ok=True)
        info = _info(api, repository, made=not create_pr)
        if private and not info.private:
            raise Error(
                f"{repository}: exists already and is public.\nMake it private in its settings first."
            )
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        before = _tree(api, repository, revision)
        operations, card = _operations(facts, repository, before, overwrite_card)
        done = api.create_commit(
            repository,
            operations,
            commit_message=message or f"Upload pipeline with {facts.conversion.get('tool', 'kcv2diffusers')}",
            revision=revision,
            create_pr=create_pr,
        )
        after = _tree(api, repository, done.oid)
    return Pushed(
        repository,
        f"{api.endpoint}/{repository}",
        done.oid,
        [name for name in sorted(after) if after[name] != before.get(name)],
        checked.left_out,
        card,
        done.pr_url,
    )


def log_in(repository: str, token: str | None = None, license: str | None = None) -> tuple[HfApi, str]:
    """Return the client of a logged-in user, and the repository's full name.

    Raises Error if the token is missing or invalid, or for an invalid repository or license id. Long work
    that ends in a push calls this first, so that it fails early.
    """
    api = connect(token)
    check_names(repository, license)
    with asking(repository, token_of(api)):
        if api.token is None:
            raise Error(f"{repository}: publishing needs a login.\n{NOT_LOGGED_IN}")
        me = api.whoami()["name"]
    return api, repository if "/" in repository else f"{me}/{repository}"


def _info(api: HfApi, repository: str, *, made: bool) -> ModelInfo:
    """Return the Hub's information about a repository.

    `made` means that `create_repo` has succeeded. If the repository is not found then, it belongs to somebody
    else and is private: raises Error.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        if not made:
            raise
        raise Error(
            f"{repository}: the name is taken by a repository that you cannot see.\nChoose another name."
        ) from None


def _operations(
    facts: Facts, repository: str, there: dict[str, str], overwrite_card: bool
) -> tuple[list[CommitOperationAdd], str]:
    """Return the files of the commit, and whether the card is "kept" or "written".

    The card is the folder's own, else the one in the repository, else a generated one.
    """
    from huggingface_hub import CommitOperationAdd

    folder, contents = facts.checked.folder, dict[str, bytes]()
    if facts.conversion:
        contents[CONVERSION_FILE] = (json.dumps(facts.conversion, indent=2, sort_keys=True) + "\n").encode()
    kept = not overwrite_card and (CARD in facts.checked.files or CARD in there)
    if not kept:
        contents[CARD] = model_card(facts, repository).encode()
    names = sorted({*facts.checked.files, *contents})
    sources = {name: contents.get(name) or folder / name for name in names}
    operations = [CommitOperationAdd(name, source) for name, source in sources.items()]
    return operations, "kept" if kept else "written"


def _tree(api: HfApi, repository: str, revision: str | None) -> dict[str, str]:
    """Return the files of a repository with their git blob ids."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repository, revision=revision, recursive=True)
    return {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}
