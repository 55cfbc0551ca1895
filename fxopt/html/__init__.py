"""The report as one HTML file: data from `views`, markup from `templates`, and a script that needs no network."""
