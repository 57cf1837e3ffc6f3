"""Where findings are, as boxes."""

from sista_tasks.detection.task import DetectionTask

__all__ = ["DetectionTask"]
