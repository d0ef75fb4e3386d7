"""What makes the coefficients that ship with the package."""
