"""Tables, plots and model cards, made from the results of runs alone."""
