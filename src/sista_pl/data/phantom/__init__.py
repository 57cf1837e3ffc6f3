"""The phantom: chest X-rays drawn from findings, with report, masks and boxes, in the layout of a real release."""

from __future__ import annotations

from sista_pl.data.phantom import layouts  # noqa: F401  registers the layouts
from sista_pl.data.phantom.cohort import LAYOUTS, PHANTOM_VERSION, decode_rle, generator_hash, write_phantom
from sista_pl.data.phantom.film import Rendering, render
from sista_pl.data.phantom.mesh import Tagged, findings_from_mesh
from sista_pl.data.phantom.oracle import oracle_scores, recall_at
from sista_pl.data.phantom.real import RealReports, read_real_reports, study_from_mesh
from sista_pl.data.phantom.report import Report, stated, write_report
from sista_pl.data.phantom.study import Finding, Patient, Study, draw_patient, draw_study

__all__ = [
    "LAYOUTS",
    "PHANTOM_VERSION",
    "Finding",
    "Patient",
    "RealReports",
    "Rendering",
    "Report",
    "Study",
    "Tagged",
    "decode_rle",
    "draw_patient",
    "draw_study",
    "findings_from_mesh",
    "generator_hash",
    "oracle_scores",
    "read_real_reports",
    "recall_at",
    "render",
    "stated",
    "study_from_mesh",
    "write_phantom",
    "write_report",
]
