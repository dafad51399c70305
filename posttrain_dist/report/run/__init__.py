"""report.html: what a run did, from the files of its folder."""
