"""Second-order optimizers for PyTorch with Kronecker-factored curvature: K-FAC, E-KFAC and two-level K-FAC."""

from . import diagnostics
from .ekfac import EKFAC
from .gkfac import GKFAC
from .kfac import KFAC
from .preconditioner import Preconditioner

__all__ = ["EKFAC", "GKFAC", "KFAC", "Preconditioner", "diagnostics"]
