"""Images by reports, and reports by images."""

from sista_tasks.retrieval.task import RetrievalTask

__all__ = ["RetrievalTask"]
