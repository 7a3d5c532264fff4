"""The paper's tables at sizes that one machine can run: benches, the runs they share, the tables, the pages."""
