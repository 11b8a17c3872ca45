"""Methods side by side over seeds, splits and data sets: grid, cells, statistics, tables."""
