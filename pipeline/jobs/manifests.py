"""The kinds of manifests, and their YAML."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

import yaml

from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.jobs import compose, kuberay, services
from pipeline.jobs.pods import ENV_MAP, Manifest

KINDS: Mapping[str, Callable[[Config, Sequence[str]], list[Manifest]]] = {
    "cronjob": services.cron_job,
    "rayjob": kuberay.ray_job,
    "raycronjob": kuberay.ray_cron_job,
    "kueue": kuberay.kueue_job,
    "raycluster": kuberay.ray_cluster,
    "namespace": services.namespace,
    "mlflow": services.mlflow,
    "s3": services.s3,
    "compose": compose.compose,
}
"""Kind -> (config, arguments of the job's command) -> documents. The first one is the default for a schedule."""


class _Plain(yaml.SafeDumper):
    """Without anchors: a value that stands twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        """Always."""
        return True


def documents(kind: str, config: Config, arguments: Sequence[str]) -> list[Manifest]:
    """The objects of a kind; ConfigError where there is no such kind, or the config lacks what it needs."""
    if kind not in KINDS:
        raise ConfigError("manifest", [f"no kind {kind!r}; choose one of {', '.join(KINDS)}"])
    return KINDS[kind](config, arguments)


def render(kind: str, config: Config, chosen: Sequence[str]) -> str:
    """YAML of a kind.

    Args:
        kind: one of `KINDS`.
        config: workers, GPUs, image, schedule and so on.
        chosen: the options that chose the config, which the job's command gets too.
    """
    found = documents(kind, config, [*config.deploy.command, *chosen])
    made_by = shlex.join(["python", "-m", "pipeline", "manifest", kind, *chosen])
    lines = [f"# {made_by}", *(f"# {line}" for line in _needs(kind, config))]
    texts = [yaml.dump(one, Dumper=_Plain, sort_keys=False, width=120) for one in found]
    return "\n".join(lines) + "\n---\n" + "---\n".join(texts)


def _needs(kind: str, config: Config) -> list[str]:
    """What must be there before, in words: the manifests hold no password."""
    if kind == "compose":
        return [
            "Needs PGPASSWORD, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and RAY_AUTH_TOKEN in the shell or in .env."
        ]
    if kind == "namespace":
        return []
    needs = [f"Needs the secrets {', '.join(config.deploy.secrets)}: each entry becomes an environment variable."]
    if config.deploy.env and kind != "s3":
        needs.append(f"Needs the ConfigMap {ENV_MAP} with {', '.join(config.deploy.env)}.")
    return needs
