"""Tasks: what a model learns and is measured by, as Lightning modules, and the commands that run them."""
