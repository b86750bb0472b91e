"""`vimpo compare`: runs of two or more algorithms as a table and plots, aligned by step, tokens and wall-clock."""
