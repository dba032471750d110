"""From raw web pairs to a training set: measured once, decided later, every removal with its reason."""
