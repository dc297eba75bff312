"""Evaluators of NXTP's answers; recipes name them as they name all others."""
