"""From run directories to something that can be shown: report.md, table.csv, one self-contained report.html, a W&B report.

`python -m framework.report DIR` reads run directories only; the modules: read (folders to runs), group (runs to configurations),
summary (figures and their spread), curves (pictures), markdown, page, and workspace (W&B).
"""
