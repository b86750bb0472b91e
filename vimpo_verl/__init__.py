"""VIMPO (arXiv 2606.20008) for verl. The equations are in `functional`, the switch is algorithm.adv_estimator=vimpo."""

__version__ = "0.1.0"
