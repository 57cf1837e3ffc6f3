"""How each release lies on disk: one file a layout, under the name of its reader."""

from sista_pl.data.phantom.layouts import (  # noqa: F401  their import is their registration
    chestxray14,
    chexpert,
    covidx,
    mimic_cxr,
    ms_cxr,
    object_cxr,
    open_i,
    rsna,
    siim,
)
