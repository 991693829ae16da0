"""Iterative Patch Selection: learn from images with more patches than a device can hold.

`select` names the M patches of each image that the model's cross-attention scores highest, without gradient and in
memory that does not depend on the image; `gather`, the model and a loss, or `bounded_backward`, train on those.
"""

from ips.bag import Bag, Batch, Certificate, Chunk, Context, Selection, TensorBag, Values, collate
from ips.learning.gradient import bounded_backward
from ips.learning.losses import mean_loss, task_loss
from ips.learning.processes import average_gradients, average_statistics
from ips.learning.schedule import parameter_groups, warmup_cosine, warmup_cosine_scheduler
from ips.network.aggregator import Aggregator
from ips.network.effects import Effects, effects
from ips.network.encoder import FeatureProjector, ResNet, TwoScales, WrappedEncoder
from ips.network.heads import Head, linear_head, probabilities
from ips.network.model import IPSModel
from ips.network.official import load_official
from ips.network.part import PatchEncoder, Positions
from ips.network.pooling import GatedAttention, MaxPool, MeanPool
from ips.network.positions import GridPositions, IndexPositions
from ips.selection.baselines import HalfByScore, RandomDraw, every_patch, random_selection, transferred
from ips.selection.predict import Prediction, predict
from ips.selection.ranking import ByAttention
from ips.selection.scorer import Scorer
from ips.selection.select import gather, select

__all__ = [
    "Aggregator",
    "Bag",
    "Batch",
    "ByAttention",
    "Certificate",
    "Chunk",
    "Context",
    "Effects",
    "FeatureProjector",
    "GatedAttention",
    "GridPositions",
    "HalfByScore",
    "Head",
    "IPSModel",
    "IndexPositions",
    "MaxPool",
    "MeanPool",
    "PatchEncoder",
    "Positions",
    "Prediction",
    "RandomDraw",
    "ResNet",
    "Scorer",
    "Selection",
    "TensorBag",
    "TwoScales",
    "Values",
    "WrappedEncoder",
    "average_gradients",
    "average_statistics",
    "bounded_backward",
    "collate",
    "effects",
    "every_patch",
    "gather",
    "linear_head",
    "load_official",
    "mean_loss",
    "parameter_groups",
    "predict",
    "probabilities",
    "random_selection",
    "select",
    "task_loss",
    "transferred",
    "warmup_cosine",
    "warmup_cosine_scheduler",
]
