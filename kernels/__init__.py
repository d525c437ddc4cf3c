"""Triton kernels, one file per hot path; imported as ``fastedit.kernels``."""
