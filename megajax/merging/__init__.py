"""From parents and data to one network: genes, fitness on the devices at hand, and the search."""
