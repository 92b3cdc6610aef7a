"""The parts of the built-in demo checkpoint: its pictures, its models, their training, and the judge."""
