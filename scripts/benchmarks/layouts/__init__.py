"""A FLUX transformer of one's own making over several ranks, without a server: for parity, scaling and memory."""
