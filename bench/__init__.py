"""Benchmarks of the operations, one module for each hot path; ``fastedit bench`` runs them."""
