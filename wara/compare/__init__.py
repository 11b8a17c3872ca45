"""Methods side by side, over seeds, splits and data sets: scores, statistics, figures."""
