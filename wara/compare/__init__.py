"""Many runs side by side: the grid, its cells, the workers that run them, and the table."""
