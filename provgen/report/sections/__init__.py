"""Sections of the report: every builder `*_section` turns results into a section of the page and its metrics."""

from provgen.report.format import Metric
from provgen.report.html import Section

Part = tuple[Section, list[Metric]]
"""Section of the page, and the numbers that it adds to report.json."""
