"""What quantization did to a model: one record per site, rendered as text, JSON and one self-contained HTML file."""

from qjax.report.data import Report, SiteRow, recovery

__all__ = ["Report", "SiteRow", "recovery"]
