"""Everything a person touches: what to rank next, saving it, the page, and annotators that stand in for people."""
