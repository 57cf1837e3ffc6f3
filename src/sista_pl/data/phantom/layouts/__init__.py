"""How each release lies on disk: one file a layout, under the name of its reader."""

from sista_pl.data.phantom.layouts import mimic_cxr  # noqa: F401  its import is its registration
