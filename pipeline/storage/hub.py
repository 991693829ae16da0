"""Files of huggingface.co, taken once and kept in its library's cache: only where a config asks for one by `hf:`.

`huggingface_hub` is needed for these alone. Its variables say where the cache is (HF_HOME, which all nodes must reach)
and who asks (HF_TOKEN); the terms of gated models are accepted on their page.
"""

from __future__ import annotations

from pipeline.errors import ConfigError, StorageError

SCHEME = "hf:"


def hub_file(uri: str, own: str | None) -> str:
    """The local path of `hf:OWNER/NAME/FILE`, downloaded unless it is in the cache; `own` is what `hf:` alone means.

    Raises:
        ConfigError: the text names no file, or huggingface_hub is not installed.
        StorageError: it cannot be had.
    """
    named = uri.removeprefix(SCHEME) or own or ""
    owner, _, rest = named.partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise ConfigError("config", [f"weights: {uri}: names no file; write hf:OWNER/NAME/FILE"])
    repository = f"{owner}/{name}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        problem = f"weights: {uri} needs huggingface_hub, which is absent ({error}); install it, or give a file's path"
        raise ConfigError("config", [problem]) from error
    try:
        return str(hf_hub_download(repository, file, local_files_only=True))
    except OSError:  # it is not in the cache yet
        pass
    try:
        return str(hf_hub_download(repository, file))
    except Exception as error:  # of the library, of HTTP, of the disk
        terms = f"accept the terms at https://huggingface.co/{repository} and set HF_TOKEN, or give a path"
        raise StorageError(f"cannot read {uri} ({error}); {terms}") from error
