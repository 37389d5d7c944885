"""Networks, data sets and the training of parents, for experiments."""
