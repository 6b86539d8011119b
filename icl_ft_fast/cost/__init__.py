"""What a run costs: the ledger that the request paths write to, FLOPs from shapes, meters, and amortisation."""

from icl_ft_fast.cost.ledger import Ledger

__all__ = ["Ledger"]
