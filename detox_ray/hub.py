"""Why a model or data set could not be had from the hub, in words that name the fix."""

from collections.abc import Iterator

from detox_ray.errors import one_line


def why_not_loaded(name: str, error: BaseException) -> str:
    """The cause of a failed load of `name`, a hub id or a folder; what has nothing to do with the hub in its own words.

    The hub's token is read from HF_TOKEN (or what `hf auth login` left), its address from HF_ENDPOINT, by its client.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    # `datasets` hides the hub's own error.
    if caused_by(GatedRepoError) or "is a gated dataset" in str(error):
        return f"it is gated: accept its terms at {constants.ENDPOINT}/{name} and set HF_TOKEN to that account's token"
    if caused_by(RepositoryNotFoundError) or "doesn't exist on the Hub" in str(error):
        return "the hub shows none of that name; check it, or set HF_TOKEN to a token that may read it"
    if caused_by(RevisionNotFoundError):
        return "the hub has no such revision of it; name a commit, tag or branch that it has"
    if any(isinstance(cause, HfHubHTTPError) and cause.response.status_code == 401 for cause in causes):
        return "the hub refuses the token in HF_TOKEN; make a new one, or unset it"
    if constants.HF_HUB_OFFLINE and caused_by(OfflineModeIsEnabled, LocalEntryNotFoundError):
        return f"HF_HUB_OFFLINE is set and {constants.HF_HOME} lacks it; load it once without HF_HUB_OFFLINE"
    if caused_by(LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} does not answer and {constants.HF_HOME} lacks it; try again, or give a path"
    if any("cannot be loaded with `safetensors`" in str(cause) for cause in causes):
        return (
            "it has no safetensors weights, and others are not read; name a revision that has them, or save it again "
            "with save_pretrained"
        )
    return one_line(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
