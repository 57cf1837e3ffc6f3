"""Findings of an image, from few labels."""

from sista_tasks.classification.task import ClassificationTask

__all__ = ["ClassificationTask"]
