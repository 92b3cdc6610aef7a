"""The processes of a stage model: the service in the Triton process, and the worker groups of ranks that it drives."""
