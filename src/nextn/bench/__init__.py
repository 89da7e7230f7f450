"""`nextn bench`: arms timed in turn, figures, verdict and page."""
