"""ViL (Vision-LSTM, arXiv 2406.04303)."""
