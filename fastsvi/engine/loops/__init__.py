"""Recorded steps as native loops: a CPU back end that is ready within a second."""
