"""The numeric kernels that everything stands on. Tricks for speed live here and nowhere else."""
