"""Stage 11: what `choose` found and what `compress` made, shown: tables for the terminal and one self-contained HTML file."""

from lighten.report.compression_page import compression_page, merged_steps
from lighten.report.html import write_page, write_report
from lighten.report.table import choice_table, format_table, prediction_table

__all__ = ["choice_table", "compression_page", "format_table", "merged_steps", "prediction_table", "write_page", "write_report"]
