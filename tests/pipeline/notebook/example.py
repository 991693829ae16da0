# %% [markdown]
# # From slides to a model, in a notebook
#
# The same work as `python -m pipeline run --config demo`, with results as objects: tables are Arrow tables, pictures
# are Pillow images, and what is done already costs nothing. This cohort is made here, and small.

# %%
import os

os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"  # else it tells of every run that begins and ends

from pipeline import load_config, predict, run

config = load_config(
    "demo", ["cohort.demo.slides=24", "train.epochs=3", "train.explore_epochs=0", "train.warmup_epochs=1"]
)

# %% [markdown]
# ## Slides to patches

# %%
tiled = run(config, "tile")
tiled

# %%
store = tiled.store
store

# %%
store.sample(24, seed=1)

# %% [markdown]
# One slide, by the name of its file: the patches of a box in level-0 px, and their positions.

# %%
slide = store["demo-0001"]
x, y = (slide.table()[name][40].as_py() for name in ("x", "y"))
box = slide.read_box(x - 200, y - 200, x + 600, y + 400)
box

# %%
box.table().to_pandas().head()

# %%
store.arrow().to_table(columns=["key", "x", "y"]).group_by("key").aggregate([("x", "min"), ("x", "max")]).to_pandas()

# %% [markdown]
# ## Patches to a model

# %%
trained = run(config)
trained

# %%
trained.predictions.to_pandas().head()

# %%
trained.report

# %% [markdown]
# ## A model to predictions

# %%
found = predict(trained, [store[name].sources[0] for name in ("demo-0000", "demo-0001")])
found

# %%
found.heatmap("demo-0001")
