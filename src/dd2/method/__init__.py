"""What the paper trains: configurations, the loss of one batch in each stage, and which networks a stage trains (the recipe)."""
