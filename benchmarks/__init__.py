"""What fdp costs, measured against code written for one purpose only."""
