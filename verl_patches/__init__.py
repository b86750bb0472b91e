"""Every place where vimpo_verl touches verl's internals, one seam a module."""
