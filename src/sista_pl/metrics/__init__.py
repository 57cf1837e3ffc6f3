"""What a prediction is worth, with intervals: retrieval here and, a file each, classification and the other tasks."""

from sista_pl.metrics.bootstrap import bootstrap_interval
from sista_pl.metrics.retrieval import RANKS, Retrieval, best_ranks, chance

__all__ = ["RANKS", "Retrieval", "best_ranks", "bootstrap_interval", "chance"]
