"""Where on an image a phrase points."""

from sista_tasks.grounding.task import GroundingTask

__all__ = ["GroundingTask"]
