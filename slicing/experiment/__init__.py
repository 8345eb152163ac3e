"""What the second script does: options, the points of a run, how they are measured, kept and compared."""
