"""`vimpo credit`: which tokens of an answer a trained policy gives credit to, as a page and as JSON."""
