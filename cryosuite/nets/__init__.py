"""torch.nn modules: everything with parameters that are learnt."""
