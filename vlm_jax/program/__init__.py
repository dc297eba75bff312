"""The program behind `vlm_jax.main`: from a recipe to a trained, evaluated run."""
