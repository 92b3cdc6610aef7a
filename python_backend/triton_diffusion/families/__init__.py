"""Model families: all that is particular to one kind of diffusion model."""
