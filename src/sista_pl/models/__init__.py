"""Encoders and projection heads; encoders are built by name from two registries."""

from sista_pl.models.heads import MaskedBatchNorm, ProjectionHead
from sista_pl.models.huggingface import hugging_face  # noqa: F401  registers `hf`
from sista_pl.models.image import IMAGE_ENCODERS, ImageEncoder
from sista_pl.models.text import TEXT_ENCODERS, TextEncoder

__all__ = ["IMAGE_ENCODERS", "TEXT_ENCODERS", "ImageEncoder", "MaskedBatchNorm", "ProjectionHead", "TextEncoder"]
