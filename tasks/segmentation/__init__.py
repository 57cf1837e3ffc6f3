"""Where a finding is, pixel by pixel."""

from sista_tasks.segmentation.task import SegmentationTask

__all__ = ["SegmentationTask"]
