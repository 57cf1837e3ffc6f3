"""How each release lies on disk: one file a layout, under the name of its reader."""

from sista_pl.data.phantom.layouts import mimic_cxr, rsna, siim  # noqa: F401  their import is their registration
