"""From slides in a bucket to a registered model that predicts. Rooms on floors: pipeline/README.md.

For notebooks and programs: `from pipeline import Config, load_config, run, predict, open_store`. Each is loaded when it
is first asked for, so that `import pipeline` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.compose import load_config
    from pipeline.config.recipe import Config
    from pipeline.datasets.opened import open_store
    from pipeline.notebook.predictions import predict
    from pipeline.notebook.stages import run

_PLACES = {
    "Config": "config.recipe",
    "load_config": "config.compose",
    "open_store": "datasets.opened",
    "predict": "notebook.predictions",
    "run": "notebook.stages",
}
__all__ = ["Config", "load_config", "open_store", "predict", "run"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
