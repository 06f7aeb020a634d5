"""Runtimes and what is done with them: prediction over folders, evaluation, benchmarks."""
