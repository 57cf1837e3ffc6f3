"""Findings of an image, asked for in words."""

from sista_tasks.zeroshot.task import ZeroShotTask

__all__ = ["ZeroShotTask"]
