"""Latents -> PCA, UMAP, clusters -> volumes, plots and ChimeraX scripts."""
