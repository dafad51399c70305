"""What is in the data of a run, from data_report.json: a page, and a text for the terminal."""
