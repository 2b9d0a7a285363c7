"""Vim (Vision Mamba, arXiv 2401.09417)."""
