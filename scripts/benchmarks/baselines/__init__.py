"""Other ways to serve the same pipeline on the same machine, as their users write them."""

# What a baseline's process finds in its environment; the values are those of StageConfig.
MODEL_PATH = "BENCHMARK_MODEL_PATH"
DTYPE = "BENCHMARK_DTYPE"
NUM_THREADS = "BENCHMARK_NUM_THREADS"
