"""Data for control by region and token (MRT, sections 4.3 and S6): counterfactual answers."""
