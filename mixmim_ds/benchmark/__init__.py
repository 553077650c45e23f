"""What launch/benchmark.py measures: a module for each of its subcommands, and the plain method to compare with."""
