"""Train and prune Keras networks at the same time, toward flat minima."""
