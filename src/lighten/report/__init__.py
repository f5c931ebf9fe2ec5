"""Stage 11: what `choose` found, shown: tables for the terminal and one self-contained HTML file."""

from lighten.report.html import write_report
from lighten.report.table import choice_table, format_table, prediction_table

__all__ = ["choice_table", "format_table", "prediction_table", "write_report"]
