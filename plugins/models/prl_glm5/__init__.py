"""GLM-5, GLM-5.1 and GLM-5.2."""
