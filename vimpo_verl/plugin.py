"""Entry point of group verl.plugins."""
