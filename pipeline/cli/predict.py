"""The command that predicts slides with a trained model."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import JsonOption, LogOption, errors, print_json
from pipeline.errors import DataBudgetError

log = logging.getLogger(__name__)

ModelOption = Annotated[
    str, typer.Option(help="models:/NAME@champion, models:/NAME/VERSION, or the folder of a checkpoint.")
]
TrackingOption = Annotated[
    str | None, typer.Option(help="Where the model is registered. Default: MLFLOW_TRACKING_URI, else ./mlflow.db.")
]
SeriesOption = Annotated[
    int | None,
    typer.Option(min=0, help="Which image of the named slides' files, where they hold several that could be meant."),
]
MppOption = Annotated[
    float | None,
    typer.Option(help="Microns per px at full resolution of the named slides, whatever their files state."),
]
StoreOption = Annotated[
    str | None, typer.Option(help="Patch store whose patches are taken; other slides are read where they lie.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Of the Ray cluster: auto or ray://host:port. Default: RAY_ADDRESS, else here.")
]


ShardOption = Annotated[
    int | None,
    typer.Option(min=1, show_default="16384", help="Slides of more patches are scored by all actors together."),
]
HeadsOption = Annotated[
    bool, typer.Option("--heads", help="Also the attention of each head; of an ensemble, of each model.")
]


def predict(
    model: ModelOption,
    out: Annotated[
        str, typer.Option(help="Folder or s3:// prefix for all that is written; slides that are done there are kept.")
    ] = "predictions",
    slides: Annotated[
        list[str] | None, typer.Argument(help="Slides, folders of slides, or prefixes in a bucket (s3://bucket/set/).")
    ] = None,
    cohort: Annotated[
        str | None, typer.Option(help="Cohort file, whose slides are predicted too; it needs slide_id and uri only.")
    ] = None,
    tracking_uri: TrackingOption = None,
    mpp: MppOption = None,
    series: SeriesOption = None,
    store: StoreOption = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Actors on Ray, each with the model and one slide at a time; 0: no Ray.")
    ] = 0,
    address: AddressOption = None,
    cpus_per_worker: Annotated[float, typer.Option(min=0.1, help="That Ray reserves for each actor.")] = 2.0,
    gpus_per_worker: Annotated[float, typer.Option(min=0.0, help="Likewise.")] = 0.0,
    shard_above: ShardOption = None,
    heads: HeadsOption = False,
    all_patches: Annotated[
        bool, typer.Option("--all-patches", help="Also every patch as GeoJSON, all.geojson.gz of each slide.")
    ] = False,
    dicom: Annotated[
        bool,
        typer.Option("--dicom", help="Also the maps of DICOM slides as DICOM Parametric Maps; needs the extra dicom."),
    ] = False,
    as_json: JsonOption = False,
    log_format: LogOption = None,
) -> None:
    """Predict slides with a trained model: probabilities, and of each slide its maps, pictures and QuPath outlines.

    Exit 3 where some slides have no prediction (the tables say why) and the others have, 1 where none has.
    """
    with errors(as_json=as_json, log_format=log_format):
        from pipeline.config.recipe import ClusterConfig
        from pipeline.predictions.run import SHARD_ABOVE, How
        from pipeline.predictions.run import predict as make_predictions

        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
        cluster = ClusterConfig(address=address, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)
        how = How(store, workers, cluster, heads, all_patches, dicom, shard_above or SHARD_ABOVE)
        found = make_predictions(model, slides or [], cohort, out, tracking_uri=uri, mpp=mpp, series=series, how=how)
        if as_json:
            print_json(found)
        else:
            print(found["written"]["summary.html"])
        if failed := found["failed"]:
            log.error(
                "predict: %d of %d slides have no prediction: %s", len(failed), found["slides"], ", ".join(failed)
            )
            raise typer.Exit(DataBudgetError.exit_code)
