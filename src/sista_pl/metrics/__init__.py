"""What a prediction is worth, with intervals: a file each for retrieval, classification, grounding, segmentation, …"""

from sista_pl.metrics.bootstrap import intervals
from sista_pl.metrics.classification import Classification, best_thresholds
from sista_pl.metrics.detection import Detection
from sista_pl.metrics.grounding import Grounding
from sista_pl.metrics.retrieval import RANKS, Retrieval, RetrievalFigures, best_ranks, chance, precision_at
from sista_pl.metrics.segmentation import Segmentation

__all__ = [
    "RANKS",
    "Classification",
    "Detection",
    "Grounding",
    "Retrieval",
    "RetrievalFigures",
    "Segmentation",
    "best_ranks",
    "best_thresholds",
    "chance",
    "intervals",
    "precision_at",
]
