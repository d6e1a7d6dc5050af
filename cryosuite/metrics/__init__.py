"""FSC and AUC, clustering scores, maps against ground truth."""
