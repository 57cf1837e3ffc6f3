"""What is wrong with a store or a raw release: leaks, duplicates, masks, labels, reports, intensity.

N images; a row is an image's place in the table.
"""

from sista_pl.data.doctor.checks import diagnose
from sista_pl.data.doctor.subject import Check, Subject, worst

__all__ = ["Check", "Subject", "diagnose", "worst"]
