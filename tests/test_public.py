"""What `from pipeline import ...` gives."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline


def test_the_names_are_those_of_the_rooms() -> None:
    from pipeline.config.compose import load_config
    from pipeline.config.recipe import Config
    from pipeline.datasets.opened import open_store
    from pipeline.notebook.predictions import predict
    from pipeline.notebook.stages import run

    found = {name: getattr(pipeline, name) for name in pipeline.__all__}
    assert found == {
        "Config": Config, "load_config": load_config, "open_store": open_store, "predict": predict, "run": run,
    }  # fmt: skip
    assert dir(pipeline) == sorted(pipeline.__all__)


def test_no_room_or_module_takes_a_name_that_is_exported() -> None:
    """An import of `pipeline.run` would put the module where `from pipeline import run` looks for the function."""
    folder = Path(pipeline.__file__).parent
    taken = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert taken & set(pipeline.__all__) == set()


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        pipeline.train  # noqa: B018
