"""The stages that a request goes through, each a PipelineStage; which Triton model runs which is said in `plan`."""
