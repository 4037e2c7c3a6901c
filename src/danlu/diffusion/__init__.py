"""Diffusion as an SDE and an ODE: processes, solvers of few steps, likelihoods, flows."""
